"""Normalisation by statistics of channels: what batch norm, group norm and wide layer norm share.

layout   x [N, C, S], or [N, S, C] with channels last, N * C < 2^31; a set of D = C / G channels has one entry in the
         statistics, n * stat_stride + c // D: batch norm has G = C, stat_stride 0, group norm has stat_stride G
mapping  moments and sums are first taken per channel and strip, part [planes, N, P, C], by as many programs as fill the
         GPU; one small kernel combines them; an elementwise kernel applies them
memory   forward reads x twice and writes y once, backward reads x and dy twice and writes dx once; the second pass runs
         backwards, so that it starts with what the first one left in L2
numerics each thread sums differences to the first element it saw: such a shift keeps the variance exact to n * ulp with
         n <= STEP_LIMIT, whatever the mean; threads and strips are combined by Chan's formula
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ._toolbox import (
    SPECIMEN_TYPES,
    Specimen,
    accumulate_dtype,
    cdiv,
    multiprocessors,
    power_of_two,
    rsqrt,
    sum_partials,
    sum_partials_kernel,
    tile_width,
    warps,
)

STEP_LIMIT = 64
TILE = 4096


@triton.jit
def shifted_sums(v, valid, shift, count, s1, s2):
    """Adds v to the sums of (v - shift) and (v - shift)^2 of each lane; its first valid element is the shift."""
    shift = tl.where(count == 0, v, shift)
    d = tl.where(valid, v - shift, 0.0)
    return shift, count + valid.to(tl.int32), s1 + d, s2 + d * d


@triton.jit
def lane_moments(shift, count, s1, s2, axis: tl.constexpr):
    """(count, mean, sum of squared deviations) over `axis` of the lanes of shifted_sums."""
    n = count.to(s1.dtype)
    rest = s1 / tl.maximum(n, 1.0)
    mean = shift + rest
    total = tl.sum(n, axis)
    nonzero = tl.maximum(total, 1.0)
    # Relative to any one lane's mean, the mean of the lanes is summed without loss.
    near = tl.max(tl.where(count > 0, mean, float("-inf")), axis)
    near = tl.where(total > 0, near, 0.0)
    near_lane = tl.expand_dims(near, axis)
    mu = near + tl.sum(tl.where(count > 0, n * (mean - near_lane), 0.0), axis) / nonzero
    d = mean - tl.expand_dims(mu, axis)
    m2 = tl.sum(tl.where(count > 0, s2 - s1 * rest + n * d * d, 0.0), axis)
    return total, mu, m2


@triton.jit
def moments_rows_kernel(x, part, ROWS, C, S, strip, STRIPS, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr):
    """Moments of rows x [ROWS = N * C, S], each in STRIPS strips: part [3, N, STRIPS, C]."""
    acc_t: tl.constexpr = part.dtype.element_ty
    pid = tl.program_id(0)
    p = pid % STRIPS
    row = (pid // STRIPS) * BLOCK_M + tl.arange(0, BLOCK_M)
    start = p.to(tl.int64) * strip
    width = tl.minimum(S - start, strip).to(tl.int32)
    at = x + (row.to(tl.int64)[:, None] * S + start)
    shift = tl.zeros((BLOCK_M, BLOCK_S), acc_t)
    count = tl.zeros((BLOCK_M, BLOCK_S), tl.int32)
    s1 = tl.zeros((BLOCK_M, BLOCK_S), acc_t)
    s2 = tl.zeros((BLOCK_M, BLOCK_S), acc_t)
    for k in range(0, width, BLOCK_S):
        col = k + tl.arange(0, BLOCK_S)[None, :]
        valid = (row < ROWS)[:, None] & (col < width)
        v = tl.load(at + col, mask=valid, other=0.0).to(acc_t)
        shift, count, s1, s2 = shifted_sums(v, valid, shift, count, s1, s2)
    n, mu, m2 = lane_moments(shift, count, s1, s2, 1)
    to = ((row // C).to(tl.int64) * STRIPS + p) * C + row % C
    plane = STRIPS * tl.full((), 1, tl.int64) * ROWS
    tl.store(part + to, n, mask=row < ROWS)
    tl.store(part + plane + to, mu, mask=row < ROWS)
    tl.store(part + 2 * plane + to, m2, mask=row < ROWS)


@triton.jit(do_not_specialize=["strip"])
def moments_columns_kernel(
    x, part, S, C, strip, STRIPS, COLUMNS, SAMPLES, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Moments of the columns of x [SAMPLES, S, C], in STRIPS strips of S: part [3, SAMPLES, STRIPS, C]."""
    acc_t: tl.constexpr = part.dtype.element_ty
    pid = tl.program_id(0)
    slab = (pid // COLUMNS).to(tl.int64)
    start = (slab % STRIPS) * strip
    height = tl.minimum(S - start, strip).to(tl.int32)
    col = (pid % COLUMNS) * BLOCK_C + tl.arange(0, BLOCK_C)
    at = x + ((slab // STRIPS) * S + start) * C + col[None, :]
    shift = tl.zeros((BLOCK_M, BLOCK_C), acc_t)
    count = tl.zeros((BLOCK_M, BLOCK_C), tl.int32)
    s1 = tl.zeros((BLOCK_M, BLOCK_C), acc_t)
    s2 = tl.zeros((BLOCK_M, BLOCK_C), acc_t)
    for k in range(0, height, BLOCK_M):
        row = k + tl.arange(0, BLOCK_M)
        valid = (row < height)[:, None] & (col < C)[None, :]
        v = tl.load(at + row.to(tl.int64)[:, None] * C, mask=valid, other=0.0).to(acc_t)
        shift, count, s1, s2 = shifted_sums(v, valid, shift, count, s1, s2)
    n, mu, m2 = lane_moments(shift, count, s1, s2, 0)
    to = slab * C + col
    plane = STRIPS * tl.full((), 1, tl.int64) * C * SAMPLES
    tl.store(part + to, n, mask=col < C)
    tl.store(part + plane + to, mu, mask=col < C)
    tl.store(part + 2 * plane + to, m2, mask=col < C)


@triton.jit(do_not_specialize=["SETS", "K"])
def combine_moments_kernel(
    part, mean, rstd, var, SETS, K, C, D, plane,
    EPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Mean, rstd and biased variance of sets (n, g) from part [3, N, K, C]: K strips of D channels each."""
    acc_t: tl.constexpr = part.dtype.element_ty
    i = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    groups = C // D
    base = part + ((i // groups) * K * C + (i % groups) * D)[:, None]
    near = tl.load(part + plane + (i // groups) * K * C + (i % groups) * D, mask=i < SETS, other=0.0)[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_K), acc_t)
    s1 = tl.zeros((BLOCK_M, BLOCK_K), acc_t)
    for k0 in range(0, K * D, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K).to(tl.int64)
        valid = (i < SETS)[:, None] & (k < K * D)[None, :]
        at = base + ((k // D) * C + k % D)[None, :]
        n = tl.load(at, mask=valid, other=0.0)
        total += n
        s1 += tl.where(valid, n * (tl.load(at + plane, mask=valid, other=0.0) - near), 0.0)
    count = tl.sum(total, 1)
    nonzero = tl.maximum(count, 1.0)
    mu = tl.sum(near, 1) + tl.sum(s1, 1) / nonzero
    m2 = tl.zeros((BLOCK_M, BLOCK_K), acc_t)
    for k0 in range(0, K * D, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K).to(tl.int64)
        valid = (i < SETS)[:, None] & (k < K * D)[None, :]
        at = base + ((k // D) * C + k % D)[None, :]
        d = tl.load(at + plane, mask=valid, other=0.0) - mu[:, None]
        n = tl.load(at, mask=valid, other=0.0)
        m2 += tl.where(valid, tl.load(at + 2 * plane, mask=valid, other=0.0) + n * d * d, 0.0)
    v = tl.sum(m2, 1) / nonzero
    tl.store(mean + i, mu, mask=i < SETS)
    tl.store(var + i, v, mask=i < SETS)
    tl.store(rstd + i, rsqrt(v + EPS), mask=i < SETS)


@triton.jit
def normalize_rows_kernel(
    x, weight, bias, y, mean, rstd, ROWS, C, S, D, stat_stride, strip, STRIPS,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """y of rows x [ROWS = N * C, S] from the statistics of their set."""
    acc_t: tl.constexpr = mean.dtype.element_ty
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    row = (pid // STRIPS) * BLOCK_M + tl.arange(0, BLOCK_M)
    start = (pid % STRIPS).to(tl.int64) * strip
    width = tl.minimum(S - start, strip).to(tl.int32)
    c = row % C
    stat = (row // C) * stat_stride + c // D
    mu = tl.load(mean + stat, mask=row < ROWS, other=0.0)
    scale = tl.load(rstd + stat, mask=row < ROWS, other=0.0)
    shift = tl.zeros((BLOCK_M,), acc_t)
    if weight is not None:
        scale *= tl.load(weight + c, mask=row < ROWS, other=0.0).to(acc_t)
    if bias is not None:
        shift = tl.load(bias + c, mask=row < ROWS, other=0.0).to(acc_t)
    base = row.to(tl.int64)[:, None] * S + start
    for k in range(0, width, BLOCK_S):
        col = k + tl.arange(0, BLOCK_S)[None, :]
        valid = (row < ROWS)[:, None] & (col < width)
        v = tl.load(x + base + col, mask=valid, other=0.0).to(acc_t)
        out = (v - mu[:, None]) * scale[:, None] + shift[:, None]
        tl.store(y + base + col, out.to(y.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["strip"])
def normalize_columns_kernel(
    x, weight, bias, y, mean, rstd, S, C, D, stat_stride, strip, STRIPS, COLUMNS,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y of x [N, S, C] from the statistics of each column's set."""
    acc_t: tl.constexpr = mean.dtype.element_ty
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    slab = (pid // COLUMNS).to(tl.int64)
    start = (slab % STRIPS) * strip
    height = tl.minimum(S - start, strip).to(tl.int32)
    col = (pid % COLUMNS) * BLOCK_C + tl.arange(0, BLOCK_C)
    stat = (slab // STRIPS) * stat_stride + col // D
    mu = tl.load(mean + stat, mask=col < C, other=0.0)
    scale = tl.load(rstd + stat, mask=col < C, other=0.0)
    shift = tl.zeros((BLOCK_C,), acc_t)
    if weight is not None:
        scale *= tl.load(weight + col, mask=col < C, other=0.0).to(acc_t)
    if bias is not None:
        shift = tl.load(bias + col, mask=col < C, other=0.0).to(acc_t)
    base = ((slab // STRIPS) * S + start) * C + col[None, :]
    for k in range(0, height, BLOCK_M):
        row = k + tl.arange(0, BLOCK_M)
        valid = (row < height)[:, None] & (col < C)[None, :]
        at = base + row.to(tl.int64)[:, None] * C
        v = tl.load(x + at, mask=valid, other=0.0).to(acc_t)
        out = (v - mu[None, :]) * scale[None, :] + shift[None, :]
        tl.store(y + at, out.to(y.dtype.element_ty), mask=valid)


@triton.jit
def sums_rows_kernel(
    dy, x, mean, rstd, part, ROWS, C, S, D, stat_stride, strip, STRIPS,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Sums of dy * xhat and dy over rows [ROWS = N * C, S]: part [2, N, STRIPS, C]."""
    acc_t: tl.constexpr = mean.dtype.element_ty
    pid = tl.program_id(0)
    p = pid % STRIPS
    row = (pid // STRIPS) * BLOCK_M + tl.arange(0, BLOCK_M)
    start = p.to(tl.int64) * strip
    width = tl.minimum(S - start, strip).to(tl.int32)
    stat = (row // C) * stat_stride + (row % C) // D
    mu = tl.load(mean + stat, mask=row < ROWS, other=0.0)[:, None]
    base = row.to(tl.int64)[:, None] * S + start
    s1 = tl.zeros((BLOCK_M, BLOCK_S), acc_t)
    s2 = tl.zeros((BLOCK_M, BLOCK_S), acc_t)
    for k in range(0, width, BLOCK_S):
        col = k + tl.arange(0, BLOCK_S)[None, :]
        valid = (row < ROWS)[:, None] & (col < width)
        g = tl.load(dy + base + col, mask=valid, other=0.0).to(acc_t)
        d = tl.load(x + base + col, mask=valid, other=0.0).to(acc_t) - mu
        s1 += g
        s2 += tl.where(valid, g * d, 0.0)
    r = tl.load(rstd + stat, mask=row < ROWS, other=0.0)
    to = ((row // C).to(tl.int64) * STRIPS + p) * C + row % C
    plane = STRIPS * tl.full((), 1, tl.int64) * ROWS
    tl.store(part + to, tl.sum(s2, 1) * r, mask=row < ROWS)
    tl.store(part + plane + to, tl.sum(s1, 1), mask=row < ROWS)


@triton.jit(do_not_specialize=["strip"])
def sums_columns_kernel(
    dy, x, mean, rstd, part, S, C, D, stat_stride, strip, STRIPS, COLUMNS, SAMPLES,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of dy * xhat and dy over the rows of [SAMPLES, S, C]: part [2, SAMPLES, STRIPS, C]."""
    acc_t: tl.constexpr = mean.dtype.element_ty
    pid = tl.program_id(0)
    slab = (pid // COLUMNS).to(tl.int64)
    start = (slab % STRIPS) * strip
    height = tl.minimum(S - start, strip).to(tl.int32)
    col = (pid % COLUMNS) * BLOCK_C + tl.arange(0, BLOCK_C)
    stat = (slab // STRIPS) * stat_stride + col // D
    mu = tl.load(mean + stat, mask=col < C, other=0.0)[None, :]
    base = ((slab // STRIPS) * S + start) * C + col[None, :]
    s1 = tl.zeros((BLOCK_M, BLOCK_C), acc_t)
    s2 = tl.zeros((BLOCK_M, BLOCK_C), acc_t)
    for k in range(0, height, BLOCK_M):
        row = k + tl.arange(0, BLOCK_M)
        valid = (row < height)[:, None] & (col < C)[None, :]
        at = base + row.to(tl.int64)[:, None] * C
        g = tl.load(dy + at, mask=valid, other=0.0).to(acc_t)
        d = tl.load(x + at, mask=valid, other=0.0).to(acc_t) - mu
        s1 += g
        s2 += tl.where(valid, g * d, 0.0)
    r = tl.load(rstd + stat, mask=col < C, other=0.0)
    to = slab * C + col
    plane = STRIPS * tl.full((), 1, tl.int64) * C * SAMPLES
    tl.store(part + to, tl.sum(s2, 0) * r, mask=col < C)
    tl.store(part + plane + to, tl.sum(s1, 0), mask=col < C)


@triton.jit(do_not_specialize=["SETS", "K"])
def combine_sums_kernel(
    part, weight, c1, c2, SETS, K, C, D, COUNT, plane, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    """c1 = mean(w * dy), c2 = mean(w * dy * xhat) over each set of COUNT elements, from part [2, N, K, C]."""
    acc_t: tl.constexpr = part.dtype.element_ty
    i = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    groups = C // D
    base = part + ((i // groups) * K * C + (i % groups) * D)[:, None]
    s1 = tl.zeros((BLOCK_M, BLOCK_K), acc_t)
    s2 = tl.zeros((BLOCK_M, BLOCK_K), acc_t)
    for k0 in range(0, K * D, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K).to(tl.int64)
        valid = (i < SETS)[:, None] & (k < K * D)[None, :]
        at = base + ((k // D) * C + k % D)[None, :]
        a = tl.load(at, mask=valid, other=0.0)
        b = tl.load(at + plane, mask=valid, other=0.0)
        if weight is not None:
            c = (i % groups)[:, None] * D + (k % D)[None, :]
            w = tl.load(weight + c, mask=valid, other=0.0).to(acc_t)
            a *= w
            b *= w
        s1 += b
        s2 += a
    tl.store(c1 + i, tl.sum(s1, 1) / COUNT, mask=i < SETS)
    tl.store(c2 + i, tl.sum(s2, 1) / COUNT, mask=i < SETS)


@triton.jit
def dx_rows_kernel(
    dy, x, weight, mean, rstd, c1, c2, dx, ROWS, C, S, D, stat_stride, strip, STRIPS,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """dx = rstd * (w * dy - c1 - xhat * c2) of rows [ROWS = N * C, S]; no c1, c2 when the statistics are constants."""
    acc_t: tl.constexpr = mean.dtype.element_ty
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    row = (pid // STRIPS) * BLOCK_M + tl.arange(0, BLOCK_M)
    start = (pid % STRIPS).to(tl.int64) * strip
    width = tl.minimum(S - start, strip).to(tl.int32)
    c = row % C
    stat = (row // C) * stat_stride + c // D
    r = tl.load(rstd + stat, mask=row < ROWS, other=0.0)
    w = tl.full(r.shape, 1.0, acc_t)
    if weight is not None:
        w = tl.load(weight + c, mask=row < ROWS, other=0.0).to(acc_t)
    if c1 is not None:
        mu = tl.load(mean + stat, mask=row < ROWS, other=0.0)
        constant = tl.load(c1 + stat, mask=row < ROWS, other=0.0)
        slope = r * tl.load(c2 + stat, mask=row < ROWS, other=0.0)
    base = row.to(tl.int64)[:, None] * S + start
    for k in range(0, width, BLOCK_S):
        col = k + tl.arange(0, BLOCK_S)[None, :]
        valid = (row < ROWS)[:, None] & (col < width)
        out = tl.load(dy + base + col, mask=valid, other=0.0).to(acc_t) * w[:, None]
        if c1 is not None:
            d = tl.load(x + base + col, mask=valid, other=0.0).to(acc_t) - mu[:, None]
            out = out - constant[:, None] - d * slope[:, None]
        out *= r[:, None]
        tl.store(dx + base + col, out.to(dx.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["strip"])
def dx_columns_kernel(
    dy, x, weight, mean, rstd, c1, c2, dx, S, C, D, stat_stride, strip, STRIPS, COLUMNS,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx of [N, S, C]; see dx_rows_kernel."""
    acc_t: tl.constexpr = mean.dtype.element_ty
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    slab = (pid // COLUMNS).to(tl.int64)
    start = (slab % STRIPS) * strip
    height = tl.minimum(S - start, strip).to(tl.int32)
    col = (pid % COLUMNS) * BLOCK_C + tl.arange(0, BLOCK_C)
    stat = (slab // STRIPS) * stat_stride + col // D
    r = tl.load(rstd + stat, mask=col < C, other=0.0)
    w = tl.full(r.shape, 1.0, acc_t)
    if weight is not None:
        w = tl.load(weight + col, mask=col < C, other=0.0).to(acc_t)
    if c1 is not None:
        mu = tl.load(mean + stat, mask=col < C, other=0.0)
        constant = tl.load(c1 + stat, mask=col < C, other=0.0)
        slope = r * tl.load(c2 + stat, mask=col < C, other=0.0)
    base = ((slab // STRIPS) * S + start) * C + col[None, :]
    for k in range(0, height, BLOCK_M):
        row = k + tl.arange(0, BLOCK_M)
        valid = (row < height)[:, None] & (col < C)[None, :]
        at = base + row.to(tl.int64)[:, None] * C
        out = tl.load(dy + at, mask=valid, other=0.0).to(acc_t) * w[None, :]
        if c1 is not None:
            d = tl.load(x + at, mask=valid, other=0.0).to(acc_t) - mu[None, :]
            out = out - constant[None, :] - d * slope[None, :]
        out *= r[None, :]
        tl.store(dx + at, out.to(dx.dtype.element_ty), mask=valid)


def strips_of(n: int, rows: int, block: int, sms: int) -> tuple[int, int]:
    """(count, length) of strips of n elements: enough programs for the GPU, whole blocks, few steps for each lane."""
    blocks = cdiv(n, block)
    wanted = max(cdiv(4 * sms, rows), cdiv(blocks, STEP_LIMIT))
    length = cdiv(blocks, min(wanted, blocks)) * block
    return cdiv(n, length), length


class Plan:
    """Tiles and strips for one x: rows of S elements, or columns of [S, C] with channels last."""

    def __init__(self, x: torch.Tensor, n: int, c: int, s: int, channels_last: bool) -> None:
        sms = multiprocessors(x)
        tile = TILE // 2 if x.dtype == torch.float64 else TILE
        self.n, self.c, self.s, self.channels_last = n, c, s, channels_last
        if n * c >= 2**31:
            raise RuntimeError(f"Triton norms over channels: got N * C = {n * c}, expected less than 2^31")
        if channels_last:
            self.block = min(power_of_two(c), 64)
            self.block_m = min(tile // self.block, power_of_two(s))
            self.columns = cdiv(c, self.block)
            self.strips, self.strip = strips_of(s, n * self.columns, self.block_m, sms)
            self.grid = (self.columns * self.strips * n,)
        else:
            self.block = tile_width(s, 1024)
            self.block_m = max(min(tile // self.block, power_of_two(cdiv(n * c, 4 * sms))), 1)
            programs = cdiv(n * c, self.block_m)
            self.strips, self.strip = strips_of(s, programs, self.block, sms)
            self.grid = (programs * self.strips,)
        self.warps = warps(self.block * self.block_m)


def sizes(x: torch.Tensor, channels_last: bool) -> tuple[int, int, int]:
    """(N, C, S) of x [N, C, *] or, channels last, [N, *, C]: S positions."""
    n, *rest = x.shape
    c = rest.pop(-1 if channels_last else 0)
    return n, c, math.prod(rest)


def combine_tile(k: int, d: int, sets: int) -> dict[str, int]:
    """Tile of the combining kernels; with one channel per set, neighbouring sets share a memory transaction."""
    block_k = min(power_of_two(k * d), 64 if d == 1 else 512)
    block_m = min(power_of_two(sets), 16 if d == 1 else max(1024 // block_k, 1))
    return {"BLOCK_M": block_m, "BLOCK_K": block_k, "num_warps": warps(block_m * block_k, 8)}


def statistics(
    x: torch.Tensor, n: int, c: int, s: int, groups: int, per_sample: bool, eps: float, channels_last: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean, rstd and biased variance of each set, flat [n * groups], or [groups] when a set spans the samples."""
    acc = accumulate_dtype(x.dtype)
    sets = n * groups if per_sample else groups
    mean, rstd, var = (torch.empty(sets, dtype=acc, device=x.device) for _ in range(3))
    if x.numel() == 0 or sets == 0:
        mean.zero_()
        var.zero_()
        rstd.fill_(eps).rsqrt_()
        return mean, rstd, var
    p = Plan(x, n, c, s, channels_last)
    part = torch.empty((3, n * p.strips * c), dtype=acc, device=x.device)
    if channels_last:
        moments_columns_kernel[p.grid](
            x, part, s, c, p.strip, p.strips, p.columns, n,
            BLOCK_M=p.block_m, BLOCK_C=p.block, num_warps=p.warps,
        )  # fmt: skip
    else:
        moments_rows_kernel[p.grid](
            x, part, n * c, c, s, p.strip, p.strips, BLOCK_M=p.block_m, BLOCK_S=p.block, num_warps=p.warps
        )
    k = p.strips if per_sample else n * p.strips
    tile = combine_tile(k, c // groups, sets)
    combine_moments_kernel[(cdiv(sets, tile["BLOCK_M"]),)](
        part, mean, rstd, var, sets, k, c, c // groups, part.shape[1], EPS=eps, **tile
    )
    return mean, rstd, var


def normalize(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, mean: torch.Tensor, rstd: torch.Tensor,
    n: int, c: int, s: int, groups: int, per_sample: bool, channels_last: bool,
) -> torch.Tensor:  # fmt: skip
    """(x - mean) * rstd * weight + bias from the statistics of each set."""
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    p = Plan(x, n, c, s, channels_last)
    stat_stride = groups if per_sample else 0
    if channels_last:
        normalize_columns_kernel[p.grid](
            x, weight, bias, y, mean, rstd, s, c, c // groups, stat_stride, p.strip, p.strips, p.columns,
            BLOCK_M=p.block_m, BLOCK_C=p.block, num_warps=p.warps,
        )  # fmt: skip
    else:
        normalize_rows_kernel[p.grid](
            x, weight, bias, y, mean, rstd, n * c, c, s, c // groups, stat_stride, p.strip, p.strips,
            BLOCK_M=p.block_m, BLOCK_S=p.block, num_warps=p.warps,
        )  # fmt: skip
    return y


def backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, mean: torch.Tensor, rstd: torch.Tensor,
    n: int, c: int, s: int, groups: int, per_sample: bool, constant: bool, channels_last: bool,
    need_dx: bool, need_dw: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """dx, dw, db; with `constant`, mean and rstd do not depend on x."""
    acc = mean.dtype
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    dw = torch.empty(c if need_dw else 0, dtype=acc if weight is None else weight.dtype, device=x.device)
    db = torch.empty_like(dw)
    if x.numel() == 0:
        return dx, dw.zero_(), db.zero_()
    p = Plan(x, n, c, s, channels_last)
    d = c // groups
    stat_stride = groups if per_sample else 0
    c1 = c2 = None
    if need_dw or (need_dx and not constant):
        part = torch.empty((2, n * p.strips, c), dtype=acc, device=x.device)
        if channels_last:
            sums_columns_kernel[p.grid](
                dy, x, mean, rstd, part, s, c, d, stat_stride, p.strip, p.strips, p.columns, n,
                BLOCK_M=p.block_m, BLOCK_C=p.block, num_warps=p.warps,
            )  # fmt: skip
        else:
            sums_rows_kernel[p.grid](
                dy, x, mean, rstd, part, n * c, c, s, d, stat_stride, p.strip, p.strips,
                BLOCK_M=p.block_m, BLOCK_S=p.block, num_warps=p.warps,
            )  # fmt: skip
        if need_dx and not constant:
            sets = n * groups if per_sample else groups
            k = p.strips if per_sample else n * p.strips
            c1 = torch.empty(sets, dtype=acc, device=x.device)
            c2 = torch.empty_like(c1)
            tile = combine_tile(k, d, sets)
            combine_sums_kernel[(cdiv(sets, tile["BLOCK_M"]),)](
                part, weight, c1, c2, sets, k, c, d, x.numel() // sets, part[0].numel(), **tile
            )
        if need_dw:
            sum_partials(part, dw, db)
    if need_dx and channels_last:
        dx_columns_kernel[p.grid](
            dy, x, weight, mean, rstd, c1, c2, dx, s, c, d, stat_stride, p.strip, p.strips, p.columns,
            BLOCK_M=p.block_m, BLOCK_C=p.block, num_warps=p.warps,
        )  # fmt: skip
    elif need_dx:
        dx_rows_kernel[p.grid](
            dy, x, weight, mean, rstd, c1, c2, dx, n * c, c, s, d, stat_stride, p.strip, p.strips,
            BLOCK_M=p.block_m, BLOCK_S=p.block, num_warps=p.warps,
        )  # fmt: skip
    return dx, dw, db


def specimens() -> list[Specimen]:
    """What tests/triton_compile.py compiles: every kernel, by type of x."""
    found = []
    for t, a in SPECIMEN_TYPES:
        tile = TILE // 2 if t == "fp64" else TILE
        part, stat = {"part": f"*{a}"}, {"mean": f"*{a}", "rstd": f"*{a}"}
        x, dy, y, dx = {"x": f"*{t}"}, {"dy": f"*{t}"}, {"y": f"*{t}"}, {"dx": f"*{t}"}
        w, b = {"weight": f"*{t}"}, {"bias": f"*{t}"}
        c12 = {"c1": f"*{a}", "c2": f"*{a}"}
        rows = dict.fromkeys(("ROWS", "C", "S"), "i32")
        cols = dict.fromkeys(("S", "C"), "i32")
        sets = dict.fromkeys(("D", "stat_stride"), "i32")
        strips = dict.fromkeys(("strip", "STRIPS"), "i32")
        split = strips | {"COLUMNS": "i32"}
        row_tile = {"BLOCK_M": tile // 256, "BLOCK_S": 256}
        column_tile = {"BLOCK_M": tile // 64, "BLOCK_C": 64}
        combine = {"BLOCK_M": 16, "BLOCK_K": 64}
        amount = dict.fromkeys(("SETS", "K", "C", "D"), "i32")
        found += [
            Specimen(moments_rows_kernel, x | part | rows | strips, row_tile, warps(tile)),
            Specimen(moments_columns_kernel, x | part | cols | split | {"SAMPLES": "i32"}, column_tile, warps(tile)),
            Specimen(
                combine_moments_kernel,
                part | stat | {"var": f"*{a}"} | amount | {"plane": "i32"},
                combine | {"EPS": 1e-5},
                4,
                hot=False,
            ),
            Specimen(normalize_rows_kernel, x | w | b | y | stat | rows | sets | strips, row_tile, warps(tile)),
            Specimen(normalize_columns_kernel, x | w | b | y | stat | cols | sets | split, column_tile, warps(tile)),
            Specimen(sums_rows_kernel, dy | x | stat | part | rows | sets | strips, row_tile, warps(tile)),
            Specimen(
                sums_columns_kernel,
                dy | x | stat | part | cols | sets | split | {"SAMPLES": "i32"},
                column_tile,
                warps(tile),
            ),
            Specimen(
                combine_sums_kernel,
                part | w | c12 | amount | {"COUNT": "i32", "plane": "i32"},
                combine,
                4,
                hot=False,
            ),
            Specimen(dx_rows_kernel, dy | x | w | stat | c12 | dx | rows | sets | strips, row_tile, warps(tile)),
            Specimen(dx_columns_kernel, dy | x | w | stat | c12 | dx | cols | sets | split, column_tile, warps(tile)),
            Specimen(
                sum_partials_kernel,
                part | {"a": f"*{t}", "b": f"*{t}", "rows": "i32", "N": "i32"},
                {"BLOCK_M": 128, "BLOCK_N": 32},
                8,
                hot=False,
            ),
        ]
    return found
