"""How tensors reach a kernel: ``[*, N]`` as rows ``[M, N]``; ``[N, C, *]`` as ``[N, C, S]`` or ``[N, S, C]``.

A view costs a microsecond, and as much again in the backward pass: none is made of what has its shape already.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch


def rows(x: torch.Tensor, dims: int) -> torch.Tensor:
    """The last ``dims`` dimensions as one contiguous row: ``[M, N]``."""
    x = x.contiguous()
    if dims == 1 and x.dim() == 2:
        return x
    split = x.dim() - dims
    return x.reshape(math.prod(x.shape[:split]), math.prod(x.shape[split:]))


def row(p: torch.Tensor | None) -> torch.Tensor | None:
    """A parameter of such rows: ``[N]``."""
    if p is None:
        return None
    p = p.contiguous()
    return p if p.dim() == 1 else p.reshape(p.numel())


def is_channels_last(x: torch.Tensor) -> bool:
    """True where channels vary fastest in memory and batch slowest, in any number of spatial dimensions."""
    return x.dim() > 2 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def flatten(x: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """``(x3, channels_last)``: the kernel's view of x, a copy only where x is neither contiguous nor channels last."""
    n, c = x.shape[0], x.shape[1]
    if x.dim() == 2:
        return x.contiguous().reshape(n, 1, c), True
    if is_channels_last(x):
        return x.movedim(1, -1).reshape(n, _count(x), c), True
    x = x.contiguous()
    return (x if x.dim() == 3 else x.reshape(n, c, _count(x))), False


def restore(y: torch.Tensor, shape: torch.Size, channels_last: bool) -> torch.Tensor:
    """The inverse of ``flatten``: ``shape`` again, in the memory layout that ``channels_last`` says."""
    if not channels_last or len(shape) == 2:
        return y if len(shape) == 3 else y.reshape(shape)
    return y.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def flatten_dense(x: torch.Tensor) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """``(flat, restore)``: x as one row in memory order, and what gives a row x's shape and strides.

    A copy only where x has gaps or overlaps; then the result is contiguous.
    """
    shape = x.shape
    if x.is_contiguous():
        return x.view(-1), lambda y: y.view(shape)
    strides = x.stride()
    order = sorted(range(x.dim()), key=lambda d: -strides[d])
    moved = x.permute(order)
    if not moved.is_contiguous():
        return x.contiguous().view(-1), lambda y: y.view(shape)
    inverse = sorted(range(x.dim()), key=order.__getitem__)
    return moved.view(-1), lambda y: y.view(moved.shape).permute(inverse)


def _count(x: torch.Tensor) -> int:
    """Number of spatial positions; spelled out because ``-1`` is ambiguous for empty tensors."""
    count = 1
    for size in x.shape[2:]:
        count = count * size
    return count
