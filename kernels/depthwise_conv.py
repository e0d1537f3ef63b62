"""depthwise_conv · Triton
  y[n,(c,m),o] = b[(c,m)] + sum_j w[(c,m),j] * x[n,c, in_base + o*in_step + j*tap_step]      along every dimension
  dx[n,c,h] = b[c] + sum over m of the same with dy and the taps that meet in h, for each residue modulo the stride
  dw[(c,m),j] = sum_{n,o} dy[n,(c,m),o] * x[n,c, in_base + o*in_step + j*tap_step]
  act: y = f(fwd + r) in the same pass, f by number, as in csrc/common
layout   x, y by strides, so NCHW and NHWC alike · w: [K, taps]
mapping  one program per block of outputs, position or channel fastest, whichever is contiguous; loops over the taps
         wgrad: one program per filter and part of the positions; partial sums are added afterwards
memory   x and y once from DRAM, overlapping taps from L1
numerics sums in fp32 (fp64 for fp64), in a fixed order
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _conv
from ._activation import value
from ._conv import NO_ACTIVATION, Axis, forward_axis, gradient_axis
from ._toolbox import Specimen, cdiv

BLOCK = 256


@triton.jit
def depthwise_conv_kernel(
    x, w, b, r, y, TOTAL, PER_EXAMPLE, OUT, PART, DIVIDE, MULTIPLIER, PARTS, TAPS, ALL_TAPS,
    COUNT_H, COUNT_W, SIZE_D, SIZE_H, SIZE_W,
    BASE_D, BASE_H, BASE_W, STEP_D, STEP_H, STEP_W, TAP_D, TAP_H, TAP_W, TAPS_H, TAPS_W,
    W_BASE, W_STEP_D, W_STEP_H, W_STEP_W,
    XN, XC, XD, XH, XW, YN, YC, YD, YH, YW, Y_BASE,
    KIND: tl.constexpr, PA: tl.constexpr, PB: tl.constexpr, PC: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of outputs; filter k * PARTS + part reads channel k * PARTS // DIVIDE + part of x."""
    acc_t: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = index < TOTAL
    n = index // PER_EXAMPLE
    at = index % PER_EXAMPLE
    if LAST:
        k = at % OUT
        at = at // OUT
    else:
        k = at // (PER_EXAMPLE // OUT)
        at = at % (PER_EXAMPLE // OUT)
    ow = at % COUNT_W
    oh = at // COUNT_W % COUNT_H
    od = at // COUNT_W // COUNT_H
    acc = tl.zeros((BLOCK,), acc_t)
    for part in range(PARTS):
        row = x + n * XN + (k * PARTS // DIVIDE + part) * XC
        weights = w + (k * PARTS + part) * ALL_TAPS
        for j in range(TAPS):
            jw = j % TAPS_W
            jh = j // TAPS_W % TAPS_H
            jd = j // TAPS_W // TAPS_H
            di = BASE_D + od * STEP_D + jd * TAP_D
            hi = BASE_H + oh * STEP_H + jh * TAP_H
            wi = BASE_W + ow * STEP_W + jw * TAP_W
            inside = valid & (di >= 0) & (di < SIZE_D) & (hi >= 0) & (hi < SIZE_H) & (wi >= 0) & (wi < SIZE_W)
            pixel = tl.load(row + di * XD + hi * XH + wi * XW, mask=inside, other=0.0).to(acc_t)
            tap = W_BASE + jd * W_STEP_D + jh * W_STEP_H + jw * W_STEP_W
            acc += pixel * tl.load(weights + tap, mask=valid, other=0.0).to(acc_t)
    if b is not None:
        acc += tl.load(b + k, mask=valid, other=0.0).to(acc_t)
    to = n * YN + k * YC + Y_BASE + od * YD + oh * YH + ow * YW
    if r is not None:
        acc += tl.load(r + to, mask=valid, other=0.0).to(acc_t)
    if KIND >= 0:
        acc = value(acc, KIND, PA, PB, PC)
    tl.store(y + to, acc.to(y.dtype.element_ty), mask=valid)


@triton.jit
def depthwise_wgrad_kernel(
    dy, x, part, K, DIVIDE, TAPS, TOTAL, RANGE,
    PIXELS, COUNT_H, COUNT_W, SIZE_D, SIZE_H, SIZE_W,
    BASE_D, BASE_H, BASE_W, STEP_D, STEP_H, STEP_W, TAP_D, TAP_H, TAP_W, TAPS_H, TAPS_W,
    XN, XC, XD, XH, XW, YN, YC, YD, YH, YW, BLOCK: tl.constexpr,
):  # fmt: skip
    """part[split, k, j] of one filter over one range of positions."""
    acc_t: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    k = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    for j in range(TAPS):
        tap_d = BASE_D + j // TAPS_W // TAPS_H * TAP_D
        tap_h = BASE_H + j // TAPS_W % TAPS_H * TAP_H
        tap_w = BASE_W + j % TAPS_W * TAP_W
        total = tl.zeros((BLOCK,), acc_t)
        for i in range(0, RANGE, BLOCK):
            pixel = split * RANGE + i + tl.arange(0, BLOCK)
            valid = pixel < TOTAL
            n = pixel // PIXELS
            at = pixel % PIXELS
            ow = at % COUNT_W
            oh = at // COUNT_W % COUNT_H
            od = at // COUNT_W // COUNT_H
            di = od * STEP_D + tap_d
            hi = oh * STEP_H + tap_h
            wi = ow * STEP_W + tap_w
            inside = valid & (di >= 0) & (di < SIZE_D) & (hi >= 0) & (hi < SIZE_H) & (wi >= 0) & (wi < SIZE_W)
            g = tl.load(dy + n * YN + k * YC + od * YD + oh * YH + ow * YW, mask=valid, other=0.0).to(acc_t)
            from_x = x + n * XN + k // DIVIDE * XC + di * XD + hi * XH + wi * XW
            total += g * tl.load(from_x, mask=inside, other=0.0).to(acc_t)
        tl.store(part + (split * K + k) * TAPS + j, tl.sum(total, 0))


def _filter(
    x, w, b, r, y, axes: list[Axis], all_taps, transposed: bool, channels_last: bool, f=NO_ACTIVATION
) -> None:  # fmt: skip
    d, h, v = axes
    n, out = y.shape[:2]
    multiplier = w.shape[0] // (out if transposed else x.shape[1])
    per_example = d.count * h.count * v.count * out
    if n * per_example == 0:
        return
    step = (all_taps[1] * all_taps[2], all_taps[2], 1)
    sy = y.stride()
    depthwise_conv_kernel[(cdiv(n * per_example, BLOCK),)](
        x, w, b, r, y, n * per_example, per_example, out, 0,
        1 if transposed else multiplier, multiplier, multiplier if transposed else 1,
        d.taps * h.taps * v.taps, step[0] * all_taps[0],
        h.count, v.count, d.size, h.size, v.size,
        d.in_base, h.in_base, v.in_base, d.in_step, h.in_step, v.in_step, d.tap_step, h.tap_step, v.tap_step,
        max(h.taps, 1), max(v.taps, 1),
        sum(a.w_base * s for a, s in zip(axes, step)), *(a.w_step * s for a, s in zip(axes, step)),
        *x.stride(), sy[0], sy[1], *(a.out_step * s for a, s in zip(axes, sy[2:])),
        sum(a.out_base * s for a, s in zip(axes, sy[2:])),
        **dict(zip(("KIND", "PA", "PB", "PC"), f)), LAST=channels_last, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip


def depthwise_conv_fwd(x, w, b, stride, padding, dilation, groups, channels_last, algorithm) -> torch.Tensor:
    return _forward(x, w, b, None, stride, padding, dilation, channels_last, NO_ACTIVATION)


def depthwise_conv_act_fwd(
    x, w, b, residual, stride, padding, dilation, groups, channels_last, algorithm, kind, pa, pb, pc
) -> torch.Tensor:  # fmt: skip
    return _forward(x, w, b, residual, stride, padding, dilation, channels_last, (kind, pa, pb, pc))


def _forward(x, w, b, residual, stride, padding, dilation, channels_last, f) -> torch.Tensor:
    xv, wv = _conv.view(x, channels_last), _conv.view(w, channels_last)
    taps = tuple(wv.shape[2:])
    count = _conv.output_size(xv.shape[2:], taps, stride, padding, dilation)
    y = _conv.empty(x, x.shape[0], w.shape[0], count, channels_last)
    axes = [forward_axis(*a) for a in zip(xv.shape[2:], count, taps, stride, padding, dilation)]
    r = None if residual is None else _conv.view(residual, channels_last)
    _filter(xv, w.flatten(1), b, r, _conv.view(y, channels_last), axes, taps, False, channels_last, f)
    return y


def depthwise_conv_dgrad(dy, w, b, size, stride, padding, dilation, groups, channels_last, algorithm) -> torch.Tensor:
    dyv, taps = _conv.view(dy, channels_last), tuple(_conv.view(w, channels_last).shape[2:])
    dx = _conv.empty(dy, dy.shape[0], groups, size, channels_last)
    for at in _conv.phases(stride):
        axes = [gradient_axis(*a) for a in zip(size, dyv.shape[2:], taps, stride, padding, dilation, at)]
        _filter(dyv, w.flatten(1), b, None, _conv.view(dx, channels_last), axes, taps, True, channels_last)
    return dx


def depthwise_conv_wgrad(dy, x, taps, stride, padding, dilation, groups, channels_last, algorithm) -> torch.Tensor:
    dyv, xv = _conv.view(dy, channels_last), _conv.view(x, channels_last)
    n, k = dyv.shape[:2]
    d, h, v = (forward_axis(*a) for a in zip(xv.shape[2:], dyv.shape[2:], taps, stride, padding, dilation))
    pixels = d.count * h.count * v.count
    splits = max(min(cdiv(n * pixels, 16 * BLOCK), 32), 1)
    span = cdiv(cdiv(n * pixels, splits), BLOCK) * BLOCK
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    part = torch.empty((splits, k, taps[0] * taps[1] * taps[2]), dtype=acc, device=x.device)
    depthwise_wgrad_kernel[(k, splits)](
        dyv, xv, part, k, k // groups, part.shape[2], n * pixels, span,
        max(pixels, 1), h.count, v.count, d.size, h.size, v.size,
        d.in_base, h.in_base, v.in_base, d.in_step, h.in_step, v.in_step, d.tap_step, h.tap_step, v.tap_step,
        h.taps, v.taps, *xv.stride(), *dyv.stride(), BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return part.sum(0).to(x.dtype).view((k, *taps, 1) if channels_last else (k, 1, *taps))


def specimens() -> list[Specimen]:
    """What tests/triton_compile.py compiles: both kernels, by type of x."""
    found = []
    plain, gelu = (dict(zip(("KIND", "PA", "PB", "PC"), f)) for f in (NO_ACTIVATION, (3, 0.0, 0.0, 0.0)))
    for t, a in (("fp32", "fp32"), ("bf16", "fp32"), ("fp64", "fp64")):
        for kernel, pointers, more in (
            (depthwise_conv_kernel, ("x", "w", "b", "y"), {"r": None, "LAST": True} | plain),
            (depthwise_conv_kernel, ("x", "w", "b", "r", "y"), {"LAST": True} | gelu),
            (depthwise_wgrad_kernel, ("dy", "x", "part"), {}),
        ):
            types = {name: f"*{a if name == 'part' else t}" for name in pointers}
            constants = {"BLOCK": BLOCK, **more}
            sizes = {name: "i32" for name in kernel.arg_names if name not in types and name not in constants}
            found.append(Specimen(kernel, types | sizes, constants, 4, hot=t != "fp64"))
    return found
