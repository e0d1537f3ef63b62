import pytest
import torch

from pyops import functional as F
from pyops import nn, testing, use

from .harness import passes, refuses, same_refusal
from .recurrent_harness import cells_agree, equal

X, H = torch.ones(2, 3), torch.ones(2, 4)
W_IH, W_HH, B = torch.ones(12, 3), torch.ones(12, 4), torch.ones(12)


@pytest.mark.parametrize("check", testing.checks())
def test_cell(backend, check):
    passes("gru_cell", backend, check)


@pytest.mark.race
def test_race(backend):
    passes("gru_cell", backend, "accuracy")


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
