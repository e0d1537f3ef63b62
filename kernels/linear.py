"""linear · Triton
  bias_act     y = f(x + b),  dx = dy * f'(x + b),  db[c] = sum of dx over n, s;  f by number, as in csrc/common
  bias_rows    y[m,n] = b[n]
  channel_sum  y[c] = sum over n, s of x[n,c,s]; x: [N, C, S] or [N, C]
layout   bias_act: x, y [N, C, S], b [C] · rows [M, N]
mapping  forward: a program takes BLOCK elements; sums: BLOCK_R of the N * S elements of each of BLOCK_C channels
memory   every input read once, every output written once; a program leaves one line of partial sums
numerics in fp32 (fp64 for fp64); partial sums are added in a fixed order
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._activation import gradient, value
from ._toolbox import SPECIMEN_TYPES, Specimen, accumulate_dtype, cdiv, sum_partials

BLOCK = 1024


@triton.jit
def bias_act_kernel(
    x, bias, y, total, C, S, KIND: tl.constexpr, PA: tl.constexpr, PB: tl.constexpr, PC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    acc_t: tl.constexpr = tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = at < total
    v = tl.load(x + at, mask=valid, other=0.0).to(acc_t) + tl.load(bias + at // S % C, mask=valid, other=0.0).to(acc_t)
    tl.store(y + at, value(v, KIND, PA, PB, PC).to(y.dtype.element_ty), mask=valid)


@triton.jit
def bias_act_sum_kernel(
    dy, x, bias, dx, part, R, C, S, KIND: tl.constexpr, PA: tl.constexpr, PB: tl.constexpr, PC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx and a line of partial sums of db; without dy, the partial sums of x. R = N * S."""
    acc_t: tl.constexpr = part.dtype.element_ty
    # both on axis 0: the others end at 65535
    blocks = (C + BLOCK_C - 1) // BLOCK_C
    line = (tl.program_id(0) // blocks).to(tl.int64)
    r = line * BLOCK_R + tl.arange(0, BLOCK_R)
    c = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = (r < R)[:, None] & (c < C)[None, :]
    at = ((r // S * C)[:, None] + c[None, :]) * S + (r % S)[:, None]
    d = tl.load(x + at, mask=valid, other=0.0).to(acc_t)
    if dy is not None:
        add = tl.load(bias + c, mask=c < C, other=0.0).to(acc_t)
        g = tl.load(dy + at, mask=valid, other=0.0).to(acc_t)
        d = tl.where(valid, gradient(g, d + add[None, :], KIND, PA, PB, PC), 0.0)
        tl.store(dx + at, d.to(dx.dtype.element_ty), mask=valid)
    tl.store(part + line * C + c, tl.sum(d, 0), mask=c < C)


@triton.jit
def bias_rows_kernel(bias, y, total, N, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(bias + at % N, mask=at < total), mask=at < total)


def _run(x, bias, y, kind, a, b, c):
    _, channels, s = x.shape
    if n := x.numel():
        parameters = {"KIND": kind, "PA": a, "PB": b, "PC": c}
        bias_act_kernel[(cdiv(n, BLOCK),)](x, bias, y, n, channels, s, **parameters, BLOCK=BLOCK)
    return y


def bias_act_fwd(x: torch.Tensor, bias: torch.Tensor, kind: int, a: float, b: float, c: float) -> torch.Tensor:
    return _run(x, bias, torch.empty_like(x), kind, a, b, c)


def bias_act_inplace(x: torch.Tensor, bias: torch.Tensor, kind: int, a: float, b: float, c: float) -> None:
    _run(x, bias, x, kind, a, b, c)


def _sums(dy, x, bias, dx, total, kind, a, b, c):
    """total[c], by programs over channels and over the N * S elements of each."""
    n, channels, s = x.shape
    block_r, block_c = (64, 32) if s == 1 else (BLOCK, 1)
    rows = cdiv(n * s, block_r)
    part = x.new_empty(1, rows, channels, dtype=accumulate_dtype(x.dtype))
    parameters = {"KIND": kind, "PA": a, "PB": b, "PC": c, "BLOCK_R": block_r, "BLOCK_C": block_c}
    bias_act_sum_kernel[(cdiv(channels, block_c) * rows,)](dy, x, bias, dx, part, n * s, channels, s, **parameters)
    sum_partials(part, total, None)


def bias_act_bwd(
    dy: torch.Tensor, x: torch.Tensor, bias: torch.Tensor, kind: int, a: float, b: float, c: float
) -> tuple[torch.Tensor, torch.Tensor]:
    dx, db = torch.empty_like(x), torch.zeros_like(bias)
    if x.numel():
        _sums(dy, x, bias, dx, db, kind, a, b, c)
    return dx, db


def bias_rows(bias: torch.Tensor, rows: int) -> torch.Tensor:
    n = bias.shape[0]
    y = bias.new_empty(rows, n)
    if y.numel():
        bias_rows_kernel[(cdiv(rows * n, BLOCK),)](bias, y, rows * n, n, BLOCK=BLOCK)
    return y


def channel_sum(x: torch.Tensor) -> torch.Tensor:
    total = x.new_zeros(x.shape[1])
    if x.numel():
        _sums(None, x if x.dim() == 3 else x.unsqueeze(-1), None, None, total, 0, 0.0, 0.0, 0.0)
    return total


def specimens() -> list[Specimen]:
    """What tests/triton_compile.py compiles: in all types the gelu, which holds the most registers."""
    found = []
    sizes = dict.fromkeys(("C", "S"), "i32")
    parameters = {"KIND": 3, "PA": 0.0, "PB": 0.0, "PC": 0.0}
    for t, acc in SPECIMEN_TYPES:
        types = {"x": f"*{t}", "bias": f"*{t}", "y": f"*{t}", "total": "i32"} | sizes
        found.append(Specimen(bias_act_kernel, types, parameters | {"BLOCK": BLOCK}, 4))
        types = {"dy": f"*{t}", "x": f"*{t}", "bias": f"*{t}", "dx": f"*{t}", "part": f"*{acc}", "R": "i32"} | sizes
        for blocks in ({"BLOCK_R": 64, "BLOCK_C": 32}, {"BLOCK_R": BLOCK, "BLOCK_C": 1}):
            found.append(Specimen(bias_act_sum_kernel, types, parameters | blocks, 4, hot=t != "fp64"))
        nothing = {"dy": None, "bias": None, "dx": None}
        for blocks in ({"BLOCK_R": 64, "BLOCK_C": 32}, {"BLOCK_R": BLOCK, "BLOCK_C": 1}):
            found.append(Specimen(bias_act_sum_kernel, types, parameters | nothing | blocks, 4, hot=t != "fp64"))
        types = {"bias": f"*{t}", "y": f"*{t}", "total": "i32", "N": "i32"}
        found.append(Specimen(bias_rows_kernel, types, {"BLOCK": BLOCK}, 4))
    return found
