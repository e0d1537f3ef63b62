import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyops import functional as F
from pyops import nn, testing
from pyops.core import backend as backends
from pyops.core.explain import explain

from .harness import (
    accurate,
    agrees,
    emulated_device,
    floating,
    laid_out,
    layouts,
    modules_agree,
    passes,
    properties,
    refuses,
    same_refusal,
)

X = torch.ones(2, 4, 3)


@pytest.mark.parametrize("check", testing.checks())
def test_checks(backend, check):
    passes("layer_norm", backend, check)


@pytest.mark.race
def test_race(backend):
    passes("layer_norm", backend, "accuracy")


@pytest.mark.race
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("capability", [80, 90])
def test_few_wide_rows(backend, capability, dtype):
    """Several blocks share a row: in a cluster, or before sm_90 in several launches."""
    width = 32 * 1024 // dtype.itemsize + 64
    x, w = torch.randn(2, width).to(dtype), torch.randn(width).to(dtype)
    ours = lambda x, w, b: F.layer_norm(x, (width,), w, b)
    theirs = lambda x, w, b: torch.nn.functional.layer_norm(x, (width,), w, b)
    with backends.backend(backend), emulated_device(backend, capability=capability):
        agrees(ours, theirs, x, w, torch.randn(width).to(dtype))


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


@pytest.mark.parametrize("first, mean", [(None, 1e3), (1e4, 0.0)])
def test_deviations_keep_their_digits(backend, first, mean):
    """Also where the mean is far above them, or one value, the first of the row, is far above all others."""
    if backend == "triton":
        pytest.skip("the Triton kernel takes the mean in one rounding, as torch does")
    x = torch.randn(4, 4096) + mean
    if first is not None:
        x[:, 0] = first
    with backends.backend(backend):
        y = F.layer_norm(x, (4096,))
    truth = torch.nn.functional.layer_norm(x.double(), (4096,))
    error = (y - truth)[:, 1:].abs().max() / truth[:, 1:].abs().max()
    assert error < 1e-6


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


@properties
@given(
    rows=st.lists(st.integers(1, 5), min_size=1, max_size=2),
    columns=st.one_of(st.integers(3, 70), st.sampled_from([129, 511, 513, 4095, 4099])),
    dtype=floating,
    layout=layouts,
    shift=st.sampled_from([0.0, 40.0]),
    affine=st.sampled_from(["none", "weight", "bias", "both"]),
)
def test_any_shape_and_layout(rows, columns, dtype, layout, shift, affine):
    def make(t):
        x = laid_out(t, (*rows, columns), layout, shift)
        weight = t.input((columns,)) if affine in ("weight", "both") else None
        bias = t.input((columns,)) if affine in ("bias", "both") else None
        return (x, (columns,), weight, bias), {"eps": 1e-2}

    accurate(F.layer_norm, torch.nn.functional.layer_norm, make, dtype)


@pytest.mark.parametrize("columns", [5, 64, 500, 600, 4096])
@pytest.mark.parametrize("needs", ["x", "weight", "both"])
def test_a_row_does_not_depend_on_its_neighbours(columns, needs):
    x, w, b, dy = torch.randn(11, columns), torch.randn(columns), torch.randn(columns), torch.randn(11, columns)
    w.requires_grad_(needs != "x")

    def run(first, last):
        part = x[first:last].clone().requires_grad_(needs != "weight")
        y = F.layer_norm(part, (columns,), w, b)
        y.backward(dy[first:last])
        return y.detach(), part.grad

    with backends.backend("cpu"):
        for whole, alone in zip(run(0, 11), zip(*(run(m, m + 1) for m in range(11)))):
            assert whole is None or torch.equal(whole, torch.cat(alone))


def notes(op, shape, dtype=torch.float32):
    return " | ".join(explain(op, [shape], dtype, wanted="cpu").notes)


def test_explains_its_blocking():
    short, long, wide = (notes("layer_norm", s) for s in [(65536, 64), (1024, 4096), (2, 1 << 20)])
    assert "four rows at a time" in short and "past the caches" in short
    assert "forward: one row at a time; backward: two rows" in long
    assert "share each row in blocks of 4096" in wide and "through the caches" in wide
    assert "through the caches" in notes("layer_norm", (70000, 63))  # rows that start off a vector
    assert explain("layer_norm", [(4, 8)], wanted="triton").notes == ()


@pytest.mark.slow
def test_offsets_past_32_bits(backend):
    if backend != "cpu":
        pytest.skip("the kernels of csrc/cpu only: minutes elsewhere")
    x = torch.zeros(2**19 + 1, 2**12, dtype=torch.bfloat16)  # pages that nobody writes take no memory
    x[-1] = torch.randn(2**12)
    with backends.backend(backend):
        y = F.layer_norm(x, (2**12,))
    torch.testing.assert_close(y[-1], torch.nn.functional.layer_norm(x[-1], (2**12,)))
    assert not y[0].any() and not y[-2].any()
