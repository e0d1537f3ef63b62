"""nms · Triton
  box j of a segment is kept when no kept box i < j of its segment overlaps it
layout   boxes: [N, 4] as (x1, y1, x2, y2), segments contiguous, the best score first · segments: [N] · keep: [N]
mapping  panels of 64 boxes in order: one program solves the panel by iterating to the fixed point, then later boxes
         meet the kept boxes of the panel only. The host waits for nothing
memory   one byte per box
numerics fp32 (fp64 for fp64), IEEE division, no fused multiply-add: every backend keeps the same boxes
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ._toolbox import Specimen, accumulate_dtype, cdiv

# As many pairs at a time as stay in registers.
PANEL = 64
COLUMNS = 32


@triton.jit
def _load(boxes, at, valid, acc_t: tl.constexpr):
    x1 = tl.load(boxes + at * 4, mask=valid, other=0.0).to(acc_t)
    y1 = tl.load(boxes + at * 4 + 1, mask=valid, other=0.0).to(acc_t)
    x2 = tl.load(boxes + at * 4 + 2, mask=valid, other=0.0).to(acc_t)
    y2 = tl.load(boxes + at * 4 + 3, mask=valid, other=0.0).to(acc_t)
    return x1, y1, x2, y2


@triton.jit
def _overlaps(boxes, segments, row, column, rows, columns, limit, SMALLER: tl.constexpr):
    """[i, j]: box row[i] and box column[j] share a segment and overlap by more than the threshold."""
    acc_t: tl.constexpr = limit.dtype.element_ty
    ax1, ay1, ax2, ay2 = _load(boxes, row[:, None], rows[:, None], acc_t)
    bx1, by1, bx2, by2 = _load(boxes, column[None, :], columns[None, :], acc_t)
    w = tl.where(ax2 < bx2, ax2, bx2) - tl.where(ax1 > bx1, ax1, bx1)
    h = tl.where(ay2 < by2, ay2, by2) - tl.where(ay1 > by1, ay1, by1)
    inter = tl.where(w > 0, w, 0.0) * tl.where(h > 0, h, 0.0)
    a = (ax2 - ax1) * (ay2 - ay1)
    b = (bx2 - bx1) * (by2 - by1)
    if SMALLER:
        whole = tl.where((a < b) | (a != a), a, b)
    else:
        whole = (a + b) - inter
    if acc_t == tl.float64:
        q = inter / whole
    else:
        q = tl.div_rn(inter, whole)
    found = (q > tl.load(limit)) & rows[:, None] & columns[None, :]
    if segments is not None:
        of_row = tl.load(segments + row, mask=rows, other=0)
        of_column = tl.load(segments + column, mask=columns, other=0)
        found &= of_row[:, None] == of_column[None, :]
    return found


@triton.jit(do_not_specialize=["first", "N"])
def nms_panel_kernel(boxes, segments, keep, limit, first, N, PANEL: tl.constexpr, SMALLER: tl.constexpr):
    """Decides the boxes [first, first + PANEL). keep holds 0 where an earlier panel removed a box."""
    local = tl.arange(0, PANEL)
    at = tl.cast(first, tl.int64) + local
    valid = at < N
    found = _overlaps(boxes, segments, at, at, valid, valid, limit, SMALLER) & (local[:, None] < local[None, :])
    marks = found.to(tl.int32)
    candidate = tl.load(keep + at, mask=valid, other=0).to(tl.int32)
    kept = candidate
    changed = 1
    while changed > 0:
        hit = tl.max(marks * kept[:, None], 0)
        better = candidate * (1 - hit)
        changed = tl.max((better != kept).to(tl.int32), 0)
        kept = better
    tl.store(keep + at, kept.to(tl.int8), mask=valid)


@triton.jit(do_not_specialize=["first", "N"])
def nms_apply_kernel(
    boxes, segments, keep, limit, first, N, PANEL: tl.constexpr, SMALLER: tl.constexpr, COLUMNS: tl.constexpr
):
    """Removes the boxes after the panel that a kept box of it overlaps."""
    row = tl.cast(first, tl.int64) + tl.arange(0, PANEL)
    column = tl.cast(first, tl.int64) + PANEL + COLUMNS * tl.program_id(0) + tl.arange(0, COLUMNS)
    columns = column < N
    found = _overlaps(boxes, segments, row, column, row < N, columns, limit, SMALLER)
    kept = tl.load(keep + row, mask=row < N, other=0).to(tl.int32)
    hit = tl.max(found.to(tl.int32) * kept[:, None], 0)
    tl.store(keep + column, tl.zeros((COLUMNS,), tl.int8), mask=columns & (hit > 0))


def nms_mask(boxes: torch.Tensor, segments: torch.Tensor | None, threshold: float, of_smaller: bool) -> torch.Tensor:
    n = boxes.shape[0]
    acc = accumulate_dtype(boxes.dtype)
    keep = torch.ones(n, dtype=torch.int8, device=boxes.device)
    limit = torch.full((1,), _floor_to(acc, threshold), dtype=acc, device=boxes.device)
    for first in range(0, n, PANEL):
        options = {"PANEL": PANEL, "SMALLER": of_smaller, "num_warps": 8, "enable_fp_fusion": False}
        nms_panel_kernel[(1,)](boxes, segments, keep, limit, first, n, **options)
        rest = n - first - PANEL
        if rest > 0:
            options["COLUMNS"] = COLUMNS
            nms_apply_kernel[(cdiv(rest, COLUMNS),)](boxes, segments, keep, limit, first, n, **options)
    return keep.bool()


def _floor_to(dtype: torch.dtype, threshold: float) -> float:
    """The largest value of dtype that is not above the threshold."""
    t = torch.tensor(threshold, dtype=dtype)
    if t.item() > threshold:
        t = torch.nextafter(t, torch.tensor(-math.inf, dtype=dtype))
    return t.item()


def specimens() -> list[Specimen]:
    """What tests/triton_compile.py compiles: every kernel with segments, without, and of the smaller box."""
    found = []
    for t, a in (("fp32", "fp32"), ("bf16", "fp32"), ("fp64", "fp64")):
        types = {"boxes": f"*{t}", "segments": "*i64", "keep": "*i8", "limit": f"*{a}", "first": "i32", "N": "i32"}
        for kernel, sizes in ((nms_panel_kernel, {}), (nms_apply_kernel, {"COLUMNS": COLUMNS})):
            for segments, smaller in (({}, False), ({"segments": None}, False), ({}, True)):
                constants = {"PANEL": PANEL, "SMALLER": smaller} | sizes | segments
                found.append(Specimen(kernel, types, constants, 8, t != "fp64"))
    return found
