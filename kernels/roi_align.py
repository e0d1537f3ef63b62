"""roi_align · Triton
  y[r,c,p,q] = mean over the samples of bin (p, q) of RoI r, bilinear in x[n_r, c]
layout   x_l: [N, C, H_l, W_l] or, channels_last, [N, H_l, W_l, C] · y likewise over (P, Q) · rois: [R, 5] in pixels of
         its level · levels: [R] or none
position sensitive: bin (p, q) of channel c reads plane (c P + p) Q + q
mapping  forward: a program per bin and block of channels. Backward: a program per row of pixels and block of channels,
         which meets the RoIs in order and gathers; no atomics. A launch per level passes over the RoIs of others
memory   backward: dx is written once
numerics fp32 (fp64 for fp64)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._toolbox import Specimen, accumulate_dtype, cdiv, power_of_two

LEVELS = 5


@triton.jit
def _axis(roi, at: tl.constexpr, bins, sampling_ratio, ALIGNED: tl.constexpr):
    """Start of the RoI along an axis, size of a bin, samples per bin; no samples where it is not finite."""
    start = tl.load(roi + at)
    stop = tl.load(roi + at + 2)
    if ALIGNED:
        start -= 0.5
        stop -= 0.5
    length = stop - start
    finite = (length - length == 0) & (start - start == 0)
    if not ALIGNED:
        length = tl.where(length > 1.0, length, 1.0).to(start.dtype)
    bin_size = length / bins
    grid = sampling_ratio.to(tl.int64)
    if sampling_ratio <= 0:
        wanted = tl.where(bin_size < 1e9, bin_size, 1e9)
        grid = tl.ceil(tl.where(wanted > 0, wanted, 0.0)).to(tl.int64)
    return start, bin_size, tl.where(finite, grid, 0)


@triton.jit
def _range(start, bin_size, grid, low, high):
    """Samples of a bin that begins at start which may lie in [low, high]."""
    scale = grid / bin_size
    few = (grid < 8) | ~(bin_size > 0)
    a = tl.minimum(tl.maximum((low - start) * scale - 2.0, 0.0), grid)
    b = tl.minimum(tl.maximum((high - start) * scale + 2.0, 0.0), grid)
    return tl.where(few, 0, a.to(tl.int64)), tl.where(few, grid, b.to(tl.int64))


@triton.jit
def _neighbours(position, size):
    """(low, high, share of high, does the sample count)."""
    inside = tl.where(position > 0, position, 0.0).to(position.dtype)
    valid = (position >= -1.0) & (position <= size)
    inside = tl.where(valid, inside, 0.0).to(position.dtype)
    low = inside.to(tl.int64)
    share = inside - low
    last = low >= size - 1
    low = tl.where(last, size - 1, low)
    high = tl.where(last, size - 1, low + 1)
    return low, high, tl.where(last, 0.0, share).to(position.dtype), valid


@triton.jit
def roi_align_fwd_kernel(
    x, rois, levels, y, level, N, C, H, W, P, Q, sampling_ratio,
    x_n, x_c, x_h, x_w, y_r, y_c, y_p, y_q,
    ALIGNED: tl.constexpr, SENSITIVE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """C: channels of y."""
    acc_t: tl.constexpr = rois.dtype.element_ty
    unit = tl.program_id(0).to(tl.int64)
    r = unit // (P * Q)
    p = unit // Q % P
    q = unit % Q
    mine = True
    if levels is not None:
        mine = tl.load(levels + r) == level
    if mine:
        roi = rois + r * 5
        image = tl.load(roi).to(tl.int64)
        c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
        plane = c
        if SENSITIVE:
            plane = c * (P * Q) + unit % (P * Q)
        base = x + image * x_n + plane * x_c
        y_start, y_bin, y_grid = _axis(roi, 2, P, sampling_ratio, ALIGNED)
        x_start, x_bin, x_grid = _axis(roi, 1, Q, sampling_ratio, ALIGNED)
        y_start += p * y_bin
        x_start += q * x_bin
        i0, i1 = _range(y_start, y_bin, y_grid, -1.0, H)
        j0, j1 = _range(x_start, x_bin, x_grid, -1.0, W)
        total = tl.zeros((BLOCK_C,), acc_t)
        for i in range(i0, i1):
            row0, row1, ty, y_ok = _neighbours(y_start + (i + 0.5) * y_bin / y_grid, H)
            for j in range(j0, j1):
                column0, column1, tx, x_ok = _neighbours(x_start + (j + 0.5) * x_bin / x_grid, W)
                if y_ok & x_ok:
                    v00 = tl.load(base + row0 * x_h + column0 * x_w, mask=c < C, other=0.0).to(acc_t)
                    v01 = tl.load(base + row0 * x_h + column1 * x_w, mask=c < C, other=0.0).to(acc_t)
                    v10 = tl.load(base + row1 * x_h + column0 * x_w, mask=c < C, other=0.0).to(acc_t)
                    v11 = tl.load(base + row1 * x_h + column1 * x_w, mask=c < C, other=0.0).to(acc_t)
                    total += (1.0 - ty) * ((1.0 - tx) * v00 + tx * v01) + ty * ((1.0 - tx) * v10 + tx * v11)
        total = total / tl.maximum(y_grid * x_grid, 1)
        to = y + r * y_r + c * y_c + p * y_p + q * y_q
        tl.store(to, total.to(y.dtype.element_ty), mask=c < C)


@triton.jit
def _weight(start, bin_size, grid, pixel, size, low, high):
    """Weight of each pixel in the mean over a bin that begins at start; low, high bound the pixels."""
    total = tl.zeros_like(pixel).to(start.dtype)
    first, last = _range(start, bin_size, grid, low - 1.0, high + 1.0)
    for i in range(first, last):
        a, b, share, good = _neighbours(start + (i + 0.5) * bin_size / grid, size)
        if good:
            total += tl.where(pixel == a, 1.0 - share, 0.0).to(start.dtype)
            total += tl.where(pixel == b, share, 0.0).to(start.dtype)
    return total / tl.maximum(grid, 1)


@triton.jit
def roi_align_bwd_kernel(
    dy, rois, levels, dx, level, R, C, H, W, P, Q, sampling_ratio,
    x_n, x_c, x_h, x_w, y_r, y_c, y_p, y_q,
    ALIGNED: tl.constexpr, SENSITIVE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """C: channels of x."""
    acc_t: tl.constexpr = rois.dtype.element_ty
    n = tl.program_id(0).to(tl.int64) // H
    row = tl.program_id(0).to(tl.int64) % H
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    first = tl.program_id(2) * BLOCK_W
    column = first + tl.arange(0, BLOCK_W)
    channel = c
    if SENSITIVE:
        channel = c // (P * Q)
    total = tl.zeros((BLOCK_C, BLOCK_W), acc_t)
    for k in range(R):
        r = tl.cast(k, tl.int64)
        roi = rois + r * 5
        mine = tl.load(roi).to(tl.int64) == n
        if levels is not None:
            mine &= tl.load(levels + r) == level
        y_start, y_bin, y_grid = _axis(roi, 2, P, sampling_ratio, ALIGNED)
        reach = tl.abs(y_bin) * P + 1.0
        if mine & (row >= y_start - reach) & (row <= y_start + reach):
            x_start, x_bin, x_grid = _axis(roi, 1, Q, sampling_ratio, ALIGNED)
            line = tl.zeros((1,), tl.int64) + row
            for p in range(P):
                wy = _weight(y_start + p * y_bin, y_bin, y_grid, line, H, row, row)
                if tl.sum(wy, 0) != 0:
                    for q in range(Q):
                        wx = _weight(x_start + q * x_bin, x_bin, x_grid, column, W, first, first + BLOCK_W)
                        own = c < C
                        if SENSITIVE:
                            own &= c % (P * Q) == p * Q + q
                        d = tl.load(dy + r * y_r + channel * y_c + p * y_p + q * y_q, mask=own, other=0.0).to(acc_t)
                        total += d[:, None] * (wy * wx)[None, :]
    to = dx + n * x_n + row * x_h + c[:, None] * x_c + column[None, :] * x_w
    tl.store(to, total.to(dx.dtype.element_ty), mask=(c < C)[:, None] & (column < W)[None, :])


def _strides(t: torch.Tensor, channels_last: bool) -> tuple[int, ...]:
    """Strides of batch, channel, height, width."""
    s = t.stride()
    return (s[0], s[3], s[1], s[2]) if channels_last else (s[0], s[1], s[2], s[3])


def _sizes(t: torch.Tensor, channels_last: bool) -> tuple[int, int, int]:
    """C, H, W."""
    return (t.shape[3], t.shape[1], t.shape[2]) if channels_last else (t.shape[1], t.shape[2], t.shape[3])


def _guard(x: torch.Tensor, rois: torch.Tensor, levels: torch.Tensor | None, count: int) -> None:
    """What is no image or level must never become an address; without a wait on the GPU."""
    inside = ((rois[:, 0] >= 0) & (rois[:, 0] < x.shape[0])).all()
    torch._assert_async(inside, f"argument 'boxes': got an image index outside [0, {x.shape[0]})")
    if levels is not None:
        torch._assert_async(((levels >= 0) & (levels < count)).all(), "argument 'levels': got a level out of range")


def roi_align_fwd(
    x0: torch.Tensor, x1: torch.Tensor | None, x2: torch.Tensor | None, x3: torch.Tensor | None,
    x4: torch.Tensor | None, rois: torch.Tensor, levels: torch.Tensor | None,
    p: int, q: int, sampling_ratio: int, aligned: bool, channels_last: bool, position_sensitive: bool,
) -> torch.Tensor:  # fmt: skip
    maps = [x for x in (x0, x1, x2, x3, x4) if x is not None]
    r = rois.shape[0]
    c = _sizes(x0, channels_last)[0] // (p * q if position_sensitive else 1)
    y = x0.new_empty((r, p, q, c) if channels_last else (r, c, p, q))
    _guard(x0, rois, levels, len(maps))
    block = min(power_of_two(max(c, 1)), 256)
    for level, x in enumerate(maps if y.numel() else []):
        _, h, w = _sizes(x, channels_last)
        roi_align_fwd_kernel[(r * p * q, cdiv(c, block))](
            x, rois, levels, y, level, x.shape[0], c, h, w, p, q, sampling_ratio,
            *_strides(x, channels_last), *_strides(y, channels_last),
            ALIGNED=aligned, SENSITIVE=position_sensitive, BLOCK_C=block, num_warps=max(block // 128, 1),
        )  # fmt: skip
    return y


def roi_align_bwd(
    dy: torch.Tensor, x0: torch.Tensor, x1: torch.Tensor | None, x2: torch.Tensor | None, x3: torch.Tensor | None,
    x4: torch.Tensor | None, rois: torch.Tensor, levels: torch.Tensor | None,
    p: int, q: int, sampling_ratio: int, aligned: bool, channels_last: bool, position_sensitive: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    maps = [x for x in (x0, x1, x2, x3, x4) if x is not None]
    _guard(x0, rois, levels, len(maps))
    results = []
    for level, x in enumerate(maps):
        dx = torch.empty_like(x)
        results.append(dx)
        c, h, w = _sizes(x, channels_last)
        if dx.numel() == 0:
            continue
        block_c, block_w = min(power_of_two(c), 32), min(power_of_two(w), 32)
        roi_align_bwd_kernel[(x.shape[0] * h, cdiv(c, block_c), cdiv(w, block_w))](
            dy, rois, levels, dx, level, rois.shape[0], c, h, w, p, q, sampling_ratio,
            *_strides(dx, channels_last), *_strides(dy, channels_last),
            ALIGNED=aligned, SENSITIVE=position_sensitive, BLOCK_C=block_c, BLOCK_W=block_w, num_warps=4,
        )  # fmt: skip
    return (*results, *(x0.new_empty(0) for _ in range(LEVELS - len(maps))))


def specimens() -> list[Specimen]:
    """What tests/triton_compile.py compiles: both kernels, by type of x."""
    found = []
    sizes = dict.fromkeys(("level", "C", "H", "W", "P", "Q", "sampling_ratio"), "i32")
    strides = dict.fromkeys(("x_n", "x_c", "x_h", "x_w", "y_r", "y_c", "y_p", "y_q"), "i32")
    for t in ("fp32", "bf16", "fp64"):
        a = accumulate_dtype(torch.float64 if t == "fp64" else torch.float32)
        rois = {"rois": "*fp64" if a == torch.float64 else "*fp32", "levels": "*i64"}
        forward = {"x": f"*{t}", "y": f"*{t}", "N": "i32"} | rois | sizes | strides
        backward = {"dy": f"*{t}", "dx": f"*{t}", "R": "i32"} | rois | sizes | strides
        for sensitive in (False, True):
            constants = {"ALIGNED": True, "SENSITIVE": sensitive, "BLOCK_C": 256}
            found.append(Specimen(roi_align_fwd_kernel, forward, constants, 2, t != "fp64"))
            constants = {"ALIGNED": sensitive, "SENSITIVE": sensitive, "BLOCK_C": 32, "BLOCK_W": 32}
            found.append(Specimen(roi_align_bwd_kernel, backward, constants, 4, False))
    return found
