import pytest
import torch

from pyops import functional as F
from pyops import nn, testing
from pyops.core import backend as backends

from .harness import passes, refuses, same_refusal

X = torch.ones(2, 2, 4, 5)


@pytest.mark.parametrize("op", ["unfold", "fold"])
@pytest.mark.parametrize("check", testing.checks())
def test_checks(backend, op, check):
    passes(op, backend, check)


@pytest.mark.race
@pytest.mark.parametrize("op", ["unfold", "fold"])
def test_race(backend, op):
    passes(op, backend, "accuracy")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unfold_copies_every_bit_pattern(backend, dtype):
    x = torch.tensor([[[[float("nan"), float("inf"), -0.0, 1e-40]]]]).to(dtype)
    with backends.backend(backend):
        y = F.unfold(x, (1, 2), padding=(0, 1))
    torch.testing.assert_close(y, torch.nn.functional.unfold(x, (1, 2), padding=(0, 1)), rtol=0, atol=0, equal_nan=True)


def test_modules_have_the_arguments_of_torch(backend):
    x = torch.randn(2, 3, 6, 7)
    for args in ((3,), ((2, 3), 1, (1, 0), 2)):
        with backends.backend(backend):
            col = nn.Unfold(*args)(x)
            back = nn.Fold((6, 7), *args)(col)
        assert repr(nn.Unfold(*args)) == repr(torch.nn.Unfold(*args))
        torch.testing.assert_close(col, torch.nn.Unfold(*args)(x))
        torch.testing.assert_close(back, torch.nn.Fold((6, 7), *args)(col))


def test_fold_is_the_transpose_of_unfold(backend):
    x, geometry = torch.randn(2, 2, 6, 7, dtype=torch.float64), ((3, 2), (2, 1), (1, 2), (2, 1))
    with backends.backend(backend):
        col = F.unfold(x, *geometry)
        y = torch.randn_like(col)
        left, right = (col * y).sum(), (x * F.fold(y, (6, 7), *geometry)).sum()
    torch.testing.assert_close(left, right)


def test_bad_input():
    refuses(RuntimeError, ("unfold", "'kernel_size'", "7"), F.unfold, X, 7)
    refuses(RuntimeError, ("unfold", "'stride'", "0"), F.unfold, X, 2, stride=0)
    refuses(RuntimeError, ("unfold", "'dilation'", "0"), F.unfold, X, 2, dilation=0)
    refuses(RuntimeError, ("unfold", "'padding'", "-1"), F.unfold, X, 2, padding=-1)
    refuses(RuntimeError, ("unfold", "'input'", "[4, 5]"), F.unfold, X[0, 0], 2)
    refuses(NotImplementedError, ("unfold", "'input'", "int64"), F.unfold, X.long(), 2)
    refuses(RuntimeError, ("fold", "'input'", "12 columns"), F.fold, torch.ones(1, 8, 12), (4, 4), 2)
    refuses(RuntimeError, ("fold", "'input'", "7 rows"), F.fold, torch.ones(1, 7, 9), (4, 4), 2)


@pytest.mark.parametrize("args", [(X, 7), (X, 2, 1, 0, 0), (X[None], 2), (X, 2, 0), (X, 2, 1, -1), (X, (2, 2, 2))])
def test_unfold_refuses_as_torch(args):
    same_refusal(F.unfold, torch.nn.functional.unfold, *args)


def test_more_than_2_31_elements_have_the_right_shape():
    x = torch.empty(2, 64, 8192, 4096, device="meta")
    assert F.unfold(x, 3, padding=1).shape == (2, 576, 8192 * 4096)


@pytest.mark.parametrize("value", [None, "2", 1.5, True, (2, 2.5), (2, None)])
@pytest.mark.parametrize("argument", ["kernel_size", "stride", "padding", "dilation"])
def test_arguments_of_the_wrong_kind(argument, value):
    refuses(
        TypeError, ("unfold", f"'{argument}'"), F.unfold, torch.ones(1, 2, 5, 5), **{"kernel_size": 2, argument: value}
    )
    how = {"output_size": 5, "kernel_size": 2, argument: value}
    refuses(TypeError, ("fold", f"'{argument}'"), F.fold, torch.ones(1, 8, 16), **how)
    with pytest.raises(TypeError):
        torch.nn.functional.fold(torch.ones(1, 8, 16), **how)
