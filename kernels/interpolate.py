"""interpolate · Triton
  y[n,o0,o1,o2,k] = sum of w0(o0,i0) w1(o1,i1) w2(o2,i2) x[n,i0,i1,i2,k];  dx by the transposed tables of weights
layout   x: [N, A0, A1, A2, K] · y: [N, B0, B1, B2, K]; of each axis first, count: [B] and weight: [B, TAPS]
mapping  a program takes BLOCK elements of the result and gathers its inputs: no atomics
memory   x from the caches where outputs share it, y written once; the tables are kept from call to call
numerics weights computed in fp64; sums in fp32 (fp64 for fp64), in the order of the inputs
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from ._toolbox import Specimen, accumulate_dtype, cdiv

BLOCK = 256
NEAREST, NEAREST_EXACT, LINEAR, CUBIC, AREA, LINEAR_ANTIALIAS, CUBIC_ANTIALIAS = range(7)


@triton.jit
def interpolate_kernel(
    x, y, total, K, A0, A1, A2, B0, B1, B2,
    first0, count0, weight0, first1, count1, weight1, first2, count2, weight2,
    TAPS0, TAPS1, TAPS2, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of y; x and y may change places: the transpose has tables of the same form."""
    acc_t: tl.constexpr = tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = e < total
    k, o2, o1 = e % K, e // K % B2, e // (K * B2) % B1
    o0, n = e // (K * B2 * B1) % B0, e // (K * B2 * B1 * B0)
    i0, n0 = tl.load(first0 + o0, mask=live, other=0), tl.load(count0 + o0, mask=live, other=0)
    i1, n1 = tl.load(first1 + o1, mask=live, other=0), tl.load(count1 + o1, mask=live, other=0)
    i2, n2 = tl.load(first2 + o2, mask=live, other=0), tl.load(count2 + o2, mask=live, other=0)
    result = tl.zeros((BLOCK,), acc_t)
    for j0 in range(TAPS0):
        w0 = tl.load(weight0 + o0 * TAPS0 + j0, mask=live, other=0.0)
        for j1 in range(TAPS1):
            w1 = tl.load(weight1 + o1 * TAPS1 + j1, mask=live, other=0.0) * w0
            row = ((n * A0 + i0 + j0) * A1 + i1 + j1) * A2 + i2
            for j2 in range(TAPS2):
                inside = live & (j0 < n0) & (j1 < n1) & (j2 < n2)
                w = tl.load(weight2 + o2 * TAPS2 + j2, mask=live, other=0.0) * w1
                v = tl.load(x + (row + j2) * K + k, mask=inside, other=0.0).to(acc_t)
                result += w * v
    tl.store(y + e, result.to(y.dtype.element_ty), mask=live)


def _cubic(d: torch.Tensor, a: float) -> torch.Tensor:
    d = d.abs()
    near, far = ((a + 2) * d - (a + 3)) * d * d + 1, ((d - 5) * d + 8) * d * a - 4 * a
    return torch.where(d < 1, near, torch.where(d < 2, far, 0.0))


