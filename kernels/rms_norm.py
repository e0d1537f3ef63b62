"""rms_norm · Triton
  y[m,n] = x[m,n] * rstd[m] * w[n],  rstd = 1 / sqrt(mean_n(x^2) + eps)
  dx = rstd * (g - xhat * mean_n(g * xhat)),  g = dy * w,  xhat = x * rstd,  dw[n] = sum_m dy * xhat
layout   x, y, dy, dx: [M, N] row-major · w, dw: [N] · rstd: [M]
mapping  forward: BLOCK_M whole rows per program, in registers; a row above the limit is shared by several programs
         backward: a strip of rows per program, which keeps its share of dw in registers
memory   x read once, y written once; backward reads x and dy once and writes dx once; wide rows are read twice
numerics accumulates in fp32 (fp64 for fp64)
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
def rms_norm_fwd_kernel(x, weight, y, rstd, M, N, EPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """One pass over whole rows."""
    acc_t: tl.constexpr = rstd.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_N)
    valid = (row < M)[:, None] & (col < N)[None, :]
    at = row[:, None] * N + col[None, :]
    v = tl.load(x + at, mask=valid, other=0.0).to(acc_t)
    r = rsqrt(tl.sum(v * v, 1) / N + EPS)
    tl.store(rstd + row, r, mask=row < M)
    out = v * r[:, None]
    if weight is not None:
        out *= tl.load(weight + col, mask=col < N, other=0.0).to(acc_t)[None, :]
    tl.store(y + at, out.to(y.dtype.element_ty), mask=valid)


@triton.jit
def rms_norm_sums_kernel(dy, x, weight, sums, N, strip, STRIPS, BLOCK: tl.constexpr):
    """Sum of x * x, or of dy * w * x when dy is given, over one strip of a wide row: sums [M, STRIPS]."""
    acc_t: tl.constexpr = sums.dtype.element_ty
    pid = tl.program_id(0)
    start = (pid % STRIPS).to(tl.int64) * strip
    width = tl.minimum(N - start, strip).to(tl.int32)
    base = (pid // STRIPS).to(tl.int64) * N + start
    total = tl.zeros((BLOCK,), acc_t)
    for k in range(0, width, BLOCK):
        col = k + tl.arange(0, BLOCK)
        valid = col < width
        v = tl.load(x + base + col, mask=valid, other=0.0).to(acc_t)
        g = v
        if dy is not None:
            g = tl.load(dy + base + col, mask=valid, other=0.0).to(acc_t)
            if weight is not None:
                g *= tl.load(weight + start + col, mask=valid, other=0.0).to(acc_t)
        total += g * v
    tl.store(sums + pid, tl.sum(total, 0))


@triton.jit
def rms_norm_apply_kernel(
    x, weight, y, sums, rstd, N, strip, STRIPS, EPS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_S: tl.constexpr
):
    """y of wide rows from sums [M, STRIPS]; backwards in memory, because the end of x is still in L2."""
    acc_t: tl.constexpr = rstd.dtype.element_ty
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    row = (pid // STRIPS).to(tl.int64)
    split = tl.arange(0, BLOCK_S)
    start = (pid % STRIPS).to(tl.int64) * strip
    width = tl.minimum(N - start, strip).to(tl.int32)
    base = row * N + start
    r = rsqrt(tl.sum(tl.load(sums + row * STRIPS + split, mask=split < STRIPS, other=0.0), 0) / N + EPS)
    tl.store(rstd + row, r, mask=start == 0)
    for k in range(0, width, BLOCK):
        col = k + tl.arange(0, BLOCK)
        valid = col < width
        out = tl.load(x + base + col, mask=valid, other=0.0).to(acc_t) * r
        if weight is not None:
            out *= tl.load(weight + start + col, mask=valid, other=0.0).to(acc_t)
        tl.store(y + base + col, out.to(y.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["M", "strip"])
def rms_norm_bwd_kernel(
    dy, x, weight, rstd, sums, dx, part, M, N, strip, COLUMNS, STRIPS,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """dx of a strip of rows, and its share of dw as one row of part [1, programs, N].

    A program owns whole rows, or a block of columns of wide rows whose sums [M, STRIPS] are already known.
    """
    acc_t: tl.constexpr = rstd.dtype.element_ty
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    start = (pid // COLUMNS).to(tl.int64) * strip
    col = (pid % COLUMNS).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.arange(0, BLOCK_S)
    dw = tl.zeros((BLOCK_M, BLOCK_N), acc_t)
    if weight is not None:
        w = tl.load(weight + col, mask=col < N, other=0.0).to(acc_t)[None, :]
    for k in range(0, strip, BLOCK_M):
        row = start + k + tl.arange(0, BLOCK_M)
        valid = (row < M)[:, None] & (col < N)[None, :]
        at = row[:, None] * N + col[None, :]
        r = tl.load(rstd + row, mask=row < M, other=0.0)[:, None]
        v = tl.load(x + at, mask=valid, other=0.0).to(acc_t)
        xhat = tl.where(valid, v * r, 0.0)
        g = tl.load(dy + at, mask=valid, other=0.0).to(acc_t)
        if part is not None:
            dw += g * xhat
        if dx is not None:
            if weight is not None:
                g *= w
            if sums is None:
                c = tl.sum(g * xhat, 1)[:, None] / N
            else:
                known = (row < M)[:, None] & (split < STRIPS)[None, :]
                strips = tl.load(sums + row[:, None] * STRIPS + split[None, :], mask=known, other=0.0)
                c = tl.sum(strips, 1)[:, None] * r / N
            tl.store(dx + at, (r * (g - xhat * c)).to(dx.dtype.element_ty), mask=valid)
    if part is not None:
        tl.store(part + (pid // COLUMNS).to(tl.int64) * N + col, tl.sum(dw, 0), mask=col < N)


def rms_norm_fwd(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    m, n = x.shape
    acc = accumulate_dtype(x.dtype)
    y = torch.empty_like(x)
    rstd = torch.empty(m, dtype=acc, device=x.device)
    if m == 0 or n == 0:
        return y, rstd.fill_(eps).rsqrt_()
    sms = multiprocessors(x)
    if n > ROW_LIMIT_FORWARD * 4 // acc.itemsize:
        strips, strip = _channels.strips_of(n, m, 4096, sms)
        sums = torch.empty((m, strips), dtype=acc, device=x.device)
        rms_norm_sums_kernel[(m * strips,)](None, x, None, sums, n, strip, strips, BLOCK=4096, num_warps=8)
        rms_norm_apply_kernel[(m * strips,)](
            x, weight, y, sums, rstd, n, strip, strips,
            EPS=eps, BLOCK=4096, BLOCK_S=power_of_two(strips), num_warps=8,
        )  # fmt: skip
        return y, rstd
    block_n = power_of_two(n)
    block_m = _toolbox.rows_per_program(m, block_n, sms, 2048)
    rms_norm_fwd_kernel[(cdiv(m, block_m),)](
        x, weight, y, rstd, m, n, EPS=eps, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps(block_m * block_n)
    )
    return y, rstd


def rms_norm_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    need_dx: bool,
    need_dw: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    m, n = x.shape
    acc = rstd.dtype
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    dw = torch.empty(n if need_dw else 0, dtype=acc if weight is None else weight.dtype, device=x.device)
    if m == 0 or n == 0:
        return dx, dw.zero_()
    if not (need_dx or need_dw):
        return dx, dw
    sms = multiprocessors(x)
    if n > ROW_LIMIT_BACKWARD * 4 // acc.itemsize:
        strips, strip = _channels.strips_of(n, m, 2048, sms)
        sums = torch.empty((m, strips), dtype=acc, device=x.device)
        if need_dx:
            rms_norm_sums_kernel[(m * strips,)](dy, x, weight, sums, n, strip, strips, BLOCK=2048, num_warps=4)
        block_m, block_n, columns = 1, 1024, cdiv(n, 1024)
        rows = cdiv(m, max(min(cdiv(4 * sms, columns), m), 1))
    else:
        sums, strips, columns = None, 1, 1
        block_n = power_of_two(n)
        block_m = _toolbox.rows_per_program(m, block_n, sms, 2048)
        rows = cdiv(cdiv(m, sms * 2), block_m) * block_m
    programs = cdiv(m, rows)
    part = torch.empty((1, programs, n), dtype=acc, device=x.device) if need_dw else None
    rms_norm_bwd_kernel[(programs * columns,)](
        dy, x, weight, rstd, sums, dx if need_dx else None, part, m, n, rows, columns, strips,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_S=power_of_two(strips), num_warps=warps(block_m * block_n),
    )  # fmt: skip
    if part is not None:
        _toolbox.sum_partials(part, dw, None)
    return dx, dw


def specimens() -> list[Specimen]:
    """What tests/triton_compile.py compiles: every kernel, by type of x."""
    found = []
    for t, a in SPECIMEN_TYPES:
        wide = 1 if t == "fp64" else 2
        p = {"x": f"*{t}", "weight": f"*{t}", "y": f"*{t}"}
        q = {"dy": f"*{t}", "x": f"*{t}", "weight": f"*{t}"}
        size, strips = {"M": "i32", "N": "i32"}, {"N": "i32", "strip": "i32", "STRIPS": "i32"}
        stat, sums = {"rstd": f"*{a}"}, {"sums": f"*{a}"}
        for block_m, block_n in ((16, 128), (1, 4096), (1, 8192 * wide)):
            shape = {"EPS": 1e-5, "BLOCK_M": block_m, "BLOCK_N": block_n}
            found.append(Specimen(rms_norm_fwd_kernel, p | stat | size, shape, warps(block_m * block_n)))
        found.append(Specimen(rms_norm_sums_kernel, q | sums | strips, {"BLOCK": 2048}, 4))
        constants = {"EPS": 1e-5, "BLOCK": 4096, "BLOCK_S": 64}
        found.append(Specimen(rms_norm_apply_kernel, p | sums | stat | strips, constants, 8))
        types = q | stat | sums | {"dx": f"*{t}", "part": f"*{a}"} | size | dict.fromkeys(("strip", "COLUMNS"), "i32")
        for block_m, block_n in ((16, 128), (1, 2048), (1, 4096 * wide)):
            whole = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_S": 1, "sums": None, "COLUMNS": 1, "STRIPS": 1}
            found.append(Specimen(rms_norm_bwd_kernel, types, whole, warps(block_m * block_n)))
        blocks = {"BLOCK_M": 1, "BLOCK_N": 1024, "BLOCK_S": 64}
        found.append(Specimen(rms_norm_bwd_kernel, types | {"STRIPS": "i32"}, blocks, 4))
    return found
