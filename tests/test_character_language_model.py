"""examples/character_language_model.py trains as plain torch does, and learns to write words."""

import copy
import math

import pytest
import torch

from . import harness


@pytest.fixture(scope="module")
def example():
    with harness.example("character_language_model") as module:
        yield module


@pytest.fixture(scope="module")
def text(example):
    return example.Text()


def test_text_is_english(example, text):
    assert len(text.train) + len(text.test) > 100_000
    assert text.decode(text.encode("for every line\n")) == "for every line\n"
    pieces = text.windows(3, 50)
    (a, first), (b, second) = next(pieces), next(pieces)
    assert first and not second and a.shape == (3, 51) and torch.equal(a[:, -1], b[:, 0])
    assert torch.equal(a[0], text.train[:51]) and torch.equal(b[0], text.train[50:101])


def losses_in_torch(example, text, model, steps, streams, window, depth):
    """The same training with the modules, the optimizer and the loss of torch, the gradient cut by hand."""
    width = model.lstm.hidden_size
    embedding = torch.nn.Embedding(len(text.characters), width // 4)
    lstm = torch.nn.LSTM(width // 4, width, batch_first=True)
    head = torch.nn.Linear(width, len(text.characters))
    network = torch.nn.ModuleDict({"embedding": embedding, "lstm": lstm, "head": head}).double()
    network.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(network.parameters(), lr=example.RATE)
    stream = (len(text.train) - 1) // streams
    state, losses = None, []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = example.RATE * (1 - step / steps)
        logits, wanted = [], []
        for at in range(step * window, (step + 1) * window, depth):
            piece = torch.stack([text.train[s * stream + at : s * stream + at + depth + 1] for s in range(streams)])
            state = None if state is None else tuple(s.detach() for s in state)
            y, state = lstm(embedding(piece[:, :-1]), state)
            logits.append(head(y).flatten(0, 1))
            wanted.append(piece[:, 1:].flatten())
        loss = torch.nn.functional.cross_entropy(torch.cat(logits), torch.cat(wanted))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), example.LARGEST_GRADIENT)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_it_trains_as_plain_torch(example, text):
    model = example.Reader(len(text.characters), width=32, depth=8).double()
    begin = copy.deepcopy(model)
    ours = example.train(text, model, 20, streams=4, window=24)
    theirs = losses_in_torch(example, text, begin, 20, 4, 24, 8)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)
    assert ours[-1] < ours[0] - 0.3
    whole = losses_in_torch(example, text, begin, 20, 4, 24, 24)  # depth matters
    assert abs(whole[-1] - ours[-1]) > 1e-6


def test_writing_and_its_measure(example, text):
    model = example.Reader(len(text.characters), width=32)
    written = example.write(model, text, "\n", 100)
    assert len(written) == 100 and written == example.write(model, text, "\n", 100)
    assert written != example.write(model, text, "\n", 100, seed=1)
    assert example.known_words(written, text) < 0.5
    assert example.known_words("the statement of a class, qqxz", text) == 4 / 5
    uniform = math.log2(len(text.characters))
    assert abs(example.bits_per_character(model, text.test[:2000]) - uniform) < 0.5


@pytest.mark.slow
def test_it_learns_to_write(example, text):
    """The default budget."""
    model = example.Reader(len(text.characters))
    example.train(text, model, example.STEPS)
    assert example.bits_per_character(model, text.test) < 2.2
    written = example.write(model, text, "\n", 2000)
    assert example.known_words(written, text) > 0.9
