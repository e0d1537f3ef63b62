import math

import pytest
import torch

from pyops import functional as F
from pyops import nn, testing, use
from pyops.core import backend as backends

from .harness import modules_agree, passes, refuses, same_refusal

torch_F = torch.nn.functional
X = torch.randn(2, 3, 4)


@pytest.mark.parametrize("check", testing.checks())
def test_checks(backend, check):
    passes("softmax", backend, check)


@pytest.mark.parametrize("check", ["accuracy", "gradcheck"])
@pytest.mark.parametrize("op", ["log_softmax", "softmin"])
def test_the_others(backend, op, check):
    passes(op, backend, check)


@pytest.mark.parametrize("check", testing.checks())
def test_log_softmax_on_the_cpu(check):
    passes("log_softmax", "cpu", check)


@pytest.mark.race
@pytest.mark.parametrize("op", ["softmax", "log_softmax"])
def test_race(backend, op):
    passes(op, backend, "accuracy")


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "softmin"])
@pytest.mark.parametrize("dim", [-3, 0, 1, 2, None])
def test_every_dimension(backend, name, dim):
    with backends.backend(backend):
        y = getattr(F, name)(X, dim)
    torch.testing.assert_close(y, getattr(torch_F, name)(X, dim, _stacklevel=3))


def test_dtype_converts_first(backend):
    x = torch.full((1, 2), 3e38)
    with backends.backend(backend):
        y = F.softmax(x.double() * 2, 1, dtype=torch.float64)
        assert F.log_softmax(torch.arange(3), 0, dtype=torch.float32).dtype == torch.float32
    torch.testing.assert_close(y, torch.full((1, 2), 0.5, dtype=torch.float64))


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@pytest.mark.parametrize("dim", [0, 1])
def test_infinities_and_nan_as_torch(backend, name, dim):
    inf, nan = math.inf, math.nan
    x = torch.tensor([[0.0, -inf, 1.0], [-inf, -inf, -inf], [inf, 0.0, 1.0], [nan, 0.0, 1.0], [1e30, -1e30, 1e30]])
    with backends.backend(backend):
        y = getattr(F, name)(x, dim)
    torch.testing.assert_close(y, getattr(torch_F, name)(x, dim), equal_nan=True)


def test_large_logits_keep_their_digits(backend):
    x = (torch.randn(4, 33) + 20000.0).requires_grad_()
    with backends.backend(backend):
        (dx,) = torch.autograd.grad(F.softmax(x, 1).square().sum(), x)
    (expected,) = torch.autograd.grad(torch_F.softmax(x, 1).square().sum(), x)
    torch.testing.assert_close(dx, expected)


def test_scalar_and_empty():
    assert F.softmax(torch.tensor(3.0), 0) == 1
    assert F.softmax(torch.zeros(2, 0, 3), 1).shape == (2, 0, 3)
    assert F.log_softmax(torch.zeros(0, 3), 0).shape == (0, 3)


@pytest.mark.parametrize("text", ["Softmax(1)", "LogSoftmax(dim=-1)", "Softmin(0)"])
def test_module(text):
    modules_agree(eval(f"nn.{text}"), eval(f"torch.nn.{text}"), X, "cpu")


def test_softmax2d():
    x = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(nn.Softmax2d()(x), torch.nn.Softmax2d()(x))
    same_refusal(nn.Softmax2d(), torch.nn.Softmax2d(), torch.ones(3))


def test_every_spelling_is_routed():
    with use() as report:
        spellings = [torch_F.softmax(X, 1), torch.softmax(X, 1), X.softmax(1), X.softmax(dim=1)]
        X.log_softmax(1, dtype=torch.float64)
    for y in spellings:
        torch.testing.assert_close(y, torch.softmax(X, 1))
    assert report.entries["softmax"].backends["cpu"] == 4 and report.entries["log_softmax"].backends["cpu"] == 1


def test_bad_input():
    refuses(IndexError, ("softmax", "'dim'", "3"), F.softmax, X, 3)
    refuses(NotImplementedError, ("log_softmax", "'input'", "int64"), F.log_softmax, X.long(), 0)
    refuses(TypeError, ("softmax", "'dim'", "str"), F.softmax, X, "0")


@pytest.mark.parametrize("args", [(X, 3), (X, -4), (X.long(), 0), (X, "0")])
def test_refuses_as_torch(args):
    same_refusal(F.softmax, torch_F.softmax, *args)
