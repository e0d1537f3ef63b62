"""Histogram of oriented gradients: the directions of the edges in each cell of an image, normed by blocks of cells.

    g[p] = (x[p + column] - x[p - column], x[p + row] - x[p - row]),  0 across the border, of the channel with the
           longest
    v[i, j, o] = 1/|cell| · sum over the pixels p of cell (i, j) whose g lies in bin o of |g[p]|
    y[b] = v/n over the cells v of block b

    L1       n = sum v + eps                   L2       n = sqrt(sum v² + eps²)
    L1-sqrt  sqrt(v/n) in the place of v/n     L2-Hys   L2, clipped at 0.2, then L2 again

    x: [N, C, H, W] or [N, H, W, C]   eps = 1e-5
    bin o: directions from o/O to (o + 1)/O of a half turn, opposite ones alike

The gradient is that of |g| and of the norms; which bin and which channel a pixel chose counts as constant
(docs/math/images.md).

Sources: skimage.feature.hog; Dalal and Triggs, Histograms of oriented gradients for human detection (2005).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..core import backend, check, layout, library
from ..core.autograd import Formula, Tensors, differentiable
from ..core.samples import Sample, checked

NORMS = ("L1", "L1-sqrt", "L2", "L2-Hys")
MOST_ORIENTATIONS = 64
_EPSILON, _LIMIT = 1e-5, 0.2
_SCHEMA = "int orientations, int[] cell, int[] block, int norm, bool channels_last"


def _fwd_fake(x, orientations, cell, block, norm, channels_last):
    space = x.shape[1:3] if channels_last else x.shape[2:]
    cells = [space[0] // cell[0], space[1] // cell[1]]
    blocks = [n - b + 1 for n, b in zip(cells, block)]
    votes = x.new_empty(x.shape[0], *cells, orientations, dtype=check.accumulate_dtype(x.dtype))
    return x.new_empty(x.shape[0], *blocks, *block, orientations), votes


_kernels = library.triton_kernels("hog")
_fwd = library.declare(f"hog_fwd(Tensor x, {_SCHEMA}) -> (Tensor, Tensor)", _fwd_fake, _kernels)
_bwd = library.declare(
    f"hog_bwd(Tensor dy, Tensor x, Tensor cells, {_SCHEMA}) -> Tensor",
    lambda dy, x, *rest: x.new_empty(x.shape),
    _kernels,
)


def _differences(x: torch.Tensor, dim: int) -> torch.Tensor:
    """x one ahead minus x one behind, 0 at both ends."""
    size = x.shape[dim]
    if size < 3:
        return x * 0
    inner = x.narrow(dim, 2, size - 2) - x.narrow(dim, 0, size - 2)
    edge = torch.zeros_like(x.narrow(dim, 0, 1))
    return torch.cat([edge, inner, edge], dim)


def _root(x: torch.Tensor) -> torch.Tensor:
    """sqrt(x) whose gradient at 0 is 0."""
    return torch.where(x == 0, torch.zeros_like(x), torch.where(x == 0, torch.ones_like(x), x).sqrt())


def _bins(gx: torch.Tensor, gy: torch.Tensor, orientations: int) -> torch.Tensor:
    below = (gy < 0) | ((gy == 0) & (gx < 0))
    gx, gy = torch.where(below, -gx, gx), torch.where(below, -gy, gy)
    passed = torch.zeros_like(gx)
    for o in range(1, orientations):
        # the same exact diagonals as in csrc/common/hog.h
        diagonal, upright = 4 * o in (orientations, 3 * orientations), 2 * o == orientations
        cosine = math.copysign(1, orientations - 2 * o) if diagonal else math.cos(math.pi * o / orientations)
        sine = 1.0 if diagonal or upright else math.sin(math.pi * o / orientations)
        passed = passed + (gy * (0.0 if upright else cosine) - gx * sine >= 0)
    return passed


def _reference(x, orientations, cell, block, norm, channels_last):
    x = x.movedim(-1, 1) if channels_last else x
    gx, gy = _differences(x, 3), _differences(x, 2)
    square = gx * gx + gy * gy
    channel = square.detach().argmax(1, keepdim=True)
    gx, gy = gx.gather(1, channel), gy.gather(1, channel)
    magnitude = _root(gx * gx + gy * gy)
    bins = torch.arange(orientations, device=x.device).view(1, -1, 1, 1)
    votes = torch.where(_bins(gx.detach(), gy.detach(), orientations) == bins, magnitude, 0.0)
    height, width = x.shape[2] // cell[0], x.shape[3] // cell[1]
    votes = votes[:, :, : height * cell[0], : width * cell[1]]
    votes = votes.reshape(x.shape[0], orientations, height, cell[0], width, cell[1])
    cells = votes.mean((3, 5)).permute(0, 2, 3, 1)
    v = cells.unfold(1, block[0], 1).unfold(2, block[1], 1).permute(0, 1, 2, 4, 5, 3)
    over = (3, 4, 5)
    if NORMS[norm] in ("L1", "L1-sqrt"):
        y = v / (v.sum(over, keepdim=True) + _EPSILON)
        y = _root(y) if NORMS[norm] == "L1-sqrt" else y
    else:
        y = v / ((v * v).sum(over, keepdim=True) + _EPSILON**2).sqrt()
        if NORMS[norm] == "L2-Hys":
            y = y.clamp(max=_LIMIT)
            y = y / ((y * y).sum(over, keepdim=True) + _EPSILON**2).sqrt()
    return y, cells.to(check.accumulate_dtype(x.dtype))


def _arguments(dy, inputs: Tensors, kept: Tensors, constants: Tensors, needs) -> Tensors:
    return dy, inputs[0], kept[0], *constants


def _fold(forward, batch, dims, inputs, constants):
    """A batch is more of N."""
    x = inputs[0].movedim(dims[0], 0)
    y, cells = forward(x.flatten(0, 1).contiguous(), *constants)
    return (y.reshape(*x.shape[:2], *y.shape[1:]), cells.reshape(*x.shape[:2], *cells.shape[1:])), (0, 0)


_apply: Any = differentiable(Formula(_fwd, _bwd, 1, 1, _arguments, _reference, _fold))


def hog(
    input: torch.Tensor,
    orientations: int = 9,
    pixels_per_cell: Sequence[int] = (8, 8),
    cells_per_block: Sequence[int] = (3, 3),
    block_norm: str = "L2-Hys",
    *,
    transform_sqrt: bool = False,
    feature_vector: bool = True,
    channel_axis: int | None = None,
) -> torch.Tensor:
    """Histogram of oriented gradients of each image; skimage.feature.hog for batches, with gradients.

        v = 1/|cell| · sum of |g| over the pixels of a cell, by the bin of g's direction;  y = v / norm of its block

    Args:
        input: Tensor[*, H, W], grey images, or with a ``channel_axis`` images of several channels, of which each pixel
            takes the one with the longest gradient; float32, float64, bfloat16, float16, or uint8, computed as float32.
        orientations: bins of a half turn, 1 to 64.
        pixels_per_cell, cells_per_block: two numbers each, of rows and of columns. Pixels that fill no cell vote for
            none.
        block_norm: ``"L1"``, ``"L1-sqrt"``, ``"L2"`` or ``"L2-Hys"``.
        transform_sqrt: take the root of the image first, which must not be negative.
        feature_vector: the values of an image in one row.
        channel_axis: the dimension of channels, -1 for [H, W, C], -3 for [N, C, H, W].

    Returns:
        Tensor[*, F], F = blocks_h · blocks_w · cells_h · cells_w · orientations, or, without ``feature_vector``,
        Tensor[*, blocks_h, blocks_w, cells_h, cells_w, orientations]; * without the channels.

    Raises:
        ValueError: fewer than two dimensions beside the channels, an unknown norm, an image smaller than one block.
        IndexError: ``channel_axis`` is no dimension of the input.
        TypeError, RuntimeError: ``orientations``, cells or blocks that are no positive whole numbers.
        NotImplementedError: a dtype without kernels.

    A direction that lies on the boundary of two bins but for rounding may fall on either side of it.
    The bin and the channel of a pixel are constant for the gradient, and so are lengths of 0; the roots of
    ``transform_sqrt`` and ``L1-sqrt`` have gradient 0 at 0. Gradients of every order, forward mode, vmap and
    torch.compile; bitwise deterministic; sums in float32 (float64), of a cell in float64.
    """
    op = "hog"
    if isinstance(input, torch.Tensor) and input.dtype == torch.uint8:
        input = input.float()
    check.floating(op, "input", input)
    x = layout.channels_before_space(op, input, channel_axis)
    if isinstance(orientations, bool) or not isinstance(orientations, int):
        check.fail(TypeError, op, "orientations", repr(orientations), "an int")
    if not 1 <= orientations <= MOST_ORIENTATIONS:
        check.fail(RuntimeError, op, "orientations", orientations, f"an int in [1, {MOST_ORIENTATIONS}]")
    cell = check.ints(op, "pixels_per_cell", pixels_per_cell, 2)
    block = check.ints(op, "cells_per_block", cells_per_block, 2)
    for name, sizes in (("pixels_per_cell", cell), ("cells_per_block", block)):
        if min(sizes) < 1:
            check.fail(RuntimeError, op, name, sizes, "numbers >= 1")
    if block_norm not in NORMS:
        check.fail(ValueError, op, "block_norm", repr(block_norm), f"one of {', '.join(NORMS)}")
    least = [c * b for c, b in zip(cell, block)]
    if x.shape[-2] < least[0] or x.shape[-1] < least[1]:
        check.fail(ValueError, op, "input", f"shape {list(input.shape)}", f"at least {least[0]} by {least[1]} pixels")
    if x.shape[-3] == 0:
        check.fail(ValueError, op, "input", f"shape {list(input.shape)}", "at least one channel")
    lead = x.shape[:-3]
    channels_last = not x.is_contiguous() and x.movedim(-3, -1).is_contiguous()
    x = x.movedim(-3, -1) if channels_last else x.contiguous()
    x = x.reshape(math.prod(lead), *x.shape[-3:])
    x = _root(x) if transform_sqrt else x
    how = (orientations, tuple(cell), tuple(block), NORMS.index(block_norm), channels_last)
    y = _apply(backend.namespace_for(op, x), x, *how)[0]
    return y.reshape(*lead, math.prod(y.shape[1:])) if feature_vector else y.reshape(*lead, *y.shape[1:])


def _torch_reference(input, orientations, cell, block, norm="L2-Hys", transform_sqrt=False, channel_axis=None):
    """The formula in plain torch."""
    x = layout.channels_before_space("hog", input, channel_axis)
    x = x.reshape(-1, *x.shape[-3:])
    x = _root(x) if transform_sqrt else x
    return _reference(x, orientations, cell, block, NORMS.index(norm), False)[0].flatten(1)


def _sample(shape, orientations, cell, block, norm="L2-Hys", shift=0.0, channels_last=False, **how):
    return lambda t: (
        (t.input(shape, shift, channels_last=channels_last), orientations, cell, block, norm),
        how,
    )


checked(
    "hog",
    hog,
    _torch_reference,
    Sample("clipped blocks", _sample((1, 4, 6), 4, (2, 3), (2, 1)), derivatives=True),
    Sample("sums, three channels", _sample((1, 2, 3, 4), 3, (3, 2), (1, 2), "L1", channel_axis=1), derivatives=True),
    Sample("roots of shares", _sample((1, 3, 4), 2, (3, 2), (1, 1), "L1-sqrt")),
    Sample("squares, roots of pixels", _sample((1, 9, 19), 9, (3, 4), (3, 2), "L2", 9.0, transform_sqrt=True)),
    Sample("many bins, channels last", _sample((1, 3, 9, 19), 18, (4, 9), (1, 1), "L2", 0.0, True, channel_axis=1)),
    Sample("rows of one pixel", _sample((3, 1, 9), 5, (1, 3), (1, 1))),
    Sample("no images", _sample((0, 8, 8), 9, (4, 4), (2, 2))),
)
