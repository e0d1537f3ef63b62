"""layer_norm · Triton
  y[m,n] = (x[m,n] - mean[m]) * rstd[m] * w[n] + b[n]
  dx = rstd * (g - mean_n(g) - xhat * mean_n(g * xhat)),  g = dy * w,  xhat = (x - mean) * rstd
  dw[n] = sum_m dy * xhat,  db[n] = sum_m dy
layout   x, y, dy, dx: [M, N] row-major · w, b, dw, db: [N] · mean, rstd: [M]
mapping  forward: BLOCK_M whole rows per program, in registers; a row above ROW_LIMIT is shared by several programs
         backward: a strip of rows per program, which keeps its share of dw and db in registers
memory   x read once, y written once; backward reads x and dy once (twice for wide rows) and writes dx once
numerics accumulates in fp32 (fp64 for fp64); the mean is summed relative to the row's first element, the variance is
         two-pass on registers, or moments of the strips combined by Chan's formula
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _channels, _toolbox
from ._toolbox import SPECIMEN_TYPES, Specimen, accumulate_dtype, cdiv, multiprocessors, power_of_two, rsqrt, warps

# Elements of a row that one program holds in registers without spilling, by number of arrays it keeps.
ROW_LIMIT_FORWARD = 16384
ROW_LIMIT_BACKWARD = 8192


@triton.jit(do_not_specialize=["M"])
def layer_norm_fwd_kernel(
    x, weight, bias, y, mean, rstd, M, N, EPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """One pass over whole rows."""
    acc_t: tl.constexpr = mean.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_N)
    valid = (row < M)[:, None] & (col < N)[None, :]
    at = row[:, None] * N + col[None, :]
    v = tl.load(x + at, mask=valid, other=0.0).to(acc_t)
    first = tl.load(x + row * N, mask=row < M, other=0.0).to(acc_t)
    mu = first + tl.sum(tl.where(valid, v - first[:, None], 0.0), 1) / N
    d = tl.where(valid, v - mu[:, None], 0.0)
    r = rsqrt(tl.sum(d * d, 1) / N + EPS)
    tl.store(mean + row, mu, mask=row < M)
    tl.store(rstd + row, r, mask=row < M)
    out = d * r[:, None]
    if weight is not None:
        out *= tl.load(weight + col, mask=col < N, other=0.0).to(acc_t)[None, :]
    if bias is not None:
        out += tl.load(bias + col, mask=col < N, other=0.0).to(acc_t)[None, :]
    tl.store(y + at, out.to(y.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["M"])
def layer_norm_apply_kernel(x, weight, bias, y, mean, rstd, M, N, strip, STRIPS, BLOCK: tl.constexpr):
    """y of wide rows from known statistics; backwards in memory, because the end of x is still in L2."""
    acc_t: tl.constexpr = mean.dtype.element_ty
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    row = pid // STRIPS
    start = (pid % STRIPS).to(tl.int64) * strip
    width = tl.minimum(N - start, strip).to(tl.int32)
    base = row.to(tl.int64) * N + start
    mu = tl.load(mean + row)
    r = tl.load(rstd + row)
    for k in range(0, width, BLOCK):
        col = k + tl.arange(0, BLOCK)
        valid = col < width
        out = (tl.load(x + base + col, mask=valid, other=0.0).to(acc_t) - mu) * r
        if weight is not None:
            out *= tl.load(weight + start + col, mask=valid, other=0.0).to(acc_t)
        if bias is not None:
            out += tl.load(bias + start + col, mask=valid, other=0.0).to(acc_t)
        tl.store(y + base + col, out.to(y.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["M", "strip"])
def layer_norm_bwd_kernel(
    dy, x, weight, mean, rstd, dx, part, M, N, strip, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """dx of a strip of rows, and the strip's share of dw and db as one row of part [2, programs, N]."""
    acc_t: tl.constexpr = mean.dtype.element_ty
    start = tl.program_id(0).to(tl.int64) * strip
    col = tl.arange(0, BLOCK_N)
    dw = tl.zeros((BLOCK_M, BLOCK_N), acc_t)
    db = tl.zeros((BLOCK_M, BLOCK_N), acc_t)
    if weight is not None:
        w = tl.load(weight + col, mask=col < N, other=0.0).to(acc_t)[None, :]
    for k in range(0, strip, BLOCK_M):
        row = start + k + tl.arange(0, BLOCK_M)
        valid = (row < M)[:, None] & (col < N)[None, :]
        at = row[:, None] * N + col[None, :]
        mu = tl.load(mean + row, mask=row < M, other=0.0)[:, None]
        r = tl.load(rstd + row, mask=row < M, other=0.0)[:, None]
        xhat = tl.where(valid, tl.load(x + at, mask=valid, other=0.0).to(acc_t) - mu, 0.0) * r
        g = tl.load(dy + at, mask=valid, other=0.0).to(acc_t)
        if part is not None:
            dw += g * xhat
            db += g
        if dx is not None:
            if weight is not None:
                g *= w
            c1 = tl.sum(g, 1)[:, None] / N
            c2 = tl.sum(g * xhat, 1)[:, None] / N
            tl.store(dx + at, (r * (g - c1 - xhat * c2)).to(dx.dtype.element_ty), mask=valid)
    if part is not None:
        at_part = tl.program_id(0).to(tl.int64) * N + col
        plane = tl.num_programs(0).to(tl.int64) * N
        tl.store(part + at_part, tl.sum(dw, 0), mask=col < N)
        tl.store(part + plane + at_part, tl.sum(db, 0), mask=col < N)


