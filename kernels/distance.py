"""distance · Triton
  cdist  y[b,p,r] = (sum_m |x1[b,p,m] - x2[b,r,m]|^p)^(1/p), p = 0, 1, 2, infinity or any other
         dx1[p] = sum_r of the gradient of y[p,r] in x1[p], dx2 likewise; 0 where y is 0
  knn    the k smallest of each row of such a y, ascending, the lower index first among equals, with their indices
layout   x1: [B, P, M] · x2: [B, R, M] · y, dy: [B, P, R]
mapping  a program takes a tile of y, or of dx, and a few columns, or rows of the other, at a time; knn: the distances
         to a chunk of rows of x2 are sorted together with the best so far
memory   x1 and x2 once for each tile of the other; knn: a chunk of distances, never [P, R]
numerics differences first, so that the distance of equals is 0 exactly; sums in fp32 (fp64 for fp64), a fixed order
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._toolbox import SPECIMEN_TYPES, Specimen, accumulate_dtype, cdiv, root

TILE, DEPTH, CHUNK = 32, 8, 4096
ZERO, TWO, INFINITY, GENERAL = tl.constexpr(0), tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)


@triton.jit
def _power(x, e):
    """x^e for x >= 0, 0 at 0; NaN stays."""
    return tl.where(x <= 0, 0.0, tl.exp(tl.log(tl.where(x <= 0, 1.0, x)) * e))


@triton.jit
def _sign(d):
    """-1, 1, 0 or NaN."""
    return tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))


@triton.jit
def cdist_fwd_kernel(
    x1, x2, y, order, P, R, M, METRIC: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    acc_t: tl.constexpr = order.dtype.element_ty
    b = tl.program_id(1).to(tl.int64)
    tiles = tl.cdiv(R, TILE)
    p = tl.program_id(0) // tiles * TILE + tl.arange(0, TILE)
    r = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    total = tl.zeros((TILE, TILE), acc_t)
    for first in range(0, M, DEPTH):
        m = first + tl.arange(0, DEPTH)
        left = tl.load(x1 + (b * P + p[:, None]) * M + m[None, :], mask=(p < P)[:, None] & (m < M)[None, :], other=0.0)
        right = tl.load(x2 + (b * R + r[:, None]) * M + m[None, :], mask=(r < R)[:, None] & (m < M)[None, :], other=0.0)
        # equal zeros add nothing to any metric
        d = left.to(acc_t)[:, None, :] - right.to(acc_t)[None, :, :]
        if METRIC == ZERO:
            total += tl.sum(tl.where((d > 0) | (d < 0), 1.0, d - d), 2)
        elif METRIC == TWO:
            total += tl.sum(d * d, 2)
        elif METRIC == INFINITY:
            most = tl.max(tl.where(d == d, tl.abs(d), 0.0), 2) + tl.sum(tl.where(d == d, 0.0, d), 2)
            total = tl.where(total >= most, total, most + (total - total))  # a NaN on either side stays
        elif METRIC == GENERAL:
            total += tl.sum(_power(tl.abs(d), tl.load(order)), 2)
        else:
            total += tl.sum(tl.abs(d), 2)
    if METRIC == TWO:
        total = root(total)
    elif METRIC == GENERAL:
        total = _power(total, 1 / tl.load(order))
    at = y + (b * P + p[:, None]) * R + r[None, :]
    tl.store(at, total.to(y.dtype.element_ty), mask=(p < P)[:, None] & (r < R)[None, :])


@triton.jit
def cdist_bwd_kernel(
    dy, dist, x, other, dx, order, P, R, M, ROW, COLUMN,
    METRIC: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """dx: [B, P, M]; ROW, COLUMN: how far apart p and r are in dy and dist, so that both gradients are this one."""
    acc_t: tl.constexpr = order.dtype.element_ty
    b = tl.program_id(1).to(tl.int64)
    tiles = tl.cdiv(M, TILE)
    p = tl.program_id(0) // tiles * TILE + tl.arange(0, TILE)
    m = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    mine = (p < P)[:, None] & (m < M)[None, :]
    v = tl.load(x + (b * P + p[:, None]) * M + m[None, :], mask=mine, other=0.0).to(acc_t)
    total = tl.zeros((TILE, TILE), acc_t)
    for first in range(0, R, DEPTH):
        r = first + tl.arange(0, DEPTH)
        there = (p < P)[:, None] & (r < R)[None, :]
        at = b * P * R + p[:, None].to(tl.int64) * ROW + r[None, :] * COLUMN
        factor, length = tl.load(dy + at, mask=there, other=0.0), tl.load(dist + at, mask=there, other=0.0)
        factor, length = factor.to(acc_t), length.to(acc_t)
        near = (m < M)[:, None] & (r < R)[None, :]
        w = tl.load(other + (b * R + r[None, :]) * M + m[:, None], mask=near, other=0.0).to(acc_t)
        d = v[:, :, None] - w[None, :, :]
        if METRIC == TWO:
            factor = tl.where(length <= 0, 0.0, factor / tl.where(length <= 0, 1.0, length))
            along = d
        elif METRIC == INFINITY:
            along = tl.where(tl.abs(d) >= length[:, None, :], _sign(d), 0.0)
        elif METRIC == GENERAL:
            share = tl.abs(d) / tl.where(length <= 0, 1.0, length)[:, None, :]
            along = tl.where(length[:, None, :] <= 0, 0.0, _sign(d) * _power(share, tl.load(order) - 1))
        else:
            along = _sign(d)
        total += tl.sum(tl.where((r < R)[None, None, :], factor[:, None, :] * along, 0.0), 2)
    tl.store(dx + (b * P + p[:, None]) * M + m[None, :], total.to(dx.dtype.element_ty), mask=mine)


def _metric(p: float) -> int:
    return int(p) if p in (0.0, 1.0, 2.0) else INFINITY.value if p > 1e300 else GENERAL.value


def _order(p: float, x: torch.Tensor) -> torch.Tensor:
    """As a tensor, because Triton takes scalars in float32."""
    return torch.full((1,), p, dtype=accumulate_dtype(x.dtype), device=x.device)


def _distances(x1: torch.Tensor, x2: torch.Tensor, p: float, dtype: torch.dtype) -> torch.Tensor:
    (batch, rows, m), columns = x1.shape, x2.shape[1]
    y = x1.new_empty(batch, rows, columns, dtype=dtype)
    if y.numel():
        grid = (cdiv(rows, TILE) * cdiv(columns, TILE), batch)
        cdist_fwd_kernel[grid](
            x1, x2, y, _order(p, x1), rows, columns, m, METRIC=_metric(p), TILE=TILE, DEPTH=DEPTH, num_warps=8
        )
    return y


def cdist_fwd(x1: torch.Tensor, x2: torch.Tensor, p: float) -> torch.Tensor:
    return _distances(x1, x2, p, x1.dtype)


def cdist_bwd(
    dy: torch.Tensor, x1: torch.Tensor, x2: torch.Tensor, dist: torch.Tensor, p: float, need_dx1: bool, need_dx2: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, rows, columns = dy.shape
    m, order, results = x1.shape[2], _order(p, x1), []
    for need, x, other, strides in ((need_dx1, x1, x2, (columns, 1)), (need_dx2, x2, x1, (1, columns))):
        if not need:
            results.append(x.new_empty(0))
        elif p == 0.0 or dy.numel() == 0:
            results.append(torch.zeros_like(x))
        else:
            dx = torch.empty_like(x)
            if dx.numel():
                cdist_bwd_kernel[(cdiv(x.shape[1], TILE) * cdiv(m, TILE), batch)](
                    dy, dist, x, other, dx, order, x.shape[1], other.shape[1], m, *strides,
                    METRIC=_metric(p), TILE=TILE, DEPTH=DEPTH, num_warps=8,
                )  # fmt: skip
            results.append(dx)
    return results[0], results[1]


def knn_search(query: torch.Tensor, data: torch.Tensor, k: int, p: float) -> tuple[torch.Tensor, torch.Tensor]:
    batch, rows = query.shape[:2]
    wide = accumulate_dtype(query.dtype)
    nearest = query.new_empty(batch, rows, 0, dtype=wide)
    index = query.new_empty(batch, rows, 0, dtype=torch.int64)
    for first in range(0, data.shape[1], CHUNK):
        part = data[:, first : first + CHUNK].contiguous()
        found = torch.arange(first, first + part.shape[1], device=data.device).expand(batch, rows, -1)
        both = torch.cat([nearest, _distances(query, part, p, wide)], -1)
        # stable, and what was found before stands before: among equals the lower index is first
        nearest, order = (t[..., :k] for t in both.sort(stable=True, dim=-1))
        index = torch.cat([index, found], -1).gather(-1, order)
    return nearest.to(query.dtype).contiguous(), index.contiguous()


def specimens() -> list[Specimen]:
    """What tests/triton_compile.py compiles, by type of x and metric."""
    found = []
    for t, a in SPECIMEN_TYPES:
        sizes = {"order": f"*{a}"} | dict.fromkeys("PRM", "i32")
        for metric in (1, 2, 3, 4) if t == "fp32" else (2, 4):
            constants = {"METRIC": metric, "TILE": TILE, "DEPTH": DEPTH}
            types = {"x1": f"*{t}", "x2": f"*{t}", "y": f"*{t}"} | sizes
            found.append(Specimen(cdist_fwd_kernel, types, constants, 8, hot=t != "fp64"))
            types = dict.fromkeys(("dy", "dist", "x", "other", "dx"), f"*{t}") | sizes
            types |= {"ROW": "i32", "COLUMN": "i32"}
            found.append(Specimen(cdist_bwd_kernel, types, constants, 8, hot=t != "fp64"))
    return found
