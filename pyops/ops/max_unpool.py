"""Max unpooling: the values of a pooled map back at the places their maxima came from, zeros elsewhere.

    y[p, index[p,i,c], c] = x[p,i,c]                dx[p,i,c] = dy[p, index[p,i,c], c]

    x, index: [P, I, C]   y: [P, S, C]; channels first has C = 1 and P = N · channels

Source: torch.nn.functional.max_unpool2d; Zeiler, Fergus 2014, https://arxiv.org/abs/1311.2901.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..core import autocast, backend, check, library
from ..core.autograd import Formula, differentiable
from ..core.intercept import route
from ..core.layout import is_channels_last
from ..core.samples import Maker, Sample, checked

_kernels = library.triton_kernels("max_unpool")
_torch = torch.nn.functional

_fwd = library.declare(
    "max_unpool_fwd(Tensor x, Tensor index, int size) -> Tensor",
    lambda x, index, size: x.new_empty(x.shape[0], size, x.shape[2]),
    _kernels,
)
_bwd = library.declare(
    "max_unpool_bwd(Tensor dy, Tensor index) -> Tensor", lambda dy, index: dy.new_empty(index.shape), _kernels
)


def _reference(x, index, size):
    return (x.new_zeros(x.shape[0], size, x.shape[2]).scatter(1, index, x),)


def _fold(forward, batch, dims, inputs, constants):
    """A batch is more planes."""
    x, index = (t.expand(batch, *t.shape) if d is None else t.movedim(d, 0) for t, d in zip(inputs, dims))
    y = forward(x.flatten(0, 1), index.flatten(0, 1), *constants)
    return y.unflatten(0, (batch, -1)), 0


_apply = differentiable(
    Formula(_fwd, _bwd, 2, 1, lambda dy, inputs, kept, constants, needs: (dy, inputs[1]), _reference, _fold)
)


def _output(op: str, x: torch.Tensor, rank: int, kernel: Any, stride: Any, padding: Any, size: Any) -> list[int]:
    kernels, paddings = check.ints(op, "kernel_size", kernel, rank), check.ints(op, "padding", padding, rank)
    strides = kernels if stride is None else check.ints(op, "stride", stride, rank)
    spatial = x.shape[x.dim() - rank :]
    usual = [(i - 1) * s + k - 2 * p for i, s, k, p in zip(spatial, strides, kernels, paddings)]
    if size is None:
        return usual
    given = list(size)
    given = given[2:] if len(given) == rank + 2 else given
    if len(given) != rank:
        check.fail(ValueError, op, "output_size", list(size), f"{rank} or {rank + 2} numbers")
    for g, u, s in zip(given, usual, strides):
        if not u - s < g < u + s:
            check.fail(ValueError, op, "output_size", given, f"less than a stride away from {usual}")
    return given


def _unpool(
    op: str, rank: int, input: torch.Tensor, indices: torch.Tensor, kernel: Any, stride: Any, padding: Any, size: Any
) -> torch.Tensor:
    check.floating(op, "input", input)
    x: Any = autocast.cast(op, input)[0]
    if x.dim() not in (rank + 1, rank + 2) or 0 in x.shape[x.dim() - rank - 1 :]:
        want = f"[N, C, *] or [C, *] with {rank} sizes > 0 in *"
        check.fail(RuntimeError, op, "input", f"shape {list(x.shape)}", want)
    if not isinstance(indices, torch.Tensor):
        check.fail(TypeError, op, "indices", type(indices).__name__, "a tensor")
    if indices.dtype != torch.int64:
        check.fail(RuntimeError, op, "indices", indices.dtype, "torch.int64")
    if indices.shape != x.shape or indices.device != x.device:
        got = f"shape {list(indices.shape)} on {indices.device}"
        check.fail(RuntimeError, op, "indices", got, f"shape {list(x.shape)} on {x.device}, as the input")
    out = _output(op, x, rank, kernel, stride, padding, size)
    if min(out) < 0:
        check.fail(RuntimeError, op, "output_size", out, "numbers >= 0")
    alone = x.dim() == rank + 1
    if alone:
        x, indices = x[None], indices[None]
    last = is_channels_last(x)
    n, c = x.shape[:2]
    if last:
        planes, index = (t.movedim(1, -1).contiguous().flatten(1, -2) for t in (x, indices))
    else:
        planes, index = (t.contiguous().reshape(n * c, math.prod(t.shape[2:]), 1) for t in (x, indices))
    try:
        y = _apply(backend.namespace_for(op, x), planes, index, math.prod(out))
    except RuntimeError as error:
        if "out of bounds" not in str(error):
            raise
        check.outside(RuntimeError, op, "indices", index, math.prod(out))
    y = y.reshape(n, *out, c).movedim(-1, 1) if last else y.reshape(n, c, *out)
    return y[0] if alone else y


Size = int | Sequence[int]


def max_unpool1d(
    input: torch.Tensor,
    indices: torch.Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    output_size: Sequence[int] | None = None,
) -> torch.Tensor:
    """Undoes max_pool1d as far as possible; drops in for torch.nn.functional.max_unpool1d. See ``max_unpool2d``."""
    return _unpool("max_unpool1d", 1, input, indices, kernel_size, stride, padding, output_size)


def max_unpool2d(
    input: torch.Tensor,
    indices: torch.Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    output_size: Sequence[int] | None = None,
) -> torch.Tensor:
    """Puts each value where its index says, zeros elsewhere; drops in for torch.nn.functional.max_unpool2d.

    Args:
        input: Tensor[N, C, H, W] or [C, H, W] in float32, float64, bfloat16 or float16.
        indices: int64 of the same shape, positions in the output's plane, as max_pool2d returns them.
        kernel_size, stride, padding: those of the pooling, from which the output's size follows.
        output_size: another size, less than a stride away from that.

    Returns:
        Tensor[N, C, *output_size]; channels last stays channels last.

    Raises:
        RuntimeError: indices of another shape or dtype, or, on the CPU, outside the output.
        ValueError: an ``output_size`` that does not fit.

    Where indices meet the value that comes last stays, on every backend, and each of them gets the gradient, as in
    torch. On a GPU an index outside the output writes nothing. Bitwise deterministic; gradients of every order, forward
    mode, vmap and torch.compile.
    """
    return _unpool("max_unpool2d", 2, input, indices, kernel_size, stride, padding, output_size)


def max_unpool3d(
    input: torch.Tensor,
    indices: torch.Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    output_size: Sequence[int] | None = None,
) -> torch.Tensor:
    """Undoes max_pool3d as far as possible; drops in for torch.nn.functional.max_unpool3d. See ``max_unpool2d``."""
    return _unpool("max_unpool3d", 3, input, indices, kernel_size, stride, padding, output_size)


class MaxUnpool1d(torch.nn.MaxUnpool1d):
    """torch.nn.MaxUnpool1d whose forward is pyops.functional.max_unpool1d."""

    def forward(
        self, input: torch.Tensor, indices: torch.Tensor, output_size: Sequence[int] | None = None
    ) -> torch.Tensor:
        return max_unpool1d(input, indices, self.kernel_size, self.stride, self.padding, output_size)


class MaxUnpool2d(torch.nn.MaxUnpool2d):
    """torch.nn.MaxUnpool2d whose forward is pyops.functional.max_unpool2d."""

    def forward(
        self, input: torch.Tensor, indices: torch.Tensor, output_size: Sequence[int] | None = None
    ) -> torch.Tensor:
        return max_unpool2d(input, indices, self.kernel_size, self.stride, self.padding, output_size)


class MaxUnpool3d(torch.nn.MaxUnpool3d):
    """torch.nn.MaxUnpool3d whose forward is pyops.functional.max_unpool3d."""

    def forward(
        self, input: torch.Tensor, indices: torch.Tensor, output_size: Sequence[int] | None = None
    ) -> torch.Tensor:
        return max_unpool3d(input, indices, self.kernel_size, self.stride, self.padding, output_size)


for _function in (max_unpool1d, max_unpool2d, max_unpool3d):
    route((getattr(_torch, _function.__name__),), _function.__name__, _function)


def _sample(shape, channels_last=False, **how):
    """A pooled map and places that do not meet: each value somewhere in its own window of 2."""

    def make(t: Maker):
        x = t.input(shape, channels_last=channels_last)
        rows, columns = (torch.arange(n) for n in shape[-2:])
        shift = (torch.arange(x.numel()).reshape(shape) * 7 // 3) % 2
        index = (2 * rows[:, None] + shift) * (2 * shape[-1]) + 2 * columns + (1 - shift)
        return (x, index.to(t.device), 2), how

    return make


checked(
    "max_unpool2d",
    max_unpool2d,
    _torch.max_unpool2d,
    Sample("windows of 2", _sample((2, 3, 2, 3)), derivatives=True),
    Sample("channels last", _sample((2, 5, 4, 3), True)),
    Sample("no batch dimension, more than a block", _sample((3, 11, 17))),
    Sample("another size", _sample((1, 2, 3, 3), output_size=(6, 7))),
    Sample("no examples", _sample((0, 2, 3, 3))),
)
