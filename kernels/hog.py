"""hog · Triton
  cells[i,j,o] = 1/|cell| · sum over the pixels of cell (i,j) whose gradient g points into bin o of |g|
  y[b,:] = v/n,  v: the cells of block b;  n = sum v + eps (L1)  or sqrt(sum v² + eps²) (L2)
  L1-sqrt: sqrt(v/n);  L2-Hys: t = min(v/n, 0.2), then t/m with m = sqrt(sum t² + eps²)
layout   x: [N, C, H, W] or, channels_last, [N, H, W, C] · cells: [N, cells_h, cells_w, O] in fp32 (fp64)
         y: [N, blocks_h, blocks_w, block_h, block_w, O]
mapping  a program takes a cell, BLOCK pixels by all bins at a time; or a block; or BLOCK elements of a gradient
memory   x once from DRAM; backward: scratch for every value of y, two fp32 (fp64) and a channel for each pixel
numerics fp32 (fp64 for fp64); no atomics: a gradient is gathered, in a fixed order
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ._toolbox import SPECIMEN_TYPES, Specimen, accumulate_dtype, cdiv, power_of_two, root

BLOCK = 256
EPSILON, LIMIT = tl.constexpr(1e-5), tl.constexpr(0.2)
L1_SQRT, L2, L2_HYS = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def _gradient(image, h, w, valid, H, W, C, PIXEL, PLANE, acc_t: tl.constexpr):
    """Central differences, 0 across the border, of the channel where they are longest; the first of equal ones."""
    gx = tl.zeros(h.shape, acc_t)
    gy = tl.zeros(h.shape, acc_t)
    most = gx - 1
    channel = tl.zeros(h.shape, tl.int32)
    across, down = valid & (w > 0) & (w + 1 < W), valid & (h > 0) & (h + 1 < H)
    at = image + (h.to(tl.int64) * W + w) * PIXEL
    for c in range(C):
        left, right = tl.load(at - PIXEL, mask=across, other=0.0), tl.load(at + PIXEL, mask=across, other=0.0)
        upper, lower = tl.load(at - W * PIXEL, mask=down, other=0.0), tl.load(at + W * PIXEL, mask=down, other=0.0)
        x, y = right.to(acc_t) - left.to(acc_t), lower.to(acc_t) - upper.to(acc_t)
        low, high = tl.minimum(tl.abs(x), tl.abs(y)), tl.maximum(tl.abs(x), tl.abs(y))
        square = high * high + low * low  # the same for (y, x): a tie of two channels stays one
        longer = (square > most) | ((square != square) & (most == most))
        gx, gy = tl.where(longer, x, gx), tl.where(longer, y, gy)
        channel, most = tl.where(longer, c, channel), tl.where(longer, square, most)
        at += PLANE
    return gx, gy, channel


@triton.jit
def _bin(x, y, directions, DIRECTIONS):
    """The bin of a direction; opposite ones are one. directions: [2, O], where each bin begins."""
    below = (y < 0) | ((y == 0) & (x < 0))
    x, y = tl.where(below, -x, x), tl.where(below, -y, y)
    passed = tl.zeros(x.shape, tl.int32)
    for o in range(1, DIRECTIONS):
        passed += (y * tl.load(directions + o) - x * tl.load(directions + DIRECTIONS + o) >= 0).to(tl.int32)
    return passed


@triton.jit
def hog_cells_kernel(
    x, cells, directions, C, H, W, PIXEL, PLANE, DIRECTIONS, CELLS_H, CELLS_W, CELL_H, CELL_W,
    BLOCK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    acc_t: tl.constexpr = cells.dtype.element_ty
    cell = tl.program_id(0).to(tl.int64)
    left, top = cell % CELLS_W * CELL_W, cell // CELLS_W % CELLS_H * CELL_H
    image = x + cell // CELLS_W // CELLS_H * C * H * W
    bins = tl.arange(0, BINS)
    total = tl.zeros((BINS,), tl.float64)
    for first in range(0, CELL_H * CELL_W, BLOCK):
        p = first + tl.arange(0, BLOCK)
        valid = p < CELL_H * CELL_W
        gx, gy, _ = _gradient(image, top + p // CELL_W, left + p % CELL_W, valid, H, W, C, PIXEL, PLANE, acc_t)
        magnitude = root(gx * gx + gy * gy)
        mine = _bin(gx, gy, directions, DIRECTIONS)[:, None] == bins[None, :]
        total += tl.sum(tl.where(mine & valid[:, None], magnitude[:, None], 0.0), 0).to(tl.float64)
    tl.store(cells + cell * DIRECTIONS + bins, (total / (CELL_H * CELL_W)).to(acc_t), mask=bins < DIRECTIONS)


@triton.jit
def _block(cells, b, k, K, DIRECTIONS, CELLS_H, CELLS_W, BLOCK_H, BLOCK_W, BLOCKS_H, BLOCKS_W, NORM: tl.constexpr):
    """The values v of block b, and what they are divided by."""
    o, j, i = k % DIRECTIONS, k // DIRECTIONS % BLOCK_W, k // DIRECTIONS // BLOCK_W
    left, top, n = b % BLOCKS_W, b // BLOCKS_W % BLOCKS_H, b // BLOCKS_W // BLOCKS_H
    v = tl.load(cells + ((n * CELLS_H + top + i) * CELLS_W + left + j) * DIRECTIONS + o, mask=k < K, other=0.0)
    if NORM >= L2:
        divisor = root(tl.sum(v * v, 0) + EPSILON * EPSILON)
    else:
        divisor = tl.sum(v, 0) + EPSILON
    return v, divisor


@triton.jit
def _clipped(u):
    t = tl.where(u > LIMIT, LIMIT, u)
    return t, root(tl.sum(t * t, 0) + EPSILON * EPSILON)


@triton.jit
def hog_blocks_kernel(
    cells, y, K, DIRECTIONS, CELLS_H, CELLS_W, BLOCK_H, BLOCK_W, BLOCKS_H, BLOCKS_W,
    NORM: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, VALUES)
    v, divisor = _block(cells, b, k, K, DIRECTIONS, CELLS_H, CELLS_W, BLOCK_H, BLOCK_W, BLOCKS_H, BLOCKS_W, NORM)
    u = v / divisor
    if NORM == L1_SQRT:
        u = root(u)
    if NORM == L2_HYS:
        t, second = _clipped(u)
        u = t / second
    tl.store(y + b * K + k, u.to(y.dtype.element_ty), mask=k < K)


@triton.jit
def hog_blocks_bwd_kernel(
    dy, cells, dv, K, DIRECTIONS, CELLS_H, CELLS_W, BLOCK_H, BLOCK_W, BLOCKS_H, BLOCKS_W,
    NORM: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, VALUES)
    v, divisor = _block(cells, b, k, K, DIRECTIONS, CELLS_H, CELLS_W, BLOCK_H, BLOCK_W, BLOCKS_H, BLOCKS_W, NORM)
    u = v / divisor
    du = tl.load(dy + b * K + k, mask=k < K, other=0.0).to(v.dtype)
    if NORM == L1_SQRT:
        du = tl.where(u > 0, du / (2 * root(tl.where(u > 0, u, 1.0))), 0.0)
    if NORM == L2_HYS:
        t, second = _clipped(u)
        along = tl.sum(du * t, 0) / (second * second)
        du = tl.where(u > LIMIT, 0.0, (du - t * along) / second)
    inner = tl.sum(du * v, 0) / (divisor * divisor)
    if NORM >= L2:
        grad = du / divisor - u * inner
    else:
        grad = du / divisor - inner
    tl.store(dv + b * K + k, grad, mask=k < K)


@triton.jit
def hog_cells_bwd_kernel(
    dv, dcells, TOTAL, DIRECTIONS, CELLS_H, CELLS_W, BLOCK_H, BLOCK_W, BLOCKS_H, BLOCKS_W, AREA, BLOCK: tl.constexpr
):
    """A cell lies at (i, j) of the block that begins i rows above and j columns before it."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    o, column, row = e % DIRECTIONS, e // DIRECTIONS % CELLS_W, e // DIRECTIONS // CELLS_W % CELLS_H
    n = e // DIRECTIONS // CELLS_W // CELLS_H
    total = tl.zeros((BLOCK,), dv.dtype.element_ty)
    for i in range(BLOCK_H):
        for j in range(BLOCK_W):
            top, left = row - i, column - j
            inside = (e < TOTAL) & (top >= 0) & (top < BLOCKS_H) & (left >= 0) & (left < BLOCKS_W)
            block = (n * BLOCKS_H + top) * BLOCKS_W + left
            total += tl.load(dv + ((block * BLOCK_H + i) * BLOCK_W + j) * DIRECTIONS + o, mask=inside, other=0.0)
    tl.store(dcells + e, total / AREA, mask=e < TOTAL)


