"""Sampling an image at the points of a grid, and the grid of an affine map.

    y[n, c, p] = sum over taps of w(tap) x[n, c, i(tap)]        the taps of point p: 1, 2 or 4 along each axis
    dx[n, c, i] = sum of w dy over the taps that read i         dgrid[n, p] = sum over taps of dw/dg · sum_c dy x

Sources: torch.nn.functional.grid_sample and affine_grid; Jaderberg et al., Spatial Transformer Networks (2015).
Positions, weights and slopes are stated in docs/math/resampling.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from ..core import autocast, backend, check, layout, library
from ..core.autograd import Formula, Tensors, differentiable
from ..core.explain import composite
from ..core.intercept import route
from ..core.samples import Maker, Sample, checked

MODES, PADDINGS = ("bilinear", "nearest", "bicubic"), ("zeros", "border", "reflection")
_SCHEMA = "Tensor x, Tensor grid, int mode, int padding, bool align_corners, bool channels_last"


def _fwd_fake(x, grid, mode, padding, align_corners, channels_last):
    n, c, p = x.shape[0], x.shape[4 if channels_last else 1], grid.shape[1]
    return x.new_empty((n, p, c) if channels_last else (n, c, p))


def _bwd_fake(dy, x, grid, mode, padding, align_corners, channels_last, needs_x, needs_grid):
    return x.new_empty(x.shape if needs_x else (0,)), grid.new_empty(grid.shape if needs_grid else (0,))


_kernels = library.triton_kernels("grid_sample")
_fwd = library.declare(f"grid_sample_fwd({_SCHEMA}) -> Tensor", _fwd_fake, _kernels)
_bwd = library.declare(
    f"grid_sample_bwd(Tensor dy, {_SCHEMA}, bool needs_x, bool needs_grid) -> (Tensor, Tensor)", _bwd_fake, _kernels
)


def _position(g: torch.Tensor, size: int, align_corners: bool) -> torch.Tensor:
    return (g + 1) / 2 * (size - 1) if align_corners else ((g + 1) * size - 1) / 2


def _padded(at: torch.Tensor, size: int, padding: str, align_corners: bool) -> torch.Tensor:
    if padding == "zeros":
        return at
    if padding == "reflection":
        low, span = (0.0, size - 1) if align_corners else (-0.5, size)
        if span == 0:
            return torch.zeros_like(at)
        d = (at - low).abs()
        flips = (d / span).floor().detach()
        rest = d - flips * span
        at = torch.where(flips % 2 == 0, rest, span - rest) + low
    return torch.where(at > 0, torch.where(at < size - 1, at, torch.full_like(at, size - 1)), torch.zeros_like(at))


def _keys(d: torch.Tensor, outer: bool) -> torch.Tensor:
    a, d = -0.75, d.abs()
    return ((d - 5) * d + 8) * d * a - 4 * a if outer else ((a + 2) * d - (a + 3)) * d * d + 1


def _taps(
    g: torch.Tensor, size: int, mode: str, padding: str, align_corners: bool
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Whole positions, in or outside the axis, and their weights."""
    at = _position(g, size, align_corners)
    if mode == "bicubic":
        low = at.floor().detach()
        places = [_padded(low + k, size, padding, align_corners).detach() for k in range(-1, 3)]
        return [(i, _keys(at - low - k, k in (-1, 2))) for i, k in zip(places, range(-1, 3))]
    at = _padded(at, size, padding, align_corners)
    if mode == "nearest":
        return [(at.round().detach(), torch.ones_like(at))]
    low = at.floor().detach()
    return [(low, 1 - (at - low)), (low + 1, at - low)]


def _reference(x, grid, mode, padding, align_corners, channels_last):
    planes = x.permute(0, 4, 1, 2, 3) if channels_last else x
    sizes = planes.shape[2:]
    flat = planes.reshape(*planes.shape[:2], -1)
    axes = [
        _taps(grid[..., d], sizes[2 - d], MODES[mode], PADDINGS[padding], align_corners) for d in range(grid.shape[2])
    ]
    if len(axes) == 2:
        axes.append([(torch.zeros_like(grid[..., 0]), torch.ones_like(grid[..., 0]))])
    total = torch.zeros((), dtype=x.dtype, device=x.device)
    for d, wd in axes[2]:
        for h, wh in axes[1]:
            for w, ww in axes[0]:
                inside = (d >= 0) & (d < sizes[0]) & (h >= 0) & (h < sizes[1]) & (w >= 0) & (w < sizes[2])
                index = torch.where(inside, (d * sizes[1] + h) * sizes[2] + w, torch.zeros_like(w)).long()
                value = flat.gather(2, index[:, None].expand(-1, flat.shape[1], -1))
                total = total + torch.where(inside[:, None], value, torch.zeros_like(value)) * (wd * wh * ww)[:, None]
    return (total.movedim(1, 2) if channels_last else total,)


