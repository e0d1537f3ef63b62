"""grid_sample · Triton
  y[n,c,p] = sum over taps of w(tap) x[n,c,i(tap)];  dx gathers w dy;  dgrid = sum over taps of dw/dg sum_c dy x
layout   x: [N, C, D, H, W] or [N, D, H, W, C] · grid: [N, P, dims] · y: [N, C, P] or [N, P, C]
mapping  a program takes BLOCK elements of y, or points for dgrid. dx: the taps of all points are sorted by the element
         that they read, and a program takes BLOCK elements of dx, each of which adds its own in the order of the points
memory   dx needs an index, its order and a weight for each tap, whatever the number of channels
numerics fp32 (fp64 for fp64); no atomics, so the order of sums, and every bit, is the same each time
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ._toolbox import SPECIMEN_TYPES, Specimen, accumulate_dtype, cdiv

BLOCK, POINTS = 256, 128  # elements, and points of dgrid, which keep three sums each
TAPS = (2, 1, 4)  # of bilinear, nearest, bicubic, along one axis
REFLECTION = tl.constexpr(2)


@triton.jit
def _padded(at, slope, SIZE, PADDING: tl.constexpr, ALIGN: tl.constexpr):
    """The position where a coordinate reads, and its derivative; NaN becomes 0 but for zeros."""
    if PADDING == REFLECTION:
        if ALIGN:
            low, span = 0.0, SIZE - 1
        else:
            low, span = -0.5, SIZE
        d = at - low
        slope = tl.where(d < 0, -slope, slope)
        d = tl.abs(d)
        flips = tl.floor(d / tl.maximum(span, 1))
        rest = d - flips * span
        odd = flips - 2 * tl.floor(flips / 2) != 0
        at = tl.where(odd, span - rest, rest) + low
        slope = tl.where(odd, -slope, slope)
        at, slope = tl.where(span > 0, at, 0.0), tl.where(span > 0, slope, 0.0)
    if PADDING != 0:
        moves = (at > 0) & (at < SIZE - 1)
        slope = tl.where(moves, slope, 0.0)
        at = tl.where(at > 0, tl.where(at < SIZE - 1, at, SIZE - 1), 0.0)
    return at, slope


@triton.jit
def _element(at, SIZE):
    """The element at a whole position, -1 outside the axis."""
    inside = (at >= 0) & (at <= SIZE - 1)
    return tl.where(inside, at, -1.0).to(tl.int64)


@triton.jit
def _tap(g, SIZE, K: tl.constexpr, TAPS: tl.constexpr, PADDING: tl.constexpr, ALIGN: tl.constexpr):
    """Tap K of one axis: its element, its weight and the slope of that."""
    if ALIGN:
        at, slope = (g + 1) / 2 * (SIZE - 1), g * 0 + (SIZE - 1) / 2
    else:
        at, slope = ((g + 1) * SIZE - 1) / 2, g * 0 + SIZE / 2
    if TAPS == 4:
        low = tl.floor(at)
        x = at - low - (K - 1)
        d, a = tl.abs(x), -0.75
        # the outer taps lie at distances of 1 to 2, the inner ones at 0 to 1
        if (K == 1) or (K == 2):
            weight = ((a + 2) * d - (a + 3)) * d * d + 1
            change = (3 * (a + 2) * d - 2 * (a + 3)) * d
        else:
            weight = ((d - 5) * d + 8) * d * a - 4 * a
            change = ((3 * d - 10) * d + 8) * a
        slope = tl.where(x < 0, -slope, slope) * change
        place, _ = _padded(low + (K - 1), slope, SIZE, PADDING, ALIGN)
    else:
        at, slope = _padded(at, slope, SIZE, PADDING, ALIGN)
        low = tl.floor(at)
        over = at - low
        if TAPS == 1:
            # halves go to the even neighbour
            up = (over > 0.5) | ((over == 0.5) & (low - 2 * tl.floor(low / 2) != 0))
            place, weight, slope = tl.where(up, low + 1, low), g * 0 + 1, g * 0
            weight = tl.where(weight == weight, weight, 1.0)
        elif K == 0:
            place, weight, slope = low, 1 - over, -slope
        else:
            place, weight = low + 1, over
    return _element(place, SIZE), weight, slope


@triton.jit
def _point(grid, at, valid, DIMS: tl.constexpr, acc_t: tl.constexpr):
    """The coordinates of a point: along W, H and D."""
    gw = tl.load(grid + at * DIMS, mask=valid, other=0.0).to(acc_t)
    gh = tl.load(grid + at * DIMS + 1, mask=valid, other=0.0).to(acc_t)
    gd = gw * 0
    if DIMS == 3:
        gd = tl.load(grid + at * DIMS + 2, mask=valid, other=0.0).to(acc_t)
    return gw, gh, gd


@triton.jit
def _depth(g, D, K: tl.constexpr, DIMS: tl.constexpr, TAPS: tl.constexpr, PADDING: tl.constexpr, ALIGN: tl.constexpr):
    """Tap K along D, which images of two dimensions do not have."""
    if DIMS == 3:
        i, w, s = _tap(g, D, K, TAPS, PADDING, ALIGN)
    else:
        i = tl.zeros(g.shape, tl.int64)
        w, s = tl.full(g.shape, 1.0, g.dtype), tl.zeros(g.shape, g.dtype)
    return i, w, s


@triton.jit
def grid_sample_fwd_kernel(
    x, grid, y, TOTAL, C, D, H, W, P, DIMS: tl.constexpr, TAPS: tl.constexpr, DEEP: tl.constexpr,
    PADDING: tl.constexpr, ALIGN: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """DEEP: taps along D."""
    acc_t: tl.constexpr = tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = e < TOTAL
    size = tl.cast(D, tl.int64) * H * W
    n, rest = e // C // P, e % (tl.cast(C, tl.int64) * P)
    if LAST:
        c, p = rest % C, rest // C
        base, step = n * C * size + c, C
    else:
        c, p = rest // P, rest % P
        base, step = (n * C + c) * size, 1
    gw, gh, gd = _point(grid, n * P + p, valid, DIMS, acc_t)
    total = tl.zeros((BLOCK,), acc_t)
    for k in tl.static_range(DEEP):
        d, wd, _ = _depth(gd, D, k, DIMS, TAPS, PADDING, ALIGN)
        for j in tl.static_range(TAPS):
            h, wh, _ = _tap(gh, H, j, TAPS, PADDING, ALIGN)
            for i in tl.static_range(TAPS):
                w, ww, _ = _tap(gw, W, i, TAPS, PADDING, ALIGN)
                inside = valid & (d >= 0) & (h >= 0) & (w >= 0)
                v = tl.load(x + base + ((d * H + h) * W + w) * step, mask=inside, other=0.0).to(acc_t)
                total += wd * wh * ww * v
    tl.store(y + e, total.to(y.dtype.element_ty), mask=valid)


@triton.jit
def grid_sample_taps_kernel(
    grid, key, weight, TOTAL, D, H, W, P, DIMS: tl.constexpr, TAPS: tl.constexpr, DEEP: tl.constexpr,
    PADDING: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The element n S + i that each tap of each point reads, N S for none, and its weight."""
    acc_t: tl.constexpr = weight.dtype.element_ty
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = e < TOTAL
    size, n = tl.cast(D, tl.int64) * H * W, e // P
    gw, gh, gd = _point(grid, e, valid, DIMS, acc_t)
    for k in tl.static_range(DEEP):
        d, wd, _ = _depth(gd, D, k, DIMS, TAPS, PADDING, ALIGN)
        for j in tl.static_range(TAPS):
            h, wh, _ = _tap(gh, H, j, TAPS, PADDING, ALIGN)
            for i in tl.static_range(TAPS):
                w, ww, _ = _tap(gw, W, i, TAPS, PADDING, ALIGN)
                inside = (d >= 0) & (h >= 0) & (w >= 0)
                at = e * (DEEP * TAPS * TAPS) + (k * TAPS + j) * TAPS + i
                tl.store(key + at, tl.where(inside, n * size + (d * H + h) * W + w, TOTAL // P * size), mask=valid)
                tl.store(weight + at, wd * wh * ww, mask=valid)


@triton.jit
def grid_sample_bwd_x_kernel(
    dy, order, starts, weight, dx, TOTAL, C, S, P, MOST: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr
):
    """MOST: taps of a point. starts: where the taps of each element begin in their order."""
    acc_t: tl.constexpr = weight.dtype.element_ty
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = e < TOTAL
    n = e // C // S
    if LAST:
        c, i = e % C, e // C % S
        base, step = n * C * P + c, C
    else:
        c, i = e // S % C, e % S
        base, step = (n * C + c) * P, 1
    first = tl.load(starts + n * S + i, mask=valid, other=0)
    count = tl.load(starts + n * S + i + 1, mask=valid, other=0) - first
    total = tl.zeros((BLOCK,), acc_t)
    for j in range(tl.max(count, 0)):
        mine = valid & (j < count)
        tap = tl.load(order + first + j, mask=mine, other=0)
        p = tap // MOST - n * P
        g = tl.load(dy + base + p * step, mask=mine, other=0.0).to(acc_t)
        total += tl.where(mine, tl.load(weight + tap, mask=mine, other=0.0) * g, 0.0)
    tl.store(dx + e, total.to(dx.dtype.element_ty), mask=valid)


@triton.jit
def grid_sample_bwd_grid_kernel(
    dy, x, grid, dgrid, TOTAL, C, D, H, W, P, DIMS: tl.constexpr, TAPS: tl.constexpr, DEEP: tl.constexpr,
    PADDING: tl.constexpr, ALIGN: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    acc_t: tl.constexpr = tl.float64 if dgrid.dtype.element_ty == tl.float64 else tl.float32
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = e < TOTAL
    size, n, p = tl.cast(D, tl.int64) * H * W, e // P, e % P
    gw, gh, gd = _point(grid, e, valid, DIMS, acc_t)
    dw, dh, dd = tl.zeros((BLOCK,), acc_t), tl.zeros((BLOCK,), acc_t), tl.zeros((BLOCK,), acc_t)
    for k in tl.static_range(DEEP):
        d, wd, sd = _depth(gd, D, k, DIMS, TAPS, PADDING, ALIGN)
        for j in tl.static_range(TAPS):
            h, wh, sh = _tap(gh, H, j, TAPS, PADDING, ALIGN)
            for i in tl.static_range(TAPS):
                w, ww, sw = _tap(gw, W, i, TAPS, PADDING, ALIGN)
                inside = valid & (d >= 0) & (h >= 0) & (w >= 0)
                at = (d * H + h) * W + w
                if LAST:
                    of_x, of_dy, x_step, dy_step = n * C * size + at * C, (n * P + p) * C, 1, 1
                else:
                    of_x, of_dy, x_step, dy_step = n * C * size + at, n * C * P + p, size, P
                dot = tl.zeros((BLOCK,), acc_t)
                for c in range(C):
                    g = tl.load(dy + of_dy + c * dy_step, mask=inside, other=0.0).to(acc_t)
                    dot += g * tl.load(x + of_x + c * x_step, mask=inside, other=0.0).to(acc_t)
                dw += sw * wh * wd * dot
                dh += ww * sh * wd * dot
                dd += ww * wh * sd * dot
    tl.store(dgrid + e * DIMS, dw.to(dgrid.dtype.element_ty), mask=valid)
    tl.store(dgrid + e * DIMS + 1, dh.to(dgrid.dtype.element_ty), mask=valid)
    if DIMS == 3:
        tl.store(dgrid + e * DIMS + 2, dd.to(dgrid.dtype.element_ty), mask=valid)


def _problem(
    x: torch.Tensor, grid: torch.Tensor, mode: int, padding: int, align_corners: bool, channels_last: bool
) -> tuple[int, list[int], dict[str, Any]]:
    """C; D, H and W; what the kernels are compiled for."""
    c, space = (x.shape[4], x.shape[1:4]) if channels_last else (x.shape[1], x.shape[2:])
    taps, dims = TAPS[mode], grid.shape[2]
    return c, list(space), {
        "DIMS": dims, "TAPS": taps, "DEEP": taps if dims == 3 else 1,
        "PADDING": padding, "ALIGN": align_corners, "BLOCK": BLOCK,
    }  # fmt: skip


def grid_sample_fwd(
    x: torch.Tensor, grid: torch.Tensor, mode: int, padding: int, align_corners: bool, channels_last: bool
) -> torch.Tensor:
    c, space, how = _problem(x, grid, mode, padding, align_corners, channels_last)
    n, p = x.shape[0], grid.shape[1]
    y = x.new_empty((n, p, c) if channels_last else (n, c, p))
    if y.numel():
        grid_sample_fwd_kernel[(cdiv(y.numel(), BLOCK),)](
            x, grid, y, y.numel(), c, *space, p, LAST=channels_last, **how
        )
    return y


def grid_sample_bwd(
    dy: torch.Tensor, x: torch.Tensor, grid: torch.Tensor, mode: int, padding: int, align_corners: bool,
    channels_last: bool, needs_x: bool, needs_grid: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    c, space, how = _problem(x, grid, mode, padding, align_corners, channels_last)
    n, p = grid.shape[:2]
    points, size = n * p, space[0] * space[1] * space[2]
    most = how["TAPS"] ** 2 * how["DEEP"]
    dx, dgrid = x.new_zeros(x.shape if needs_x else 0), grid.new_zeros(grid.shape if needs_grid else 0)
    blocks = (cdiv(points, BLOCK),)
    if needs_x and dy.numel():
        key = torch.empty(points * most, dtype=torch.int64, device=x.device)
        weight = torch.empty(points * most, dtype=accumulate_dtype(x.dtype), device=x.device)
        grid_sample_taps_kernel[blocks](grid, key, weight, points, *space, p, **how)
        ordered, order = key.sort(stable=True)
        starts = torch.searchsorted(ordered, torch.arange(n * size + 1, device=x.device))
        grid_sample_bwd_x_kernel[(cdiv(dx.numel(), BLOCK),)](
            dy, order, starts, weight, dx, dx.numel(), c, size, p, MOST=most, LAST=channels_last, BLOCK=BLOCK
        )
    if needs_grid and dy.numel():
        grid_sample_bwd_grid_kernel[(cdiv(points, POINTS),)](
            dy, x, grid, dgrid, points, c, *space, p, LAST=channels_last, **how | {"BLOCK": POINTS}
        )
    return dx, dgrid


def specimens() -> list[Specimen]:
    """What tests/triton_compile.py compiles, by type of x and mode."""
    found = []
    for t, a in SPECIMEN_TYPES:
        for mode, dims, padding in ((0, 2, 0), (0, 3, 1), (1, 2, 2), (2, 2, 1)) if t == "fp32" else ((0, 2, 0),):
            whole = lambda *names: dict.fromkeys(names, "i32")
            how = {"DIMS": dims, "TAPS": TAPS[mode], "DEEP": TAPS[mode] if dims == 3 else 1}
            how |= {"PADDING": padding, "ALIGN": False, "BLOCK": BLOCK}
            image, last = whole("TOTAL", "C", "D", "H", "W", "P"), {"LAST": mode == 0}
            hot = t != "fp64"
            found += [
                Specimen(
                    grid_sample_fwd_kernel, dict.fromkeys(("x", "grid", "y"), f"*{t}") | image, how | last, 4, hot
                ),
                Specimen(
                    grid_sample_bwd_grid_kernel,
                    dict.fromkeys(("dy", "x", "grid", "dgrid"), f"*{t}") | image,
                    how | last | {"BLOCK": POINTS},
                    4,
                    hot,
                ),
                Specimen(
                    grid_sample_taps_kernel,
                    {"grid": f"*{t}", "key": "*i64", "weight": f"*{a}"} | whole("TOTAL", "D", "H", "W", "P"),
                    how,
                    4,
                    hot,
                ),
            ]
        types = {"dy": f"*{t}", "order": "*i64", "starts": "*i64", "weight": f"*{a}", "dx": f"*{t}"}
        types |= dict.fromkeys(("TOTAL", "C", "S", "P"), "i32")
        found.append(Specimen(grid_sample_bwd_x_kernel, types, {"MOST": 4, "LAST": True, "BLOCK": BLOCK}, 4))
    return found
