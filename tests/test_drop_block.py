import pytest
import torch

from pyops import vision

from .harness import refuses

CASES = [(vision.drop_block2d, (2, 3, 9, 8)), (vision.drop_block3d, (2, 2, 7, 9, 8))]


@pytest.mark.parametrize("function, shape", CASES)
def test_whole_blocks_are_dropped(function, shape):
    torch.manual_seed(0)
    x = torch.ones(shape)
    y = function(x, 0.2, 3)
    kept = y != 0
    assert 0.05 < 1 - kept.float().mean() < 0.4
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], kept.numel() / kept.sum()))
    # every dropped element belongs to a block of 3 that is dropped as a whole
    dims = len(shape) - 2
    pool = getattr(torch.nn.functional, f"max_pool{dims}d")
    whole = -pool(kept.float(), 3, 1) == 0
    centres = torch.nn.functional.pad(whole.float(), [1] * 2 * dims)
    assert torch.equal(pool(centres, 3, 1, 1) == 1, ~kept)


@pytest.mark.parametrize("function, shape", CASES)
def test_share_of_dropped_elements(function, shape):
    torch.manual_seed(0)
    x = torch.ones(16, 16, *shape[2:])
    for p in (0.1, 0.3):
        # centres are drawn independently: an element inside is spared with probability (1 - gamma)^(block^d)
        y = function(x, p, 1)
        assert abs((y == 0).float().mean().item() - p) < 0.01


@pytest.mark.parametrize("function, shape", CASES)
def test_identity_gradient_and_in_place(function, shape):
    x = torch.randn(shape, requires_grad=True)
    assert function(x, 0.0, 3) is x and function(x, 0.5, 3, training=False) is x
    torch.manual_seed(1)
    y = function(x, 0.3, 3)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx * x, y)
    torch.manual_seed(1)
    z = x.detach().clone()
    assert function(z, 0.3, 3, inplace=True) is z and torch.equal(z, y)


def test_modules():
    x = torch.randn(2, 3, 6, 6)
    module = vision.DropBlock2d(0.3, 3)
    torch.manual_seed(2)
    y = module(x)
    torch.manual_seed(2)
    assert torch.equal(y, vision.drop_block2d(x, 0.3, 3)) and module.eval()(x) is x
    assert repr(vision.DropBlock3d(0.1, 5, True)) == "DropBlock3d(p=0.1, block_size=5, inplace=True)"
    assert vision.DropBlock3d(0.5, 3)(x[:, None]).shape == (2, 1, 3, 6, 6)


def test_bad_input():
    x = torch.randn(2, 3, 6, 6)
    refuses(ValueError, ("drop_block2d", "'p'", "1.5"), vision.drop_block2d, x, 1.5, 3)
    refuses(ValueError, ("drop_block2d", "'block_size'", "4"), vision.drop_block2d, x, 0.5, 4)
    refuses(ValueError, ("drop_block2d", "'block_size'"), vision.drop_block2d, x, 0.5, 9)  # cut to 6
    refuses(ValueError, ("drop_block3d", "'input'", "4 dimensions"), vision.drop_block3d, x, 0.5, 3)
