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
ONES = torch.ones(4)


@pytest.mark.parametrize("check", testing.checks())
def test_checks(backend, check):
    passes("batch_norm", backend, check)


@pytest.mark.race
def test_race(backend):
    passes("batch_norm", backend, "accuracy")


@pytest.mark.race
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("affine", [True, False])
def test_channels_normalised_while_the_cache_holds_them(backend, affine, dtype):
    """An input larger than half of L2 takes one launch, whose blocks wait for each other's channels."""
    x = (torch.randn(2, 5, 2056) + torch.arange(5)[:, None]).to(dtype)
    parameters = (torch.randn(5).to(dtype), torch.randn(5).to(dtype)) if affine else ()
    ours = lambda x, *p: F.batch_norm(x, None, None, *p, training=True)
    theirs = lambda x, *p: torch.nn.functional.batch_norm(x, None, None, *p, training=True)
    with backends.backend(backend), emulated_device(backend, l2_bytes=32 * 1024 * dtype.itemsize):
        agrees(ours, theirs, x, *parameters)


@pytest.mark.parametrize("momentum", [0.1, None], ids=["moving average", "cumulative average"])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_module(backend, dimensions, track, momentum):
    name = f"BatchNorm{dimensions}d"
    make = lambda m: getattr(m, name)(3, momentum=momentum, track_running_stats=track)
    modules_agree(make(nn), make(torch.nn), torch.randn(4, 3, *(5, 2, 3)[:dimensions]), backend)


def test_module_on_two_dimensions(backend):
    modules_agree(nn.BatchNorm1d(6), torch.nn.BatchNorm1d(6), torch.randn(5, 6), backend)


def test_low_precision_with_float32_parameters_and_statistics(backend):
    x = torch.randn(4, 3, 5, 5).bfloat16()
    statistics = [torch.zeros(3), torch.ones(3)], [torch.zeros(3), torch.ones(3)]
    w, b = torch.randn(3), torch.randn(3)
    with backends.backend(backend):
        y = F.batch_norm(x, *statistics[0], w, b, True)
    z = torch.nn.functional.batch_norm(x, *statistics[1], w, b, True)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, z, rtol=0.01, atol=0.01)
    for ours, theirs in zip(*statistics):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 4, 0)])
def test_empty_batch(backend, shape):
    mean, var = torch.zeros(shape[1]), torch.ones(shape[1])
    x = torch.ones(shape, requires_grad=True)
    with backends.backend(backend):
        y = F.batch_norm(x, mean, var, training=True)
        y.sum().backward()
    assert y.shape == shape and x.grad.shape == shape
    assert (mean == 0).all() and (var == 1).all()


def test_bad_input():
    bn = F.batch_norm
    refuses(IndexError, ("batch_norm", "'input'"), bn, torch.ones(3), None, None, training=True)
    refuses(RuntimeError, ("batch_norm", "'weight'", "[3]", "[4]"), bn, X, None, None, torch.ones(3), training=True)
    refuses(RuntimeError, ("batch_norm", "'running_mean'", "[3]"), bn, X, torch.ones(3), ONES, training=True)
    refuses(RuntimeError, ("batch_norm", "'running_mean'"), bn, X, None, None)
    refuses(ValueError, ("batch_norm", "'running_var'"), bn, X, ONES, None, training=True)
    refuses(NotImplementedError, ("batch_norm", "'input'"), bn, X.long(), None, None, training=True)
    refuses(ValueError, ("batch_norm", "'input'", "[1, 4]"), bn, torch.ones(1, 4), None, None, training=True)
    refuses(ValueError, ("batch_norm", "'eps'", "-1"), bn, X, None, None, training=True, eps=-1)
    refuses(ValueError, ("batch_norm", "'momentum'", "-1"), bn, X, ONES, ONES, training=True, momentum=-1)


