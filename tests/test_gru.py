import pytest
import torch

from pyops import functional as F
from pyops import nn, use

from .harness import passes, refuses, same_refusal
from .recurrent_harness import (
    EXPLAINED,
    MULTICAST,
    NETWORKS,
    OF_THE_RECIPE,
    STACKS,
    TENSOR_CORES,
    cells_agree,
    equal,
    explains_what_runs,
    network_case,
    networks_agree,
    products_on_tensor_cores,
    stacks_agree,
    stacks_compile,
    stacks_differentiate,
    states_by_multicast,
)

X, H = torch.ones(2, 3), torch.ones(2, 4)
W_IH, W_HH, B = torch.ones(12, 3), torch.ones(12, 4), torch.ones(12)


@pytest.mark.parametrize("op", ["gru_cell", "gru"])
@pytest.mark.parametrize("check", OF_THE_RECIPE)
def test_checks(op, check):
    passes(op, "cpu", check)


@pytest.mark.parametrize("op", ["gru_cell", "gru"])
def test_kernels(backend, op):
    passes(op, backend, "accuracy")


@pytest.mark.race
@pytest.mark.parametrize("op", ["gru_cell", "gru"])
def test_race(backend, op):
    passes(op, backend, "accuracy")


@pytest.mark.parametrize("bias", [True, False])
def test_cell_module(backend, bias):
    cells_agree(nn.GRUCell(5, 7, bias), torch.nn.GRUCell(5, 7, bias), 7, 1, backend)


def test_an_unmodified_cell_is_routed():
    cell, x = torch.nn.GRUCell(3, 4), torch.randn(2, 3)
    expected = cell(x)
    with use() as report:
        y = cell(x)
    equal(y, expected)
    assert report.entries["gru_cell"].backends == {"cpu": 1}


CELL = [
    ((torch.ones(2, 5), H, W_IH, W_HH), RuntimeError, ("'input'", "[2, 5]", "3")),
    ((X, torch.ones(3, 4), W_IH, W_HH), RuntimeError, ("'hx'", "[3, 4]", "[2, 4]")),
    ((X, H, W_IH, torch.ones(12, 5)), RuntimeError, ("'w_hh'", "[12, 5]")),
    ((X, H, torch.ones(16, 3), W_HH), RuntimeError, ("'w_ih'", "[16, 3]")),
    ((X, H, W_IH, W_HH, B, torch.ones(4)), RuntimeError, ("'b_hh'", "[4]", "[12]")),
    ((X, H.double(), W_IH, W_HH), RuntimeError, ("'hx'", "float32", "float64")),
    ((X, None, W_IH, W_HH), TypeError, ("'hx'", "NoneType")),
]


@pytest.mark.parametrize("args, kind, words", CELL)
def test_cell_refuses_as_torch(args, kind, words):
    refuses(kind, ("gru_cell", *words), F.gru_cell, *args)
    same_refusal(F.gru_cell, torch.gru_cell, *args)


def test_cell_module_refuses_as_torch():
    for args in ((torch.ones(1, 2, 3),), (X, H[None]), (torch.ones(2, 4),), (X, torch.ones(2, 5))):
        same_refusal(nn.GRUCell(3, 4), torch.nn.GRUCell(3, 4), *args)


@pytest.mark.network
@pytest.mark.parametrize("name", NETWORKS)
def test_module(backend, name):
    settings, x, states = network_case(name, lambda layers, batch: torch.randn(layers, *batch, 7))
    networks_agree(nn.GRU(5, 7, **settings), torch.nn.GRU(5, 7, **settings), x, states, backend)


def test_an_unmodified_network_is_routed():
    network = torch.nn.GRU(5, 7, 2, bidirectional=True)
    for x in (torch.randn(4, 3, 5), torch.nn.utils.rnn.pack_sequence([torch.randn(3, 5), torch.randn(2, 5)])):
        expected = network(x)
        with use() as report:
            y = network(x)
        equal(tuple(y), tuple(expected))
        assert report.entries["gru"].backends == {"cpu": 1}


