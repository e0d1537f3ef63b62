import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyops import functional as F
from pyops import nn, testing, use
from pyops.core.samples import all_checked

from .harness import accurate, laid_out, layouts, modules_agree, passes, properties, refuses, same_refusal

OP = "local_response_norm"
X = torch.arange(96.0).reshape(1, 8, 3, 4)


@pytest.mark.parametrize("check", testing.checks())
def test_checks(backend, check):
    if backend != "cpu" and check not in ("accuracy", "opcheck"):
        pytest.skip("derivatives of higher order, transforms and layouts are the same Python on every backend")
    passes(OP, backend, check)


@pytest.mark.race
def test_race(backend):
    if backend == "emulator":
        passes(OP, backend, "accuracy")


@properties
@given(
    shape=st.lists(st.integers(1, 9), min_size=3, max_size=5), size=st.integers(1, 12), layout=layouts,
    dtype=st.sampled_from([torch.float32, torch.float64]), alpha=st.sampled_from([1e-4, 0.7]),
    beta=st.sampled_from([0.75, 1.5]), k=st.sampled_from([1.0, 0.3]),
)  # fmt: skip
def test_any_shape_and_layout(shape, size, layout, dtype, alpha, beta, k):
    reference = all_checked()[OP].reference  # torch's, which refuses some strides, on a contiguous input
    make = lambda t: ((laid_out(t, tuple(shape), layout), size, alpha, beta, k), {})
    accurate(F.local_response_norm, reference, make, dtype)


def test_not_a_number_reaches_its_window_alone():
    x = torch.randn(1, 9, 2, 40)
    x[0, 4, 1, 3] = torch.nan
    for image in (x, x.contiguous(memory_format=torch.channels_last)):
        for size in (3, 4):
            ours, theirs = (f.local_response_norm(image, size) for f in (F, torch.nn.functional))
            assert torch.equal(ours.isnan(), theirs.isnan())


def test_module_and_route():
    ours, theirs = (m.LocalResponseNorm(5, alpha=0.1, beta=0.6, k=2.0) for m in (nn, torch.nn))
    modules_agree(ours, theirs, torch.randn(2, 8, 3, 4), "cpu")
    with use() as report:
        theirs(X)
    assert sum(report.entries[OP].backends.values()) == 1


def test_second_gradient_without_channels():
    x = torch.ones(2, 0, 3, dtype=torch.float64, requires_grad=True)
    (d,) = torch.autograd.grad(F.local_response_norm(x, 3).sum(), x, create_graph=True)
    assert torch.autograd.grad(d.sum(), x)[0].shape == x.shape


def test_bad_input():
    refuses(ValueError, (OP, "'input'", "[3, 4]"), F.local_response_norm, X[0, 0], 3)
    refuses(RuntimeError, (OP, "'size'", "0"), F.local_response_norm, X, 0)
    for shape in ((0, 3, 4), (2, 0, 4)):  # as torch
        assert F.local_response_norm(torch.ones(shape), 0).shape == shape
    refuses(TypeError, (OP, "'size'", "2.5"), F.local_response_norm, X, 2.5)
    refuses(NotImplementedError, (OP, "'input'", "int64"), F.local_response_norm, X.long(), 3)


@pytest.mark.parametrize("args", [(X[0, 0], 3), (X, 0), (X, -1), (X, 2.5)])
def test_refuses_as_torch(args):
    same_refusal(F.local_response_norm, torch.nn.functional.local_response_norm, *args)
