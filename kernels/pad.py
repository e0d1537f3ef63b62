"""pad · Triton
  y[n,o0,o1,o2,k] = x[n,i0,i1,i2,k],  i = source(o) axis by axis, or the constant;  dx sums dy over the o of each i
layout   x: [N, A0, A1, A2, K] · y: [N, B0, B1, B2, K], row-major
mapping  a program takes BLOCK elements of y, or of dx
memory   x read once, y written once
numerics dx in fp32 (fp64 for fp64), in a fixed order
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._toolbox import Specimen, cdiv

BLOCK = 512
REFLECT, REPLICATE, CIRCULAR = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def _source(o, IN, BEFORE, MODE: tl.constexpr):
    """The input index of an output index, -1 where the constant stands."""
    i = o - BEFORE
    if MODE == REFLECT:
        outside = tl.where(i < 0, -i, 2 * (IN - 1) - i)
    elif MODE == REPLICATE:
        outside = tl.where(i < 0, 0 * i, IN - 1)
    elif MODE == CIRCULAR:
        outside = tl.where(i < 0, i + IN, i - IN)
    else:
        outside = 0 * i - 1
    return tl.where((i >= 0) & (i < IN), i, outside)


@triton.jit
def pad_fwd_kernel(
    x, y, value, TOTAL, K, A0, A1, A2, B0, B1, B2, F0, F1, F2, MODE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A, B: sizes of x and y; F: what is added in front."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    k, o2, o1, o0 = e % K, e // K % B2, e // K // B2 % B1, e // K // B2 // B1 % B0
    n = e // K // B2 // B1 // B0
    i0, i1, i2 = _source(o0, A0, F0, MODE), _source(o1, A1, F1, MODE), _source(o2, A2, F2, MODE)
    inside = (e < TOTAL) & (i0 >= 0) & (i1 >= 0) & (i2 >= 0)
    v = tl.load(x + (((n * A0 + i0) * A1 + i1) * A2 + i2) * K + k, mask=inside, other=0.0)
    tl.store(y + e, tl.where(inside, v, tl.load(value)), mask=e < TOTAL)


@triton.jit
def _target(i, t, IN, OUT, BEFORE, MODE: tl.constexpr):
    """Output t of those that read input i, -1 where it has fewer; REPLICATE: its edge repeated from either end."""
    center = i + BEFORE
    if MODE == REFLECT:
        before, behind = BEFORE - i, BEFORE + 2 * (IN - 1) - i
        o = tl.where(t == 0, center, tl.where(t == 1, before, behind))
        exists = (t == 0) | ((t == 1) & (i > 0)) | ((t == 2) & (i < IN - 1))
    elif MODE == CIRCULAR:
        o = tl.where(t == 0, center, tl.where(t == 1, center - IN, center + IN))
        exists = t < 3
    elif MODE == REPLICATE:
        # t = 0: itself; then those in front for the first input, and those behind for the last
        front = tl.maximum(tl.minimum(BEFORE, OUT), 0)
        o = tl.where(t == 0, center, tl.where(t <= front, t - 1, tl.maximum(BEFORE + IN, 0) + t - 1 - front))
        exists = (t == 0) | ((t <= front) & (i == 0)) | ((t > front) & (i == IN - 1))
    else:
        o = center
        exists = t == 0
    return tl.where(exists & (o >= 0) & (o < OUT), o, -1)


@triton.jit
def pad_bwd_kernel(
    dy, dx, TOTAL, K, A0, A1, A2, B0, B1, B2, F0, F1, F2, T0, T1, T2, MODE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """T: the most outputs that one input has along each axis."""
    acc_t: tl.constexpr = tl.float64 if dx.dtype.element_ty == tl.float64 else tl.float32
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    k, i2, i1, i0 = e % K, e // K % A2, e // K // A2 % A1, e // K // A2 // A1 % A0
    n = e // K // A2 // A1 // A0
    total = tl.zeros((BLOCK,), acc_t)
    for t0 in range(T0):
        o0 = _target(i0, t0, A0, B0, F0, MODE)
        for t1 in range(T1):
            o1 = _target(i1, t1, A1, B1, F1, MODE)
            for t2 in range(T2):
                o2 = _target(i2, t2, A2, B2, F2, MODE)
                inside = (e < TOTAL) & (o0 >= 0) & (o1 >= 0) & (o2 >= 0)
                at = (((n * B0 + o0) * B1 + o1) * B2 + o2) * K + k
                total += tl.load(dy + at, mask=inside, other=0.0).to(acc_t)
    tl.store(dx + e, total.to(dx.dtype.element_ty), mask=e < TOTAL)


def pad_fwd(x: torch.Tensor, before: list[int], sizes: list[int], mode: int, value: float) -> torch.Tensor:
    y = x.new_empty(x.shape[0], *sizes, x.shape[4])
    if y.numel():
        constant = torch.full((1,), value, dtype=x.dtype, device=x.device)
        pad_fwd_kernel[(cdiv(y.numel(), BLOCK),)](
            x, y, constant, y.numel(), x.shape[4], *x.shape[1:4], *sizes, *before, MODE=mode, BLOCK=BLOCK
        )
    return y


def _targets(mode: int, size: int, out: int, before: int) -> int:
    if mode == 2:
        front = max(min(before, out), 0)
        return 1 + front + max(out - max(before + size, 0), 0)
    return 1 if mode == 0 or (before <= 0 and out - size - before <= 0) else 3


def pad_bwd(dy: torch.Tensor, before: list[int], sizes: list[int], mode: int) -> torch.Tensor:
    dx = dy.new_empty(dy.shape[0], *sizes, dy.shape[4])
    if dx.numel():
        targets = [_targets(mode, *axis) for axis in zip(sizes, dy.shape[1:4], before)]
        pad_bwd_kernel[(cdiv(dx.numel(), BLOCK),)](
            dy, dx, dx.numel(), dy.shape[4], *sizes, *dy.shape[1:4], *before, *targets, MODE=mode, BLOCK=BLOCK
        )
    return dx


def specimens() -> list[Specimen]:
    """What tests/triton_compile.py compiles, by type of x and mode."""
    sizes = dict.fromkeys(("TOTAL", "K", "A0", "A1", "A2", "B0", "B1", "B2", "F0", "F1", "F2"), "i32")
    found = []
    for t in ("fp32", "bf16", "fp16", "fp64"):
        for mode in range(4):
            constants = {"MODE": mode, "BLOCK": BLOCK}
            types = {"x": f"*{t}", "y": f"*{t}", "value": f"*{t}"} | sizes
            found.append(Specimen(pad_fwd_kernel, types, constants, 4))
            types = {"dy": f"*{t}", "dx": f"*{t}"} | sizes | dict.fromkeys(("T0", "T1", "T2"), "i32")
            found.append(Specimen(pad_bwd_kernel, types, constants, 4))
    return found
