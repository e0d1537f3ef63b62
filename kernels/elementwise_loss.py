"""elementwise_loss · Triton
  y[i] = l(x[i], t[i]);  dx[i] = g l_x(x[i], t[i]),  dt[i] = g l_t(x[i], t[i]),  g = dy[i];
  reduced: y = (Σ_i l(x[i], t[i])) / over,  g = dy / over;  l by number, as in csrc/common/elementwise_loss.h
layout   x, t, c, dx, dt: n elements of any shape · y, dy: as many, or reduced one · parts: the sum of each span
mapping  a program takes a span of a sum, or TILE elements; one adds up the spans, if they are several
memory   every input read once, every output written once; of a sum, one number for a span
numerics in fp32 (fp64 for fp64); rounded once
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._toolbox import Specimen, accumulate_dtype, cdiv

TILE = 1024
LEAST_SPAN, MOST_SPANS = 4096, 2048  # of a sum; powers of two


@triton.jit
def sign_of(d):
    """0 for 0 and, as torch has it, for NaN."""
    return (d > 0).to(d.dtype) - (d < 0).to(d.dtype)


@triton.jit
def log1p_unit(e):
    """log(1 + e) for e in [0, 1], without the loss of small e: log(u) e / (u - 1), u = 1 + e as rounded."""
    u = 1.0 + e
    return tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def log_of_rest(x):
    """log(1 - x) for x in [0, 1]."""
    small = tl.where(x > 0.5, 0.0, x)
    return tl.where(x > 0.5, tl.log(1.0 - x), -log1p_unit(small / (1.0 - small)))


@triton.jit
def at_least(v, low):
    return tl.where(v < low, low, v)


@triton.jit
def soft_of(x):
    """log(1 + exp(-x))"""
    return tl.where(x > 0, 0.0, -x) + log1p_unit(tl.exp(-tl.abs(x)))


@triton.jit
def value(x, t, c, KIND: tl.constexpr, A: tl.constexpr):
    d = x - t
    size = tl.abs(d)
    if KIND == 0:
        y = d * d
    elif KIND == 1:
        y = size
    elif KIND == 2:
        y = tl.where(size < A, 0.5 * d * d / A, size - 0.5 * A)
    elif KIND == 3:
        y = tl.where(size <= A, 0.5 * d * d, A * (size - 0.5 * A))
    elif KIND == 4:
        y = (t - 1.0) * at_least(log_of_rest(x), -100.0) - t * at_least(tl.log(x), -100.0)
    elif KIND == 5:
        y = (1.0 - t) * x + (1.0 + (c - 1.0) * t) * soft_of(x)
    elif KIND == 6:
        y = tl.where(t > 0, t * tl.log(tl.where(t > 0, t, 1.0)), tl.where(t < 0, float("nan"), t)) - t * x
    else:
        y = tl.exp(t) * (t - x)
    return y


@triton.jit
def slope(x, t, c, KIND: tl.constexpr, A: tl.constexpr):
    d = x - t
    if KIND == 0:
        dx = 2.0 * d
        dt = -dx
    elif KIND == 1:
        dx = sign_of(d)
        dt = -dx
    elif KIND == 2:
        dx = tl.where(tl.abs(d) >= A, sign_of(d), d / A)
        dt = -dx
    elif KIND == 3:
        dx = tl.where(tl.abs(d) >= A, A * sign_of(d), d)
        dt = -dx
    elif KIND == 4:
        dx = d / at_least((1.0 - x) * x, 1e-12)
        dt = at_least(log_of_rest(x), -100.0) - at_least(tl.log(x), -100.0)
    elif KIND == 5:
        e = tl.exp(-tl.abs(x))
        dx = (1.0 - t) - (1.0 + (c - 1.0) * t) * (tl.where(x >= 0, e, 1.0) / (1.0 + e))
        dt = tl.where(c == 1.0, 0.0, (c - 1.0) * soft_of(x)) - x
    elif KIND == 6:
        dx = -t
        dt = tl.log(t) + 1.0 - x
    else:
        dx = -tl.exp(t)
        dt = -dx * (d * -1.0 + 1.0)
    return dx, dt


@triton.jit
def operands(x, t, c, i, n, acc_t: tl.constexpr, TILE: tl.constexpr):
    """Elements i of x, t and c, which is 1 where there is none."""
    xv = tl.load(x + i, mask=i < n, other=0.0).to(acc_t)
    tv = tl.load(t + i, mask=i < n, other=0.0).to(acc_t)
    cv = tl.full((TILE,), 1.0, acc_t)
    if c is not None:
        cv = tl.load(c + i, mask=i < n, other=0.0).to(acc_t)
    return xv, tv, cv


@triton.jit
def elementwise_loss_fwd_kernel(x, t, c, y, n, KIND: tl.constexpr, A: tl.constexpr, TILE: tl.constexpr):
    acc_t: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    xv, tv, cv = operands(x, t, c, i, n, acc_t, TILE)
    tl.store(y + i, value(xv, tv, cv, KIND, A).to(y.dtype.element_ty), mask=i < n)


@triton.jit
def elementwise_loss_sum_kernel(
    x, t, c, y, n, over, KIND: tl.constexpr, A: tl.constexpr, SPAN: tl.constexpr, TILE: tl.constexpr
):
    """y: the sum of each span, over ``over``."""
    acc_t: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    program = tl.program_id(0).to(tl.int64)
    total = tl.zeros((TILE,), acc_t)
    for k in range(0, SPAN, TILE):
        i = program * SPAN + k + tl.arange(0, TILE)
        xv, tv, cv = operands(x, t, c, i, n, acc_t, TILE)
        total += tl.where(i < n, value(xv, tv, cv, KIND, A), 0.0)
    tl.store(y + program, (tl.sum(total, 0) / over).to(y.dtype.element_ty))


@triton.jit
def elementwise_loss_total_kernel(parts, y, spans, over, SPANS: tl.constexpr):
    i = tl.arange(0, SPANS)
    total = tl.sum(tl.load(parts + i, mask=i < spans, other=0.0), 0)
    tl.store(y, (total / over).to(y.dtype.element_ty))


@triton.jit
def elementwise_loss_bwd_kernel(
    dy, x, t, c, dx, dt, n, over,
    KIND: tl.constexpr, A: tl.constexpr, EACH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    acc_t: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    xv, tv, cv = operands(x, t, c, i, n, acc_t, TILE)
    if EACH:
        g = tl.load(dy + i, mask=i < n, other=0.0).to(acc_t)
    else:
        g = tl.load(dy).to(acc_t) / over
    in_x, in_t = slope(xv, tv, cv, KIND, A)
    if dx is not None:
        tl.store(dx + i, (g * in_x).to(dx.dtype.element_ty), mask=i < n)
    if dt is not None:
        tl.store(dt + i, (g * in_t).to(dt.dtype.element_ty), mask=i < n)


def elementwise_loss_fwd(
    x: torch.Tensor, t: torch.Tensor, c: torch.Tensor | None, kind: int, a: float, reduced: bool, over: int
) -> torch.Tensor:
    n = x.numel()
    if not reduced:
        y = torch.empty_like(x)
        if n:
            elementwise_loss_fwd_kernel[(cdiv(n, TILE),)](x, t, c, y, n, KIND=kind, A=a, TILE=TILE)
        return y
    y = x.new_empty(())
    span = LEAST_SPAN
    while cdiv(n, span) > MOST_SPANS:
        span *= 2
    spans = max(cdiv(n, span), 1)  # no elements: one that writes 0 / over
    how = {"KIND": kind, "A": a, "SPAN": span, "TILE": TILE}
    if spans == 1:
        elementwise_loss_sum_kernel[(1,)](x, t, c, y, n, over, **how)
        return y
    parts = x.new_empty(spans, dtype=accumulate_dtype(x.dtype))
    elementwise_loss_sum_kernel[(spans,)](x, t, c, parts, n, 1, **how)
    elementwise_loss_total_kernel[(1,)](parts, y, spans, over, SPANS=MOST_SPANS)
    return y


def elementwise_loss_bwd(
    dy: torch.Tensor, x: torch.Tensor, t: torch.Tensor, c: torch.Tensor | None, kind: int, a: float, reduced: bool,
    over: int, need_dx: bool, need_dt: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    n = x.numel()
    dx, dt = (torch.empty_like(x) if need else x.new_empty(0) for need in (need_dx, need_dt))
    if n:
        elementwise_loss_bwd_kernel[(cdiv(n, TILE),)](
            dy, x, t, c, dx if need_dx else None, dt if need_dt else None, n, over,
            KIND=kind, A=a, EACH=not reduced, TILE=TILE,
        )  # fmt: skip
    return dx, dt


def specimens() -> list[Specimen]:
    """What tests/triton_compile.py compiles: every loss as a sum in fp32, one in all types and without sum."""
    found = []
    for kind in range(8):
        for t in ("fp32", "bf16", "fp64") if kind in (0, 5) else ("fp32",):
            hot = t != "fp64"
            inputs = {"x": f"*{t}", "t": f"*{t}", "c": f"*{t}"}
            which = {"KIND": kind, "A": 0.5, "TILE": TILE}
            out = {"y": f"*{t}", "n": "i32"}
            found.append(Specimen(elementwise_loss_fwd_kernel, inputs | out, which, 4, hot))
            out["over"] = "i32"
            found.append(Specimen(elementwise_loss_sum_kernel, inputs | out, which | {"SPAN": LEAST_SPAN}, 4, hot))
            for each in (True, False):
                outs = {"dx": f"*{t}", "dt": f"*{t}", "n": "i32", "over": "i32"}
                backward = {"dy": f"*{t}"} | inputs | outs
                found.append(Specimen(elementwise_loss_bwd_kernel, backward, which | {"EACH": each}, 4, hot))
    for t in ("fp32", "bf16", "fp64"):
        total = {"parts": "*fp64" if t == "fp64" else "*fp32", "y": f"*{t}", "spans": "i32", "over": "i32"}
        found.append(Specimen(elementwise_loss_total_kernel, total, {"SPANS": MOST_SPANS}, 4, t != "fp64"))
    return found
