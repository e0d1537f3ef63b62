"""activation · Triton
  activation   y = f(x),  dx = dy * f'(x);  f by number, as in csrc/common/activation.h
  gated        y = a * f(b),  da = dy * f(b),  db = dy * a * f'(b)
  prelu        y = x > 0 ? x : w[c] * x,  dx = x > 0 ? dy : w[c] * dy,  dw[c] = sum over x <= 0 of dy * x
layout   activation: N elements of any shape · gated: x [M, 2, N], y [M, N] · prelu: x [N, C, S], w [C]
mapping  a program takes BLOCK elements; dw: a program per channel
memory   every input read once, every output written once; prelu's dw reads x and dy once more
numerics in fp32 (fp64 for fp64)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._activation import gradient, value
from ._toolbox import Specimen, cdiv

BLOCK = 1024


@triton.jit
def activation_kernel(
    dy, x, y, N, KIND: tl.constexpr, PA: tl.constexpr, PB: tl.constexpr, PC: tl.constexpr, BLOCK: tl.constexpr
):
    """y = f(x), or dy * f'(x) when dy is given."""
    acc_t: tl.constexpr = tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + at, mask=at < N, other=0.0).to(acc_t)
    if dy is None:
        out = value(v, KIND, PA, PB, PC)
    else:
        out = gradient(tl.load(dy + at, mask=at < N, other=0.0).to(acc_t), v, KIND, PA, PB, PC)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=at < N)


@triton.jit
def gated_kernel(dy, x, y, M, N, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """y = a * f(b); when dy is given, y is dx."""
    acc_t: tl.constexpr = tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = i < M * N
    at = i + i // N * N
    a = tl.load(x + at, mask=valid, other=0.0).to(acc_t)
    b = tl.load(x + at + N, mask=valid, other=0.0).to(acc_t)
    gate = value(b, KIND, 0.0, 0.0, 0.0)
    if dy is None:
        tl.store(y + i, (a * gate).to(y.dtype.element_ty), mask=valid)
    else:
        g = tl.load(dy + i, mask=valid, other=0.0).to(acc_t)
        tl.store(y + at, (g * gate).to(y.dtype.element_ty), mask=valid)
        db = gradient(g * a, b, KIND, 0.0, 0.0, 0.0)
        tl.store(y + at + N, db.to(y.dtype.element_ty), mask=valid)


@triton.jit
def prelu_kernel(dy, x, weight, y, total, C, S, BLOCK: tl.constexpr):
    """y = prelu(x); when dy is given, y is dx."""
    acc_t: tl.constexpr = tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = at < total
    v = tl.load(x + at, mask=valid, other=0.0).to(acc_t)
    w = tl.load(weight + at // S % C, mask=valid, other=0.0).to(acc_t)
    g = v
    if dy is not None:
        g = tl.load(dy + at, mask=valid, other=0.0).to(acc_t)
    tl.store(y + at, tl.where(v > 0.0, g, g * w).to(y.dtype.element_ty), mask=valid)


@triton.jit
def prelu_weight_kernel(dy, x, dw, N, C, S, BLOCK: tl.constexpr):
    """dw of one channel."""
    acc_t: tl.constexpr = tl.float64 if dw.dtype.element_ty == tl.float64 else tl.float32
    channel = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), acc_t)
    for k in range(0, N * S, BLOCK):
        i = k + tl.arange(0, BLOCK).to(tl.int64)
        at = (i // S * C + channel) * S + i % S
        v = tl.load(x + at, mask=i < N * S, other=0.0).to(acc_t)
        g = tl.load(dy + at, mask=i < N * S, other=0.0).to(acc_t)
        total += tl.where(v > 0.0, 0.0, v * g)
    tl.store(dw + channel, tl.sum(total, 0).to(dw.dtype.element_ty))


def _run(dy, x, y, kind, a, b, c):
    n = x.numel()
    if n:
        activation_kernel[(cdiv(n, BLOCK),)](dy, x, y, n, KIND=kind, PA=a, PB=b, PC=c, BLOCK=BLOCK)
    return y


def activation_fwd(x: torch.Tensor, kind: int, a: float, b: float, c: float) -> torch.Tensor:
    return _run(None, x, torch.empty_like(x), kind, a, b, c)


def activation_inplace(x: torch.Tensor, kind: int, a: float, b: float, c: float) -> None:
    _run(None, x, x, kind, a, b, c)


def activation_bwd(dy: torch.Tensor, x: torch.Tensor, kind: int, a: float, b: float, c: float) -> torch.Tensor:
    return _run(dy, x, torch.empty_like(x), kind, a, b, c)


def gated_fwd(x: torch.Tensor, kind: int) -> torch.Tensor:
    m, _, n = x.shape
    y = x.new_empty(m, n)
    if m * n:
        gated_kernel[(cdiv(m * n, BLOCK),)](None, x, y, m, n, KIND=kind, BLOCK=BLOCK)
    return y


def gated_bwd(dy: torch.Tensor, x: torch.Tensor, kind: int) -> torch.Tensor:
    m, _, n = x.shape
    dx = torch.empty_like(x)
    if m * n:
        gated_kernel[(cdiv(m * n, BLOCK),)](dy, x, dx, m, n, KIND=kind, BLOCK=BLOCK)
    return dx


def prelu_fwd(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    if x.numel():
        prelu_kernel[(cdiv(x.numel(), BLOCK),)](None, x, weight, y, x.numel(), x.shape[1], x.shape[2], BLOCK=BLOCK)
    return y


def prelu_bwd(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, need_dw: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    n, c, s = x.shape
    dx, dw = torch.empty_like(x), weight.new_zeros(c if need_dw else 0)
    if x.numel():
        prelu_kernel[(cdiv(x.numel(), BLOCK),)](dy, x, weight, dx, x.numel(), c, s, BLOCK=BLOCK)
        if need_dw:
            prelu_weight_kernel[(c,)](dy, x, dw, n, c, s, BLOCK=BLOCK)
    return dx, dw


def specimens() -> list[Specimen]:
    """What tests/triton_compile.py compiles: every function once in fp32, a few in all types."""
    found = []
    for kind in range(19):
        for t in ("fp32", "bf16", "fp64") if kind in (0, 3) else ("fp32",):
            types = {"dy": f"*{t}", "x": f"*{t}", "y": f"*{t}", "N": "i32"}
            constants = {"KIND": kind, "PA": 1.0, "PB": 2.0, "PC": 0.5, "BLOCK": BLOCK}
            found.append(Specimen(activation_kernel, types, constants, 4))
            found.append(Specimen(activation_kernel, types, constants | {"dy": None}, 4))
    for t in ("fp32", "bf16"):
        types = {"dy": f"*{t}", "x": f"*{t}", "y": f"*{t}", "M": "i32", "N": "i32"}
        found.append(Specimen(gated_kernel, types, {"KIND": 7, "BLOCK": BLOCK}, 4))
        sizes = {"C": "i32", "S": "i32"}
        types = {"dy": f"*{t}", "x": f"*{t}", "weight": f"*{t}", "y": f"*{t}", "total": "i32"} | sizes
        found.append(Specimen(prelu_kernel, types, {"BLOCK": BLOCK}, 4))
        types = {"dy": f"*{t}", "x": f"*{t}", "dw": f"*{t}", "N": "i32"} | sizes
        found.append(Specimen(prelu_weight_kernel, types, {"BLOCK": BLOCK}, 4))
    return found
