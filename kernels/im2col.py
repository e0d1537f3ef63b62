"""im2col · Triton
  col[n, (c,r,s), (p,q)] = x[n, c, p*stride - padding + r*dilation, q*stride - padding + s*dilation]   (0 outside)
  col2im is its transpose: dx[n,c,h,w] = sum of the col elements that were copied from x[n,c,h,w]
layout   x: [N, C, H, W] · col: [N, C*R*S, P*Q]
mapping  a block of outputs (input positions for col2im) of one plane (n, c) per program; loops over the R*S taps
memory   col once, x once from DRAM
numerics col2im sums in fp32 (fp64 for fp64), taps in order: no atomics
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._toolbox import Specimen, cdiv

BLOCK = 512


@triton.jit
def im2col_kernel(
    x, col, BLOCKS, H, W, P, Q, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DIL_H, DIL_W,
    TAPS_H: tl.constexpr, TAPS_W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of the outputs of one plane, all taps."""
    plane = (tl.program_id(0) // BLOCKS).to(tl.int64)
    at = (tl.program_id(0) % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    valid = at < P * Q
    p, q = at // Q, at % Q
    for tap in range(TAPS_H * TAPS_W):
        h = p * STRIDE_H - PAD_H + (tap // TAPS_W) * DIL_H
        w = q * STRIDE_W - PAD_W + (tap % TAPS_W) * DIL_W
        inside = valid & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        value = tl.load(x + plane * H * W + h.to(tl.int64) * W + w, mask=inside, other=0.0)
        tl.store(col + (plane * (TAPS_H * TAPS_W) + tap) * P * Q + at, value, mask=valid)


@triton.jit
def col2im_kernel(
    col, x, BLOCKS, H, W, P, Q, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DIL_H, DIL_W,
    TAPS_H: tl.constexpr, TAPS_W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of the positions of one plane of x gathers its taps."""
    acc_t: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    plane = (tl.program_id(0) // BLOCKS).to(tl.int64)
    at = (tl.program_id(0) % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    valid = at < H * W
    h, w = at // W, at % W
    total = tl.zeros((BLOCK,), acc_t)
    for tap in range(TAPS_H * TAPS_W):
        up = h + PAD_H - (tap // TAPS_W) * DIL_H
        left = w + PAD_W - (tap % TAPS_W) * DIL_W
        p, q = up // STRIDE_H, left // STRIDE_W
        inside = valid & (up >= 0) & (left >= 0) & (p * STRIDE_H == up) & (q * STRIDE_W == left) & (p < P) & (q < Q)
        base = col + (plane * (TAPS_H * TAPS_W) + tap) * P * Q
        total += tl.load(base + p.to(tl.int64) * Q + q, mask=inside, other=0.0).to(acc_t)
    tl.store(x + plane * H * W + at, total.to(x.dtype.element_ty), mask=valid)


def _count(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _run(kernel, source, target, x, planes, positions, geometry) -> torch.Tensor:
    taps, stride, padding, dilation = geometry
    h, w = x.shape[2:]
    p, q = (_count(*a) for a in zip((h, w), *geometry))
    blocks = cdiv(positions(p, q), BLOCK)
    if planes * blocks:
        kernel[(planes * blocks,)](
            source, target, blocks, h, w, p, q, *stride, *padding, *dilation,
            TAPS_H=taps[0], TAPS_W=taps[1], BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return target


def im2col(x: torch.Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]):
    n, c, h, w = x.shape
    p, q = (_count(*a) for a in zip((h, w), kernel, stride, padding, dilation))
    col = x.new_empty(n, c * kernel[0] * kernel[1], p * q)
    return _run(im2col_kernel, x, col, x, n * c, lambda p, q: p * q, (kernel, stride, padding, dilation))


def col2im(
    col: torch.Tensor, size: list[int], kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> torch.Tensor:
    n, c = col.shape[0], col.shape[1] // (kernel[0] * kernel[1])
    x = col.new_empty(n, c, *size)
    return _run(col2im_kernel, col, x, x, n * c, lambda p, q: size[0] * size[1], (kernel, stride, padding, dilation))


def specimens() -> list[Specimen]:
    """What tests/triton_compile.py compiles: both kernels, by type of x."""
    names = ("BLOCKS", "H", "W", "P", "Q", "STRIDE_H", "STRIDE_W", "PAD_H", "PAD_W", "DIL_H", "DIL_W")
    constants = {"TAPS_H": 3, "TAPS_W": 3, "BLOCK": BLOCK}
    return [
        Specimen(kernel, {"x": f"*{t}", "col": f"*{t}"} | dict.fromkeys(names, "i32"), constants, 4)
        for t in ("fp32", "bf16", "fp64")
        for kernel in (im2col_kernel, col2im_kernel)
    ]
