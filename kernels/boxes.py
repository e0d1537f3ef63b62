"""boxes · Triton
  y[b,n,m] = overlap(boxes1[b,n], boxes2[b,m])     IoU, generalised, distance or complete
layout   boxes1: [B, N, 4] · boxes2: [B, M, 4] as (x1, y1, x2, y2) · y, dy: [B, N, M] in the type of sums
mapping  forward: a tile of pairs per program; backward: a strip of one side per program, a loop over the other
memory   forward writes y once; backward reads dy twice
numerics fp32 (fp64 for fp64); at ties of max and min both sides get half the gradient; sums in a fixed order
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._toolbox import Specimen, accumulate_dtype, cdiv

IOU, GENERALIZED, DISTANCE, COMPLETE = range(4)


@triton.jit
def _atan(v):
    """atan by halving the angle twice: |t| < 0.2, where the series to t^25 is exact in fp64."""
    inverted = tl.abs(v) > 1.0
    t = tl.where(inverted, 1.0 / v, v)
    t = t / (1.0 + tl.sqrt(1.0 + t * t))
    t = t / (1.0 + tl.sqrt(1.0 + t * t))
    q = t * t
    series = 1.0 / 17 - q * (1.0 / 19 - q * (1.0 / 21 - q * (1.0 / 23 - q * (1.0 / 25))))
    series = 1.0 / 9 - q * (1.0 / 11 - q * (1.0 / 13 - q * (1.0 / 15 - q * series)))
    a = 4.0 * t * (1.0 - q * (1.0 / 3 - q * (1.0 / 5 - q * (1.0 / 7 - q * series))))
    # built in v's own dtype: a bare constant would be fp32
    quarter_turn = tl.zeros_like(v) + 1.5707963267948966
    return tl.where(inverted, tl.where(v > 0, quarter_turn, -quarter_turn) - a, a)


@triton.jit
def _load(boxes, at, valid, acc_t: tl.constexpr):
    x1 = tl.load(boxes + at * 4, mask=valid, other=0.0).to(acc_t)
    y1 = tl.load(boxes + at * 4 + 1, mask=valid, other=0.0).to(acc_t)
    x2 = tl.load(boxes + at * 4 + 2, mask=valid, other=1.0).to(acc_t)
    y2 = tl.load(boxes + at * 4 + 3, mask=valid, other=1.0).to(acc_t)
    return x1, y1, x2, y2


@triton.jit
def _max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _min(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _share(a, b):
    return tl.where(a > b, 1.0, tl.where(a == b, 0.5, 0.0))


@triton.jit
def _positive(a):
    return tl.where(a < 0, 0.0, a)


@triton.jit
def box_overlap_fwd_kernel(
    boxes1, boxes2, y, N, M, EPS: tl.constexpr, KIND: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr
):
    acc_t: tl.constexpr = y.dtype.element_ty
    b = tl.program_id(2).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ax1, ay1, ax2, ay2 = _load(boxes1, (b * N + n)[:, None], (n < N)[:, None], acc_t)
    bx1, by1, bx2, by2 = _load(boxes2, (b * M + m)[None, :], (m < M)[None, :], acc_t)
    inter = _positive(_min(ax2, bx2) - _max(ax1, bx1)) * _positive(_min(ay2, by2) - _max(ay1, by1))
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - inter
    iou = inter / union
    out = iou
    if KIND > 0:
        cw = _positive(_max(ax2, bx2) - _min(ax1, bx1))
        ch = _positive(_max(ay2, by2) - _min(ay1, by1))
        if KIND == 1:
            out = iou - (cw * ch - union) / (cw * ch)
        else:
            dx = (ax1 + ax2 - bx1 - bx2) * 0.5
            dy = (ay1 + ay2 - by1 - by2) * 0.5
            out = iou - (dx * dx + dy * dy) / (cw * cw + ch * ch + EPS)
            if KIND == 3:
                turn = _atan((ax2 - ax1) / (ay2 - ay1)) - _atan((bx2 - bx1) / (by2 - by1))
                v = 0.40528473456935108578 * turn * turn
                out -= v / (1.0 - iou + v + EPS) * v
    valid = (n < N)[:, None] & (m < M)[None, :]
    tl.store(y + (b * N + n[:, None]) * M + m[None, :], out, mask=valid)


@triton.jit
def box_overlap_bwd_kernel(
    dy, boxes1, boxes2, d1, N, M, stride_n, stride_m,
    EPS: tl.constexpr, KIND: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Gradient of boxes1. The overlap is symmetric: with the sides and strides swapped it is that of boxes2."""
    acc_t: tl.constexpr = dy.dtype.element_ty
    b = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ax1, ay1, ax2, ay2 = _load(boxes1, (b * N + n)[:, None], (n < N)[:, None], acc_t)
    aw = ax2 - ax1
    ah = ay2 - ay1
    g1 = tl.zeros((BLOCK_N, BLOCK_M), acc_t)
    g2 = tl.zeros((BLOCK_N, BLOCK_M), acc_t)
    g3 = tl.zeros((BLOCK_N, BLOCK_M), acc_t)
    g4 = tl.zeros((BLOCK_N, BLOCK_M), acc_t)
    for k in range(0, M, BLOCK_M):
        m = k + tl.arange(0, BLOCK_M)
        valid = (n < N)[:, None] & (m < M)[None, :]
        bx1, by1, bx2, by2 = _load(boxes2, (b * M + m)[None, :], (m < M)[None, :], acc_t)
        at = b * N * M + n[:, None].to(tl.int64) * stride_n + m[None, :].to(tl.int64) * stride_m
        g = tl.load(dy + at, mask=valid, other=0.0)
        iw0 = _min(ax2, bx2) - _max(ax1, bx1)
        ih0 = _min(ay2, by2) - _max(ay1, by1)
        iw = _positive(iw0)
        ih = _positive(ih0)
        inter = iw * ih
        union = aw * ah + (bx2 - bx1) * (by2 - by1) - inter
        cw0 = _max(ax2, bx2) - _min(ax1, bx1)
        ch0 = _max(ay2, by2) - _min(ay1, by1)
        cw = _positive(cw0)
        ch = _positive(ch0)
        gu = -g * inter / (union * union)
        gcw = tl.zeros_like(g)
        gch = tl.zeros_like(g)
        gx = tl.zeros_like(g)
        gy = tl.zeros_like(g)
        if KIND == 1:
            area = cw * ch
            gu += g / area
            gcw = -g * union / (area * area) * ch
            gch = -g * union / (area * area) * cw
        gaw = gu * ah
        gah = gu * aw
        if KIND >= 2:
            dx = (ax1 + ax2 - bx1 - bx2) * 0.5
            dc = (ay1 + ay2 - by1 - by2) * 0.5
            diagonal = cw * cw + ch * ch + EPS
            far = (dx * dx + dc * dc) / (diagonal * diagonal)
            gcw = 2.0 * cw * g * far
            gch = 2.0 * ch * g * far
            gx = -g / diagonal * dx
            gy = -g / diagonal * dc
        if KIND == 3:
            turn = _atan(aw / ah) - _atan((bx2 - bx1) / (by2 - by1))
            v = 0.40528473456935108578 * turn * turn
            alpha = v / (1.0 - inter / union + v + EPS)
            r = -g * alpha * (2 * 0.40528473456935108578) * turn / (aw * aw + ah * ah)
            gaw += r * ah
            gah -= r * aw
        gi = g / union - gu
        giw = tl.where(iw0 >= 0, gi * ih, 0.0)
        gih = tl.where(ih0 >= 0, gi * iw, 0.0)
        gcw = tl.where(cw0 >= 0, gcw, 0.0)
        gch = tl.where(ch0 >= 0, gch, 0.0)
        left = _share(ax1, bx1)
        top = _share(ay1, by1)
        right = _share(ax2, bx2)
        bottom = _share(ay2, by2)
        g1 += tl.where(valid, -giw * left - gcw * (1.0 - left) - gaw + gx, 0.0).to(acc_t)
        g2 += tl.where(valid, -gih * top - gch * (1.0 - top) - gah + gy, 0.0).to(acc_t)
        g3 += tl.where(valid, giw * (1.0 - right) + gcw * right + gaw + gx, 0.0).to(acc_t)
        g4 += tl.where(valid, gih * (1.0 - bottom) + gch * bottom + gah + gy, 0.0).to(acc_t)
    to = d1 + (b * N + n) * 4
    out_t: tl.constexpr = d1.dtype.element_ty
    tl.store(to, tl.sum(g1, 1).to(out_t), mask=n < N)
    tl.store(to + 1, tl.sum(g2, 1).to(out_t), mask=n < N)
    tl.store(to + 2, tl.sum(g3, 1).to(out_t), mask=n < N)
    tl.store(to + 3, tl.sum(g4, 1).to(out_t), mask=n < N)