@pytest.mark.parametrize(
    "args",
    [
        (torch.ones(3), None, None, None, None, True),
        (X, None, None, torch.ones(3), None, True),
        (X, torch.ones(3), ONES, None, None, True),
        (X, None, None),
        (X, ONES, None, None, None, True),
        (X.int(), None, None, None, None, True),
        (torch.ones(1, 4), None, None, None, None, True),
        (X, None, None, None, None, True, 0.1, -1),
    ],
)
def test_refuses_as_torch(args):
    same_refusal(F.batch_norm, torch.nn.functional.batch_norm, *args)


def test_module_refuses_a_wrong_rank_as_torch():
    same_refusal(nn.BatchNorm2d(4), torch.nn.BatchNorm2d(4), X)


def test_infinity_reaches_the_running_mean_as_in_torch():
    """The mean of a channel that holds one infinity is infinite; its variance is not a number."""
    x = torch.randn(2, 3, 5)
    x[0, 1, 2] = float("inf")
    ours, theirs = ((torch.zeros(3), torch.ones(3)) for _ in range(2))
    with backends.backend("cpu"):
        F.batch_norm(x, *ours, training=True)
    torch.nn.functional.batch_norm(x, *theirs, training=True)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, equal_nan=True)


@properties
@given(
    batch=st.integers(3, 9),
    channels=st.one_of(st.integers(1, 40), st.sampled_from([64, 65, 513])),
    space=st.lists(st.integers(1, 9), max_size=3),
    dtype=floating,
    layout=layouts,
    shift=st.sampled_from([0.0, 40.0]),
    affine=st.booleans(),
    training=st.booleans(),
)
def test_any_shape_and_layout(batch, channels, space, dtype, layout, shift, affine, training):
    def make(t):
        x = laid_out(t, (batch, channels, *space), layout, shift)
        mean, var = t.constant((channels,)), t.constant((channels,), positive=True)
        parameters = {"weight": t.input((channels,)), "bias": t.input((channels,))} if affine else {}
        return (x, mean, var), {**parameters, "training": training, "eps": 0.1}

    accurate(F.batch_norm, torch.nn.functional.batch_norm, make, dtype)


@pytest.mark.parametrize("space", [(7, 7), (14, 14), (31,), (1200,)])
def test_many_channels(space):
    def make(t):
        shape = (6, 150, *space)
        return (t.input(shape, 3.0), None, None, t.input((150,)), t.input((150,)), True), {}

    accurate(F.batch_norm, torch.nn.functional.batch_norm, make, torch.float32)


def test_explains_its_blocking():
    notes = lambda *shape: " | ".join(explain("batch_norm", [shape], wanted="cpu").notes)
    assert "whole channels, in blocks of 4096" in notes(32, 64, 56, 56)
    assert "lanes over channels" in notes(256, 512)


@pytest.mark.slow
@pytest.mark.parametrize("channels_last", [False, True])
def test_offsets_past_32_bits(backend, channels_last):
    if backend != "cpu":
        pytest.skip("the kernels of csrc/cpu only: minutes elsewhere")
    shape = (2**11 + 1, 4, 2**18) if not channels_last else (2**11 + 1, 2**18, 4)
    x = torch.zeros(shape, dtype=torch.bfloat16)  # pages that nobody writes take no memory
    x[-1] = torch.randn(shape[1:])
    x = x.transpose(1, 2) if channels_last else x
    mean, var = torch.zeros(4), torch.ones(4)
    with backends.backend(backend):
        y = F.batch_norm(x, mean, var, training=True, momentum=1.0)
    last = x[-1].double()
    torch.testing.assert_close(mean, (last.sum(1) / (x.numel() / 4)).float(), rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(var, (last.square().sum(1) / (x.numel() / 4)).float(), rtol=1e-3, atol=1e-8)
    expected = (last - mean[:, None]) / (var[:, None].double() + 1e-5).sqrt()
    torch.testing.assert_close(y[-1].double(), expected, rtol=0.01, atol=0.01)


def test_more_elements_than_32_bits_count():
    x = torch.empty(2**11, 2**6, 2**7, 2**7, device="meta", requires_grad=True)
    y = F.batch_norm(x, None, None, training=True)
    assert y.shape == x.shape and y.dtype == x.dtype
