"""Recurrent layers in whole models: a character language model on real English text trains as with torch."""

import pydoc_data.topics

import pytest
import torch

import pyops
from pyops import nn as pyops_nn

WIDTH, LENGTH, BATCH = 24, 16, 4


class CharacterModel(torch.nn.Module):
    """Next character from all before: embedding, two recurrent layers of one library, projection to characters."""

    def __init__(self, recurrent: type[torch.nn.RNNBase], characters: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(characters, WIDTH)
        self.recurrent = recurrent(WIDTH, WIDTH, 2, batch_first=True)
        self.head = torch.nn.Linear(WIDTH, characters)

    def forward(self, text, state):
        y, state = self.recurrent(self.embedding(text), state)
        return self.head(y), state


def english() -> tuple[torch.Tensor, int]:
    """Python's own documentation as character numbers, in BATCH streams."""
    text = " ".join(pydoc_data.topics.topics[k] for k in ("if", "for", "class"))
    known = {c: i for i, c in enumerate(sorted(set(text)))}
    numbers = torch.tensor([known[c] for c in text])
    return numbers[: len(numbers) // BATCH * BATCH].reshape(BATCH, -1), len(known)


def losses(recurrent, steps) -> list[float]:
    """Truncated backpropagation: the state goes on from piece to piece, its gradient does not."""
    text, characters = english()
    torch.manual_seed(0)
    model = CharacterModel(recurrent, characters)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    state, found = None, []
    for i in range(steps):
        piece = text[:, i * LENGTH : (i + 1) * LENGTH + 1]
        logits, state = model(piece[:, :-1], state)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), piece[:, 1:].flatten())
        state = tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_a_language_model_trains_as_with_torch(name):
    theirs = losses(getattr(torch.nn, name), 30)
    torch.testing.assert_close(losses(getattr(pyops_nn, name), 30), theirs, rtol=1e-3, atol=1e-3)
    op = {"LSTM": "lstm", "GRU": "gru", "RNN": "rnn_tanh"}[name]
    with pyops.use(op) as report:
        routed = losses(getattr(torch.nn, name), 30)
    torch.testing.assert_close(routed, theirs, rtol=1e-3, atol=1e-3)
    assert report.entries[op].backends["cpu"] == 30
    assert theirs[-1] < theirs[0] - 0.5
