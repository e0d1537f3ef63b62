"""local_response_norm · Triton
  q[c] = k + alpha/size · sum over window(c) of x²        y = x q^-beta
  dx[c] = dy q^-beta - 2 alpha beta/size · x[c] · sum over the c' whose window holds c of dy x q^-(beta+1)
layout   x, y: [N, C, S] or, channels_last, [N, S, C]
mapping  a program takes BLOCK elements; the gradient in two passes, the first of which writes dy x q^-(beta+1)
memory   the window from the caches; backward: scratch of one fp32 (fp64) an element
numerics fp32 (fp64 for fp64); each window is added anew
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._toolbox import SPECIMEN_TYPES, Specimen, accumulate_dtype, cdiv

BLOCK = 512


@triton.jit
def _base(x, e, valid, c, C, STEP, BEFORE, BEHIND, SHARE, K, acc_t: tl.constexpr):
    """q at each element; STEP: the distance of channels."""
    squares = tl.zeros(e.shape, acc_t)
    for j in range(-BEFORE, BEHIND + 1):
        inside = valid & (c + j >= 0) & (c + j < C)
        v = tl.load(x + e + j * STEP, mask=inside, other=0.0).to(acc_t)
        squares += v * v
    return K + SHARE * squares


@triton.jit
def _constants(constants):
    return tl.load(constants), tl.load(constants + 1), tl.load(constants + 2)


@triton.jit
def local_response_norm_fwd_kernel(x, y, constants, TOTAL, C, STEP, BEFORE, BEHIND, BLOCK: tl.constexpr):
    acc_t: tl.constexpr = constants.dtype.element_ty
    share, beta, k = _constants(constants)
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = e < TOTAL
    q = _base(x, e, valid, e // STEP % C, C, STEP, BEFORE, BEHIND, share, k, acc_t)
    value = tl.load(x + e, mask=valid, other=0.0).to(acc_t) * tl.exp(-beta * tl.log(q))
    tl.store(y + e, value.to(y.dtype.element_ty), mask=valid)


@triton.jit
def local_response_norm_inner_kernel(dy, x, inner, constants, TOTAL, C, STEP, BEFORE, BEHIND, BLOCK: tl.constexpr):
    acc_t: tl.constexpr = constants.dtype.element_ty
    share, beta, k = _constants(constants)
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = e < TOTAL
    q = _base(x, e, valid, e // STEP % C, C, STEP, BEFORE, BEHIND, share, k, acc_t)
    g, value = tl.load(dy + e, mask=valid, other=0.0).to(acc_t), tl.load(x + e, mask=valid, other=0.0).to(acc_t)
    tl.store(inner + e, g * value * tl.exp(-beta * tl.log(q)) / q, mask=valid)


@triton.jit
def local_response_norm_bwd_kernel(dy, x, inner, dx, constants, TOTAL, C, STEP, BEFORE, BEHIND, BLOCK: tl.constexpr):
    acc_t: tl.constexpr = constants.dtype.element_ty
    share, beta, k = _constants(constants)
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid, c = e < TOTAL, e // STEP % C
    q = _base(x, e, valid, c, C, STEP, BEFORE, BEHIND, share, k, acc_t)
    total = tl.zeros((BLOCK,), acc_t)
    for j in range(-BEHIND, BEFORE + 1):  # the channels whose window holds c
        inside = valid & (c + j >= 0) & (c + j < C)
        total += tl.load(inner + e + j * STEP, mask=inside, other=0.0)
    g, value = tl.load(dy + e, mask=valid, other=0.0).to(acc_t), tl.load(x + e, mask=valid, other=0.0).to(acc_t)
    grad = g * tl.exp(-beta * tl.log(q)) - 2 * share * beta * value * total
    tl.store(dx + e, grad.to(dx.dtype.element_ty), mask=valid)


def _arguments(x: torch.Tensor, size: int, alpha: float, beta: float, k: float, channels_last: bool):
    """alpha/size, beta and k as a tensor, because Triton takes scalars in float32; the sizes; the grid."""
    constants = torch.tensor([alpha / size, beta, k], dtype=accumulate_dtype(x.dtype), device=x.device)
    channels, step = (x.shape[-1], 1) if channels_last else (x.shape[1], max(x[0, 0].numel(), 1))
    window = (min(size // 2, channels), min((size - 1) // 2, channels))
    return constants, (x.numel(), channels, step, *window), (cdiv(x.numel(), BLOCK),)


def local_response_norm_fwd(
    x: torch.Tensor, size: int, alpha: float, beta: float, k: float, channels_last: bool
) -> torch.Tensor:
    y = torch.empty_like(x)
    if x.numel():
        constants, sizes, grid = _arguments(x, size, alpha, beta, k, channels_last)
        local_response_norm_fwd_kernel[grid](x, y, constants, *sizes, BLOCK=BLOCK)
    return y


def local_response_norm_bwd(
    dy: torch.Tensor, x: torch.Tensor, size: int, alpha: float, beta: float, k: float, channels_last: bool
) -> torch.Tensor:
    dx = torch.empty_like(x)
    if x.numel():
        constants, sizes, grid = _arguments(x, size, alpha, beta, k, channels_last)
        inner = torch.empty_like(x, dtype=constants.dtype)
        local_response_norm_inner_kernel[grid](dy, x, inner, constants, *sizes, BLOCK=BLOCK)
        local_response_norm_bwd_kernel[grid](dy, x, inner, dx, constants, *sizes, BLOCK=BLOCK)
    return dx


def specimens() -> list[Specimen]:
    """What tests/triton_compile.py compiles, by type of x."""
    found = []
    for t, a in SPECIMEN_TYPES:
        sizes = {"constants": f"*{a}"} | dict.fromkeys(("TOTAL", "C", "STEP", "BEFORE", "BEHIND"), "i32")
        for kernel, names in (
            (local_response_norm_fwd_kernel, ("x", "y")),
            (local_response_norm_inner_kernel, ("dy", "x")),
            (local_response_norm_bwd_kernel, ("dy", "x", "dx")),
        ):
            scratch = {} if "y" in names else {"inner": f"*{a}"}
            found.append(Specimen(kernel, dict.fromkeys(names, f"*{t}") | scratch | sizes, {"BLOCK": BLOCK}, 4))
    return found
