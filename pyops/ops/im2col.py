"""Sliding blocks of an image as columns of a matrix, and back: unfold and fold, the two halves of im2col.

    col[n, (c,r,s), (p,q)] = x[n, c, p*stride - padding + r*dilation, q*stride - padding + s*dilation]

    x: [N, C, H, W]   col: [N, C*R*S, P*Q]   R, S: sizes of a block   P, Q: how many fit along each side

Positions outside the image read 0. ``fold`` is the transpose of ``unfold``: it adds every column element to the
position it would have come from. Each is therefore the gradient of the other.

Source: torch.nn.functional.unfold and fold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..core import backend, check, library
from ..core.explain import explains
from ..core.intercept import route
from ..core.multilinear import Multilinear, differentiable
from ..core.samples import Maker, Sample, checked

_kernels = library.triton_kernels("im2col")

Pair = int | tuple[int, ...] | list[int]


def _count(size, kernel, stride, padding, dilation):
    """How many blocks fit along one side."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _im2col_fake(x, kernel, stride, padding, dilation):
    p, q = (_count(*a) for a in zip(x.shape[2:], kernel, stride, padding, dilation))
    return x.new_empty(x.shape[0], x.shape[1] * kernel[0] * kernel[1], p * q)


def _col2im_fake(col, size, kernel, stride, padding, dilation):
    return col.new_empty(col.shape[0], col.shape[1] // (kernel[0] * kernel[1]), *size)


_im2col = library.declare(
    "im2col(Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation) -> Tensor",
    _im2col_fake,
    _kernels,
)
_col2im = library.declare(
    "col2im(Tensor col, int[] size, int[] kernel, int[] stride, int[] padding, int[] dilation) -> Tensor",
    _col2im_fake,
    _kernels,
)


def _fold_batch(function):
    """vmap: images are independent, so a batch of them is a larger N."""

    def rule(namespace, batch, dims, inputs, constants):
        x = inputs[0].movedim(dims[0], 0)
        y = function(namespace, x.flatten(0, 1).contiguous(), *constants)
        return y.reshape(batch, x.shape[1], *y.shape[1:]), 0

    return rule


_unfold: Callable[..., Any] = differentiable(
    Multilinear(
        _im2col,
        1,
        lambda ns, dy, inputs, constants, needs: (_fold(ns, dy, list(inputs[0].shape[2:]), *constants),),
        lambda ns, inputs, tangents, constants: _unfold(ns, tangents[0].contiguous(), *constants),
        _fold_batch(lambda *a: _unfold(*a)),
    )
)
_fold: Callable[..., Any] = differentiable(
    Multilinear(
        _col2im,
        1,
        lambda ns, dy, inputs, constants, needs: (_unfold(ns, dy, *constants[1:]),),
        lambda ns, inputs, tangents, constants: _fold(ns, tangents[0].contiguous(), *constants),
        _fold_batch(lambda *a: _fold(*a)),
    )
)


def _geometry(op: str, kernel_size: Pair, dilation: Pair, padding: Pair, stride: Pair) -> tuple[list[int], ...]:
    """(kernel, stride, padding, dilation), each [2]."""
    return (
        check.sides(op, "kernel_size", kernel_size, 2, 1),
        check.sides(op, "stride", stride, 2, 1),
        check.sides(op, "padding", padding, 2, 0),
        check.sides(op, "dilation", dilation, 2, 1),
    )


def unfold(
    input: torch.Tensor, kernel_size: Pair, dilation: Pair = 1, padding: Pair = 0, stride: Pair = 1
) -> torch.Tensor:
    """Copies every sliding block of an image into a column; drops in for torch.nn.functional.unfold.

    ``y[n, (c,r,s), (p,q)] = x[n, c, p*stride - padding + r*dilation, q*stride - padding + s*dilation]``, 0 outside.

    Args:
        input: Tensor[N, C, H, W] or Tensor[C, H, W], float32, float64, bfloat16 or float16.
        kernel_size: sides of a block, one integer or (R, S), >= 1.
        dilation: distance of the elements of a block, >= 1.
        padding: zeros around the image, >= 0.
        stride: distance of neighbouring blocks, >= 1.

    Returns:
        Tensor[N, C*R*S, P*Q] (without N where the input has none) with
        ``P = (H + 2*padding - dilation*(R-1) - 1) // stride + 1`` and Q likewise.

    Raises:
        RuntimeError: an input of another rank or without elements in an image, sizes out of range, no block that fits.
        NotImplementedError: an input that is not floating point.

    A copy, exact in every dtype. Gradients of every order (by ``fold``), forward mode, vmap and torch.compile are
    supported.
    """
    op = "unfold"
    check.floating(op, "input", input)
    kernel, stride, padding, dilation = _geometry(op, kernel_size, dilation, padding, stride)
    if input.dim() not in (3, 4) or 0 in input.shape[input.dim() - 3 :]:
        check.fail(RuntimeError, op, "input", f"shape {list(input.shape)}", "[N, C, H, W] or [C, H, W], C, H, W > 0")
    counts = [_count(*a) for a in zip(input.shape[-2:], kernel, stride, padding, dilation)]
    if min(counts) < 1:
        check.fail(RuntimeError, op, "kernel_size", kernel_size, f"blocks that fit an image {list(input.shape[-2:])}")
    x = input if input.dim() == 4 else input.unsqueeze(0)
    y = _unfold(backend.namespace_for(op, input), x.contiguous(), kernel, stride, padding, dilation)
    return y if input.dim() == 4 else y.squeeze(0)


def fold(
    input: torch.Tensor,
    output_size: Pair,
    kernel_size: Pair,
    dilation: Pair = 1,
    padding: Pair = 0,
    stride: Pair = 1,
) -> torch.Tensor:
    """Adds columns back into the blocks of an image; drops in for torch.nn.functional.fold.

    The transpose of ``unfold``: ``x[n, c, h, w]`` is the sum of the column elements that unfold copies from there.

    Args:
        input: Tensor[N, C*R*S, P*Q] or Tensor[C*R*S, P*Q], float32, float64, bfloat16 or float16.
        output_size: (H, W) of the image, >= 1.
        kernel_size, dilation, padding, stride: as in ``unfold``.

    Returns:
        Tensor[N, C, H, W] (without N where the input has none).

    Raises:
        RuntimeError: sizes that do not fit together or are out of range.
        NotImplementedError: an input that is not floating point.

    Sums are taken in float32 (float64 for float64), in a fixed order: bitwise deterministic. Gradients of every order
    (by ``unfold``), forward mode, vmap and torch.compile are supported.
    """
    op = "fold"
    check.floating(op, "input", input)
    size = check.sides(op, "output_size", output_size, 2, 1)
    kernel, stride, padding, dilation = _geometry(op, kernel_size, dilation, padding, stride)
    if input.dim() not in (2, 3) or 0 in input.shape[input.dim() - 2 :]:
        check.fail(RuntimeError, op, "input", f"shape {list(input.shape)}", "[N, C*R*S, L] or [C*R*S, L], not empty")
    if input.shape[-2] % (kernel[0] * kernel[1]):
        check.fail(RuntimeError, op, "input", f"{input.shape[-2]} rows", f"a multiple of {kernel[0]} * {kernel[1]}")
    counts = [_count(*a) for a in zip(size, kernel, stride, padding, dilation)]
    if min(counts) < 1:
        check.fail(RuntimeError, op, "kernel_size", kernel_size, f"blocks that fit an image {size}")
    if input.shape[-1] != counts[0] * counts[1]:
        check.fail(RuntimeError, op, "input", f"{input.shape[-1]} columns", f"{counts[0]} * {counts[1]}, one per block")
    col = input if input.dim() == 3 else input.unsqueeze(0)
    y = _fold(backend.namespace_for(op, input), col.contiguous(), size, kernel, stride, padding, dilation)
    return y if input.dim() == 3 else y.squeeze(0)


class Unfold(torch.nn.Unfold):
    """torch.nn.Unfold whose forward is pyops.functional.unfold."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return unfold(input, self.kernel_size, self.dilation, self.padding, self.stride)


class Fold(torch.nn.Fold):
    """torch.nn.Fold whose forward is pyops.functional.fold."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return fold(input, self.output_size, self.kernel_size, self.dilation, self.padding, self.stride)


route((torch.nn.functional.unfold,), "unfold", unfold)
route((torch.nn.functional.fold,), "fold", fold)


def _explain_unfold(shapes, dtype, name):
    return ("one algorithm: rows of the image are copied to where they belong; workspace 0 bytes besides the columns",)


def _explain_fold(shapes, dtype, name):
    rows = f"a row of {_wide(dtype)} sums for each thread" if name == "cpu" else "0 bytes besides the image"
    return (f"one algorithm: each position adds the columns that meet in it, in their order; workspace {rows}",)


def _wide(dtype):
    return str(check.accumulate_dtype(dtype)).removeprefix("torch.")


explains("unfold", _explain_unfold, lambda op, shapes: "im2col")
explains("fold", _explain_fold, lambda op, shapes: "im2col")


def _sample(shape, *args: Any, **kwargs: Any):
    return lambda t: ((t.input(shape), *args), kwargs)


checked(
    "unfold",
    unfold,
    torch.nn.functional.unfold,
    Sample("overlapping blocks", _sample((2, 2, 5, 4), 3, padding=1), derivatives=True),
    Sample("every parameter differs by side", _sample((1, 2, 9, 8), (3, 2), (2, 1), (1, 2), (2, 3)), derivatives=True),
    Sample("one image without batch", _sample((2, 4, 4), 2, stride=2)),
    Sample("no image", _sample((0, 2, 4, 4), 2)),
    Sample("rows of several vectors", _sample((2, 3, 6, 70), 3, padding=(1, 2))),
    Sample("block as large as the padded image", _sample((1, 2, 3, 3), 5, padding=1)),
)


def _columns(n, c, size, *geometry: Any):
    r, s = geometry[0]
    counts = [_count(*a) for a in zip(size, geometry[0], geometry[3], geometry[2], geometry[1])]

    def make(t: Maker):
        return (t.input((*n, c * r * s, counts[0] * counts[1])), size, *geometry), {}

    return make


checked(
    "fold",
    fold,
    torch.nn.functional.fold,
    Sample("overlapping blocks", _columns((2,), 2, (5, 4), (3, 3), (1, 1), (1, 1), (1, 1)), derivatives=True),
    Sample(
        "every parameter differs by side", _columns((1,), 2, (9, 8), (3, 2), (2, 1), (1, 2), (2, 3)), derivatives=True
    ),
    Sample("one image without batch", _columns((), 2, (4, 4), (2, 2), (1, 1), (0, 0), (2, 2))),
    Sample("no image", _columns((0,), 2, (4, 4), (2, 2), (1, 1), (0, 0), (1, 1))),
    Sample("rows of several vectors", _columns((2,), 3, (6, 70), (3, 3), (1, 1), (1, 2), (1, 1))),
)
