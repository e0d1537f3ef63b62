from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from pyops import functional as F
from pyops import nn, use
from pyops.core import backend as backends
from pyops.core import library, recurrent
from pyops.core.explain import explain

from .harness import emulated_device, passes, refuses, same_refusal
from .recurrent_harness import (
    BEYOND_REGISTERS,
    EXPLAINED,
    MULTICAST,
    NETWORKS,
    ODD,
    OF_THE_RECIPE,
    ONE_EXAMPLE,
    PROJECTED,
    SMALL,
    STACKS,
    TENSOR_CORES,
    cells_agree,
    equal,
    explains_what_runs,
    launches,
    network_case,
    networks_agree,
    products_on_tensor_cores,
    stacks_agree,
    stacks_compile,
    stacks_differentiate,
    states_by_multicast,
)

X, H = torch.ones(2, 3), torch.ones(2, 4)
W_IH, W_HH, B = torch.ones(16, 3), torch.ones(16, 4), torch.ones(16)


@pytest.mark.parametrize("op", ["lstm_cell"])
@pytest.mark.parametrize("check", OF_THE_RECIPE)
def test_checks(backend, op, check):
    passes(op, backend, check)


@pytest.mark.parametrize("check", OF_THE_RECIPE)
def test_checks_of_sequences(check):
    passes("lstm", "cpu", check)


@pytest.mark.parametrize("op", ["lstm_cell", "lstm"])
def test_kernels(backend, op):
    passes(op, backend, "accuracy")


@pytest.mark.race
@pytest.mark.parametrize("op", ["lstm_cell", "lstm"])
def test_race(backend, op):
    passes(op, backend, "accuracy")


@pytest.mark.parametrize("bias", [True, False])
def test_cell_module(backend, bias):
    cells_agree(nn.LSTMCell(5, 7, bias), torch.nn.LSTMCell(5, 7, bias), 7, 2, backend)


def test_an_unmodified_cell_is_routed():
    cell, x = torch.nn.LSTMCell(3, 4), torch.randn(2, 3)
    expected = cell(x)
    with use() as report:
        y = cell(x)
    equal(y, expected)
    assert report.entries["lstm_cell"].backends == {"cpu": 1}


