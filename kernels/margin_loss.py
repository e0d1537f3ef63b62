"""margin_loss · Triton
  loss[m] = w_t / N Σ_{n≠t} max(0, d - x_t + x_n)^p,  t = target[m], d the margin, p = 1 or 2
  dx_n = g w_t / N (p = 1: [z_n > 0], p = 2: 2 max(0, z_n)) for n ≠ t, z_n = d - x_t + x_n;  dx_t = -Σ_{n≠t} dx_n
layout   x, dx: [M, N] · target, loss, g: [M] · w: [N]
mapping  a program per row, which walks over n in steps of BLOCK
memory   x read once; backward reads x, writes dx
numerics in fp32 (fp64 for fp64); a label outside [0, N) gives NaN and reads nothing
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._toolbox import Specimen, accumulate_dtype, power_of_two, warps

LARGEST_BLOCK = 2048


@triton.jit
def margin_loss_kernel(g, x, target, w, loss, dx, N, P: tl.constexpr, MARGIN: tl.constexpr, BLOCK: tl.constexpr):
    """g None: the loss; else the gradient."""
    acc_t: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    m = tl.program_id(0).to(tl.int64)
    t = tl.load(target + m)
    inside = (t >= 0) & (t < N)
    label = tl.load(x + m * N + t, mask=inside, other=float("nan")).to(acc_t)
    scale = tl.full((), 1.0, acc_t)
    if w is not None:
        scale = tl.load(w + t, mask=inside, other=0.0)
    scale = tl.where(inside, scale, float("nan")) / N
    if g is not None:
        scale = scale * tl.load(g + m)
    total = tl.zeros((BLOCK,), acc_t)
    for k in range(0, N, BLOCK):
        n = k + tl.arange(0, BLOCK)
        valid = (n < N) & (n != t)
        z = tl.load(x + m * N + n, mask=valid, other=0.0).to(acc_t) + (MARGIN - label)
        if g is None:
            term = tl.where(z > 0, z, 0.0)  # 0 for NaN, as torch has it
            if P == 2:
                term = term * term
        else:
            term = tl.zeros((BLOCK,), acc_t) + scale
            if P == 2:
                term = 2.0 * z * scale
            term = tl.where((z > 0) | ~inside, term, 0.0)
            tl.store(dx + m * N + n, term.to(dx.dtype.element_ty), mask=valid)
        total += tl.where(valid, term, 0.0)
    if g is None:
        tl.store(loss + m, tl.sum(total, 0) * scale)
    else:
        tl.store(dx + m * N + t, (-tl.sum(total, 0)).to(dx.dtype.element_ty), mask=inside)


def _run(g, x, target, weight, loss, dx, p: int, margin: float) -> None:
    m, n = x.shape
    if m and n:
        block = min(power_of_two(n), LARGEST_BLOCK)
        margin_loss_kernel[(m,)](
            g, x, target, weight, loss, dx, n, P=p, MARGIN=margin, BLOCK=block, num_warps=warps(block, 8)
        )


def margin_loss_fwd(
    x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, p: int, margin: float
) -> torch.Tensor:
    loss = torch.empty(x.shape[0], dtype=accumulate_dtype(x.dtype), device=x.device)
    _run(None, x, target, weight, loss, None, p, margin)
    return loss


def margin_loss_bwd(
    g: torch.Tensor, x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, p: int, margin: float
) -> torch.Tensor:
    dx = torch.empty_like(x)
    _run(g, x, target, weight, None, dx, p, margin)
    return dx


def specimens() -> list[Specimen]:
    """What tests/triton_compile.py compiles, by type of x and power."""
    found = []
    for t, a in (("fp32", "fp32"), ("bf16", "fp32"), ("fp64", "fp64")):
        for p in (1, 2):
            inputs = {"x": f"*{t}", "target": "*i64", "w": f"*{a}", "N": "i32"}
            constants = {"P": p, "MARGIN": 1.0, "BLOCK": 1024}
            forward = inputs | {"loss": f"*{a}"}
            found.append(Specimen(margin_loss_kernel, forward, constants | {"g": None, "dx": None}, 4))
            backward = inputs | {"g": f"*{a}", "dx": f"*{t}"}
            found.append(Specimen(margin_loss_kernel, backward, constants | {"loss": None}, 4))
    return found