def _arguments(dy, inputs: Tensors, kept: Tensors, constants: Tensors, needs) -> Tensors:
    return dy, *inputs, *constants, needs[0], needs[1]


def _fold(forward, batch, dims, inputs, constants):
    """A batch is more of N."""
    moved = [t[None].expand(batch, *t.shape) if d is None else t.movedim(d, 0) for t, d in zip(inputs, dims)]
    y = forward(*(t.reshape(-1, *t.shape[2:]).contiguous() for t in moved), *constants)
    return y.reshape(batch, -1, *y.shape[1:]), 0


_apply: Any = differentiable(Formula(_fwd, _bwd, 2, 2, _arguments, _reference, _fold, keep=()))


def _corners(align_corners: bool | None) -> bool:
    if align_corners is None:
        warnings.warn(
            "grid_sample and affine_grid: align_corners is False where it is not given; say which you mean",
            stacklevel=3,
        )
    return bool(align_corners)


def grid_sample(
    input: torch.Tensor,
    grid: torch.Tensor,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool | None = None,
) -> torch.Tensor:
    """Samples an image at the points of a grid; drops in for torch.nn.functional.grid_sample.

    Args:
        input: Tensor[N, C, H, W] or Tensor[N, C, D, H, W], contiguous or channels last, float32, float64, bfloat16 or
            float16.
        grid: Tensor[N, P, Q, 2] of (x, y), or Tensor[N, O, P, Q, 3] of (x, y, z), of the input's dtype, from -1 to 1
            over the image.
        mode: ``bilinear`` (in three dimensions trilinear), ``nearest``, or in two dimensions ``bicubic``.
        padding_mode: what lies outside: ``zeros``, the nearest ``border`` element, or the ``reflection``.
        align_corners: -1 and 1 are the centres of the first and last elements instead of their outer corners.

    Returns:
        Tensor[N, C, P, Q] or Tensor[N, C, O, P, Q] in the memory format of the input.

    Raises:
        ValueError: an unknown mode or padding mode.
        RuntimeError: shapes, dtypes or devices that do not fit, an empty image, bicubic in three dimensions.
        NotImplementedError: a dtype without kernels.

    Where a coordinate is NaN the result is, as in torch, NaN or, with border and reflection, that of the first element;
    nothing is read outside the image. Positions and sums in float32 (float64 for float64). The gradients are bitwise
    deterministic on every device: that of the image is added in the order of the points. Gradients of every order,
    forward mode, vmap and torch.compile.
    """
    op = "grid_sample"
    if mode not in MODES:
        check.fail(ValueError, op, "mode", repr(mode), f"one of {', '.join(MODES)}")
    if padding_mode not in PADDINGS:
        check.fail(ValueError, op, "padding_mode", repr(padding_mode), f"one of {', '.join(PADDINGS)}")
    align = _corners(align_corners)
    check.floating(op, "input", input)
    if not isinstance(grid, torch.Tensor):
        check.fail(TypeError, op, "grid", type(grid).__name__, "a tensor")
    given: Any = autocast.cast(op, input, grid)
    x, points = given
    if x.dtype != points.dtype and autocast.enabled(x):
        wide = torch.promote_types(x.dtype, points.dtype)
        x, points = x.to(wide), points.to(wide)
    dims = x.dim() - 2
    if dims not in (2, 3) or points.dim() != x.dim() or points.shape[-1] != dims or points.shape[0] != x.shape[0]:
        got = f"shape {list(points.shape)} for an input of shape {list(x.shape)}"
        check.fail(
            RuntimeError, op, "grid", got, "[N, P, Q, 2] for [N, C, H, W] or [N, O, P, Q, 3] for [N, C, D, H, W]"
        )
    if points.dtype != x.dtype:
        check.fail(RuntimeError, op, "grid", points.dtype, f"{x.dtype}, as the input")
    if points.device != x.device:
        check.fail(RuntimeError, op, "grid", f"a tensor on {points.device}", f"one on {x.device}, as the input")
    if 0 in x.shape[2:]:
        check.fail(RuntimeError, op, "input", f"shape {list(x.shape)}", "an image that is not empty")
    if mode == "bicubic" and dims == 3:
        check.fail(RuntimeError, op, "mode", "'bicubic' for an input of 5 dimensions", "4 dimensions with it")
    last = layout.is_channels_last(x)
    ones = (1,) * (3 - dims)
    if last:
        planes = x.movedim(1, -1).reshape(x.shape[0], *ones, *x.shape[2:], x.shape[1])
    else:
        planes = x.contiguous().view(*x.shape[:2], *ones, *x.shape[2:])
    out = points.shape[1:-1]
    count = 1
    for size in out:
        count = count * size
    flat = points.contiguous().view(points.shape[0], count, dims)
    y = _apply(backend.namespace_for(op, x), planes, flat, MODES.index(mode), PADDINGS.index(padding_mode), align, last)
    return y.view(x.shape[0], *out, x.shape[1]).movedim(-1, 1) if last else y.view(*x.shape[:2], *out)


