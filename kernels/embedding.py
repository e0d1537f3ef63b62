"""embedding · Triton
  gather_rows  y[k] = x[index[k]]
  gather_sum   y[v] = sum over k in [offsets[v], offsets[v+1]) of scale[k] * x[index[k]]
  gather_max   y[v] = max over the same k, without those with index[k] = padding, of x[index[k]], the first of equal
               ones, column by column; entry[v] = its k, -1 and y = 0 where there is none
  gather_max_bwd  dx[r] = sum over the k in [starts[r], starts[r+1]) of order of dy[bag[k]] where entry[bag[k]] = k
layout   x [R, D], gather_rows: y [K, D] · gather_sum: index, scale [K], offsets [V + 1], y [V, D]
mapping  gather_rows: a program takes BLOCK elements of y; gather_sum: BLOCK_D columns of a row, BLOCK_K terms a step;
         gather_max: BLOCK_D columns of a row, a term a step
memory   the rows that are named are read once each time they are named, y is written once
numerics sums in fp32 (fp64 for fp64), the order fixed by the number of terms; an index outside [0, R) gives NaN and
         reads nothing
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._toolbox import Specimen, cdiv

BLOCK, BLOCK_K, BLOCK_D = 1024, 16, 64


@triton.jit
def gather_rows_kernel(x, index, y, R, K, D, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = i < K * D
    at = tl.load(index + i // D, mask=valid, other=0)
    inside = (at >= 0) & (at < R)
    v = tl.load(x + at * D + i % D, mask=valid & inside, other=0.0)
    tl.store(y + i, tl.where(inside, v, float("nan")).to(y.dtype.element_ty), mask=valid)


@triton.jit
def gather_sum_kernel(x, index, offsets, scale, y, R, K, D, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    acc_t: tl.constexpr = tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first, last = tl.load(offsets + row), tl.load(offsets + row + 1)
    sums = tl.zeros((BLOCK_K, BLOCK_D), acc_t)
    known = (first >= 0) & (last <= K)
    for begin in range(first, tl.where(known, last, first), BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K).to(tl.int64)
        term = (k < last)[:, None] & (d < D)[None, :]
        at = tl.load(index + k, mask=k < last, other=0)
        inside = ((at >= 0) & (at < R))[:, None]
        v = tl.load(x + at[:, None] * D + d[None, :], mask=term & inside, other=0.0).to(acc_t)
        v = tl.where(term & (inside == 0), float("nan"), v)
        if scale is not None:
            v *= tl.load(scale + k, mask=k < last, other=0.0).to(acc_t)[:, None]
        sums += v
    total = tl.where(known, tl.sum(sums, 0), float("nan"))
    tl.store(y + row * D + d, total.to(y.dtype.element_ty), mask=d < D)


@triton.jit
def gather_max_kernel(x, index, offsets, y, entry, PADDING, R, K, D, BLOCK_D: tl.constexpr):
    acc_t: tl.constexpr = tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first, last = tl.load(offsets + row), tl.load(offsets + row + 1)
    known = (first >= 0) & (last <= K)
    best = tl.zeros((BLOCK_D,), acc_t)
    at = tl.full((BLOCK_D,), -1, tl.int64)
    nothing = tl.zeros((BLOCK_D,), tl.int64)
    for k in range(first, tl.where(known, last, first)):
        i = tl.load(index + k) + nothing
        inside = (d < D) & (i >= 0) & (i < R)
        v = tl.load(x + i * D + d, mask=inside, other=0.0).to(acc_t)
        v = tl.where(inside, v, float("nan"))
        larger = (i != PADDING) & ((at < 0) | (v > best))
        best, at = tl.where(larger, v, best), tl.where(larger, k, at)
    tl.store(y + row * D + d, tl.where(known, best, float("nan")).to(y.dtype.element_ty), mask=d < D)
    tl.store(entry + row * D + d, at, mask=d < D)


@triton.jit
def gather_max_bwd_kernel(dy, entry, order, bag, starts, dx, V, K, D, BLOCK_D: tl.constexpr):
    acc_t: tl.constexpr = tl.float64 if dx.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first, last = tl.load(starts + row), tl.load(starts + row + 1)
    known = (first >= 0) & (last <= K)
    total = tl.zeros((BLOCK_D,), acc_t)
    nothing = tl.zeros((BLOCK_D,), tl.int64)
    for j in range(first, tl.where(known, last, first)):
        k = tl.load(order + j) + nothing
        entered = (k >= 0) & (k < K)
        b = tl.load(bag + tl.where(entered, k, 0))
        inside = (d < D) & entered & (b >= 0) & (b < V)
        mine = tl.load(entry + b * D + d, mask=inside, other=-1) == k
        total += tl.load(dy + b * D + d, mask=inside & mine, other=0.0).to(acc_t)
    total = tl.where(known, total, float("nan"))
    tl.store(dx + row * D + d, total.to(dx.dtype.element_ty), mask=d < D)


def gather_rows(x: torch.Tensor, index: torch.Tensor, padding_idx: int, scale_grad_by_freq: bool) -> torch.Tensor:
    (rows, d), k = x.shape, index.shape[0]
    y = x.new_empty(k, d)
    if k * d:
        gather_rows_kernel[(cdiv(k * d, BLOCK),)](x, index, y, rows, k, d, BLOCK=BLOCK)
    return y


def gather_sum(x: torch.Tensor, index: torch.Tensor, offsets: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    (rows, d), v = x.shape, offsets.shape[0] - 1
    y = x.new_empty(v, d)
    if v * d:
        grid = (v, cdiv(d, BLOCK_D))
        gather_sum_kernel[grid](x, index, offsets, scale, y, rows, index.shape[0], d, BLOCK_K=BLOCK_K, BLOCK_D=BLOCK_D)
    return y


def gather_max(
    x: torch.Tensor, index: torch.Tensor, offsets: torch.Tensor, padding: int
) -> tuple[torch.Tensor, torch.Tensor]:
    (rows, d), v = x.shape, offsets.shape[0] - 1
    y, entry = x.new_empty(v, d), index.new_empty(v, d)
    if v * d:
        grid = (v, cdiv(d, BLOCK_D))
        gather_max_kernel[grid](x, index, offsets, y, entry, padding, rows, index.shape[0], d, BLOCK_D=BLOCK_D)
    return y, entry


def gather_max_bwd(
    dy: torch.Tensor, entry: torch.Tensor, order: torch.Tensor, bag: torch.Tensor, starts: torch.Tensor
) -> torch.Tensor:
    (v, d), rows = dy.shape, starts.shape[0] - 1
    dx = dy.new_empty(rows, d)
    if rows * d:
        grid = (rows, cdiv(d, BLOCK_D))
        gather_max_bwd_kernel[grid](dy, entry, order, bag, starts, dx, v, bag.shape[0], d, BLOCK_D=BLOCK_D)
    return dx


def specimens() -> list[Specimen]:
    """What tests/triton_compile.py compiles, by type of x."""
    found = []
    for t in ("fp32", "bf16", "fp16", "fp64"):
        sizes = dict.fromkeys("RKD", "i32")
        types = {"x": f"*{t}", "index": "*i64", "y": f"*{t}"} | sizes
        found.append(Specimen(gather_rows_kernel, types, {"BLOCK": BLOCK}, 4))
        types = {"x": f"*{t}", "index": "*i64", "offsets": "*i64", "scale": f"*{t}", "y": f"*{t}"} | sizes
        blocks = {"BLOCK_K": BLOCK_K, "BLOCK_D": BLOCK_D}
        found.append(Specimen(gather_sum_kernel, types, blocks, 4))
        found.append(Specimen(gather_sum_kernel, types, blocks | {"scale": None}, 4))
        types = {
            "x": f"*{t}",
            "y": f"*{t}",
            "PADDING": "i32",
            **dict.fromkeys(("index", "offsets", "entry"), "*i64"),
            **sizes,
        }
        found.append(Specimen(gather_max_kernel, types, {"BLOCK_D": BLOCK_D}, 4))
        types = {"dy": f"*{t}", "dx": f"*{t}", **dict.fromkeys(("entry", "order", "bag", "starts"), "*i64")}
        types |= dict.fromkeys("VKD", "i32")
        found.append(Specimen(gather_max_bwd_kernel, types, {"BLOCK_D": BLOCK_D}, 4))
    return found
