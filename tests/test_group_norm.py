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
@pytest.mark.parametrize("op", ["group_norm", "instance_norm"])
def test_checks(backend, op, check):
    passes(op, backend, check)


@pytest.mark.race
@pytest.mark.parametrize("op", ["group_norm", "instance_norm"])
def test_race(backend, op):
    passes(op, backend, "accuracy")


@pytest.mark.race
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("channels", "groups", "positions"), [(6, 2, 16), (6, 2, 1032), (3, 3, 40)])
def test_groups_held_on_chip(backend, dtype, channels, groups, positions):
    """A group in one warp or one block, whose warps meet one or several channels."""
    x = (torch.randn(3, channels, positions) + torch.arange(channels)[:, None]).to(dtype)
    w, b = torch.randn(channels).to(dtype), torch.randn(channels).to(dtype)
    with backends.backend(backend):
        agrees(
            lambda x, w, b: F.group_norm(x, groups, w, b),
            lambda x, w, b: torch.nn.functional.group_norm(x, groups, w, b),
            x, w, b,
        )  # fmt: skip
        agrees(lambda x: F.group_norm(x, groups), lambda x: torch.nn.functional.group_norm(x, groups), x)


@pytest.mark.parametrize("affine", [True, False])
def test_group_norm_module(backend, affine):
    make = lambda m: m.GroupNorm(2, 6, eps=0.01, affine=affine)
    modules_agree(make(nn), make(torch.nn), torch.randn(3, 6, 5), backend)


@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_instance_norm_module(backend, dimensions, track):
    name = f"InstanceNorm{dimensions}d"
    make = lambda m: getattr(m, name)(3, affine=True, track_running_stats=track)
    modules_agree(make(nn), make(torch.nn), torch.randn(4, 3, *(5, 2, 3)[:dimensions]), backend)


def test_unbatched_instance_norm_module(backend):
    modules_agree(nn.InstanceNorm1d(3), torch.nn.InstanceNorm1d(3), torch.randn(3, 7), backend)


def test_without_spatial_positions(backend):
    x, w, b = torch.ones(2, 4, 0, requires_grad=True), ONES.clone().requires_grad_(), ONES.clone().requires_grad_()
    with backends.backend(backend):
        y = F.group_norm(x, 2, w, b)
        y.sum().backward()
    assert y.shape == x.shape == x.grad.shape
    assert (w.grad == 0).all() and (b.grad == 0).all()  # sums over nothing


def test_bad_input():
    gn, inn = F.group_norm, F.instance_norm
    refuses(RuntimeError, ("group_norm", "'num_groups'", "3", "4 channels"), gn, X, 3)
    refuses(ZeroDivisionError, ("group_norm", "'num_groups'"), gn, X, 0)
    refuses(RuntimeError, ("group_norm", "'num_groups'"), gn, X, -2)
    refuses(RuntimeError, ("group_norm", "'input'"), gn, torch.ones(4), 2)
    refuses(RuntimeError, ("group_norm", "'weight'", "[3]", "[4]"), gn, X, 2, torch.ones(3))
    refuses(NotImplementedError, ("group_norm", "'input'"), gn, X.int(), 2)
    refuses(ValueError, ("group_norm", "'eps'"), gn, X, 2, eps=-1)
    refuses(ValueError, ("group_norm", "'input'"), gn, torch.ones(1, 4), 4)
    refuses(ValueError, ("instance_norm", "'input'"), inn, torch.ones(2, 4, 1))
    refuses(RuntimeError, ("instance_norm", "'running_mean'"), inn, X, use_input_stats=False)
    refuses(ValueError, ("instance_norm", "'running_var'"), inn, X, ONES)
    refuses(RuntimeError, ("instance_norm", "'weight'"), inn, X, weight=torch.ones(3))
    refuses(ValueError, ("instance_norm", "'momentum'"), inn, X, ONES, ONES, momentum=-0.1)


@pytest.mark.parametrize(
    "args", [(X, 3), (X, 0), (torch.ones(4), 2), (X, 2, torch.ones(3)), (X.int(), 2), (torch.ones(1, 4), 4)]
)
def test_group_norm_refuses_as_torch(args):
    same_refusal(F.group_norm, torch.nn.functional.group_norm, *args)


@pytest.mark.parametrize(
    "args",
    [(torch.ones(2, 4, 1),), (torch.ones(2, 4),), (X, None, None, torch.ones(3)), (X, None, None, None, None, False)],
)
def test_instance_norm_refuses_as_torch(args):
    same_refusal(F.instance_norm, torch.nn.functional.instance_norm, *args)


@properties
@given(
    batch=st.integers(1, 4),
    groups=st.integers(1, 7),
    per_group=st.integers(1, 9),
    space=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    dtype=floating,
    layout=layouts,
    shift=st.sampled_from([0.0, 40.0]),
    affine=st.sampled_from(["none", "weight", "both"]),
)
def test_any_shape_and_layout(batch, groups, per_group, space, dtype, layout, shift, affine):
    channels = groups * per_group
    if per_group * torch.Size(space).numel() < 3:
        space = [*space, 3]

    def make(t):
        x = laid_out(t, (batch, channels, *space), layout, shift)
        weight = t.input((channels,)) if affine != "none" else None
        bias = t.input((channels,)) if affine == "both" else None
        return (x, groups, weight, bias), {"eps": 0.1}

    accurate(F.group_norm, torch.nn.functional.group_norm, make, dtype)


@properties
@given(
    batch=st.integers(1, 4),
    channels=st.integers(1, 40),
    space=st.lists(st.integers(2, 9), min_size=1, max_size=3),
    dtype=floating,
    layout=layouts,
)
def test_any_shape_and_layout_of_instance_norm(batch, channels, space, dtype, layout):
    def make(t):
        x = laid_out(t, (batch, channels, *space), layout)
        return (x,), {"weight": t.input((channels,)), "bias": t.input((channels,)), "eps": 0.1}

    accurate(F.instance_norm, torch.nn.functional.instance_norm, make, dtype)


def test_explains_its_blocking():
    notes = lambda op, *shape: " | ".join(explain(op, [shape], wanted="cpu").notes)
    assert "whole groups, in blocks of 4096" in notes("group_norm", 16, 256, 14, 14)
    assert "whole planes" in notes("instance_norm", 8, 64, 128, 128)


def test_more_elements_than_32_bits_count():
    x = torch.empty(2**11, 2**6, 2**7, 2**7, device="meta", requires_grad=True)
    for y in (F.group_norm(x, 4), F.instance_norm(x)):
        assert y.shape == x.shape and y.dtype == x.dtype
