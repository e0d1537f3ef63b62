"""softmax · Triton
  y[m,n,s] = exp(x - max_n x) / sum,  sum = sum_n exp(x - max_n x);  log: y = x - max - log(sum)
  dx = p * (dy - sum_n dy * p),  log: dx = dy - p * sum_n dy,  p = exp(x - max) / sum
layout   x, y, dy, dx: [M, N, S] · max, sum: [M * S]
mapping  a program takes BLOCK_R columns (m, s) and walks over n in steps of BLOCK_N
memory   x read three times (from the caches after the first, for rows that fit), y written once; backward: dy, x twice
numerics in fp32 (fp64 for fp64); a row without a finite maximum gives NaN, as in torch
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ._toolbox import Specimen, accumulate_dtype, cdiv, power_of_two, warps

LARGEST_BLOCK = 2048


@triton.jit
def softmax_fwd_kernel(
    x, y, top, total, COLUMNS, N, S, LOG: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr
):
    acc_t: tl.constexpr = total.dtype.element_ty
    column = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = column < COLUMNS
    at = column // S * N * S + column % S
    # Sums and maxima stay whole blocks inside the loops: Triton 3.6 fails to compile a reduction that a loop carries.
    tops = tl.full((BLOCK_R, BLOCK_N), float("-inf"), acc_t)
    for k in range(0, N, BLOCK_N):
        n = k + tl.arange(0, BLOCK_N)
        valid = live[:, None] & (n < N)[None, :]
        v = tl.load(x + at[:, None] + n[None, :] * S, mask=valid, other=float("-inf")).to(acc_t)
        # A NaN that the maximum passes over comes back through the sum.
        tops = tl.maximum(v, tops)
    most = tl.max(tops, 1)
    parts = tl.zeros((BLOCK_R, BLOCK_N), acc_t)
    for k in range(0, N, BLOCK_N):
        n = k + tl.arange(0, BLOCK_N)
        valid = live[:, None] & (n < N)[None, :]
        v = tl.load(x + at[:, None] + n[None, :] * S, mask=valid, other=0.0).to(acc_t)
        parts += tl.where(valid, tl.exp(v - most[:, None]), 0.0)
    sums = tl.sum(parts, 1)
    for k in range(0, N, BLOCK_N):
        n = k + tl.arange(0, BLOCK_N)
        valid = live[:, None] & (n < N)[None, :]
        v = tl.load(x + at[:, None] + n[None, :] * S, mask=valid, other=0.0).to(acc_t) - most[:, None]
        if LOG:
            v = v - tl.log(sums)[:, None]
        else:
            v = tl.exp(v) / sums[:, None]
        tl.store(y + at[:, None] + n[None, :] * S, v.to(y.dtype.element_ty), mask=valid)
    tl.store(top + column, most, mask=live)
    tl.store(total + column, sums, mask=live)


@triton.jit
def softmax_bwd_kernel(
    dy, x, top, total, dx, COLUMNS, N, S, LOG: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr
):
    acc_t: tl.constexpr = total.dtype.element_ty
    column = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = column < COLUMNS
    at = column // S * N * S + column % S
    most = tl.load(top + column, mask=live, other=0.0)[:, None]
    sums = tl.load(total + column, mask=live, other=1.0)[:, None]
    parts = tl.zeros((BLOCK_R, BLOCK_N), acc_t)
    for k in range(0, N, BLOCK_N):
        n = k + tl.arange(0, BLOCK_N)
        valid = live[:, None] & (n < N)[None, :]
        g = tl.load(dy + at[:, None] + n[None, :] * S, mask=valid, other=0.0).to(acc_t)
        if not LOG:
            v = tl.load(x + at[:, None] + n[None, :] * S, mask=valid, other=0.0).to(acc_t)
            g = tl.where(valid, g * (tl.exp(v - most) / sums), 0.0)
        parts += tl.where(valid, g, 0.0)
    dot = tl.sum(parts, 1)
    for k in range(0, N, BLOCK_N):
        n = k + tl.arange(0, BLOCK_N)
        valid = live[:, None] & (n < N)[None, :]
        g = tl.load(dy + at[:, None] + n[None, :] * S, mask=valid, other=0.0).to(acc_t)
        v = tl.load(x + at[:, None] + n[None, :] * S, mask=valid, other=0.0).to(acc_t)
        p = tl.exp(v - most) / sums
        if LOG:
            g = g - p * dot[:, None]
        else:
            g = p * (g - dot[:, None])
        tl.store(dx + at[:, None] + n[None, :] * S, g.to(dx.dtype.element_ty), mask=valid)


def _blocks(columns: int, n: int) -> tuple[int, int]:
    block_n = min(power_of_two(n), LARGEST_BLOCK)
    return min(max(LARGEST_BLOCK // (4 * block_n), 1), power_of_two(columns)), block_n


def _sizes(x: torch.Tensor, dim: int) -> tuple[int, int, int]:
    return math.prod(x.shape[:dim]), x.shape[dim], math.prod(x.shape[dim + 1 :])


def softmax_fwd(x: torch.Tensor, dim: int, log_of: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    m, n, s = _sizes(x, dim)
    y = torch.empty_like(x)
    top, total = (torch.empty(m * s, dtype=accumulate_dtype(x.dtype), device=x.device) for _ in range(2))
    if x.numel():
        r, b = _blocks(m * s, n)
        softmax_fwd_kernel[(cdiv(m * s, r),)](
            x, y, top, total, m * s, n, s, LOG=log_of, BLOCK_R=r, BLOCK_N=b, num_warps=warps(r * b, 8)
        )
    return y, top, total


def softmax_bwd(
    dy: torch.Tensor, x: torch.Tensor, top: torch.Tensor, total: torch.Tensor, dim: int, log_of: bool
) -> torch.Tensor:
    m, n, s = _sizes(x, dim)
    dx = torch.empty_like(x)
    if x.numel():
        r, b = _blocks(m * s, n)
        softmax_bwd_kernel[(cdiv(m * s, r),)](
            dy, x, top, total, dx, m * s, n, s, LOG=log_of, BLOCK_R=r, BLOCK_N=b, num_warps=warps(r * b, 8)
        )
    return dx


def specimens() -> list[Specimen]:
    """What tests/triton_compile.py compiles: narrow and wide rows, by type of x."""
    found = []
    for t, a in (("fp32", "fp32"), ("bf16", "fp32"), ("fp64", "fp64")):
        sizes = dict.fromkeys(("COLUMNS", "N", "S"), "i32")
        stats = {"top": f"*{a}", "total": f"*{a}"}
        for log_of in (False, True):
            for r, b in ((8, 64), (1, 2048)):
                constants = {"LOG": log_of, "BLOCK_R": r, "BLOCK_N": b}
                forward = {"x": f"*{t}", "y": f"*{t}"} | stats | sizes
                backward = {"dy": f"*{t}", "x": f"*{t}", "dx": f"*{t}"} | stats | sizes
                # the logarithm of wide rows in fp64 spills eight bytes
                hot = t != "fp64" or b < 2048
                found.append(Specimen(softmax_fwd_kernel, forward, constants, warps(r * b, 8), hot=hot))
                found.append(Specimen(softmax_bwd_kernel, backward, constants, warps(r * b, 8)))
    return found
