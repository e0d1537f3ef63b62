"""fractional_max_pool · Triton
  y[o] = max over the window of x at start(o), start random per plane;  dx[i] = Σ dy[o] over the o whose maximum is i
layout   x: [P, D, H, W], y, index: [P, OD, OH, OW] · samples: [P, 3]
mapping  a program takes BLOCK elements of the result; backward gathers: no atomics
memory   x read once from DRAM, its overlaps from the caches; y and index written once
numerics in fp32 (fp64 for fp64); the first maximum wins, NaN wins always; backward adds in the order of the outputs
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._toolbox import Specimen, cdiv

BLOCK = 256


@triton.jit
def start(o, u, SIZE, OUT, KERNEL):
    """floor((o + u) a) - floor(u a) with a = (SIZE - KERNEL) / (OUT - 1); the last window ends with the input."""
    span = SIZE - KERNEL
    alpha = (u * 0.0 + span) / tl.maximum(OUT - 1, 1)
    at = ((o + u) * alpha).to(tl.int64) - (u * alpha).to(tl.int64)
    return tl.where(o == OUT - 1, span, tl.minimum(tl.maximum(at, 0), span))


@triton.jit
def first_output(i, SIZE, OUT, KERNEL):
    """The first window that may reach position i."""
    return tl.maximum(i - KERNEL - 1, 0) * (OUT - 1) // tl.maximum(SIZE - KERNEL, 1)


@triton.jit
def fractional_max_pool_kernel(x, samples, y, index, total, D, OD, KD, H, OH, KH, W, OW, KW, BLOCK: tl.constexpr):
    acc_t: tl.constexpr = tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = i < total
    p = i // (OD * OH * OW)
    z0 = start(i // (OW * OH) % OD, tl.load(samples + 3 * p, mask=live, other=0.0).to(acc_t), D, OD, KD)
    r0 = start(i // OW % OH, tl.load(samples + 3 * p + 1, mask=live, other=0.0).to(acc_t), H, OH, KH)
    c0 = start(i % OW, tl.load(samples + 3 * p + 2, mask=live, other=0.0).to(acc_t), W, OW, KW)
    best = tl.full((BLOCK,), float("-inf"), acc_t)
    at = (z0 * H + r0) * W + c0
    for kd in range(KD):
        for kh in range(KH):
            for kw in range(KW):
                position = ((z0 + kd) * H + r0 + kh) * W + c0 + kw
                v = tl.load(x + p * (D * H * W) + position, mask=live, other=0.0).to(acc_t)
                wins = (v > best) | (v != v)
                best = tl.where(wins, v, best)
                at = tl.where(wins, position, at)
    tl.store(y + i, best.to(y.dtype.element_ty), mask=live)
    tl.store(index + i, at, mask=live)


@triton.jit
def fractional_max_pool_bwd_kernel(
    dy, index, dx, total, D, OD, KD, H, OH, KH, W, OW, KW, RD, RH, RW, BLOCK: tl.constexpr
):
    """RD, RH, RW: how many windows from the first on may reach one position."""
    acc_t: tl.constexpr = tl.float64 if dx.dtype.element_ty == tl.float64 else tl.float32
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = i < total
    position, p = i % (D * H * W), i // (D * H * W)
    first_d = first_output(i // (W * H) % D, D, OD, KD)
    first_h = first_output(i // W % H, H, OH, KH)
    first_w = first_output(i % W, W, OW, KW)
    total_dx = tl.zeros((BLOCK,), acc_t)
    for a in range(RD):
        for b in range(RH):
            for e in range(RW):
                od, oh, ow = first_d + a, first_h + b, first_w + e
                inside = live & (od < OD) & (oh < OH) & (ow < OW)
                o = ((p * OD + od) * OH + oh) * OW + ow
                mine = tl.load(index + o, mask=inside, other=-1) == position
                total_dx += tl.load(dy + o, mask=inside & mine, other=0.0).to(acc_t)
    tl.store(dx + i, total_dx.to(dx.dtype.element_ty), mask=live)


def _dimensions(size: list[int], window: list[int]) -> tuple[list[int], list[int]]:
    """(size, out, kernel) of D, H and W; windows from the first on that may reach one position."""
    arguments, reach = [], []
    for k in range(3):
        extent, out, kernel = size[1 + k], window[2 * k], window[2 * k + 1]
        arguments += [extent, out, kernel]
        # windows are at least 1 apart, and begin less than 1 from their multiple of a
        reach.append(min(kernel + 5, out))
    return arguments, reach


def fractional_max_pool_fwd(
    x: torch.Tensor, samples: torch.Tensor, window: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    y = x.new_empty(x.shape[0], *window[::2])
    index = torch.empty_like(y, dtype=torch.int64)
    arguments, _ = _dimensions(list(x.shape), window)
    if y.numel():
        fractional_max_pool_kernel[(cdiv(y.numel(), BLOCK),)](x, samples, y, index, y.numel(), *arguments, BLOCK=BLOCK)
    return y, index


def fractional_max_pool_bwd(dy: torch.Tensor, index: torch.Tensor, size: list[int], window: list[int]) -> torch.Tensor:
    dx = dy.new_empty(size)
    arguments, reach = _dimensions(size, window)
    if dx.numel():
        fractional_max_pool_bwd_kernel[(cdiv(dx.numel(), BLOCK),)](
            dy, index, dx, dx.numel(), *arguments, *reach, BLOCK=BLOCK
        )
    return dx


def specimens() -> list[Specimen]:
    """What tests/triton_compile.py compiles, by type of x."""
    found = []
    for t in ("fp32", "bf16", "fp64"):
        sizes = dict.fromkeys(("total", *(a + k for k in "DHW" for a in ("", "O", "K"))), "i32")
        forward = {"x": f"*{t}", "samples": f"*{t}", "y": f"*{t}", "index": "*i64"} | sizes
        backward = {"dy": f"*{t}", "index": "*i64", "dx": f"*{t}"} | sizes | dict.fromkeys(("RD", "RH", "RW"), "i32")
        found.append(Specimen(fractional_max_pool_kernel, forward, {"BLOCK": BLOCK}, 4))
        found.append(Specimen(fractional_max_pool_bwd_kernel, backward, {"BLOCK": BLOCK}, 4))
    return found
