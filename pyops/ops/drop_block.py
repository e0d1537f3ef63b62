"""DropBlock: whole squares (or cubes) of a map are dropped at random while training, channel by channel.

    y = x * keep * numel(keep) / sum(keep),   keep = 0 in a block around every drawn centre, else 1

Centres are drawn where a block fits, with the probability γ at which a share p of all elements is dropped if no blocks
overlap: ``γ = p * size / (block^d * number of places)``.

Source: Ghiasi et al. 2018, https://arxiv.org/abs/1810.12890; torchvision.ops.drop_block2d, drop_block3d.
"""

from __future__ import annotations

import math

import torch

from ..core import check
from ..core.explain import composite


def _drop_block(
    op: str, dims: int, input: torch.Tensor, p: float, block_size: int, inplace: bool, eps: float, training: bool
) -> torch.Tensor:
    if not 0.0 <= p <= 1.0:
        check.fail(ValueError, op, "p", p, "a probability in [0, 1]")
    if input.dim() != dims + 2:
        check.fail(ValueError, op, "input", f"{input.dim()} dimensions", f"{dims + 2}")
    if not training or p == 0.0:
        return input
    size = input.shape[2:]
    block = min(block_size, *size)
    if block < 1 or block % 2 == 0:
        got = f"{block} (of {block_size} in a map {list(size)})"
        check.fail(ValueError, op, "block_size", got, "an odd number >= 1")
    places = [s - block + 1 for s in size]
    gamma = p * math.prod(size) / (block**dims * math.prod(places))
    centres = torch.empty((*input.shape[:2], *places), dtype=input.dtype, device=input.device).bernoulli_(min(gamma, 1))
    # a block around each centre: the maximum over the window that would reach it
    spread = torch.nn.functional.max_pool2d if dims == 2 else torch.nn.functional.max_pool3d
    dropped = spread(torch.nn.functional.pad(centres, [block // 2] * (2 * dims)), block, 1, block // 2)
    keep = 1 - dropped
    scale = keep.numel() / (eps + keep.sum())
    return input.mul_(keep).mul_(scale) if inplace else input * keep * scale


def drop_block2d(
    input: torch.Tensor, p: float, block_size: int, inplace: bool = False, eps: float = 1e-06, training: bool = True
) -> torch.Tensor:
    """Drops squares of a map; drops in for torchvision.ops.drop_block2d, with the same random numbers.

    Args:
        input: Tensor[N, C, H, W].
        p: share of elements to drop, in [0, 1].
        block_size: side of a block, odd; at most that of the map.
        inplace: writes to the input.
        eps: added to the number of elements that stay.
        training: False returns the input.

    Returns:
        Tensor[N, C, H, W]; what stays is scaled so that the mean stays.

    Raises:
        ValueError: p outside [0, 1], another rank, an even block.
    """
    return _drop_block("drop_block2d", 2, input, p, block_size, inplace, eps, training)


def drop_block3d(
    input: torch.Tensor, p: float, block_size: int, inplace: bool = False, eps: float = 1e-06, training: bool = True
) -> torch.Tensor:
    """Drops cubes of a volume Tensor[N, C, D, H, W]; see ``drop_block2d``."""
    return _drop_block("drop_block3d", 3, input, p, block_size, inplace, eps, training)


class DropBlock2d(torch.nn.Module):
    """``drop_block2d`` as a module; see torchvision.ops.DropBlock2d."""

    def __init__(self, p: float, block_size: int, inplace: bool = False, eps: float = 1e-06) -> None:
        super().__init__()
        self.p = p
        self.block_size = block_size
        self.inplace = inplace
        self.eps = eps

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return drop_block2d(input, self.p, self.block_size, self.inplace, self.eps, self.training)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(p={self.p}, block_size={self.block_size}, inplace={self.inplace})"


class DropBlock3d(DropBlock2d):
    """``drop_block3d`` as a module; see torchvision.ops.DropBlock3d."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return drop_block3d(input, self.p, self.block_size, self.inplace, self.eps, self.training)


composite("drop_block2d", "drop_block3d")
