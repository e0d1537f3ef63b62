import pytest
import torch

from pyops import functional as F
from pyops import nn, testing
from pyops.core import backend as backends

from .harness import modules_agree, passes, refuses, same_refusal

X = torch.ones(2, 4, 3)


@pytest.mark.parametrize("check", testing.checks())
def test_checks(backend, check):
    passes("layer_norm", backend, check)


@pytest.mark.race
def test_race(backend):
    passes("layer_norm", backend, "accuracy")


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_module(backend, affine, bias):
    make = lambda m: m.LayerNorm((4, 3), elementwise_affine=affine, bias=bias)
    modules_agree(make(nn), make(torch.nn), torch.randn(5, 4, 3), backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_input_with_float32_affine(backend, dtype):
    x, w, b = torch.randn(6, 40).to(dtype), torch.randn(40), torch.randn(40)
    with backends.backend(backend):
        y = F.layer_norm(x, (40,), w, b)
    assert y.dtype == dtype
    exact = torch.nn.functional.layer_norm(x.double(), (40,), w.double(), b.double())
    torch.testing.assert_close(y.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)


def test_nan_and_infinity_stay_in_their_row(backend):
    x = torch.randn(4, 33)
    x[1, 5], x[2, 7] = float("nan"), float("inf")
    with backends.backend(backend):
        y = F.layer_norm(x, (33,))
    assert y[1].isnan().all() and y[2].isnan().all()
    torch.testing.assert_close(y[[0, 3]], torch.nn.functional.layer_norm(x, (33,))[[0, 3]])


def test_variance_survives_a_huge_mean(backend):
    x = (1e6 + torch.randn(3, 512, dtype=torch.float64)).float()
    exact = torch.nn.functional.layer_norm(x.double(), (512,))
    error = lambda y: (y.double() - exact).abs().max().item()
    with backends.backend(backend):
        ours = error(F.layer_norm(x, (512,)))
    # at 1e6 the mean itself rounds to 1/16
    assert ours <= 2 * error(torch.nn.functional.layer_norm(x, (512,))) < 0.1


def test_bad_input():
    ln = F.layer_norm
    refuses(RuntimeError, ("layer_norm", "'normalized_shape'", "[4]"), ln, X, (4,))
    refuses(RuntimeError, ("layer_norm", "'normalized_shape'"), ln, X, ())
    refuses(RuntimeError, ("layer_norm", "'weight'", "[4]", "[3]"), ln, X, (3,), torch.ones(4))
    refuses(RuntimeError, ("layer_norm", "'bias'"), ln, X, (3,), torch.ones(3), torch.ones(4))
    refuses(RuntimeError, ("layer_norm", "'weight'", "float64"), ln, X, (3,), torch.ones(3).double())
    refuses(RuntimeError, ("layer_norm", "'weight'", "meta"), ln, X, (3,), torch.ones(3, device="meta"))
    refuses(NotImplementedError, ("layer_norm", "'input'", "int64"), ln, X.long(), (3,))
    refuses(ValueError, ("layer_norm", "'eps'", "-1"), ln, X, (3,), eps=-1)
    refuses(TypeError, ("layer_norm", "'input'"), ln, [1.0], (1,))


@pytest.mark.parametrize(
    "args",
    [(X, (4,)), (X, ()), (X, (3,), torch.ones(4)), (X.int(), (3,)), (X.bfloat16(), (3,), X[0, 0], X[0, 0].bfloat16())],
)
def test_refuses_as_torch(args):
    same_refusal(F.layer_norm, torch.nn.functional.layer_norm, *args)


def test_more_elements_than_32_bits_count():
    x = torch.empty(2**20, 2**12, device="meta", requires_grad=True)
    y = F.layer_norm(x, (2**12,))
    assert y.shape == x.shape and y.dtype == x.dtype