@triton.jit
def hog_votes_bwd_kernel(
    x, dcells, directions, u, v, channel, TOTAL, C, H, W, PIXEL, PLANE, DIRECTIONS, CELLS_H, CELLS_W, CELL_H, CELL_W,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of the two differences of each pixel; |g| moves along g/|g|, and not at all where g = 0."""
    acc_t: tl.constexpr = u.dtype.element_ty
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    w, h, n = e % W, e // W % H, e // W // H
    gx, gy, taken = _gradient(x + n * C * H * W, h, w, e < TOTAL, H, W, C, PIXEL, PLANE, acc_t)
    magnitude = root(gx * gx + gy * gy)
    i, j = h // CELL_H, w // CELL_W
    votes = (e < TOTAL) & (i < CELLS_H) & (j < CELLS_W) & (magnitude != 0)
    at = ((n * CELLS_H + i) * CELLS_W + j) * DIRECTIONS + _bin(gx, gy, directions, DIRECTIONS)
    slope = tl.load(dcells + at, mask=votes, other=0.0) / tl.where(votes, magnitude, 1.0)
    tl.store(u + e, slope * gx, mask=e < TOTAL)
    tl.store(v + e, slope * gy, mask=e < TOTAL)
    tl.store(channel + e, taken, mask=e < TOTAL)


@triton.jit
def _part(field, channel, at, c, inside):
    mine = inside & (tl.load(channel + at, mask=inside, other=-1) == c)
    return tl.load(field + at, mask=mine, other=0.0)


@triton.jit
def hog_differences_bwd_kernel(u, v, channel, dx, TOTAL, C, H, W, PIXEL, PLANE, BLOCK: tl.constexpr):
    """It is what lies ahead of one neighbour and behind the other, wherever they took channel c."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    w, h, c, n = e // PIXEL % W, e // PIXEL // W % H, e // PLANE % C, e // C // H // W
    p, valid = (n * H + h) * W + w, e < TOTAL
    across = _part(u, channel, p - 1, c, valid & (w > 0)) - _part(u, channel, p + 1, c, valid & (w + 1 < W))
    down = _part(v, channel, p - W, c, valid & (h > 0)) - _part(v, channel, p + W, c, valid & (h + 1 < H))
    tl.store(dx + e, (across + down).to(dx.dtype.element_ty), mask=valid)


def _directions(orientations: int, x: torch.Tensor) -> torch.Tensor:
    """Where each bin begins, as columns x and y; the rational slopes are exact, as in csrc/common/hog.h."""
    table = []
    for o in range(orientations):
        diagonal, upright = 4 * o in (orientations, 3 * orientations), 2 * o == orientations
        angle = math.pi * o / orientations
        along = math.copysign(1, orientations - 2 * o) if diagonal else 0.0 if upright else math.cos(angle)
        table.append((along, 1.0 if diagonal or upright else math.sin(angle)))
    return torch.tensor(table, dtype=accumulate_dtype(x.dtype), device=x.device).t().contiguous()


def _sizes(x: torch.Tensor, cell: list[int], block: list[int], channels_last: bool) -> tuple[list[int], ...]:
    """Of the image: C, H, W, the distance of pixels and of channels; then cells and blocks."""
    (h, w), c = (x.shape[1:3], x.shape[3]) if channels_last else (x.shape[2:], x.shape[1])
    cells = [h // cell[0], w // cell[1]]
    return [c, h, w, *((c, 1) if channels_last else (1, h * w))], cells, [n - b + 1 for n, b in zip(cells, block)]


def hog_fwd(x: torch.Tensor, orientations: int, cell: list[int], block: list[int], norm: int, channels_last: bool):
    n, (image, cells, blocks) = x.shape[0], _sizes(x, cell, block, channels_last)
    votes = x.new_empty(n, *cells, orientations, dtype=accumulate_dtype(x.dtype))
    y = x.new_empty(n, *blocks, *block, orientations)
    if n:
        values = block[0] * block[1] * orientations
        hog_cells_kernel[(n * cells[0] * cells[1],)](
            x, votes, _directions(orientations, x), *image, orientations, *cells, *cell,
            BLOCK=min(power_of_two(cell[0] * cell[1]), 64), BINS=power_of_two(orientations), num_warps=1,
        )  # fmt: skip
        hog_blocks_kernel[(n * blocks[0] * blocks[1],)](
            votes, y, values, orientations, *cells, *block, *blocks,
            NORM=norm, VALUES=power_of_two(values), num_warps=1,
        )  # fmt: skip
    return y, votes


def hog_bwd(
    dy: torch.Tensor, x: torch.Tensor, votes: torch.Tensor, orientations: int, cell: list[int], block: list[int],
    norm: int, channels_last: bool,
) -> torch.Tensor:  # fmt: skip
    n, (image, cells, blocks) = x.shape[0], _sizes(x, cell, block, channels_last)
    _, h, w, *_ = image
    dx = x.new_empty(x.shape)
    if n:
        values = block[0] * block[1] * orientations
        dv, dcells = votes.new_empty(dy.shape), torch.empty_like(votes)
        u, v, channel = votes.new_empty(n, h, w), votes.new_empty(n, h, w), votes.new_empty(n, h, w, dtype=torch.int32)
        hog_blocks_bwd_kernel[(n * blocks[0] * blocks[1],)](
            dy, votes, dv, values, orientations, *cells, *block, *blocks,
            NORM=norm, VALUES=power_of_two(values), num_warps=1,
        )  # fmt: skip
        hog_cells_bwd_kernel[(cdiv(votes.numel(), BLOCK),)](
            dv, dcells, votes.numel(), orientations, *cells, *block, *blocks, cell[0] * cell[1], BLOCK=BLOCK
        )
        hog_votes_bwd_kernel[(cdiv(n * h * w, BLOCK),)](
            x, dcells, _directions(orientations, x), u, v, channel, n * h * w, *image, orientations,
            *cells, *cell,
            BLOCK=BLOCK,
        )  # fmt: skip
        hog_differences_bwd_kernel[(cdiv(x.numel(), BLOCK),)](u, v, channel, dx, x.numel(), *image, BLOCK=BLOCK)
    return dx


def specimens() -> list[Specimen]:
    """What tests/triton_compile.py compiles, by type of x."""
    space, image = ("CELLS_H", "CELLS_W"), ("C", "H", "W", "PIXEL", "PLANE")
    geometry = (*image, "DIRECTIONS", *space, "CELL_H", "CELL_W")
    blocks = ("K", "DIRECTIONS", *space, "BLOCK_H", "BLOCK_W", "BLOCKS_H", "BLOCKS_W")
    found = []
    for t, a in SPECIMEN_TYPES:
        whole = lambda *names: dict.fromkeys(names, "i32")
        fields = {"u": f"*{a}", "v": f"*{a}", "channel": "*i32"}
        source = {"x": f"*{t}", "directions": f"*{a}"}
        one = {"BLOCK": BLOCK}
        found += [
            Specimen(
                hog_cells_kernel,
                {**source, "cells": f"*{a}"} | whole(*geometry),
                {"BLOCK": 64, "BINS": 16},
                1,
            ),
            Specimen(
                hog_votes_bwd_kernel,
                {**source, **fields, "dcells": f"*{a}"} | whole("TOTAL", *geometry),
                one,
                4,
            ),
            Specimen(hog_differences_bwd_kernel, {**fields, "dx": f"*{t}"} | whole("TOTAL", *image), one, 4),
        ]
        for norm in (1, 3):
            constants = {"NORM": norm, "VALUES": 128}
            found += [
                Specimen(hog_blocks_kernel, {"cells": f"*{a}", "y": f"*{t}"} | whole(*blocks), constants, 1),
                Specimen(
                    hog_blocks_bwd_kernel,
                    {"dy": f"*{t}", "cells": f"*{a}", "dv": f"*{a}"} | whole(*blocks),
                    constants,
                    1,
                ),
            ]
    for a in ("fp32", "fp64"):
        names = ("TOTAL", *blocks[1:], "AREA")
        types = {"dv": f"*{a}", "dcells": f"*{a}"} | dict.fromkeys(names, "i32")
        found.append(Specimen(hog_cells_bwd_kernel, types, {"BLOCK": BLOCK}, 4))
    return found
