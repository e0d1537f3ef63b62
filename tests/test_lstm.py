import pytest
import torch

from pyops import functional as F
from pyops import nn, testing, use

from .harness import agrees_on_every_cpu_capability, passes, refuses, same_refusal
from .recurrent_harness import cells_agree, equal

X, H = torch.ones(2, 3), torch.ones(2, 4)
W_IH, W_HH, B = torch.ones(16, 3), torch.ones(16, 4), torch.ones(16)


@pytest.mark.parametrize("check", testing.checks())
def test_cell(backend, check):
    passes("lstm_cell", backend, check)


@pytest.mark.race
def test_race(backend):
    passes("lstm_cell", backend, "accuracy")


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
    ((X, (H, H), W_IH, None), TypeError, ("'w_hh'", "NoneType")),
]


@pytest.mark.parametrize("args, kind, words", CELL)
def test_cell_refuses_as_torch(args, kind, words):
    refuses(kind, ("lstm_cell", *words), F.lstm_cell, *args)
    same_refusal(F.lstm_cell, torch.lstm_cell, *args)


def test_cell_module_refuses_as_torch():
    for args in ((torch.ones(1, 2, 3),), (X, (H[None], H)), (torch.ones(2, 4),), (X, (torch.ones(2, 5), H))):
        same_refusal(nn.LSTMCell(3, 4), torch.nn.LSTMCell(3, 4), *args)


@pytest.mark.slow
def test_every_cpu_capability_agrees(tmp_path):
    agrees_on_every_cpu_capability(tmp_path, "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
