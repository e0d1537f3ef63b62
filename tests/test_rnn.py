import pytest
import torch

from pyops import functional as F
from pyops import nn, testing, use

from .harness import passes, refuses, same_refusal
from .recurrent_harness import cells_agree, equal

X, H = torch.ones(2, 3), torch.ones(2, 4)
W_IH, W_HH, B = torch.ones(4, 3), torch.ones(4, 4), torch.ones(4)


@pytest.mark.parametrize("check", testing.checks())
def test_cell(backend, check):
    passes("rnn_tanh_cell", backend, check)


@pytest.mark.parametrize("check", ["accuracy", "gradcheck", "transforms"])
def test_relu_cell(backend, check):
    passes("rnn_relu_cell", backend, check)


@pytest.mark.race
@pytest.mark.parametrize("op", ["rnn_tanh_cell", "rnn_relu_cell"])
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
