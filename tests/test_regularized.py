"""Dropout inside the recurrent modules, and truncated backpropagation through time."""

from functools import partial

import pytest
import torch

from pyops import nn
from pyops.core import masking

from .harness import refuses
from .recurrent_harness import equal

KINDS = [nn.LSTM, nn.GRU, nn.RNN, nn.LayerNormLSTM]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)


def first(states):
    return states if isinstance(states, torch.Tensor) else states[0]


def pack(*lengths):
    return torch.nn.utils.rnn.pack_sequence([torch.randn(n, 3) for n in lengths], enforce_sorted=False)


def a_twin(network):
    """The same weights without dropout or truncation."""
    twin = type(network)(3, 5, network.num_layers, batch_first=network.batch_first)
    twin.load_state_dict(network.state_dict())
    return twin


@kinds
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_truncation_changes_no_output(kind, steps):
    for x in (torch.randn(2, 5, 3), torch.randn(5, 3), pack(2, 5, 4, 5)):
        network = kind(3, 5, 2, batch_first=True, detach_every=steps)
        expected = a_twin(network)(x)
        found = network(x)
        if isinstance(x, torch.nn.utils.rnn.PackedSequence):
            equal(tuple(found[0]), tuple(expected[0]))
            found, expected = found[1], expected[1]
        equal(found, expected)
        assert f"detach_every={steps}" in repr(network)


@kinds
def test_gradients_stop_at_every_kth_step(kind):
    """The gradient of the output of step t reaches the inputs of its own piece up to t, and no others."""
    network, x = kind(3, 5, 2, detach_every=3), torch.randn(8, 2, 3, requires_grad=True)
    y, _ = network(x)
    for t in range(8):
        (dx,) = torch.autograd.grad(y[t].sin().sum(), x, retain_graph=True)
        reached = [bool(row.abs().sum() > 0) for row in dx]
        assert reached == [t // 3 * 3 <= s <= t for s in range(8)]


@kinds
def test_truncated_gradients_are_those_of_detached_pieces(kind):
    network, x = kind(3, 5, detach_every=2).double(), torch.randn(5, 2, 3, dtype=torch.float64)
    y, state = network(x)
    found = torch.autograd.grad(y.sin().sum() + first(state).cos().sum(), tuple(network.parameters()))
    twin, state, total = a_twin(network).double(), None, 0
    for piece in (x[:2], x[2:4], x[4:]):
        if state is not None:
            state = state.detach() if isinstance(state, torch.Tensor) else tuple(s.detach() for s in state)
        y, state = twin(piece, state)
        total = total + y.sin().sum()
    equal(found, torch.autograd.grad(total + first(state).cos().sum(), tuple(twin.parameters())), 1e-10)


def test_truncation_of_packed_sequences_with_states():
    network, x = nn.LSTM(3, 5, 2, detach_every=2), pack(1, 5, 3)
    states = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    found, expected = network(x, states), a_twin(network)(x, states)
    equal((found[0].data, found[1]), (expected[0].data, expected[1]))


@kinds
def test_input_dropout_drops_the_same_features_in_all_steps(kind):
    network, x = kind(64, 5, input_dropout=0.5), torch.ones(6, 2, 64, requires_grad=True)
    (dx,) = torch.autograd.grad(network(x)[0].sum(), x)
    dropped = dx == 0
    assert torch.equal(dropped, dropped[:1].expand_as(dropped))
    assert 0.2 < dropped[0].float().mean() < 0.8
    assert not torch.equal(dropped[0, 0], dropped[0, 1])
    network.eval()
    (dx,) = torch.autograd.grad(network(x)[0].sum(), x)
    assert not bool((dx == 0).any())


def test_input_dropout_of_packed_sequences():
    network = nn.GRU(64, 5, input_dropout=0.5)
    x = torch.nn.utils.rnn.pack_sequence([torch.ones(n, 64) for n in (4, 2)])
    data = x.data.requires_grad_()
    y, _ = network(x._replace(data=data))
    dropped = torch.autograd.grad(y.data.sum(), data)[0] == 0
    of_first, of_second = dropped[[0, 2, 4, 5]], dropped[[1, 3]]
    assert torch.equal(of_first, of_first[:1].expand_as(of_first))
    assert torch.equal(of_second, of_second[:1].expand_as(of_second))
    assert bool(dropped.any()) and not torch.equal(of_first[0], of_second[0])


@kinds
def test_hidden_dropout_is_dropconnect_on_the_recurrent_weights(kind):
    """The gradient of a dropped weight is 0; the layer is the plain one with weights masked and scaled."""
    network, x = kind(3, 5, 2, hidden_dropout=0.4).double(), torch.randn(6, 2, 3, dtype=torch.float64)
    before = {name: p.clone() for name, p in network.state_dict().items()}
    torch.manual_seed(3)
    y, _ = network(x)
    weights = [network.weight_hh_l0, network.weight_hh_l1]
    kept = [dw != 0 for dw in torch.autograd.grad(y.sin().sum(), weights)]
    assert all(0 < k.float().mean() < 1 for k in kept)
    twin = a_twin(network).double()
    with torch.no_grad():
        for k, mask in enumerate(kept):
            getattr(twin, f"weight_hh_l{k}").mul_(mask.double() / 0.6)
    equal(y, twin(x)[0], 1e-10)
    equal(network.eval()(x)[0], a_twin(network).double()(x)[0], 1e-10)
    for name, p in network.state_dict().items():
        assert torch.equal(p, before[name])
    assert network._flat_weights[1] is network.weight_hh_l0


def test_dropout_is_repeatable_and_all_of_it_at_once_is_differentiable():
    network = nn.LSTM(3, 4, 2, dropout=0.3, input_dropout=0.3, hidden_dropout=0.3, detach_every=2).double()
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)

    def run(x):
        torch.manual_seed(5)
        return network(x)[0]

    assert torch.equal(run(x), run(x))
    torch.autograd.gradgradcheck(lambda x: run(x)[:1], x)


def test_dropout_between_layers_is_counter_based(monkeypatch):
    seen = []
    plain = masking.masked
    monkeypatch.setattr(masking, "masked", lambda op, x, *rest: seen.append(x.shape) or plain(op, x, *rest))
    nn.LSTM(3, 5, 3, dropout=0.5)(torch.randn(4, 2, 3))
    assert seen == [(8, 5), (8, 5)]


@kinds
def test_bad_arguments(kind):
    for name in ("input_dropout", "hidden_dropout"):
        refuses(ValueError, (kind.__name__, name, "1.5"), partial(kind, 3, 4, **{name: 1.5}))
        refuses(TypeError, (kind.__name__, name, "str"), partial(kind, 3, 4, **{name: "a"}))
    refuses(ValueError, (kind.__name__, "detach_every", "0"), lambda: kind(3, 4, detach_every=0))
    refuses(TypeError, (kind.__name__, "detach_every", "float"), lambda: kind(3, 4, detach_every=1.5))
    refuses(ValueError, (kind.__name__, "bidirectional"), lambda: kind(3, 4, bidirectional=True, detach_every=2))
    with pytest.raises((TypeError, ValueError)):  # by position there is nothing beyond what torch has
        kind(3, 4, *[1] * 20)
