"""The dropout op, for the room dropout and for what drops inside another layer.

    y = (x * scale + shift where an element is kept, else x * 0 + fill)

Which elements are kept is a function of (seed, offset, position), pyops.core.random: no mask is stored.
"""

from __future__ import annotations

import math

import torch

from . import backend, check, library, random
from .layout import is_channels_last, memory_order
from .multilinear import Multilinear, Tensors, differentiable

_kernels = library.triton_kernels("dropout")

_op = library.declare(
    "dropout(Tensor x, Tensor random, int threshold, float scale, float shift, float fill) -> Tensor",
    lambda x, *_: torch.empty_like(x),
    _kernels,
)


def _linear(namespace: str, v: torch.Tensor, state: torch.Tensor, constants: Tensors) -> torch.Tensor:
    """The linear part of the op on a tensor of x's shape."""
    return _apply(namespace, v, state, *constants[:2], 0.0, 0.0)


def _fold(namespace: str, batch: int, dims: Tensors, inputs: Tensors, constants: Tensors) -> tuple[torch.Tensor, int]:
    """One state for all examples: they share their masks, as more positions s. A state each: one call each."""
    (x, state), (at, state_at) = inputs, dims
    if state_at is None:
        x = x.movedim(at, 1)
        y = _apply(namespace, x.flatten(1, 2).contiguous(), state, *constants)
        return y.reshape(x.shape), 1
    xs = [x] * batch if at is None else x.unbind(at)
    pairs = zip(xs, state.unbind(state_at))
    return torch.stack([_apply(namespace, v.contiguous(), s.contiguous(), *constants) for v, s in pairs]), 0


_apply = differentiable(
    Multilinear(
        _op,
        2,
        lambda namespace, dy, inputs, constants, needs: (_linear(namespace, dy, inputs[1], constants), None),
        lambda namespace, inputs, tangents, constants: _linear(namespace, tangents[0], inputs[1], constants),
        _fold,
        kept=(1,),
    )
)


def numbers(p: float, alpha: bool) -> tuple[int, float, float, float]:
    """Threshold, scale, shift and fill."""
    if not alpha:
        return random.drop_threshold(p), 1 / (1 - p) if p < 1 else 0.0, 0.0, 0.0
    if p == 1:
        return random.drop_threshold(p), 0.0, 0.0, 0.0
    limit = -1.7580993408473766
    a = 1 / math.sqrt((1 - p) * (1 + p * limit**2))
    shift = -a * p * limit
    return random.drop_threshold(p), a, shift, a * limit + shift


def masked(
    op: str, x: torch.Tensor, state: torch.Tensor, p: float, alpha: bool = False, features: bool = False
) -> torch.Tensor:
    """x with what ``state`` drops dropped: single elements, or whole channels [N, C]."""
    namespace, constants = backend.namespace_for(op, x), numbers(p, alpha)
    if not features:
        order = memory_order(x)
        moved = x.permute(order).contiguous()
        y = _apply(namespace, moved.view(1, 1, -1), state, *constants).view(moved.shape)
        return y.permute(sorted(range(x.dim()), key=order.__getitem__))
    n, c = x.shape[:2]
    if is_channels_last(x):
        moved = x.movedim(1, -1)
        return _apply(namespace, moved.reshape(n, -1, c), state, *constants).view(moved.shape).movedim(-1, 1)
    x = x.contiguous()
    spatial = math.prod(x.shape[2:])
    return _apply(namespace, x.view(n * c, spatial, 1), state, *constants).view(x.shape)


def check_probability(op: str, argument: str, p: object) -> None:
    """Raises unless p is a number in [0, 1]."""
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        check.fail(TypeError, op, argument, type(p).__name__, "a number")
    if not 0 <= p <= 1:
        check.fail(ValueError, op, argument, p, "a probability in [0, 1]")


def drop(op: str, x: torch.Tensor, p: float) -> torch.Tensor:
    """x with elements zeroed with probability p and the others divided by 1 - p."""
    return x if p == 0 or x.numel() == 0 else masked(op, x, random.draw(x.device), float(p))
