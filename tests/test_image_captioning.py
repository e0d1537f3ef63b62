"""examples/image_captioning.py: its loss is that of plain torch, and both decoders learn the captions."""

import importlib.util
import itertools

import pytest
import torch

import pyops

from . import harness

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("skimage", "sklearn", "efficientnet_lite_pytorch")),
    reason="needs requirements/demo-no-deps.txt",
)


@pytest.fixture(scope="module")
def example():
    with harness.example("image_captioning") as module:
        yield module


@pytest.fixture(scope="module")
def places(example):
    with pyops.use():
        found = example.places_of(list(example.CAPTIONS))
    assert found.shape == (len(example.CAPTIONS), 49, example.FEATURES)
    return found


def attention(module, query, places):
    """Softmax over places of v . tanh(W_q query + W_k place + b), in torch."""
    at = module.query_proj(query)[:, None] + module.key_proj(places) + module.bias
    weights = (at.tanh() @ module.v).softmax(1)
    return (weights[..., None] * places).sum(1)


def loss_in_torch(example, decoder, places, captions):
    """Step by step, of either decoder, each caption alone."""
    plain = isinstance(decoder, example.Plain)
    weights = list((decoder.lstm if plain else decoder.cell).parameters())
    linear = torch.nn.functional.linear
    losses = []
    for row, caption in zip(places, captions):
        view = linear(row[None], decoder.look.weight, decoder.look.bias)
        state = linear(view.mean(1), decoder.first.weight, decoder.first.bias).tanh().chunk(2, 1)
        for word, following in itertools.pairwise(caption):
            if following == example.PAD:
                break
            x = decoder.embedding.weight[word][None]
            if not plain:
                x = torch.cat([x, attention(decoder.attention, state[0], view)], 1)
            state = torch.lstm_cell(x, state, *weights)
            logits = linear(state[0], decoder.head.weight, decoder.head.bias)
            losses.append(-logits[0].log_softmax(0)[following])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("kind", ["Plain", "Attentive"])
def test_loss_and_its_gradient_are_those_of_plain_torch(example, kind):
    captions = list(example.CAPTIONS.values())[:3]
    words = example.Words(captions)
    decoder = getattr(example, kind)(len(words.words)).double()
    places = torch.randn(3, 5, example.FEATURES, dtype=torch.double)
    numbers = words.encode(captions)
    loss = example.loss_of(decoder, places, numbers)
    expected = loss_in_torch(example, decoder, places, numbers)
    torch.testing.assert_close(loss, expected)
    parameters = dict(decoder.named_parameters())
    ours, theirs = (torch.autograd.grad(x, list(parameters.values())) for x in (loss, expected))
    for name, a, b in zip(parameters, ours, theirs):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", ["Plain", "Attentive"])
def test_it_learns_the_captions(example, places, kind):
    """Said word by word: the likeliest word each time, and words drawn by chance."""
    captions = list(example.CAPTIONS.values())
    words = example.Words(captions)
    decoder = getattr(example, kind)(len(words.words))
    numbers = words.encode(captions)
    before = words.decode(example.describe(decoder, places))
    assert all(a != b for a, b in zip(before, captions))
    losses = example.train(decoder, places, numbers)
    assert losses[-1] < 0.01
    assert words.decode(example.describe(decoder, places)) == captions
    assert words.decode(example.describe(decoder, places, temperature=0.3)) == captions
