"""How tensors reach a kernel: ``[*, N]`` as rows ``[M, N]``; ``[N, C, *]`` as it is or as ``[N, *, C]``.

A view costs a microsecond, and as much again in the backward pass: none is made of what has its shape already.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from . import check


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


def channels(x: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """``(x, False)`` or, in the order of a channels-last memory, ``(x as [N, *, C], True)``: contiguous either way.

    A copy only where x is neither contiguous nor channels last. Without space both orders are one, and it counts as
    the latter.
    """
    if x.is_contiguous():
        return x, x.dim() == 2
    if is_channels_last(x):
        return x.movedim(1, -1), True
    return x.contiguous(), x.dim() == 2


def restore(y: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """The inverse of ``channels``: [N, C, *] again."""
    return y.movedim(-1, 1) if channels_last and y.dim() > 2 else y


def along_channels(t: torch.Tensor, dims: int) -> torch.Tensor:
    """A tensor [C] that broadcasts against [N, C, *] of ``dims`` dimensions."""
    return t.reshape(-1, *(1,) * (dims - 2))


def flatten_dense(x: torch.Tensor) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """``(flat, restore)``: x as one row in memory order, and what gives a row x's shape and strides.

    A copy only where x has gaps or overlaps; then the result is contiguous.
    """
    moved, order = in_memory_order(x)
    return moved.view(-1), lambda y: from_memory_order(y.view(moved.shape), order)


def in_memory_order(x: torch.Tensor) -> tuple[torch.Tensor, Sequence[int]]:
    """``(moved, order)``: x as a contiguous tensor, and which of its dimensions stands where there.

    A copy only where x has gaps or overlaps; then the order stays, as it does where x is contiguous: a range.
    """
    dims = range(x.dim())
    if x.is_contiguous():
        return x, dims
    strides = x.stride()
    order = sorted(dims, key=lambda d: -strides[d])
    moved = x.permute(order)
    return (moved, order) if moved.is_contiguous() else (x.contiguous(), dims)


def from_memory_order(y: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """The inverse of ``in_memory_order``, for what has the shape of ``moved``."""
    return y if isinstance(order, range) else y.permute(sorted(range(len(order)), key=order.__getitem__))


def memory_order(x: torch.Tensor) -> list[int]:
    """Dimensions from the slowest to the fastest: elements are numbered as they lie in memory."""
    dims = list(range(x.dim()))
    if x.is_contiguous() or 0 in x.stride():
        return dims
    return sorted(dims, key=lambda d: -x.stride(d))


def channels_before_space(op: str, x: torch.Tensor, channel_axis: int | None) -> torch.Tensor:
    """Images as [*, C, H, W]: channels moved before the last two dimensions; one channel where no axis is named."""
    least = 2 if channel_axis is None else 3
    if x.dim() < least:
        check.fail(ValueError, op, "input", f"shape {list(x.shape)}", f"at least {least} dimensions")
    if channel_axis is None:
        return x.unsqueeze(-3)
    if not isinstance(channel_axis, int) or isinstance(channel_axis, bool):
        check.fail(TypeError, op, "channel_axis", repr(channel_axis), "an int or None")
    if not -x.dim() <= channel_axis < x.dim():
        check.fail(IndexError, op, "channel_axis", channel_axis, f"a dimension of shape {list(x.shape)}")
    return x.movedim(channel_axis, -3)