def test_autocast_keeps_the_states_as_torch():
    cell, ours = torch.nn.LSTMCell(3, 4), nn.LSTMCell(3, 4)
    ours.load_state_dict(cell.state_dict())
    x = torch.randn(2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        equal(ours(x), cell(x), 2e-2)
        y = ours(x)[0]
    torch.autograd.grad(y.sum(), tuple(ours.parameters()))


CELL = [
    ((torch.ones(2, 5), (H, H), W_IH, W_HH), RuntimeError, ("'input'", "[2, 5]", "3")),
    ((torch.ones(3), (H, H), W_IH, W_HH), IndexError, ("'input'", "[3]")),
    ((X, (torch.ones(3, 4), H), W_IH, W_HH), RuntimeError, ("'hx[0]'", "[3, 4]", "[2, 4]")),
    ((X, (H, torch.ones(2, 5)), W_IH, W_HH), RuntimeError, ("'hx[1]'", "[2, 5]", "[2, 4]")),
    ((X, (H,), W_IH, W_HH), RuntimeError, ("'hx'", "1 tensors")),
    ((X, (H, H), W_IH, torch.ones(16, 5)), RuntimeError, ("'w_hh'", "[16, 5]")),
    ((X, (H, H), torch.ones(12, 3), W_HH), RuntimeError, ("'w_ih'", "[12, 3]")),
    ((X, (H, H), W_IH, W_HH, torch.ones(4), B), RuntimeError, ("'b_ih'", "[4]", "[16]")),
    ((X.double(), (H, H), W_IH, W_HH), RuntimeError, ("'hx[0]'", "float32", "float64")),
    ((X.long(), (H, H), W_IH, W_HH), RuntimeError, ("'input'", "int64")),
    ((X, (torch.ones(2), H), W_IH, W_HH), IndexError, ("'hx[0]'", "[2]", "[2, 4]")),
    ((X, (H, torch.ones(4)), W_IH, W_HH), RuntimeError, ("'hx[1]'", "[4]", "[2, 4]")),
    ((X, (H, H), W_IH, None), TypeError, ("'w_hh'", "NoneType")),
]


@pytest.mark.parametrize("args, kind, words", CELL)
def test_cell_refuses_as_torch(args, kind, words):
    refuses(kind, ("lstm_cell", *words), F.lstm_cell, *args)
    same_refusal(F.lstm_cell, torch.lstm_cell, *args)


def test_cell_module_refuses_as_torch():
    for args in ((torch.ones(1, 2, 3),), (X, (H[None], H)), (torch.ones(2, 4),), (X, (torch.ones(2, 5), H))):
        same_refusal(nn.LSTMCell(3, 4), torch.nn.LSTMCell(3, 4), *args)


@pytest.mark.network
@pytest.mark.parametrize("name", NETWORKS)
def test_module(backend, name):
    settings, x, states = network_case(
        name, lambda layers, batch: (torch.randn(layers, *batch, 7), torch.randn(layers, *batch, 7))
    )
    networks_agree(nn.LSTM(5, 7, **settings), torch.nn.LSTM(5, 7, **settings), x, states, backend)


def test_an_unmodified_network_is_routed():
    network = torch.nn.LSTM(5, 7, 2, bidirectional=True)
    for x in (torch.randn(4, 3, 5), torch.nn.utils.rnn.pack_sequence([torch.randn(3, 5), torch.randn(2, 5)])):
        expected = network(x)
        with use() as report:
            y = network(x)
        equal(tuple(y), tuple(expected))
        assert report.entries["lstm"].backends == {"cpu": 1}


X3, H0 = torch.ones(3, 2, 3), torch.ones(1, 2, 4)
PARAMS, REST = [W_IH, W_HH, B, B], (True, 1, 0.0, False, False)
SEQUENCE = [
    ((torch.ones(3, 2, 5), (H0, H0), PARAMS, *REST, False), RuntimeError, ("'input'", "[16, 3]", "[16, 5]")),
    ((torch.ones(3, 3), (H0, H0), PARAMS, *REST, False), RuntimeError, ("'input'", "2 dimensions")),
    ((X3, (H0, torch.ones(1, 2, 5)), PARAMS, *REST, False), RuntimeError, ("'hx[1]'", "[1, 2, 5]", "[1, 2, 4]")),
    ((X3, (H0, H0), PARAMS[:3], *REST, False), RuntimeError, ("'params'", "3 tensors")),
    ((X3.double(), (H0, H0), PARAMS, *REST, False), RuntimeError, ("'hx[0]'", "float32", "float64")),
    ((X3.long(), (H0, H0), PARAMS, *REST, False), RuntimeError, ("'input'", "int64")),
    ((X3[0], torch.tensor([2, 1]), (H0, H0), PARAMS, *REST), RuntimeError, ("'batch_sizes'", "sum of 3")),
    ((X3[0], torch.tensor([2, 0]), (H0, H0), PARAMS, *REST), RuntimeError, ("'batch_sizes'", "[2, 0]")),
]


@pytest.mark.parametrize("args, kind, words", SEQUENCE)
def test_sequence_refuses(args, kind, words):
    refuses(kind, ("lstm", *words), F.lstm, *args)


def test_module_refuses_as_torch():
    for args in (
        (torch.ones(3, 2, 4),),
        (torch.ones(0, 2, 3),),
        (torch.ones(3),),
        (X3, (H0[0], H0[0])),
        (X3.double(),),
    ):
        same_refusal(nn.LSTM(3, 4), torch.nn.LSTM(3, 4), *args)
    for kind in ("LSTM", "GRU", "RNN", "LayerNormLSTM"):
        make = getattr(nn, kind)
        for sizes, error, words in (
            ((3, 0), ValueError, ("'hidden_size'", "0")),
            ((3, "4"), TypeError, ("'hidden_size'", "str")),
            ((2.5, 4), TypeError, ("'input_size'", "float")),
        ):
            refuses(error, (f"{kind}: ", *words), make, *sizes)
            same_refusal(make, getattr(torch.nn, kind, torch.nn.LSTM), *sizes)
        refuses(ValueError, (f"{kind}: ", "'input_size'", "-1"), make, input_size=-1, hidden_size=4)
        refuses(RuntimeError, (f"{kind}: ", "'input'", "[3, 2, 5]", "input_size 3"), make(3, 4), torch.ones(3, 2, 5))
        few = (torch.ones(1, 3, 4),) * 2 if "LSTM" in kind else torch.ones(1, 3, 4)
        with pytest.raises(RuntimeError, match=f"^{kind}: Expected hidden.* size .*1, 2, 4.* got .*1, 3, 4"):
            make(3, 4)(X3, few)
    for size in (4, 5, -1):
        same_refusal(partial(nn.LSTM, proj_size=size), partial(torch.nn.LSTM, proj_size=size), 3, 4)
    pack = torch.nn.utils.rnn.pack_padded_sequence
    for kind in ("LSTM", "GRU", "RNN"):
        ours, theirs = getattr(nn, kind)(3, 4), getattr(torch.nn, kind)(3, 4)
        for lengths in ([3, 0], [3, -1], [2, 3]):
            packs = lambda module, lengths=lengths: module(pack(X3, torch.tensor(lengths)))
            same_refusal(partial(packs, ours), partial(packs, theirs))
        few, wide = torch.zeros(1, 3, 4), torch.zeros(1, 2, 4).double()
        for state in (few, wide):
            hx = (state, state) if kind == "LSTM" else state
            same_refusal(ours, theirs, pack(X3, torch.tensor([3, 1])), hx)
            same_refusal(ours, theirs, X3, hx)


@pytest.mark.network
@pytest.mark.parametrize("name", ["batch first", "packed", "packed, not sorted"])
def test_module_with_projection(backend, name):
    states = lambda layers, batch: (torch.randn(layers, *batch, 3), torch.randn(layers, *batch, 7))
    settings, x, states = network_case(name, states)
    make = lambda m: m.LSTM(5, 7, proj_size=3, **settings)
    networks_agree(make(nn), make(torch.nn), x, states, backend)


def test_dropout_between_layers_is_repeatable():
    network = nn.LSTM(3, 5, 3, dropout=0.5)
    x = torch.randn(4, 2, 3)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(network(x)[0])
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    expected = torch.nn.LSTM(3, 5, 3)
    expected.load_state_dict(network.state_dict())
    equal(network.eval()(x), expected(x))


def test_any_layout():
    network, x, h = nn.LSTM(4, 5), torch.randn(2, 4, 3), torch.randn(5, 3, 1)
    for p in network.parameters():
        p.data = p.data.t().contiguous().t() if p.dim() == 2 else p.data
    x, states = x.permute(0, 2, 1), (h.permute(2, 1, 0), h.permute(2, 1, 0))
    equal(network(x, states), network(x.contiguous(), tuple(s.contiguous() for s in states)))


def test_derivatives_of_packed_sequences():
    network = nn.LSTM(1, 1, bidirectional=True).double()
    x = torch.nn.utils.rnn.pack_sequence([torch.randn(n, 1, dtype=torch.float64) for n in (2, 1)])
    states = torch.randn(2, 2, 1, dtype=torch.float64), torch.randn(2, 2, 1, dtype=torch.float64)

    def outputs(data, *states):
        y, final = network(x._replace(data=data), states)
        return y.data, *(final)

    inputs = [t.requires_grad_() for t in (x.data, *states)]
    torch.autograd.gradcheck(outputs, inputs, check_forward_ad=True)
    torch.autograd.gradgradcheck(outputs, inputs, check_fwd_over_rev=True)


def test_a_module_compiles_into_one_graph():
    """As the docstrings and README say: with torch's switch, without which torch does not look at the forward."""
    network, x = nn.LSTM(3, 4, 2), torch.randn(5, 2, 3)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="RNN, GRU"):
        torch.compile(network, backend="aot_eager", fullgraph=True)(x)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):  # torch breaks the graph at these modules unless told
        equal(tuple(torch.compile(network, backend="aot_eager", fullgraph=True)(x)), tuple(network(x)))