def affine_grid(theta: torch.Tensor, size: Sequence[int], align_corners: bool | None = None) -> torch.Tensor:
    """The grid of an affine map, for ``grid_sample``; drops in for torch.nn.functional.affine_grid.

        grid[n, p, q] = theta[n] (x_q, y_p, 1)        x, y: the centres of the output's elements, from -1 to 1

    Args:
        theta: Tensor[N, 2, 3], or Tensor[N, 3, 4] in three dimensions, floating point.
        size: of the image to sample, [N, C, H, W] or [N, C, D, H, W].
        align_corners: as of ``grid_sample``.

    Returns:
        Tensor[N, H, W, 2] or Tensor[N, D, H, W, 3].

    Raises:
        ValueError: a theta that is not floating point or does not fit, a size that is not positive.
        NotImplementedError: a size of neither 4 nor 5 numbers.

    Put together from torch's ops: products and sums in float32 (float64 for float64). Deterministic; gradients of every
    order.
    """
    op = "affine_grid"
    align = _corners(align_corners)
    if not theta.is_floating_point():
        check.fail(ValueError, op, "theta", theta.dtype, "a floating dtype")
    if len(size) not in (4, 5):
        check.fail(NotImplementedError, op, "size", list(size), "4 or 5 numbers")
    dims = len(size) - 2
    if theta.dim() != 3 or theta.shape[1:] != (dims, dims + 1):
        check.fail(
            ValueError, op, "theta", f"shape {list(theta.shape)}", f"[N, {dims}, {dims + 1}] for size {list(size)}"
        )
    if min(size) <= 0:
        check.fail(ValueError, op, "size", list(size), "positive numbers")
    if theta.shape[0] != size[0]:
        check.fail(RuntimeError, op, "theta", f"{theta.shape[0]} matrices", f"{size[0]}, as size says")
    low: Any = autocast.cast(op, theta)[0]
    wide = low.contiguous().to(check.accumulate_dtype(low.dtype))
    total = wide[:, :, dims].reshape(-1, *(1,) * dims, dims)
    for d in range(dims):  # coordinates (x, y, z) lie along the axes (W, H, D)
        n = size[-1 - d]
        along = torch.arange(n, dtype=wide.dtype, device=theta.device)
        along = (along * 2 - (n - 1)) / (max(n - 1, 1) if align else n)
        total = total + along.reshape(-1, *(1,) * (d + 1)) * wide[:, :, d].reshape(-1, *(1,) * dims, dims)
    return total.to(low.dtype)


route((torch.nn.functional.grid_sample,), "grid_sample", grid_sample)
route((torch.nn.functional.affine_grid,), "affine_grid", affine_grid)


def _sample(
    shape: Sequence[int], out: Sequence[int], channels_last: bool = False, spread: float = 0.5, **more: Any
) -> Any:
    def make(t: Maker) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = t.input(shape, channels_last=channels_last)
        grid = t.input((shape[0], *out, len(out)))
        with torch.no_grad():
            # odd multiples of 1/128: the same in every dtype, and never where the formula changes
            grid.mul_(spread * 64).floor_().add_(0.5).div_(64).clamp_(-253 / 128, 253 / 128)
        return (x, grid), {"align_corners": False, **more}

    return make


checked(
    "grid_sample",
    grid_sample,
    torch.nn.functional.grid_sample,
    Sample("bilinear, zeros around", _sample((1, 2, 3, 5), (3, 2), spread=1), derivatives=True),
    Sample(
        "bicubic, reflected", _sample((1, 1, 5, 7), (2, 2), mode="bicubic", padding_mode="reflection"), derivatives=True
    ),
    Sample("border, corners aligned", _sample((2, 3, 5, 4), (7, 10), padding_mode="border", align_corners=True)),
    Sample("nearest", _sample((2, 2, 5, 7), (3, 5), mode="nearest")),
    Sample("bicubic, zeros", _sample((1, 3, 6, 5), (9, 8), mode="bicubic", spread=1)),
    Sample("three dimensions, reflected", _sample((1, 2, 3, 5, 4), (2, 3, 4), padding_mode="reflection", spread=2)),
    Sample("channels last", _sample((2, 19, 5, 4), (3, 3), True)),
    Sample("no points", _sample((1, 2, 3, 3), (0, 2))),
)
checked(
    "affine_grid",
    affine_grid,
    torch.nn.functional.affine_grid,
    Sample("two dimensions", lambda t: ((t.input((2, 2, 3)), (2, 3, 4, 5), False), {}), derivatives=True),
    Sample("three dimensions", lambda t: ((t.input((1, 3, 4)), (1, 1, 2, 3, 4), True), {})),
)


composite("affine_grid")
