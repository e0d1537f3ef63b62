"""conv · Triton
  y[n,k,o] = b[k] + sum_{j,c} w[k,j,c] * x[n,c, in_base + o*in_step + j*tap_step]      along every dimension
  dw[k,j,c] = sum_{n,o} dy[n,k,o] * x[n,c, in_base + o*in_step + j*tap_step]
  act: y = f(fwd + r) in the same pass, f by number, as in csrc/common
layout   x, y by strides, so NCHW and NHWC alike · w: [G, K/G, taps, C/G], copied once (small)
mapping  implicit GEMM: a tile of BLOCK_M pixels by BLOCK_N output channels; the reduction runs over (tap, c)
         the gradient in the input with stride s is one such product for each residue of the position modulo s
         the gradient in the weight: a tile of output channels by (tap, c), pixels split over programs, partial sums
memory   x through L1 once per tap, w through L2
numerics sums in fp32; fp64 plain; float32 in full precision unless TF32 is asked for
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _conv
from ._activation import value
from ._conv import NO_ACTIVATION, Axis, forward_axis, gradient_axis
from ._toolbox import Specimen, cdiv, multiprocessors


@triton.jit
def conv_kernel(
    x, w, b, r, y, N, C, K, TAPS, BLOCKS,
    PIXELS, COUNT_H, COUNT_W, SIZE_D, SIZE_H, SIZE_W,
    BASE_D, BASE_H, BASE_W, STEP_D, STEP_H, STEP_W, TAP_D, TAP_H, TAP_W, TAPS_H, TAPS_W,
    W_BASE, W_STEP_D, W_STEP_H, W_STEP_W, ALL_TAPS,
    XN, XC, XD, XH, XW, YN, YC, YD, YH, YW, Y_BASE,
    KIND: tl.constexpr, PA: tl.constexpr, PB: tl.constexpr, PC: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of pixels by output channels of one group; COUNT_* and PIXELS count positions of this phase."""
    acc_t: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    g = (tl.program_id(0) // BLOCKS).to(tl.int64)
    pixel = (tl.program_id(0) % BLOCKS).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    n = pixel // PIXELS
    at = pixel % PIXELS
    ow = (at % COUNT_W).to(tl.int32)
    oh = (at // COUNT_W % COUNT_H).to(tl.int32)
    od = (at // COUNT_W // COUNT_H).to(tl.int32)
    valid = n < N
    d0 = BASE_D + od * STEP_D
    h0 = BASE_H + oh * STEP_H
    w0 = BASE_W + ow * STEP_W
    x_at = x + n * XN + g * C * XC
    w_at = w + (g * K + k) * ALL_TAPS * C
    acc = tl.zeros((BLOCK_M, BLOCK_N), acc_t)
    for j in range(TAPS):
        jw = j % TAPS_W
        jh = j // TAPS_W % TAPS_H
        jd = j // TAPS_W // TAPS_H
        di = d0 + jd * TAP_D
        hi = h0 + jh * TAP_H
        wi = w0 + jw * TAP_W
        inside = valid & (di >= 0) & (di < SIZE_D) & (hi >= 0) & (hi < SIZE_H) & (wi >= 0) & (wi < SIZE_W)
        row = x_at + di.to(tl.int64) * XD + hi.to(tl.int64) * XH + wi.to(tl.int64) * XW
        tap = W_BASE + jd * W_STEP_D + jh * W_STEP_H + jw * W_STEP_W
        for c0 in range(0, C, BLOCK_K):
            c = c0 + tl.arange(0, BLOCK_K)
            left = tl.load(
                row[:, None] + c[None, :].to(tl.int64) * XC, mask=inside[:, None] & (c < C)[None, :], other=0.0
            )
            right = tl.load(w_at[None, :] + tap * C + c[:, None], mask=(c < C)[:, None] & (k < K)[None, :], other=0.0)
            if acc_t == tl.float64:
                acc += tl.sum(left[:, :, None] * right[None, :, :], 1)
            else:
                acc = tl.dot(left, right, acc, input_precision=PRECISION)
    if b is not None:
        acc += tl.load(b + g * K + k, mask=k < K, other=0.0).to(acc_t)[None, :]
    at = n * YN + Y_BASE + od.to(tl.int64) * YD + oh.to(tl.int64) * YH + ow.to(tl.int64) * YW
    to = at[:, None] + (g * K + k)[None, :] * YC
    stored = valid[:, None] & (k < K)[None, :]
    if r is not None:
        acc += tl.load(r + to, mask=stored, other=0.0).to(acc_t)
    if KIND >= 0:
        acc = value(acc, KIND, PA, PB, PC)
    tl.store(y + to, acc.to(y.dtype.element_ty), mask=stored)


@triton.jit
def conv_wgrad_kernel(
    dy, x, part, N, C, K, COLUMNS, TOTAL, RANGE,
    PIXELS, COUNT_H, COUNT_W, SIZE_D, SIZE_H, SIZE_W,
    BASE_D, BASE_H, BASE_W, STEP_D, STEP_H, STEP_W, TAP_D, TAP_H, TAP_W, TAPS_H, TAPS_W,
    XN, XC, XD, XH, XW, YN, YC, YD, YH, YW, GROUPS, BLOCKS,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of dw [K, (tap, c)] of one group over one range of pixels: part [splits, G, K, COLUMNS]."""
    acc_t: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    g = (tl.program_id(0) // BLOCKS % GROUPS).to(tl.int64)
    split = (tl.program_id(0) // BLOCKS // GROUPS).to(tl.int64)
    k = tl.program_id(0) % BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = column % C
    j = column // C
    tap_d = BASE_D + j // TAPS_W // TAPS_H * TAP_D
    tap_h = BASE_H + j // TAPS_W % TAPS_H * TAP_H
    tap_w = BASE_W + j % TAPS_W * TAP_W
    acc = tl.zeros((BLOCK_M, BLOCK_N), acc_t)
    start = split * RANGE
    for i in range(0, RANGE, BLOCK_K):
        pixel = start + i + tl.arange(0, BLOCK_K).to(tl.int64)
        valid = pixel < TOTAL
        n = pixel // PIXELS
        at = pixel % PIXELS
        ow = (at % COUNT_W).to(tl.int32)
        oh = (at // COUNT_W % COUNT_H).to(tl.int32)
        od = (at // COUNT_W // COUNT_H).to(tl.int32)
        from_y = dy + n * YN + od.to(tl.int64) * YD + oh.to(tl.int64) * YH + ow.to(tl.int64) * YW
        left = tl.load(from_y[None, :] + (g * K + k)[:, None] * YC, mask=(k < K)[:, None] & valid[None, :], other=0.0)
        di = od[:, None] * STEP_D + tap_d[None, :]
        hi = oh[:, None] * STEP_H + tap_h[None, :]
        wi = ow[:, None] * STEP_W + tap_w[None, :]
        inside = valid[:, None] & (column < COLUMNS)[None, :]
        inside = inside & (di >= 0) & (di < SIZE_D) & (hi >= 0) & (hi < SIZE_H) & (wi >= 0) & (wi < SIZE_W)
        where = (n * XN)[:, None] + (g * C + c)[None, :] * XC
        where += di.to(tl.int64) * XD + hi.to(tl.int64) * XH + wi.to(tl.int64) * XW
        right = tl.load(x + where, mask=inside, other=0.0)
        if acc_t == tl.float64:
            acc += tl.sum(left[:, :, None] * right[None, :, :], 1)
        else:
            acc = tl.dot(left, right, acc, input_precision=PRECISION)
    to = part + ((split * GROUPS + g) * K + k)[:, None] * COLUMNS + column[None, :]
    tl.store(to, acc, mask=(k < K)[:, None] & (column < COLUMNS)[None, :])


def _precision(algorithm: str) -> str:
    return {"tf32": "tf32", "3xtf32": "tf32x3"}.get(algorithm, "ieee")


def _tile(dtype: torch.dtype) -> dict[str, int]:
    if dtype == torch.float64:
        return {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16}
    return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}


def _product(
    x, w, b, r, y, axes: list[Axis], all_taps: tuple[int, int, int], groups: int, algorithm: str, f=NO_ACTIVATION
) -> None:  # fmt: skip
    """y at the positions of ``axes``; x, r and y [N, C, D, H, W] by strides, w [G, K/G, taps, C/G]."""
    d, h, v = axes
    n, c, k = x.shape[0], w.shape[3], w.shape[1]
    pixels = d.count * h.count * v.count
    if n * pixels == 0:
        return
    tile = _tile(x.dtype)
    sy = y.stride()
    base = sum(a.out_base * s for a, s in zip(axes, sy[2:]))
    step = (all_taps[1] * all_taps[2], all_taps[2], 1)
    blocks = cdiv(n * pixels, tile["BLOCK_M"])  # groups beside them: axes 1 and 2 of a grid end at 65535
    grid = (blocks * groups, cdiv(k, tile["BLOCK_N"]))
    conv_kernel[grid](
        x, w, b, r, y, n, c, k, d.taps * h.taps * v.taps, blocks,
        pixels, h.count, v.count, d.size, h.size, v.size,
        d.in_base, h.in_base, v.in_base, d.in_step, h.in_step, v.in_step, d.tap_step, h.tap_step, v.tap_step,
        max(h.taps, 1), max(v.taps, 1),
        sum(a.w_base * s for a, s in zip(axes, step)), *(a.w_step * s for a, s in zip(axes, step)), w.shape[2],
        *x.stride(), sy[0], sy[1], *(a.out_step * s for a, s in zip(axes, sy[2:])), base,
        **dict(zip(("KIND", "PA", "PB", "PC"), f)),
        PRECISION=_precision(algorithm), **tile, num_warps=8,
    )  # fmt: skip


def conv_fwd(x, w, b, stride, padding, dilation, groups, channels_last, algorithm) -> torch.Tensor:
    return _forward(x, w, b, None, stride, padding, dilation, groups, channels_last, algorithm, NO_ACTIVATION)


def conv_act_fwd(
    x, w, b, residual, stride, padding, dilation, groups, channels_last, algorithm, kind, pa, pb, pc
) -> torch.Tensor:  # fmt: skip
    f = (kind, pa, pb, pc)
    return _forward(x, w, b, residual, stride, padding, dilation, groups, channels_last, algorithm, f)


def _forward(x, w, b, residual, stride, padding, dilation, groups, channels_last, algorithm, f) -> torch.Tensor:
    xv, wv = _conv.view(x, channels_last), _conv.view(w, channels_last)
    k, taps = wv.shape[0], tuple(wv.shape[2:])
    count = _conv.output_size(xv.shape[2:], taps, stride, padding, dilation)
    y = _conv.empty(x, x.shape[0], k, count, channels_last)
    arranged = wv.flatten(2).transpose(1, 2).contiguous().view(groups, k // groups, -1, wv.shape[1])
    axes = [forward_axis(*a) for a in zip(xv.shape[2:], count, taps, stride, padding, dilation)]
    r = None if residual is None else _conv.view(residual, channels_last)
    _product(xv, arranged, b, r, _conv.view(y, channels_last), axes, taps, groups, algorithm, f)
    return y


def conv_dgrad(dy, w, b, size, stride, padding, dilation, groups, channels_last, algorithm) -> torch.Tensor:
    dyv, wv = _conv.view(dy, channels_last), _conv.view(w, channels_last)
    (k, c), taps = wv.shape[:2], tuple(wv.shape[2:])
    dx = _conv.empty(dy, dy.shape[0], c * groups, size, channels_last)
    arranged = wv.reshape(groups, k // groups, c, -1).permute(0, 2, 3, 1).contiguous()
    for at in _conv.phases(stride):
        axes = [gradient_axis(*a) for a in zip(size, dyv.shape[2:], taps, stride, padding, dilation, at)]
        _product(dyv, arranged, b, None, _conv.view(dx, channels_last), axes, taps, groups, algorithm)
    return dx


def conv_wgrad(dy, x, taps, stride, padding, dilation, groups, channels_last, algorithm) -> torch.Tensor:
    dyv, xv = _conv.view(dy, channels_last), _conv.view(x, channels_last)
    n, k, c = x.shape[0], dyv.shape[1] // groups, xv.shape[1] // groups
    d, h, v = (forward_axis(*a) for a in zip(xv.shape[2:], dyv.shape[2:], taps, stride, padding, dilation))
    pixels = d.count * h.count * v.count
    columns = taps[0] * taps[1] * taps[2] * c
    tile = _tile(x.dtype)
    tiles = cdiv(k, tile["BLOCK_M"]) * cdiv(columns, tile["BLOCK_N"]) * groups
    splits = max(min(cdiv(2 * multiprocessors(x), tiles), cdiv(n * pixels, 8 * tile["BLOCK_K"])), 1)
    span = cdiv(cdiv(n * pixels, splits), tile["BLOCK_K"]) * tile["BLOCK_K"]
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    part = torch.empty((splits, groups * k, columns), dtype=acc, device=x.device)
    blocks = cdiv(k, tile["BLOCK_M"])
    grid = (blocks * groups * splits, cdiv(columns, tile["BLOCK_N"]))
    conv_wgrad_kernel[grid](
        dyv, xv, part, n, c, k, columns, n * pixels, span,
        max(pixels, 1), h.count, v.count, d.size, h.size, v.size,
        d.in_base, h.in_base, v.in_base, d.in_step, h.in_step, v.in_step, d.tap_step, h.tap_step, v.tap_step,
        h.taps, v.taps, *xv.stride(), *dyv.stride(), groups, blocks,
        PRECISION=_precision(algorithm), **tile, num_warps=8,
    )  # fmt: skip
    dw = part[0] if splits == 1 else part.sum(0)
    dw = dw.view(groups * k, *taps, c).to(x.dtype)
    return dw if channels_last else dw.movedim(-1, 1).contiguous()


def specimens() -> list[Specimen]:
    """What tests/triton_compile.py compiles: both kernels, by type of x."""
    found = []
    plain, gelu = (dict(zip(("KIND", "PA", "PB", "PC"), f)) for f in (NO_ACTIVATION, (3, 0.0, 0.0, 0.0)))
    for t, a in (("fp32", "fp32"), ("bf16", "fp32"), ("fp64", "fp64")):
        tile = _tile(torch.float64 if t == "fp64" else torch.float32)
        for kernel, pointers, more in (
            (conv_kernel, ("x", "w", "b", "y"), {"r": None} | plain),
            (conv_kernel, ("x", "w", "b", "r", "y"), gelu),
            (conv_wgrad_kernel, ("dy", "x", "part"), {}),
        ):
            types = {name: f"*{a if name == 'part' else t}" for name in pointers}
            constants = {"PRECISION": "ieee" if t == "fp64" else "tf32", **tile, **more}
            sizes = {name: "i32" for name in kernel.arg_names if name not in types and name not in constants}
            found.append(Specimen(kernel, types | sizes, constants, 8, hot=t != "fp64"))
    return found