X3, H0 = torch.ones(3, 2, 3), torch.ones(1, 2, 4)
PARAMS, REST = [W_IH, W_HH, B, B], (True, 1, 0.0, False, False)
SEQUENCE = [
    ((torch.ones(3, 2, 5), H0, PARAMS, *REST, False), RuntimeError, ("'input'", "[12, 3]", "[12, 5]")),
    ((torch.ones(3, 3), H0, PARAMS, *REST, False), RuntimeError, ("'input'", "2 dimensions")),
    ((X3, torch.ones(1, 2, 5), PARAMS, *REST, False), RuntimeError, ("'hx'", "[1, 2, 5]", "[1, 2, 4]")),
    ((X3, H0, PARAMS[:3], *REST, False), RuntimeError, ("'params'", "3 tensors")),
    ((X3.double(), H0, PARAMS, *REST, False), RuntimeError, ("'hx'", "float32", "float64")),
    ((X3.long(), H0, PARAMS, *REST, False), RuntimeError, ("'input'", "int64")),
    ((X3[0], torch.tensor([2, 1]), H0, PARAMS, *REST), RuntimeError, ("'batch_sizes'", "sum of 3")),
    ((X3[0], torch.tensor([2, 0]), H0, PARAMS, *REST), RuntimeError, ("'batch_sizes'", "[2, 0]")),
]


@pytest.mark.parametrize("args, kind, words", SEQUENCE)
def test_sequence_refuses(args, kind, words):
    refuses(kind, ("gru", *words), F.gru, *args)


def test_module_refuses_as_torch():
    for args in ((torch.ones(3, 2, 4),), (torch.ones(0, 2, 3),), (torch.ones(3),), (X3, H0[0]), (X3.double(),)):
        same_refusal(nn.GRU(3, 4), torch.nn.GRU(3, 4), *args)


def test_derivatives_of_packed_sequences():
    network = nn.GRU(1, 1, bidirectional=True).double()
    x = torch.nn.utils.rnn.pack_sequence([torch.randn(n, 1, dtype=torch.float64) for n in (2, 1)])
    states = (torch.randn(2, 2, 1, dtype=torch.float64),)

    def outputs(data, *states):
        y, final = network(x._replace(data=data), states[0])
        return y.data, *((final,))

    inputs = [t.requires_grad_() for t in (x.data, *states)]
    torch.autograd.gradcheck(outputs, inputs, check_forward_ad=True)
    torch.autograd.gradgradcheck(outputs, inputs, check_fwd_over_rev=True)


def test_a_module_compiles_into_one_graph():
    network, x = nn.GRU(3, 4, 2), torch.randn(5, 2, 3)
    with torch._dynamo.config.patch(allow_rnn=True):  # torch breaks the graph at these modules unless told
        equal(tuple(torch.compile(network, backend="aot_eager", fullgraph=True)(x)), tuple(network(x)))


@pytest.mark.race
@pytest.mark.parametrize("name", TENSOR_CORES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensor_cores(backend, name, dtype):
    products_on_tensor_cores("gru", TENSOR_CORES[name], dtype, backend)


@pytest.mark.race
@pytest.mark.parametrize("name", MULTICAST)
def test_multicast(backend, name, monkeypatch):
    states_by_multicast("gru", MULTICAST[name], torch.bfloat16, backend, monkeypatch)


@pytest.mark.race
@pytest.mark.parametrize("name", STACKS)
def test_layers_side_by_side(backend, name):
    if backend == "triton":
        pytest.skip("Triton has no barrier of all its programs")
    stacks_agree("GRU", name, 1, backend)


def test_derivatives_of_layers_side_by_side():
    stacks_differentiate(nn.GRU(1, 2, 2).double(), 1)


def test_layers_side_by_side_compile():
    stacks_compile(nn.GRU(3, 4, 2))


@pytest.mark.parametrize("name", EXPLAINED)
def test_explains_what_runs(name, monkeypatch):
    explains_what_runs("gru", name, monkeypatch)