@triton.jit(do_not_specialize=["M"])
def layer_norm_sums_kernel(dy, x, weight, mean, rstd, sums, M, N, strip, STRIPS, BLOCK: tl.constexpr):
    """Sums of g and g * xhat over one strip of a wide row: sums [2, M, STRIPS]."""
    acc_t: tl.constexpr = mean.dtype.element_ty
    pid = tl.program_id(0)
    row = pid // STRIPS
    start = (pid % STRIPS).to(tl.int64) * strip
    width = tl.minimum(N - start, strip).to(tl.int32)
    base = row.to(tl.int64) * N + start
    mu = tl.load(mean + row)
    s1 = tl.zeros((BLOCK,), acc_t)
    s2 = tl.zeros((BLOCK,), acc_t)
    for k in range(0, width, BLOCK):
        col = k + tl.arange(0, BLOCK)
        valid = col < width
        g = tl.load(dy + base + col, mask=valid, other=0.0).to(acc_t)
        if weight is not None:
            g *= tl.load(weight + start + col, mask=valid, other=0.0).to(acc_t)
        d = tl.load(x + base + col, mask=valid, other=0.0).to(acc_t) - mu
        s1 += g
        s2 += tl.where(valid, g * d, 0.0)
    tl.store(sums + pid, tl.sum(s1, 0))
    tl.store(sums + tl.num_programs(0).to(tl.int64) + pid, tl.sum(s2, 0) * tl.load(rstd + row))


