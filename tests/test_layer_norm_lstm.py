import copy
import pickle

import pytest
import torch

from pyops import functional as F
from pyops import nn
from pyops.core import backend as backends
from pyops.ops import layer_norm_lstm

from .harness import emulated_device, passes, refuses
from .recurrent_harness import OF_THE_RECIPE, SMALL, equal, launches

X, H = torch.ones(2, 3), torch.ones(2, 4)
W_IH, W_HH, ROW, CELL = torch.ones(16, 3), torch.ones(16, 4), torch.ones(16), torch.ones(4)
OPS = ["layer_norm_lstm_cell", "layer_norm_lstm"]


# Second gradients of a layer are plain torch, step by step: test_second_gradients_of_layers takes few inputs for all.
OF_LAYERS = tuple(c for c in OF_THE_RECIPE if c != "gradgradcheck")


@pytest.mark.parametrize("op, check", [(OPS[0], c) for c in OF_THE_RECIPE] + [(OPS[1], c) for c in OF_LAYERS])
def test_checks(op, check):
    passes(op, "cpu", check)


@pytest.mark.parametrize("op", OPS)
def test_kernels(backend, op):
    passes(op, backend, "accuracy")


@pytest.mark.race
@pytest.mark.parametrize("op", OPS)
def test_race(backend, op):
    passes(op, backend, "accuracy")


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


def _layers_of_cells(network):
    """network's layers as cells that share its parameters: f(sequences) -> (outputs, final states of each)."""
    suffixes = [f"_l{k}{d}" for k in range(network.num_layers) for d in ("", "_reverse")[: 1 + network.bidirectional]]

    def cell(x, state, suffix):
        w = {name: getattr(network, name + suffix) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
        gains = [getattr(network, name + suffix) for name in ("gain_ih", "gain_hh", "gain_c")]
        biases = w["bias_ih"], w["bias_hh"], getattr(network, f"bias_c{suffix}")
        return F.layer_norm_lstm_cell(x, state, w["weight_ih"], w["weight_hh"], *gains, *biases, eps=network.eps)

    def run(x):
        finals = []
        for k in range(network.num_layers):
            ys = []
            for suffix in suffixes[k * (1 + network.bidirectional) :][: 1 + network.bidirectional]:
                zero = x.new_zeros(1, network.hidden_size)
                state, found = (zero, zero), []
                for step in x.flip(0) if suffix.endswith("reverse") else x:
                    state = cell(step[None], state, suffix)
                    found.append(state[0][0])
                ys.append(torch.stack(found[::-1] if suffix.endswith("reverse") else found))
                finals.append(torch.stack(state)[:, 0])
            x = torch.cat(ys, 1)
        return x, torch.stack(finals)

    return run


@pytest.mark.race
@pytest.mark.parametrize("hidden, layers, bidirectional", [(5, 2, False), (6, 1, True)])
def test_a_layer_is_its_cells(backend, hidden, layers, bidirectional):
    """Packed sequences and their gradients, against cells with the same parameters, one sequence at a time."""
    network = nn.LayerNormLSTM(3, hidden, layers, bidirectional=bidirectional, eps=1e-2).double()
    for p in network.parameters():
        torch.nn.init.normal_(p)
    sequences = [torch.randn(n, 3).double() for n in (2, 4, 3)]
    with backends.backend(backend):
        packed, (h_n, c_n) = network(torch.nn.utils.rnn.pack_sequence(sequences, enforce_sorted=False))
        outputs = torch.nn.utils.rnn.unpack_sequence(packed)
        loss = torch.cat(outputs).sin().sum() + h_n.cos().sum() + (c_n * 0.1).sin().sum()
        grads = torch.autograd.grad(loss, tuple(network.parameters()))
    cells, total = _layers_of_cells(network), 0
    for b, x in enumerate(sequences):
        y, final = cells(x)
        equal((outputs[b], h_n[:, b], c_n[:, b]), (y, final[:, 0], final[:, 1]), 1e-10)
        total = total + y.sin().sum() + final[:, 0].cos().sum() + (final[:, 1] * 0.1).sin().sum()
    equal(grads, torch.autograd.grad(total, tuple(network.parameters())), 1e-9)


@pytest.mark.parametrize("batch", [1, 5, 70])
def test_threads_change_nothing(batch):
    """Rows for every thread, or all threads on each step; more rows than are summed at once.

    Not the gradients of weights: products of torch's, whose last bits depend on the number of threads.
    """
    network, x = nn.LayerNormLSTM(3, 17), torch.randn(9, batch, 3)
    parameters = [p for name, p in network.named_parameters() if not name.startswith("weight")]
    results, threads = [], torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            y, (h, c) = network(x)
            loss = y.sin().sum() + h.sum() + c.sum()
            results.append((y, h, c, *torch.autograd.grad(loss, parameters)))
    finally:
        torch.set_num_threads(threads)
    equal(*results, 0)


@pytest.mark.race
@pytest.mark.parametrize("hidden, expected", [(64, 1), (96, 4)], ids=["some", "most"])
def test_weights_beyond_shared_memory(backend, hidden, expected):
    """On CUDA one launch reads some weights from memory; of most, two launches for each step read all from there."""
    if backend == "triton":
        pytest.skip("Triton reads weights from memory at any size")
    network, x = nn.LayerNormLSTM(2, hidden, bidirectional=True).double(), torch.randn(2, 2, 2).double()
    results = []
    for name in (backend, "cpu"):
        with backends.backend(name), emulated_device(name, SMALL):
            y, (h, c) = network(x)
            grads = torch.autograd.grad(y.sin().sum() + h.sum() + c.sum(), tuple(network.parameters()))
            results.append((y, h, c, *grads))
            assert name != "emulator" or launches(network, x) == expected
    equal(*results, 1e-10)


def test_second_gradients_of_layers():
    network = nn.LayerNormLSTM(1, 2).double()
    x = torch.randn(2, 1, 1, dtype=torch.float64, requires_grad=True)
    names = ("gain_hh_l0", "bias_ih_l0", "gain_c_l0")

    def outputs(x, *parameters):
        given = dict(network.named_parameters()) | dict(zip(names, parameters))
        return torch.func.functional_call(network, given, (x,))[0]

    parameters = [getattr(network, name).detach().requires_grad_() for name in names]
    torch.autograd.gradgradcheck(outputs, (x, *parameters))


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


@pytest.mark.parametrize("settings", [{"eps": 0.1}, {"detach_every": 2}])
def test_a_module_compiles_into_one_graph(settings):
    """Also one that came from a file in a process that has made none."""
    pickled = pickle.dumps(nn.LayerNormLSTM(3, 4, **settings))
    layer_norm_lstm._forwards.clear()
    network, x = pickle.loads(pickled), torch.randn(5, 2, 3)
    with torch._dynamo.config.patch(allow_rnn=True):  # torch breaks the graph at these modules unless told
        compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
        parameters = tuple(network.parameters())
        found, expected = (torch.autograd.grad(f(x)[0].sin().sum(), parameters) for f in (compiled, network))
    equal(found, expected)
    other = nn.LayerNormLSTM(3, 4, eps=1e-5)
    other.load_state_dict(network.state_dict())
    assert torch.allclose(other(x)[0], network(x)[0], atol=1e-5) == (network.eps == 1e-5)


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
    refuses(ValueError, ("LayerNormLSTM", "'eps'", "-1"), nn.LayerNormLSTM, 3, 4, eps=-1)
    refuses(ValueError, ("LayerNormLSTMCell", "'eps'", "-1"), nn.LayerNormLSTMCell, 3, 4, eps=-1)