def _taps(mode: int, align: bool, size: int, out: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [out, TAPS], which never fall, and weights, of each output."""
    whole = torch.arange(out)
    o = whole.double()
    if mode in (NEAREST, NEAREST_EXACT):
        single = torch.float32
        step = torch.tensor(1 / scale, dtype=single) if scale > 0 else torch.tensor(float(size)).div(out).to(single)
        at = (o.float() * step) if mode == NEAREST else ((o + 0.5) * step.double()).float()
        source = at.floor().long().clamp(max=size - 1)
        return source[:, None], torch.ones(out, 1, dtype=torch.float64)
    if mode == AREA:
        first, end = whole * size // out, ((whole + 1) * size + out - 1) // out
        i = first[:, None] + torch.arange(int((end - first).max()))
        weight = (i < end[:, None]).double() / (end - first)[:, None]
        return torch.minimum(i, end[:, None] - 1), weight
    step = (size - 1) / (out - 1) if align and out > 1 else 0.0 if align else 1 / scale if scale > 0 else size / out
    if mode in (LINEAR_ANTIALIAS, CUBIC_ANTIALIAS):
        wide = max(step, 1.0)
        center, reach = step * (o + 0.5), wide * (2 if mode == CUBIC_ANTIALIAS else 1)
        first = (center - reach + 0.5).long().clamp(0, size - 1)
        last = torch.maximum((center + reach + 0.5).long() - 1, first).clamp(max=size - 1)
        i = first[:, None] + torch.arange(int((last - first).max()) + 1)
        d = (i - center[:, None] + 0.5) / wide
        weight = _cubic(d, -0.5) if mode == CUBIC_ANTIALIAS else (1 - d.abs()).clamp(min=0)
        weight = torch.where(i <= last[:, None], weight, 0.0)
        return torch.minimum(i, last[:, None]), weight / weight.sum(1, keepdim=True)
    at = step * o if align else step * (o + 0.5) - 0.5
    if mode == LINEAR and size == out:
        return whole[:, None], torch.ones(out, 1, dtype=torch.float64)
    low = at.floor()
    t, shift = (at - low)[:, None], torch.arange(2) if mode == LINEAR else torch.arange(-1, 3)
    weight = torch.cat([1 - t, t], 1) if mode == LINEAR else _cubic(t - shift, -0.75)
    return (low.long()[:, None] + shift).clamp(0, size - 1), weight


@lru_cache(maxsize=256)
def _table(
    mode: int, align: bool, size: int, out: int, scale: float, transpose: bool, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """first [B], count [B], weight [B, TAPS] of one axis, of the transpose by its inputs."""
    inputs, taps = _taps(mode, align, size, out, scale)
    first, count = inputs[:, 0].contiguous(), inputs[:, -1] - inputs[:, 0] + 1
    weight = torch.zeros(out, int(count.max()), dtype=torch.float64).scatter_add_(1, inputs - first[:, None], taps)
    if transpose:
        i = torch.arange(size)
        begin = torch.searchsorted(first + count - 1, i)
        count_of = torch.searchsorted(first, i, right=True) - begin
        o = (begin[:, None] + torch.arange(max(int(count_of.max()), 1))).clamp(max=out - 1)
        column = (i[:, None] - first[o]).clamp(0, weight.shape[1] - 1)
        first, count, weight = begin, count_of, weight[o, column]
    return first.int().to(device), count.int().to(device), weight.to(dtype).contiguous().to(device)


def _run(x: torch.Tensor, size: list[int], mode: int, align: bool, scales: tuple[float, ...], transpose: bool):
    y = x.new_empty(x.shape[0], *size, x.shape[4])
    if y.numel() == 0:
        return y
    dtype = accumulate_dtype(x.dtype)
    tables = []
    for here, there, scale in zip(x.shape[1:4], size, scales):
        a, b = (there, here) if transpose else (here, there)
        tables.append(_table(mode, align, a, b, scale, transpose, dtype, x.device))
    interpolate_kernel[(cdiv(y.numel(), BLOCK),)](
        x, y, y.numel(), x.shape[4], *x.shape[1:4], *size, *(t for table in tables for t in table),
        *(table[2].shape[1] for table in tables), BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return y


def interpolate_fwd(
    x: torch.Tensor, size: list[int], mode: int, align: bool, scale_d: float, scale_h: float, scale_w: float
) -> torch.Tensor:
    return _run(x, size, mode, align, (scale_d, scale_h, scale_w), False)


def interpolate_bwd(
    dy: torch.Tensor, size: list[int], mode: int, align: bool, scale_d: float, scale_h: float, scale_w: float
) -> torch.Tensor:
    return _run(dy, size, mode, align, (scale_d, scale_h, scale_w), True)


def specimens() -> list[Specimen]:
    """What tests/triton_compile.py compiles: the kernel, by type of x."""
    numbers = dict.fromkeys(("total", "K", "A0", "A1", "A2", "B0", "B1", "B2", "TAPS0", "TAPS1", "TAPS2"), "i32")
    found = []
    for t, acc in (("fp32", "fp32"), ("bf16", "fp32"), ("fp16", "fp32"), ("fp64", "fp64"), ("u8", "fp32")):
        tables = {}
        for axis in range(3):
            tables |= {f"first{axis}": "*i32", f"count{axis}": "*i32", f"weight{axis}": f"*{acc}"}
        signature = {"x": f"*{t}", "y": f"*{t}"} | numbers | tables
        order = interpolate_kernel.arg_names
        signature = {name: signature[name] for name in order if name in signature}
        found.append(Specimen(interpolate_kernel, signature, {"BLOCK": BLOCK}, 4))
    return found