# What does not fit into shared memory on CUDA: name -> (hidden size, of a projection, launches). One launch reads the
# rest from memory in each step; where that is most of it, a launch for each step, or two with a projection, reads all.
BEYOND = {
    "some": (64, 0, 1),
    "some, projection": (72, 56, 1),
    "most": (80, 0, 2),
    "most, projection": (96, 88, 4),
}


@pytest.mark.race
@pytest.mark.parametrize("name", BEYOND)
def test_weights_beyond_shared_memory(backend, name):
    if backend == "triton":
        pytest.skip("Triton reads weights from memory at any size")
    hidden, project, expected = BEYOND[name]
    theirs = torch.nn.LSTM(2, hidden, proj_size=project, bidirectional=True).double()
    ours = nn.LSTM(2, hidden, proj_size=project, bidirectional=True).double()
    ours.load_state_dict(theirs.state_dict())
    x, grads = torch.randn(2, 3, 2, dtype=torch.float64), []
    with backends.backend(backend), emulated_device(backend, SMALL):
        equal(ours(x), theirs(x), 1e-10)
        for module in (ours, theirs):
            grads.append(torch.autograd.grad(module(x)[0].sin().sum(), tuple(module.parameters())))
        if backend == "emulator":
            assert launches(ours, x) == expected
    equal(*grads, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("hidden, expected", [(1536, 1), (2048, 1), (3072, 2)])
def test_large_layers(hidden, expected):
    """An H100's 132 multiprocessors of 227 KB keep all weights of 1536 units in bfloat16, most of 2048, not of 3072."""
    network, x = nn.LSTM(3, hidden).bfloat16(), torch.randn(2, 9, 3).bfloat16()
    results = []
    with torch.no_grad(), emulated_device("emulator"):
        library.configure_emulator(multiprocessors=132)
        try:
            assert launches(network, x) == expected
            for name in ("emulator", "cpu"):
                with backends.backend(name):
                    results.append(network(x))
        finally:
            library.configure_emulator(multiprocessors=2)
    equal(*results, 2e-2)


@pytest.mark.race
@pytest.mark.parametrize("name", TENSOR_CORES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensor_cores(backend, name, dtype):
    products_on_tensor_cores("lstm", TENSOR_CORES[name], dtype, backend)


@pytest.mark.race
def test_tensor_cores_with_a_projection(backend):
    products_on_tensor_cores("lstm", PROJECTED, torch.bfloat16, backend)


def test_tensor_cores_with_weights_beyond_registers(backend):
    products_on_tensor_cores("lstm", BEYOND_REGISTERS, torch.bfloat16, backend)


@pytest.mark.parametrize("case", [ONE_EXAMPLE, ODD])
def test_what_cuda_cores_keep(backend, case):
    products_on_tensor_cores("lstm", case, torch.bfloat16, backend, expected=False)


@pytest.mark.race
@pytest.mark.parametrize("name", MULTICAST)
def test_multicast(backend, name, monkeypatch):
    states_by_multicast("lstm", MULTICAST[name], torch.bfloat16, backend, monkeypatch)


@pytest.mark.race
@pytest.mark.parametrize("name", STACKS)
def test_layers_side_by_side(backend, name):
    if backend == "triton":
        pytest.skip("Triton has no barrier of all its programs")
    stacks_agree("LSTM", name, 2, backend)


def test_derivatives_of_layers_side_by_side():
    stacks_differentiate(nn.LSTM(1, 2, 2).double(), 2)


def test_layers_side_by_side_compile():
    stacks_compile(nn.LSTM(3, 4, 2))


def test_which_layers_run_side_by_side():
    """The rule, on an H100's numbers."""

    def asks(layers, hidden, batch, dtype=torch.bfloat16, gates=4, **changes):
        x = SimpleNamespace(
            is_cuda=True, device=None, shape=(8, batch, hidden), numel=lambda: 1, element_size=lambda: dtype.itemsize
        )
        net = recurrent.Network(x, None, None, [], True, layers, 0.0, True, False, False)._replace(**changes)
        return recurrent.runs_as_stack("pyops", net, gates, hidden)

    with mock.patch.object(recurrent, "_multiprocessors", lambda _: (132, 227 * 1024)):
        assert asks(6, 256, 10) and asks(2, 768, 1) and asks(2, 256, 64, torch.float32)
        assert not asks(1, 256, 10)
        assert not asks(2, 1024, 64)  # products take longer than a barrier
        assert not asks(4, 1024, 1)  # weights do not fit
        assert asks(4, 1024, 1, gates=1)  # those of an RNN do
        assert not asks(2, 256, 1, bidirectional=True)
        assert not asks(2, 256, 1, dropout=0.5)
        assert asks(2, 256, 1, dropout=0.5, train=False)


@pytest.mark.parametrize("name", EXPLAINED)
def test_explains_what_runs(name, monkeypatch):
    explains_what_runs("lstm", name, monkeypatch)


def test_explains_other_backends():
    notes = lambda name, *shapes: " | ".join(explain("lstm", shapes, torch.float32, wanted=name).notes)
    shapes = (5, 3, 2), (1, 3, 7)
    assert "15 x 2 x 28" in notes("cpu", *shapes) and "packed once" in notes("cpu", *shapes)
    # the four gates and the cell state of each step and example
    assert f"keeps {5 * 3 * (28 + 7) * 4} bytes" in notes("cpu", *shapes)
    assert "each step of each layer" in notes("triton", *shapes)
    assert "give the shapes" in notes("cpu", (5, 3, 2))
    if not torch.cuda.is_available():
        assert "none is here" in notes("cuda", *shapes)
