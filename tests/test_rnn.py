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
W_IH, W_HH, B = torch.ones(4, 3), torch.ones(4, 4), torch.ones(4)


@pytest.mark.parametrize("op", ["rnn_tanh_cell", "rnn_tanh"])
@pytest.mark.parametrize("check", OF_THE_RECIPE)
def test_checks(op, check):
    passes(op, "cpu", check)


@pytest.mark.parametrize("op", ["rnn_tanh_cell", "rnn_tanh", "rnn_relu_cell", "rnn_relu"])
def test_kernels(backend, op):
    passes(op, backend, "accuracy")


@pytest.mark.race
@pytest.mark.parametrize("op", ["rnn_tanh_cell", "rnn_relu_cell", "rnn_tanh", "rnn_relu"])
def test_race(backend, op):
    passes(op, backend, "accuracy")


@pytest.mark.parametrize("bias, nonlinearity", [(True, "tanh"), (False, "relu")])
def test_cell_module(backend, bias, nonlinearity):
    make = lambda m: m.RNNCell(5, 7, bias, nonlinearity)
    cells_agree(make(nn), make(torch.nn), 7, 1, backend)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_an_unmodified_cell_is_routed(nonlinearity):
    cell, x = torch.nn.RNNCell(3, 4, nonlinearity=nonlinearity), torch.randn(2, 3)
    expected = cell(x)
    with use() as report:
        y = cell(x)
    equal(y, expected)
    assert report.entries[f"rnn_{nonlinearity}_cell"].backends == {"cpu": 1}


CELL = [
    ((torch.ones(2, 5), H, W_IH, W_HH), RuntimeError, ("'input'", "[2, 5]", "3")),
    ((X, torch.ones(3, 4), W_IH, W_HH), RuntimeError, ("'hx'", "[3, 4]", "[2, 4]")),
    ((X, H, W_IH, torch.ones(4, 5)), RuntimeError, ("'w_hh'", "[4, 5]")),
    ((X, H, torch.ones(5, 3), W_HH), RuntimeError, ("'w_ih'", "[5, 3]")),
    ((X, H, W_IH, W_HH, B, torch.ones(3)), RuntimeError, ("'b_hh'", "[3]", "[4]")),
    ((X, H.double(), W_IH, W_HH), RuntimeError, ("'hx'", "float32", "float64")),
]


@pytest.mark.parametrize("name", ["rnn_tanh_cell", "rnn_relu_cell"])
@pytest.mark.parametrize("args, kind, words", CELL)
def test_cell_refuses_as_torch(name, args, kind, words):
    refuses(kind, (name, *words), getattr(F, name), *args)
    same_refusal(getattr(F, name), getattr(torch, name), *args)


def test_cell_module_refuses_as_torch():
    for args in ((torch.ones(1, 2, 3),), (X, H[None]), (torch.ones(2, 4),), (X, torch.ones(2, 5))):
        same_refusal(nn.RNNCell(3, 4), torch.nn.RNNCell(3, 4), *args)
    for module in (nn, torch.nn):
        with pytest.raises(RuntimeError):
            module.RNNCell(3, 4, nonlinearity="sine")(X)


@pytest.mark.network
@pytest.mark.parametrize("name", NETWORKS)
def test_module(backend, name):
    settings, x, states = network_case(name, lambda layers, batch: torch.randn(layers, *batch, 7))
    networks_agree(nn.RNN(5, 7, **settings), torch.nn.RNN(5, 7, **settings), x, states, backend)


def test_an_unmodified_network_is_routed():
    network = torch.nn.RNN(5, 7, 2, bidirectional=True)
    for x in (torch.randn(4, 3, 5), torch.nn.utils.rnn.pack_sequence([torch.randn(3, 5), torch.randn(2, 5)])):
        expected = network(x)
        with use() as report:
            y = network(x)
        equal(tuple(y), tuple(expected))
        assert report.entries["rnn_tanh"].backends == {"cpu": 1}


X3, H0 = torch.ones(3, 2, 3), torch.ones(1, 2, 4)
PARAMS, REST = [W_IH, W_HH, B, B], (True, 1, 0.0, False, False)
SEQUENCE = [
    ((torch.ones(3, 2, 5), H0, PARAMS, *REST, False), RuntimeError, ("'input'", "[4, 3]", "[4, 5]")),
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
    refuses(kind, ("rnn_tanh", *words), F.rnn_tanh, *args)


def test_module_refuses_as_torch():
    for args in ((torch.ones(3, 2, 4),), (torch.ones(0, 2, 3),), (torch.ones(3),), (X3, H0[0]), (X3.double(),)):
        same_refusal(nn.RNN(3, 4), torch.nn.RNN(3, 4), *args)


def test_relu_module(backend):
    make = lambda m: m.RNN(5, 7, 2, nonlinearity="relu")
    networks_agree(make(nn), make(torch.nn), torch.randn(4, 3, 5), torch.randn(2, 3, 7), backend)


def test_derivatives_of_packed_sequences():
    network = nn.RNN(1, 1, bidirectional=True).double()
    x = torch.nn.utils.rnn.pack_sequence([torch.randn(n, 1, dtype=torch.float64) for n in (2, 1)])
    states = (torch.randn(2, 2, 1, dtype=torch.float64),)

    def outputs(data, *states):
        y, final = network(x._replace(data=data), states[0])
        return y.data, *((final,))

    inputs = [t.requires_grad_() for t in (x.data, *states)]
    torch.autograd.gradcheck(outputs, inputs, check_forward_ad=True)
    torch.autograd.gradgradcheck(outputs, inputs, check_fwd_over_rev=True)


def test_a_module_compiles_into_one_graph():
    network, x = nn.RNN(3, 4, 2), torch.randn(5, 2, 3)
    with torch._dynamo.config.patch(allow_rnn=True):  # torch breaks the graph at these modules unless told
        equal(tuple(torch.compile(network, backend="aot_eager", fullgraph=True)(x)), tuple(network(x)))


@pytest.mark.race
@pytest.mark.parametrize("name", TENSOR_CORES)
@pytest.mark.parametrize("op, dtype", [("rnn_tanh", torch.bfloat16), ("rnn_relu", torch.float16)])
def test_tensor_cores(backend, name, op, dtype):
    products_on_tensor_cores(op, TENSOR_CORES[name], dtype, backend)


@pytest.mark.race
@pytest.mark.parametrize("name", MULTICAST)
@pytest.mark.parametrize("op, dtype", [("rnn_tanh", torch.bfloat16), ("rnn_relu", torch.float16)])
def test_multicast(backend, name, op, dtype, monkeypatch):
    states_by_multicast(op, MULTICAST[name], dtype, backend, monkeypatch)


@pytest.mark.race
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("name", STACKS)
def test_layers_side_by_side(backend, name, nonlinearity):
    if backend == "triton":
        pytest.skip("Triton has no barrier of all its programs")
    stacks_agree("RNN", name, 1, backend, nonlinearity=nonlinearity)


def test_derivatives_of_layers_side_by_side():
    stacks_differentiate(nn.RNN(1, 2, 2).double(), 1)


def test_layers_side_by_side_compile():
    stacks_compile(nn.RNN(3, 4, 2))


@pytest.mark.parametrize("name", EXPLAINED)
def test_explains_what_runs(name, monkeypatch):
    explains_what_runs("rnn_tanh", name, monkeypatch)
