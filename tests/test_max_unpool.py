import pytest
import torch

from pyops import backend as forced
from pyops import functional as F
from pyops import nn, testing, use

from .harness import passes, refuses, same_refusal

torch_F = torch.nn.functional


@pytest.mark.parametrize("check", testing.checks())
def test_checks(backend, check):
    if backend != "cpu" and check not in ("accuracy", "gradcheck", "opcheck"):
        pytest.skip("transforms and higher derivatives are the same Python on every backend")
    passes("max_unpool2d", backend, check)


@pytest.mark.race
def test_race(backend):
    passes("max_unpool2d", backend, "accuracy")


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_undoes_max_pool(backend, rank):
    x = torch.randperm(2 * 3 * 6**rank).float().reshape(2, 3, *(6,) * rank)
    y, index = getattr(F, f"max_pool{rank}d")(x, 2, return_indices=True)
    module = getattr(nn, f"MaxUnpool{rank}d")(2)
    with forced(backend):
        back, alone = module(y, index), module(y[0], index[0], output_size=x.shape[2:])
    expected = getattr(torch_F, f"max_unpool{rank}d")(y, index, 2)
    assert torch.equal(back, expected) and torch.equal(alone, expected[0])


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_channels_before_or_behind_space(rank):
    """Each of values and indices may lie in memory as it likes; the output follows the values."""
    x = torch.randperm(2 * 3 * 4**rank).float().reshape(2, 3, *(4,) * rank)
    y, index = getattr(torch_F, f"max_pool{rank}d")(x, 2, return_indices=True)
    behind = lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1)
    expected = getattr(torch_F, f"max_unpool{rank}d")(y, index, 2)
    for value in (y, behind(y)):
        for place in (index, behind(index)):
            back = getattr(F, f"max_unpool{rank}d")(value, place, 2)
            assert torch.equal(back, expected)
            assert back.movedim(1, -1).is_contiguous() == value.movedim(1, -1).is_contiguous()


def test_the_last_of_equal_places_stays(backend):
    x, index = torch.arange(1.0, 9).reshape(1, 1, 2, 4), torch.tensor([[[[3, 3, 0, 5], [3, 5, 5, 7]]]])
    x.requires_grad_()
    with forced(backend):
        y = F.max_unpool2d(x, index, 2)
        (dx,) = torch.autograd.grad(y, x, torch.arange(32.0).reshape(y.shape))
    assert y.flatten()[:8].tolist() == [3, 0, 0, 5, 0, 7, 0, 8]
    assert torch.equal(dx.flatten(), index.flatten().float())  # each gets the gradient of its place, as in torch


def test_index_outside_the_output():
    x, index = torch.ones(1, 1, 2, 2), torch.full((1, 1, 2, 2), 16)
    said = ("'indices'", "got 16 out of bounds", "[0, 16)")
    refuses(RuntimeError, ("max_unpool2d: ", *said), F.max_unpool2d, x, index, 2)
    refuses(RuntimeError, ("max_unpool1d: ", *said[:1]), F.max_unpool1d, x[0], index[0], 2)
    refuses(RuntimeError, ("max_unpool3d: ", *said[:1]), F.max_unpool3d, x[None], 99 * index[None], 2)
    same_refusal(F.max_unpool2d, torch_F.max_unpool2d, x, -index, 2)
    for name in ("emulator", "triton"):
        try:
            force = forced(name)
        except RuntimeError:
            continue
        with force:
            assert not F.max_unpool2d(x, index, 2).any()


@pytest.mark.parametrize(
    ("index", "how"),
    [
        (torch.zeros(1, 1, 2, 2, dtype=torch.int32), {}),
        (torch.zeros(1, 1, 2, 3, dtype=torch.int64), {}),
        (torch.zeros(1, 1, 2, 2, dtype=torch.int64), {"output_size": (7, 4)}),
        (torch.zeros(1, 1, 2, 2, dtype=torch.int64), {"output_size": (4,)}),
    ],
)
def test_refuses_as_torch(index, how):
    same_refusal(F.max_unpool2d, torch_F.max_unpool2d, torch.ones(1, 1, 2, 2), index, 2, **how)


def test_is_routed():
    x = torch.randn(1, 2, 4, 4)
    y, index = torch_F.max_pool2d(x, 2, return_indices=True)
    with use() as report:
        torch.nn.MaxUnpool2d(2)(y, index), torch_F.max_unpool1d(y[0, 0], index[0, 0] % 4, 2)
    assert report.entries["max_unpool2d"].backends == {"cpu": 1} and not report.unrouted()
