"""An LSTM reads Python's documentation letter by letter, then writes some of its own.

    python examples/character_language_model.py

A character language model (Graves 2013, https://arxiv.org/abs/1308.0850): p(next | all before) is a softmax of the
state of an LSTM. The text, a quarter of a million characters of English, comes with Python itself. It is read in
streams beside each other, WINDOW characters at a time; the state goes on from window to window and within one, but its
gradient flows back DEPTH characters at most (``detach_every``): truncated backpropagation through time (Williams,
Peng 1990), which costs the memory of a window, not of the text. The measure is bits per character, the mean of
-log2 p, of text that was held out: 6.3 for equally likely characters, 4.5 if only their frequencies are known.
"""

from __future__ import annotations

import argparse
import math
import pydoc_data.topics
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator

import torch

from pyops import functional as F
from pyops import nn, optim

WIDTH = 256
STREAMS, WINDOW, DEPTH = 16, 128, 64
STEPS, RATE, LARGEST_GRADIENT = 1500, 4e-3, 1.0
HELD_OUT = 0.05
OFTEN = 20  # a character that occurs less often is left out


def prose() -> str:
    """The sentences of Python's documentation, a paragraph a line, each once; no tables, no code, no grammar."""
    topics = pydoc_data.topics.topics
    paragraphs = [" ".join(p.split()) for name in sorted(topics) for p in re.split(r"\n\s*\n", topics[name])]
    sentences = re.compile(r"[A-Z\"*](?!.*(::=|\||>>>|---|===)).{60,}[.:]")
    return "\n".join(dict.fromkeys(p for p in paragraphs if sentences.fullmatch(p)))


class Text:
    """Python's documentation as numbers of characters; the last part is held out.

    Attributes:
        characters: each known one, at its number.
        train, test: Tensor[N], int64.
    """

    def __init__(self) -> None:
        text = prose()
        self.characters = sorted(c for c, n in Counter(text).items() if n >= OFTEN)
        self.numbers = {c: i for i, c in enumerate(self.characters)}
        numbers = self.encode(text)
        end = int(len(numbers) * (1 - HELD_OUT))
        self.train, self.test = numbers[:end], numbers[end:]

    def encode(self, text: str) -> torch.Tensor:
        return torch.tensor([self.numbers[c] for c in text if c in self.numbers])

    def decode(self, numbers: torch.Tensor) -> str:
        return "".join(self.characters[i] for i in numbers.tolist())

    def windows(self, streams: int, window: int) -> Iterator[tuple[torch.Tensor, bool]]:
        """The training text again and again, in ``streams`` parts read at once: ([streams, window + 1], is first)."""
        length = (len(self.train) - 1) // streams
        starts = torch.arange(streams)[:, None] * length
        while True:
            for at in range(0, length - window + 1, window):
                yield self.train[starts + torch.arange(at, at + window + 1)], at == 0


State = tuple[torch.Tensor, torch.Tensor]


class Reader(torch.nn.Module):
    """Characters [B, T] and the state after those before -> logits of the next [B, T, characters], state.

    Args:
        depth: how many characters a gradient flows back at most.
    """

    def __init__(self, characters: int, width: int = WIDTH, depth: int = DEPTH) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width // 4)
        self.lstm = nn.LSTM(width // 4, width, batch_first=True, detach_every=depth)
        self.head = nn.Linear(width, characters)
        with torch.no_grad():  # forget gates start open, so that gradients reach far from the first step on
            self.lstm.bias_hh_l0[width : 2 * width] = 1

    def forward(self, text: torch.Tensor, state: State | None = None) -> tuple[torch.Tensor, State]:
        y, state = self.lstm(self.embedding(text), state)
        return self.head(y), state


def train(
    text: Text,
    model: Reader,
    steps: int,
    streams: int = STREAMS,
    window: int = WINDOW,
    report: Callable[[int, list[float]], None] | None = None,
) -> list[float]:
    """Trains; the mean loss in nats of every step."""
    optimizer = optim.AdamW(model.parameters(), lr=RATE)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    losses: list[float] = []
    state: State | None = None
    for step, (piece, first) in zip(range(steps), text.windows(streams, window)):
        state = None if first or state is None else (state[0].detach(), state[1].detach())
        logits, state = model(piece[:, :-1], state)
        loss = F.cross_entropy(logits.flatten(0, 1), piece[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optim.clip_grad_norm_(model.parameters(), LARGEST_GRADIENT)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        if report is not None:
            report(step, losses)
    return losses


@torch.no_grad()
def bits_per_character(model: Reader, numbers: torch.Tensor) -> float:
    """Of a text [N], read from its beginning."""
    logits, _ = model(numbers[None, :-1])
    return F.cross_entropy(logits[0], numbers[1:]).item() / math.log(2)


@torch.no_grad()
def write(model: Reader, text: Text, begin: str, count: int, temperature: float = 0.6, seed: int = 0) -> str:
    """``count`` characters after ``begin``, each drawn from softmax(logits / temperature)."""
    generator = torch.Generator().manual_seed(seed)
    logits, state = model(text.encode(begin)[None])
    written = []
    for _ in range(count):
        p = F.softmax(logits[:, -1].float() / temperature, -1)
        drawn = torch.multinomial(p, 1, generator=generator)
        written.append(drawn[0])
        logits, state = model(drawn, state)
    return text.decode(torch.cat(written))


def known_words(written: str, text: Text) -> float:
    """The part of the written words of two letters and more that the training text contains."""
    words = re.findall(r"[A-Za-z]{2,}", written)
    known = set(re.findall(r"[A-Za-z]{2,}", text.decode(text.train)))
    return sum(word in known for word in words) / max(1, len(words))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--characters", type=int, default=1000, help="how many to write")
    parser.add_argument("--temperature", type=float, default=0.6)
    options = parser.parse_args()
    begin = time.perf_counter()

    def report(step: int, losses: list[float]) -> None:
        if (step + 1) % 100 == 0 or step == options.steps - 1:
            bits = sum(losses[-100:]) / len(losses[-100:]) / math.log(2)
            print(f"step {step + 1:5d}  {bits:.3f} bits  {time.perf_counter() - begin:5.0f} s", flush=True)

    torch.manual_seed(0)
    text = Text()
    model = Reader(len(text.characters))
    train(text, model, options.steps, report=report)
    print(f"held out: {bits_per_character(model, text.test):.3f} bits per character\n")
    begun = "\nThe "
    written = begun + write(model, text, begun, options.characters, options.temperature)
    print(written)
    print(f"\nof its words, {known_words(written, text):.0%} occur in the text it read")


if __name__ == "__main__":
    main()
