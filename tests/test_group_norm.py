import pytest
import torch

from pyops import functional as F
from pyops import nn, testing
from pyops.core import backend as backends

from .harness import modules_agree, passes, refuses, same_refusal

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