def box_overlap_fwd(boxes1: torch.Tensor, boxes2: torch.Tensor, kind: int, eps: float) -> torch.Tensor:
    b, n, _ = boxes1.shape
    m = boxes2.shape[1]
    y = torch.empty((b, n, m), dtype=accumulate_dtype(boxes1.dtype), device=boxes1.device)
    if y.numel():
        grid = (cdiv(m, 128), cdiv(n, 16), b)
        box_overlap_fwd_kernel[grid](boxes1, boxes2, y, n, m, EPS=eps, KIND=kind, BLOCK_N=16, BLOCK_M=128, num_warps=4)
    return y


def box_overlap_bwd(
    dy: torch.Tensor, boxes1: torch.Tensor, boxes2: torch.Tensor, kind: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    b, n, _ = boxes1.shape
    m = boxes2.shape[1]
    d1, d2 = torch.empty_like(boxes1), torch.empty_like(boxes2)
    if b * n * m == 0:
        return d1.zero_(), d2.zero_()
    constants = {"EPS": eps, "KIND": kind, "BLOCK_N": 8, "BLOCK_M": 64, "num_warps": 4}
    box_overlap_bwd_kernel[(cdiv(n, 8), b)](dy, boxes1, boxes2, d1, n, m, m, 1, **constants)
    box_overlap_bwd_kernel[(cdiv(m, 8), b)](dy, boxes2, boxes1, d2, m, n, 1, m, **constants)
    return d1, d2


def specimens() -> list[Specimen]:
    """What tests/triton_compile.py compiles: every kernel and kind, by type of the boxes."""
    found = []
    for t, a in (("fp32", "fp32"), ("bf16", "fp32"), ("fp64", "fp64")):
        for kind in (IOU, GENERALIZED, COMPLETE):
            boxes = {"boxes1": f"*{t}", "boxes2": f"*{t}"}
            size = {"N": "i32", "M": "i32"}
            constants = {"EPS": 1e-7, "KIND": kind}
            forward = constants | {"BLOCK_N": 16, "BLOCK_M": 128}
            found.append(Specimen(box_overlap_fwd_kernel, boxes | {"y": f"*{a}"} | size, forward, 4, t != "fp64"))
            types = {"dy": f"*{a}"} | boxes | {"d1": f"*{t}"} | size | {"stride_n": "i32", "stride_m": "i32"}
            found.append(
                Specimen(box_overlap_bwd_kernel, types, constants | {"BLOCK_N": 8, "BLOCK_M": 64}, 4, t != "fp64")
            )
    return found
