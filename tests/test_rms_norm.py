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
    passes("rms_norm", backend, check)


@pytest.mark.race
def test_race(backend):
    passes("rms_norm", backend, "accuracy")


@pytest.mark.race
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("capability", [80, 90])
def test_few_wide_rows(backend, capability, dtype):
    """Several blocks share a row: in a cluster, or before sm_90 in several launches."""
    width = 32 * 1024 // dtype.itemsize + 64
    x, w = torch.randn(2, width).to(dtype), torch.randn(width).to(dtype)
    ours = lambda x, w: F.rms_norm(x, (width,), w, 1e-5)
    theirs = lambda x, w: torch.nn.functional.rms_norm(x, (width,), w, 1e-5)
    with backends.backend(backend), emulated_device(backend, capability=capability):
        agrees(ours, theirs, x, w)


@pytest.mark.parametrize("eps", [None, 0.1])
def test_module(backend, eps):
    make = lambda m: m.RMSNorm((4, 3), eps=eps)
    modules_agree(make(nn), make(torch.nn), torch.randn(5, 4, 3), backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_default_eps_is_that_of_torch(dtype):
    x = torch.full((1, 8), 1e-4, dtype=torch.float64).to(dtype)
    torch.testing.assert_close(F.rms_norm(x, (8,)), torch.nn.functional.rms_norm(x, (8,)))


def test_bad_input():
    rms = F.rms_norm
    refuses(RuntimeError, ("rms_norm", "'normalized_shape'", "[4]"), rms, X, (4,))
    refuses(RuntimeError, ("rms_norm", "'weight'", "[4]", "[3]"), rms, X, (3,), torch.ones(4))
    refuses(NotImplementedError, ("rms_norm", "'input'", "int64"), rms, X.long(), (3,))
    refuses(ValueError, ("rms_norm", "'eps'", "-1"), rms, X, (3,), eps=-1)


@pytest.mark.parametrize("args", [(X, (4,)), (X, ()), (X, (3,), torch.ones(4)), (X.int(), (3,))])
def test_refuses_as_torch(args):
    same_refusal(F.rms_norm, torch.nn.functional.rms_norm, *args)


@properties
@given(
    rows=st.lists(st.integers(1, 5), min_size=1, max_size=2),
    columns=st.one_of(st.integers(1, 70), st.sampled_from([129, 4099])),
    dtype=floating,
    layout=layouts,
    affine=st.booleans(),
)
def test_any_shape_and_layout(rows, columns, dtype, layout, affine):
    def make(t):
        x = laid_out(t, (*rows, columns), layout)
        return (x, (columns,), t.input((columns,)) if affine else None), {"eps": 1e-2}

    accurate(F.rms_norm, torch.nn.functional.rms_norm, make, dtype)


def test_explains_its_blocking():
    notes = explain("rms_norm", [(4096, 1024)], wanted="cpu").notes
    assert "4096 rows of 1024: a thread takes whole rows" in notes
    assert "forward: one row at a time; backward: one row at a time" in notes
