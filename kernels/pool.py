"""pool · Triton
  max  y[o] = max over the window of x;  dx[i] = sum of dy[o] over the windows whose maximum lies at i
  avg  y[o] = sum over the window of x / divisor;  dx[i] = sum of dy[o] / divisor over the windows that hold i
layout   x: [P, D, H, W, C], y: [P, OD, OH, OW, C]; channels first has C = 1 and P = N * channels
mapping  a program takes BLOCK elements of the result; backward gathers: no atomics
memory   x read once from DRAM, its overlaps from the caches; y written once; positions of maxima as one byte each
numerics in fp32 (fp64 for fp64); the first maximum wins, NaN wins always; backward adds in the order of the outputs
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._toolbox import Specimen, cdiv

BLOCK = 256
NOTHING, TAPS, POSITIONS = 0, 1, 2


@triton.jit
def window(o, SIZE, OUT, KERNEL, STRIDE, PADDING, DILATION, ADAPTIVE: tl.constexpr):
    """Origin, end and step of window o; positions from the origin on may lie before the input."""
    if ADAPTIVE:
        origin = o * SIZE // OUT
        end = ((o + 1) * SIZE + OUT - 1) // OUT
    else:
        origin = o * STRIDE - PADDING
        end = tl.minimum(origin + (KERNEL - 1) * DILATION + 1, SIZE)
    return origin, end


@triton.jit
def counted(o, SIZE, OUT, KERNEL, STRIDE, PADDING, INCLUDE: tl.constexpr, ADAPTIVE: tl.constexpr, DILATION):
    """Positions of window o that count in its average."""
    origin, end = window(o, SIZE, OUT, KERNEL, STRIDE, PADDING, DILATION, ADAPTIVE)
    if ADAPTIVE:
        n = end - origin
    elif INCLUDE:
        n = tl.minimum(origin + KERNEL, SIZE + PADDING) - origin
    else:
        n = end - tl.maximum(origin, 0)
    return n


@triton.jit
def pool_fwd_kernel(
    x, y, index, total, C,
    D, OD, KD, SD, PD, LD, H, OH, KH, SH, PH, LH, W, OW, KW, SW, PW, LW, divisor,
    IS_MAX: tl.constexpr, KEEP: tl.constexpr, INCLUDE: tl.constexpr, OVERRIDE: tl.constexpr, ADAPTIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    acc_t: tl.constexpr = tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = i < total
    c, ow, oh = i % C, i // C % OW, i // (C * OW) % OH
    od, p = i // (C * OW * OH) % OD, i // (C * OW * OH * OD)
    d0, d1 = window(od, D, OD, KD, SD, PD, LD, ADAPTIVE)
    h0, h1 = window(oh, H, OH, KH, SH, PH, LH, ADAPTIVE)
    w0, w1 = window(ow, W, OW, KW, SW, PW, LW, ADAPTIVE)
    result = tl.full((BLOCK,), float("-inf"), acc_t) if IS_MAX else tl.zeros((BLOCK,), acc_t)
    # Where every value is -inf the first position is kept.
    at = tl.full((BLOCK,), -1, tl.int64)
    for kd in range(KD):
        z = d0 + kd * LD
        for kh in range(KH):
            r = h0 + kh * LH
            for kw in range(KW):
                s = w0 + kw * LW
                inside = live & (z >= 0) & (z < d1) & (r >= 0) & (r < h1) & (s >= 0) & (s < w1)
                position = (z * H + r) * W + s
                v = tl.load(x + ((p * D * H * W + position) * C + c), mask=inside, other=0.0).to(acc_t)
                if IS_MAX:
                    wins = inside & ((v > result) | (v != v) | (at < 0))
                    result = tl.where(wins, v, result)
                    kept = position
                    if KEEP == 1:
                        kept = position * 0 + (kd * KH + kh) * KW + kw
                    at = tl.where(wins, kept, at)
                else:
                    result += tl.where(inside, v, 0.0)
    if not IS_MAX:
        if OVERRIDE:
            result = result / divisor
        else:
            n = counted(od, D, OD, KD, SD, PD, INCLUDE, ADAPTIVE, LD)
            n *= counted(oh, H, OH, KH, SH, PH, INCLUDE, ADAPTIVE, LH)
            n *= counted(ow, W, OW, KW, SW, PW, INCLUDE, ADAPTIVE, LW)
            result = result / n.to(acc_t)
    tl.store(y + i, result.to(y.dtype.element_ty), mask=live)
    if KEEP != 0:
        tl.store(index + i, at.to(index.dtype.element_ty), mask=live)


@triton.jit
def pool_bwd_kernel(
    dy, index, dx, total, C,
    D, OD, KD, SD, PD, LD, H, OH, KH, SH, PH, LH, W, OW, KW, SW, PW, LW, divisor, RD, RH, RW,
    IS_MAX: tl.constexpr, KEEP: tl.constexpr, INCLUDE: tl.constexpr, OVERRIDE: tl.constexpr, ADAPTIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """dx; RD, RH, RW: how many windows at most reach one position."""
    acc_t: tl.constexpr = tl.float64 if dx.dtype.element_ty == tl.float64 else tl.float32
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = i < total
    c, s, r = i % C, i // C % W, i // (C * W) % H
    z, p = i // (C * W * H) % D, i // (C * W * H * D)
    position = (z * H + r) * W + s
    if ADAPTIVE:
        first_d, first_h, first_w = z * OD // D, r * OH // H, s * OW // W
    else:
        first_d = (tl.maximum(z + PD - (KD - 1) * LD, 0) + SD - 1) // SD
        first_h = (tl.maximum(r + PH - (KH - 1) * LH, 0) + SH - 1) // SH
        first_w = (tl.maximum(s + PW - (KW - 1) * LW, 0) + SW - 1) // SW
    total_dx = tl.zeros((BLOCK,), acc_t)
    for a in range(RD):
        od = first_d + a
        d0, d1 = window(od, D, OD, KD, SD, PD, LD, ADAPTIVE)
        in_d = live & (od < OD) & (z >= d0) & (z < d1) & ((z - d0) % LD == 0)
        for b in range(RH):
            oh = first_h + b
            h0, h1 = window(oh, H, OH, KH, SH, PH, LH, ADAPTIVE)
            in_h = in_d & (oh < OH) & (r >= h0) & (r < h1) & ((r - h0) % LH == 0)
            for e in range(RW):
                ow = first_w + e
                w0, w1 = window(ow, W, OW, KW, SW, PW, LW, ADAPTIVE)
                inside = in_h & (ow < OW) & (s >= w0) & (s < w1) & ((s - w0) % LW == 0)
                out = (((p * OD + od) * OH + oh) * OW + ow) * C + c
                g = tl.load(dy + out, mask=inside, other=0.0).to(acc_t)
                if IS_MAX:
                    kept = tl.load(index + out, mask=inside, other=0).to(tl.int64)
                    mine = position
                    if KEEP == 1:
                        mine = (((z - d0) // LD) * KH + (r - h0) // LH) * KW + (s - w0) // LW
                    total_dx += tl.where(inside & (kept == mine), g, 0.0)
                elif OVERRIDE:
                    total_dx += g / divisor
                else:
                    n = counted(od, D, OD, KD, SD, PD, INCLUDE, ADAPTIVE, LD)
                    n *= counted(oh, H, OH, KH, SH, PH, INCLUDE, ADAPTIVE, LH)
                    n *= counted(ow, W, OW, KW, SW, PW, INCLUDE, ADAPTIVE, LW)
                    total_dx += g / tl.where(inside, n, 1).to(acc_t)
    tl.store(dx + i, total_dx.to(dx.dtype.element_ty), mask=live)


def _dimensions(size: list[int], window: list[int]) -> tuple[list[int], list[int], bool]:
    """Arguments (size, out, kernel, stride, padding, dilation) of D, H and W; windows that reach one position."""
    adaptive = bool(window[0])
    arguments, reach = [], []
    for k in range(3):
        out, kernel, stride, padding, dilation = window[1 + 5 * k : 6 + 5 * k]
        extent = size[1 + k]
        if adaptive:
            kernel = min(extent // out + (extent % out > 0) + 1, extent)
            reach.append(out // extent + 2)
        else:
            reach.append((kernel - 1) * dilation // stride + 1)
        arguments += [extent, out, kernel, stride, padding, dilation]
    return arguments, reach, adaptive


def _outputs(window: list[int]) -> list[int]:
    return [window[1], window[6], window[11]]


def max_pool_fwd(x: torch.Tensor, window: list[int], keep: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = [x.shape[0], *_outputs(window), x.shape[4]]
    y = x.new_empty(shape)
    index = x.new_empty([0] if keep == NOTHING else shape, dtype=torch.int64 if keep == POSITIONS else torch.uint8)
    arguments, _, adaptive = _dimensions(list(x.shape), window)
    if y.numel():
        pool_fwd_kernel[(cdiv(y.numel(), BLOCK),)](
            x, y, index, y.numel(), shape[4], *arguments, 1,
            IS_MAX=True, KEEP=keep, INCLUDE=False, OVERRIDE=False, ADAPTIVE=adaptive, BLOCK=BLOCK,
        )  # fmt: skip
    return y, index


def max_pool_bwd(dy: torch.Tensor, index: torch.Tensor, size: list[int], window: list[int]) -> torch.Tensor:
    dx = dy.new_empty(size)
    arguments, reach, adaptive = _dimensions(size, window)
    keep = TAPS if index.dtype == torch.uint8 else POSITIONS
    if dx.numel():
        pool_bwd_kernel[(cdiv(dx.numel(), BLOCK),)](
            dy, index, dx, dx.numel(), size[4], *arguments, 1, *reach,
            IS_MAX=True, KEEP=keep, INCLUDE=False, OVERRIDE=False, ADAPTIVE=adaptive, BLOCK=BLOCK,
        )  # fmt: skip
    return dx


def avg_pool_fwd(x: torch.Tensor, window: list[int], include_padding: bool, divisor: int) -> torch.Tensor:
    shape = [x.shape[0], *_outputs(window), x.shape[4]]
    y = x.new_empty(shape)
    arguments, _, adaptive = _dimensions(list(x.shape), window)
    if y.numel():
        pool_fwd_kernel[(cdiv(y.numel(), BLOCK),)](
            x, y, y, y.numel(), shape[4], *arguments, divisor,
            IS_MAX=False, KEEP=NOTHING, INCLUDE=include_padding, OVERRIDE=divisor != 0, ADAPTIVE=adaptive, BLOCK=BLOCK,
        )  # fmt: skip
    return y


def avg_pool_bwd(
    dy: torch.Tensor, size: list[int], window: list[int], include_padding: bool, divisor: int
) -> torch.Tensor:
    dx = dy.new_empty(size)
    arguments, reach, adaptive = _dimensions(size, window)
    if dx.numel():
        pool_bwd_kernel[(cdiv(dx.numel(), BLOCK),)](
            dy, dy, dx, dx.numel(), size[4], *arguments, divisor, *reach,
            IS_MAX=False, KEEP=NOTHING, INCLUDE=include_padding, OVERRIDE=divisor != 0, ADAPTIVE=adaptive, BLOCK=BLOCK,
        )  # fmt: skip
    return dx


def specimens() -> list[Specimen]:
    """What tests/triton_compile.py compiles: maximum and average, by type of x; not measured, some spill 8 bytes."""
    names = [a + k for k in "DHW" for a in ("", "O", "K", "S", "P", "L")]
    found = []
    for t in ("fp32", "bf16", "fp64"):
        for is_max in (True, False):
            for adaptive in (False, True):
                sizes = dict.fromkeys(("total", "C", *names, "divisor"), "i32")
                i = "*u8" if is_max else f"*{t}"
                constants = {
                    "IS_MAX": is_max, "KEEP": int(is_max), "INCLUDE": True, "OVERRIDE": False, "ADAPTIVE": adaptive,
                    "BLOCK": BLOCK,
                }  # fmt: skip
                forward = {"x": f"*{t}", "y": f"*{t}", "index": i} | sizes
                backward = {"dy": f"*{t}", "dx": f"*{t}", "index": i} | sizes | dict.fromkeys(("RD", "RH", "RW"), "i32")
                found.append(Specimen(pool_fwd_kernel, forward, constants, 4, hot=False))
                found.append(Specimen(pool_bwd_kernel, backward, constants, 4, hot=False))
    return found
