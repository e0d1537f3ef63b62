"""Two small networks learn to say what is on a photo, word by word.

    python examples/image_captioning.py

A pretrained EfficientNet-Lite0, unmodified, run by pyops.use, turns a photo into 7 x 7 places of 1280 features. Then

    plain      an LSTM whose first state comes from the mean of the places writes the caption
               (Vinyals et al. 2015, https://arxiv.org/abs/1411.4555)
    attentive  before every word its state asks, by additive attention, which places matter now; what it sees there
               enters the next step together with the last word (Xu et al. 2015, https://arxiv.org/abs/1502.03044)

Both learn the captions below by heart: fourteen photos are no data set, but they show every part at work. The photos
ship with scikit-image and scikit-learn.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch

import pyops
from pyops import functional as F
from pyops import nn, optim
from pyops.demo.classification import load_model, preprocess
from pyops.demo.packages import load_photo

CAPTIONS = {
    "skimage/data/astronaut.png": "an astronaut in an orange suit smiles in front of a flag",
    "skimage/data/camera.png": "a man in a dark coat looks through a camera on a tripod",
    "skimage/data/chelsea.png": "the face of a cat with green eyes",
    "skimage/data/coffee.png": "a cup of coffee with a spoon on a red saucer",
    "skimage/data/coins.png": "four rows of old coins",
    "skimage/data/hubble_deep_field.jpg": "many small galaxies in the dark sky",
    "skimage/data/moon.png": "craters on the moon",
    "skimage/data/motorcycle_left.png": "a red motorcycle stands in a garage",
    "skimage/data/rocket.jpg": "a rocket stands on a launch pad in the evening",
    "skimage/data/horse.png": "the black outline of a horse",
    "skimage/data/brick.png": "a wall of bricks",
    "skimage/data/gravel.png": "a floor of small stones",
    "sklearn/datasets/images/china.jpg": "a red temple among trees in front of a lake",
    "sklearn/datasets/images/flower.jpg": "an orange flower on a dark green ground",
}
PAD, BEGIN, END = 0, 1, 2  # words of their own
FEATURES = 1280
WIDTH = 64
STEPS, RATE = 120, 1e-2
LONGEST = 20

State = tuple[torch.Tensor, torch.Tensor]


class Words:
    """The words of the captions and their numbers."""

    def __init__(self, captions: Sequence[str]) -> None:
        self.words = ["", "<begin>", "<end>", *sorted({word for caption in captions for word in caption.split()})]
        self.numbers = {word: i for i, word in enumerate(self.words)}

    def encode(self, captions: Sequence[str]) -> torch.Tensor:
        """``<begin> words <end>``, filled up with PAD: Tensor[B, T], int64."""
        rows = [torch.tensor([BEGIN, *(self.numbers[w] for w in c.split()), END]) for c in captions]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)

    def decode(self, numbers: torch.Tensor) -> list[str]:
        """The words [B, T] before <end>."""
        found = []
        for row in numbers.tolist():
            words = row[: row.index(END)] if END in row else row
            found.append(" ".join(self.words[i] for i in words))
        return found


@torch.no_grad()
def places_of(photos: Sequence[str]) -> torch.Tensor:
    """What EfficientNet-Lite0 sees on the photos: Tensor[B, 49, FEATURES]."""
    loaded = [load_photo(*photo.split("/", 1)) for photo in photos]
    network = load_model()
    with pyops.use():
        return network.extract_features(torch.stack([preprocess(p) for p in loaded])).flatten(2).mT.contiguous()


# The decoders: the places and the words so far -> logits of the word after each


class Decoder(torch.nn.Module):
    """What both have: words and places as vectors, the first state from the mean of the places, the last layer."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, WIDTH)
        self.look = nn.Linear(FEATURES, WIDTH)
        self.first = nn.Linear(WIDTH, 2 * WIDTH)
        self.head = nn.Linear(WIDTH, words)

    def begin(self, places: torch.Tensor) -> tuple[torch.Tensor, State]:
        """places [B, P, FEATURES] -> view [B, P, WIDTH] and h, c [B, WIDTH]"""
        view = self.look(places)
        h, c = F.tanh(self.first(view.mean(1))).chunk(2, 1)
        return view, (h, c)

    def advance(self, view: torch.Tensor, words: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
        """words [B, T] -> logits [B, T, words] and the state after them"""
        raise NotImplementedError

    def forward(self, places: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        view, state = self.begin(places)
        return self.advance(view, words, state)[0]


class Plain(Decoder):
    """One LSTM over all words."""

    def __init__(self, words: int) -> None:
        super().__init__(words)
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def advance(self, view: torch.Tensor, words: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
        y, (h, c) = self.lstm(self.embedding(words), (state[0][None], state[1][None]))
        return self.head(y), (h[0], c[0])


class Attentive(Decoder):
    """A cell that looks at the photo again before every word."""

    def __init__(self, words: int) -> None:
        super().__init__(words)
        self.attention = nn.AdditiveAttention(WIDTH, WIDTH, WIDTH)
        self.cell = nn.LSTMCell(2 * WIDTH, WIDTH)

    def advance(self, view: torch.Tensor, words: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
        h, c = state
        logits = []
        for word in self.embedding(words).unbind(1):
            seen = self.attention(h[:, None], view, view)[:, 0]
            h, c = self.cell(torch.cat([word, seen], 1), (h, c))
            logits.append(self.head(h))
        return torch.stack(logits, 1), (h, c)


def loss_of(decoder: Decoder, places: torch.Tensor, captions: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of each word, and of <end>, after the true words before it."""
    logits = decoder(places, captions[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), captions[:, 1:].flatten(), ignore_index=PAD)


def train(decoder: Decoder, places: torch.Tensor, captions: torch.Tensor, steps: int = STEPS) -> list[float]:
    """On all photos at once; the loss of every step."""
    optimizer = optim.Adam(decoder.parameters(), lr=RATE)
    losses = []
    for _ in range(steps):
        loss = loss_of(decoder, places, captions)
        optimizer.zero_grad()
        loss.backward()
        optim.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def describe(decoder: Decoder, places: torch.Tensor, temperature: float = 0.0, seed: int = 0) -> torch.Tensor:
    """Words [B, LONGEST], one after the other: the likeliest, or drawn from softmax(logits / temperature)."""
    generator = torch.Generator().manual_seed(seed)
    view, state = decoder.begin(places)
    word = torch.full((len(places), 1), BEGIN)
    said = []
    for _ in range(LONGEST):
        logits, state = decoder.advance(view, word, state)
        if temperature == 0:
            word = logits[:, 0].argmax(1, keepdim=True)
        else:
            word = torch.multinomial(F.softmax(logits[:, 0] / temperature, -1), 1, generator=generator)
        said.append(word)
    return torch.cat(said, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest word each time")
    options = parser.parse_args()
    torch.manual_seed(0)
    captions = list(CAPTIONS.values())
    words = Words(captions)
    places = places_of(list(CAPTIONS))
    for kind in (Plain, Attentive):
        begin = time.perf_counter()
        decoder = kind(len(words.words))
        losses = train(decoder, places, words.encode(captions), options.steps)
        said = words.decode(describe(decoder, places, options.temperature))
        print(f"{kind.__name__}: loss {losses[0]:.3f} -> {losses[-1]:.4f}, {time.perf_counter() - begin:.0f} s")
        for photo, caption, words_said in zip(CAPTIONS, captions, said):
            print(
                f"  {photo.split('/')[-1]:22s} {words_said}{'' if words_said == caption else f'   (wanted: {caption})'}"
            )
        print()


if __name__ == "__main__":
    main()
