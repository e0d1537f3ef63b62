"""focal_loss · Triton
  y = a ce m^gamma,  ce = max(x, 0) - x t + log(1 + e^-|x|),  m = p + t - 2 p t,  p = sigmoid(x)
  a = alpha t + (1 - alpha)(1 - t), 1 where alpha < 0; the gradients stand in docs/math/detection.md
layout   x, t, y, dy, dx, dt: [n]
mapping  a block of elements per program
memory   every input is read once, every output written once
numerics fp32 (fp64 for fp64)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._toolbox import Specimen, cdiv


@triton.jit
def _focal(x, t, ALPHA: tl.constexpr, GAMMA: tl.constexpr):
    """(p, ce, m^gamma, gamma m^(gamma-1), a)."""
    e = tl.exp(-tl.abs(x))
    p = tl.where(x >= 0, 1.0, e) / (1.0 + e)
    # log(1 + e) without the loss of small e: log(u) e / (u - 1), u = 1 + e as rounded
    u = 1.0 + e
    tail = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    ce = tl.where(x < 0, 0.0, x) - x * t + tail
    m = p + t - 2.0 * p * t
    m = tl.where(m < 0, 0.0, m)
    if GAMMA == 2.0:
        power = m * m
        slope = 2.0 * m
    elif GAMMA == 0.0:
        power = m * 0.0 + 1.0
        slope = m * 0.0
    else:
        power = tl.exp(GAMMA * tl.log(m))
        slope = GAMMA * tl.exp((GAMMA - 1.0) * tl.log(m)) if GAMMA != 1.0 else m * 0.0 + 1.0
    if ALPHA >= 0:
        a = ALPHA * t + (1.0 - ALPHA) * (1.0 - t)
    else:
        a = m * 0.0 + 1.0
    return p, ce, power, slope, a


@triton.jit
def focal_loss_fwd_kernel(x, t, y, n, ALPHA: tl.constexpr, GAMMA: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    xv = tl.load(x + i, mask=i < n, other=0.0).to(ACC)
    tv = tl.load(t + i, mask=i < n, other=0.0).to(ACC)
    _, ce, power, _, a = _focal(xv, tv, ALPHA, GAMMA)
    tl.store(y + i, (a * ce * power).to(y.dtype.element_ty), mask=i < n)


@triton.jit
def focal_loss_bwd_kernel(
    dy, x, t, dx, dt, n, ALPHA: tl.constexpr, GAMMA: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    xv = tl.load(x + i, mask=i < n, other=0.0).to(ACC)
    tv = tl.load(t + i, mask=i < n, other=0.0).to(ACC)
    d = tl.load(dy + i, mask=i < n, other=0.0).to(ACC)
    p, ce, power, slope, a = _focal(xv, tv, ALPHA, GAMMA)
    steep = ce * slope
    gx = d * a * ((p - tv) * power + steep * (1.0 - 2.0 * tv) * p * (1.0 - p))
    tl.store(dx + i, gx.to(dx.dtype.element_ty), mask=i < n)
    if dt is not None:
        gt = a * (steep * (1.0 - 2.0 * p) - xv * power)
        if ALPHA >= 0:
            gt += (2.0 * ALPHA - 1.0) * ce * power
        tl.store(dt + i, (d * gt).to(dt.dtype.element_ty), mask=i < n)


def _constants(x: torch.Tensor, alpha: float, gamma: float) -> dict:
    acc = tl.float64 if x.dtype == torch.float64 else tl.float32
    return {"ALPHA": alpha, "GAMMA": gamma, "ACC": acc, "BLOCK": 1024, "num_warps": 4}


def focal_loss_fwd(x: torch.Tensor, t: torch.Tensor, alpha: float, gamma: float) -> torch.Tensor:
    y = torch.empty_like(x)
    if n := x.numel():
        focal_loss_fwd_kernel[(cdiv(n, 1024),)](x, t, y, n, **_constants(x, alpha, gamma))
    return y


def focal_loss_bwd(
    dy: torch.Tensor, x: torch.Tensor, t: torch.Tensor, alpha: float, gamma: float, need_dt: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    dx, dt = torch.empty_like(x), torch.empty_like(x) if need_dt else x.new_empty(0)
    if n := x.numel():
        to = dt if need_dt else None
        focal_loss_bwd_kernel[(cdiv(n, 1024),)](dy, x, t, dx, to, n, **_constants(x, alpha, gamma))
    return dx, dt


def specimens() -> list[Specimen]:
    """What tests/triton_compile.py compiles: both kernels, by type of x and power."""
    found = []
    for t in ("fp32", "bf16", "fp64"):
        acc = tl.float64 if t == "fp64" else tl.float32
        for gamma in (2.0, 1.5):
            constants = {"ALPHA": 0.25, "GAMMA": gamma, "ACC": acc, "BLOCK": 1024}
            inputs = {"x": f"*{t}", "t": f"*{t}", "n": "i32"}
            found.append(Specimen(focal_loss_fwd_kernel, inputs | {"y": f"*{t}"}, constants, 4, t != "fp64"))
            types = inputs | {"dy": f"*{t}", "dx": f"*{t}", "dt": f"*{t}"}
            found.append(Specimen(focal_loss_bwd_kernel, types, constants, 4, t != "fp64"))
    return found
