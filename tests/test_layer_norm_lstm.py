import copy

import pytest
import torch

from pyops import functional as F
from pyops import nn
from pyops.core import backend as backends

from .harness import passes, refuses
from .recurrent_harness import OF_THE_RECIPE, equal

X, H = torch.ones(2, 3), torch.ones(2, 4)
W_IH, W_HH, ROW, CELL = torch.ones(16, 3), torch.ones(16, 4), torch.ones(16), torch.ones(4)
OPS = ["layer_norm_lstm_cell", "layer_norm_lstm"]


# Steps of a layer are cells to the recipe; what is checked twice is what the loop adds.
OF_LAYERS = ("gradcheck", "transforms", "determinism")


@pytest.mark.parametrize("op, check", [(OPS[0], c) for c in OF_THE_RECIPE] + [(OPS[1], c) for c in OF_LAYERS])
def test_checks(op, check):
    passes(op, "cpu", check)


def test_kernels(backend):
    passes("layer_norm_lstm_cell", backend, "accuracy")


def test_layers_on_the_cpu():
    """The same kernels, step by step."""
    passes("layer_norm_lstm", "cpu", "accuracy")


@pytest.mark.race
def test_race(backend):
    passes("layer_norm_lstm_cell", backend, "accuracy")


@pytest.mark.parametrize("bias", [True, False])
def test_cell_module_is_the_function(backend, bias):
    cell = nn.LayerNormLSTMCell(5, 7, bias, eps=1e-3)
    names = {"weight_ih", "weight_hh", "gain_ih", "gain_hh", "gain_c"}
    assert set(cell.state_dict()) == names | ({"bias_ih", "bias_hh", "bias_c"} if bias else set())
    x, state = torch.randn(3, 5), (torch.randn(3, 7), torch.randn(3, 7))
    biases = (cell.bias_ih, cell.bias_hh, cell.bias_c) if bias else ()
    with backends.backend(backend):
        expected = F.layer_norm_lstm_cell(
            x, state, cell.weight_ih, cell.weight_hh, cell.gain_ih, cell.gain_hh, cell.gain_c, *biases, eps=1e-3
        )
        equal(cell(x, state), expected)
        equal(cell(x[0], tuple(s[0] for s in state)), tuple(s[0] for s in expected))


def test_a_layer_is_its_cells():
    """Two layers and packed sequences, against cells with the same parameters, one sequence at a time."""
    network = nn.LayerNormLSTM(3, 5, 2, eps=1e-2)
    for p in network.parameters():
        torch.nn.init.normal_(p)
    cells = []
    for k in range(2):
        cell = nn.LayerNormLSTMCell(3 if k == 0 else 5, 5, eps=1e-2)
        cell.load_state_dict({name: network.state_dict()[f"{name}_l{k}"] for name in cell.state_dict()})
        cells.append(cell)
    sequences = [torch.randn(n, 3) for n in (2, 4, 3)]
    packed, (h_n, c_n) = network(torch.nn.utils.rnn.pack_sequence(sequences, enforce_sorted=False))
    outputs = torch.nn.utils.rnn.unpack_sequence(packed)
    for b, x in enumerate(sequences):
        for k, cell in enumerate(cells):
            state, found = None, []
            for step in x:
                state = cell(step, state)
                found.append(state[0])
            x = torch.stack(found)
            equal((h_n[k, b], c_n[k, b]), state)
        equal(outputs[b], x)


def test_second_gradients_of_layers():
    network = nn.LayerNormLSTM(1, 2).double()
    x = torch.randn(2, 1, 1, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradgradcheck(lambda x: network(x)[0], x)


def test_each_gate_row_is_normalised():
    """A shift and a scale of what the hidden state sends change nothing: that is what normalisation is for."""
    cell = nn.LayerNormLSTMCell(3, 8, eps=0.0).double()
    x, state = torch.randn(2, 3).double(), (torch.randn(2, 8).double(), torch.randn(2, 8).double())
    expected = cell(x, state)
    cell.weight_hh.data *= 7
    equal(cell(x, state), expected, 1e-12)


def test_first_parameters_and_copies():
    network = copy.deepcopy(nn.LayerNormLSTM(3, 4, 2, bidirectional=True))
    network.reset_parameters()
    for name, p in network.named_parameters():
        if name.startswith("gain"):
            assert torch.equal(p, torch.ones_like(p))
        if name.startswith("bias_c"):
            assert torch.equal(p, torch.zeros_like(p))
    y, _ = network(torch.randn(5, 2, 3))
    assert y.shape == (5, 2, 8)
    other = nn.LayerNormLSTM(3, 4, 2, bidirectional=True)
    other.load_state_dict(network.state_dict())
    x = torch.randn(5, 2, 3)
    equal(other(x), network(x))


REFUSED = [
    ((X, (H, H), W_IH, W_HH, torch.ones(15), ROW, CELL), RuntimeError, ("'gain_ih'", "[15]", "[16]")),
    ((X, (H, H), W_IH, W_HH, ROW, torch.ones(4), CELL), RuntimeError, ("'gain_hh'", "[4]", "[16]")),
    ((X, (H, H), W_IH, W_HH, ROW, ROW, ROW), RuntimeError, ("'gain_c'", "[16]", "[4]")),
    ((X, (H, H), W_IH, W_HH, ROW, ROW, None), TypeError, ("'gain_c'", "NoneType")),
    ((X, (H, H), W_IH, W_HH, ROW, ROW.double(), CELL), RuntimeError, ("'gain_hh'", "float64", "float32")),
    ((X, (H, H), W_IH, W_HH, ROW, ROW, CELL, ROW, ROW, ROW), RuntimeError, ("'bias_c'", "[16]", "[4]")),
    ((X, (H, H), W_IH, W_HH, ROW, ROW, CELL, None, None, None, -1.0), ValueError, ("'eps'", "-1")),
    ((torch.ones(2, 5), (H, H), W_IH, W_HH, ROW, ROW, CELL), RuntimeError, ("'input'", "[2, 5]", "3")),
]


@pytest.mark.parametrize("args, kind, words", REFUSED)
def test_cell_refuses(args, kind, words):
    refuses(kind, ("layer_norm_lstm_cell", *words), F.layer_norm_lstm_cell, *args)


def test_layers_refuse():
    h = torch.ones(1, 2, 4)
    rest = (False, 1, 0.0, False, False, False)
    x, gains = torch.ones(3, 2, 3), [ROW, ROW, CELL]
    call = lambda *params: F.layer_norm_lstm(x, (h, h), list(params), *rest)
    refuses(RuntimeError, ("layer_norm_lstm", "'params'", "4 tensors"), call, W_IH, W_HH, *gains[:2])
    refuses(RuntimeError, ("layer_norm_lstm", "'gain_c[0]'", "[16]"), call, W_IH, W_HH, ROW, ROW, ROW)
    refuses(ValueError, ("LayerNormLSTM", "'proj_size'"), nn.LayerNormLSTM, 3, 4, proj_size=2)