@triton.jit(do_not_specialize=["M", "strip"])
def layer_norm_bwd_columns_kernel(
    dy, x, weight, mean, rstd, sums, dx, part, M, N, strip, COLUMNS, STRIPS,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """dx of a block of columns of wide rows, and its share of dw and db; sums [2, M, STRIPS] are already known."""
    acc_t: tl.constexpr = mean.dtype.element_ty
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    start = (pid // COLUMNS).to(tl.int64) * strip
    col = (pid % COLUMNS).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.arange(0, BLOCK_S)
    plane = tl.cast(M, tl.int64) * STRIPS
    dw = tl.zeros((BLOCK_M, BLOCK_N), acc_t)
    db = tl.zeros((BLOCK_M, BLOCK_N), acc_t)
    if weight is not None:
        w = tl.load(weight + col, mask=col < N, other=0.0).to(acc_t)[None, :]
    for k in range(0, strip, BLOCK_M):
        row = start + k + tl.arange(0, BLOCK_M)
        valid = (row < M)[:, None] & (col < N)[None, :]
        at = row[:, None] * N + col[None, :]
        mu = tl.load(mean + row, mask=row < M, other=0.0)[:, None]
        r = tl.load(rstd + row, mask=row < M, other=0.0)[:, None]
        xhat = tl.where(valid, tl.load(x + at, mask=valid, other=0.0).to(acc_t) - mu, 0.0) * r
        g = tl.load(dy + at, mask=valid, other=0.0).to(acc_t)
        if part is not None:
            dw += g * xhat
            db += g
        if dx is not None:
            if weight is not None:
                g *= w
            known = (row < M)[:, None] & (split < STRIPS)[None, :]
            at_sums = sums + row[:, None] * STRIPS + split[None, :]
            c1 = tl.sum(tl.load(at_sums, mask=known, other=0.0), 1)[:, None] / N
            c2 = tl.sum(tl.load(at_sums + plane, mask=known, other=0.0), 1)[:, None] / N
            tl.store(dx + at, (r * (g - c1 - xhat * c2)).to(dx.dtype.element_ty), mask=valid)
    if part is not None:
        at_part = (pid // COLUMNS).to(tl.int64) * N + col
        plane_part = (tl.num_programs(0) // COLUMNS).to(tl.int64) * N
        tl.store(part + at_part, tl.sum(dw, 0), mask=col < N)
        tl.store(part + plane_part + at_part, tl.sum(db, 0), mask=col < N)


def layer_norm_fwd(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    m, n = x.shape
    acc = accumulate_dtype(x.dtype)
    y = torch.empty_like(x)
    if m == 0 or n == 0:
        mean = torch.zeros(m, dtype=acc, device=x.device)
        return y, mean, (mean + eps).rsqrt()
    if n > ROW_LIMIT_FORWARD * 4 // acc.itemsize:
        mean, rstd, _ = _channels.statistics(x, m, 1, n, 1, True, eps, False)
        strips, strip = _channels.strips_of(n, m, 4096, multiprocessors(x))
        layer_norm_apply_kernel[(m * strips,)](
            x, weight, bias, y, mean, rstd, m, n, strip, strips, BLOCK=4096, num_warps=8
        )
        return y, mean, rstd
    mean = torch.empty(m, dtype=acc, device=x.device)
    rstd = torch.empty_like(mean)
    block_n = power_of_two(n)
    block_m = _toolbox.rows_per_program(m, block_n, multiprocessors(x), 2048)
    layer_norm_fwd_kernel[(cdiv(m, block_m),)](
        x, weight, bias, y, mean, rstd, m, n,
        EPS=eps, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps(block_m * block_n),
    )  # fmt: skip
    return y, mean, rstd


def layer_norm_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    need_dx: bool,
    need_dw: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    m, n = x.shape
    acc = mean.dtype
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    dw = torch.empty(n if need_dw else 0, dtype=acc if weight is None else weight.dtype, device=x.device)
    db = torch.empty_like(dw)
    if m == 0 or n == 0:
        return dx, dw.zero_(), db.zero_()
    if not (need_dx or need_dw):
        return dx, dw, db
    sms = multiprocessors(x)
    if n > (ROW_LIMIT_BACKWARD // 4 if acc == torch.float64 else ROW_LIMIT_BACKWARD):
        part = _backward_wide(dy, x, weight, mean, rstd, dx if need_dx else None, need_dw, sms)
    else:
        block_n = power_of_two(n)
        block_m = _toolbox.rows_per_program(m, block_n, sms, 2048)
        strip = max(cdiv(m, sms * 2), 1)
        strip = cdiv(strip, block_m) * block_m
        programs = cdiv(m, strip)
        part = torch.empty((2, programs, n), dtype=acc, device=x.device) if need_dw else None
        layer_norm_bwd_kernel[(programs,)](
            dy, x, weight, mean, rstd, dx if need_dx else None, part, m, n, strip,
            BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps(block_m * block_n, 64 // acc.itemsize),
        )  # fmt: skip
    if part is not None:
        _toolbox.sum_partials(part, dw, db)
    return dx, dw, db


def _backward_wide(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    dx: torch.Tensor | None,
    need_dw: bool,
    sms: int,
) -> torch.Tensor | None:
    """Wide rows: sums of each row first, then dx and the partial dw, db by blocks of columns."""
    m, n = x.shape
    strips, strip = _channels.strips_of(n, m, 2048, sms)
    sums = torch.empty((2, m, strips), dtype=mean.dtype, device=x.device)
    if dx is not None:
        layer_norm_sums_kernel[(m * strips,)](
            dy, x, weight, mean, rstd, sums, m, n, strip, strips, BLOCK=2048, num_warps=4
        )
    columns = cdiv(n, 1024)
    row_strips = max(min(cdiv(4 * sms, columns), m), 1)
    rows = cdiv(m, row_strips)
    row_strips = cdiv(m, rows)
    part = torch.empty((2, row_strips, n), dtype=mean.dtype, device=x.device) if need_dw else None
    layer_norm_bwd_columns_kernel[(columns * row_strips,)](
        dy, x, weight, mean, rstd, sums, dx, part, m, n, rows, columns, strips,
        BLOCK_M=1, BLOCK_N=1024, BLOCK_S=power_of_two(strips), num_warps=8,
    )  # fmt: skip
    return part


def specimens() -> list[Specimen]:
    """What tests/triton_compile.py compiles: every kernel, by type of x."""
    found = []
    for t, a in SPECIMEN_TYPES:
        p = {"x": f"*{t}", "weight": f"*{t}", "bias": f"*{t}", "y": f"*{t}", "mean": f"*{a}", "rstd": f"*{a}"}
        q = {"dy": f"*{t}", "x": f"*{t}", "weight": f"*{t}", "mean": f"*{a}", "rstd": f"*{a}"}
        size = {"M": "i32", "N": "i32"}
        wide = 1 if t == "fp64" else 2
        for block_m, block_n in ((16, 128), (1, 4096), (1, 8192 * wide)):
            shape = {"EPS": 1e-5, "BLOCK_M": block_m, "BLOCK_N": block_n}
            found.append(Specimen(layer_norm_fwd_kernel, p | size, shape, warps(block_m * block_n)))
        strips = {"strip": "i32", "STRIPS": "i32"}
        found.append(Specimen(layer_norm_apply_kernel, p | size | strips, {"BLOCK": 4096}, 8))
        out = {"dx": f"*{t}", "part": f"*{a}"}
        for block_m, block_n in ((16, 128), (1, 2048), (1, 2048 if t == "fp64" else 8192)):
            shape = {"BLOCK_M": block_m, "BLOCK_N": block_n}
            threads = warps(block_m * block_n, 8 if t == "fp64" else 16)
            found.append(Specimen(layer_norm_bwd_kernel, q | out | size | {"strip": "i32"}, shape, threads))
        found.append(Specimen(layer_norm_sums_kernel, q | {"sums": f"*{a}"} | size | strips, {"BLOCK": 2048}, 4))
        found.append(
            Specimen(
                layer_norm_bwd_columns_kernel,
                q | {"sums": f"*{a}"} | out | size | {"strip": "i32", "COLUMNS": "i32", "STRIPS": "i32"},
                {"BLOCK_M": 1, "BLOCK_N": 1024, "BLOCK_S": 64},
                8,
            )
        )
    return found
