"""histogram · Triton
  y[m,b] = sum over s of weight(x[m,s], b): 1 in the bin that holds x, or shared by distance between the two bins
           whose centres x lies between;  dx[m,s] = (dy[m,b+1] - dy[m,b]) / width between the centres of b and b + 1
layout   x: the M = N C rows of [N, C, S] or, channels_last, of [N, S, C] · edges: [B + 1] in fp32 (fp64) · y: [M, B],
         int64 where whole
mapping  a program takes a chunk of a row and BINS bins, VALUES by BINS at a time; a second kernel adds the chunks
memory   x once for every BINS bins, B counts a chunk
numerics whole counts are exact, shares are summed in fp32 by chunk and in fp64 over chunks; no atomics, a fixed order
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._toolbox import SPECIMEN_TYPES, Specimen, cdiv

CHUNK, VALUES, BINS, BLOCK = 8192, 128, 64, 1024


@triton.jit
def _place(x, edges, B, SOFT: tl.constexpr):
    """The bin that x counts in, -1 for none, and for how much; 1 - share counts in the next."""
    low, high = tl.load(edges), tl.load(edges + B)
    inside = (x >= low) & (x <= high)
    at = tl.where(inside, (x - low) / (high - low) * B, 0.0)
    if SOFT:
        at -= 0.5
        b = tl.minimum(tl.maximum(tl.floor(at), 0.0), B - 1.0)
        share = tl.where((at > 0) & (at < B - 1.0), 1 - (at - b), 1.0)
        b = b.to(tl.int32)
    else:
        b = tl.minimum(at.to(tl.int32), B - 1)
        # the quotient is rounded, the edges decide
        b -= (x < tl.load(edges + b)).to(tl.int32)
        b = tl.maximum(b, 0)
        b += ((b + 1 < B) & (x >= tl.load(edges + b + 1))).to(tl.int32)
        share = at * 0 + 1
    return tl.where(inside, b, -1), share


@triton.jit
def histogram_kernel(
    x, edges, part, S, C, B, CHUNKS, LAST: tl.constexpr, SOFT: tl.constexpr, CHUNK: tl.constexpr, VALUES: tl.constexpr,
    BINS: tl.constexpr,
):  # fmt: skip
    acc_t: tl.constexpr = part.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    m, first = row // CHUNKS, row % CHUNKS * CHUNK
    bins = tl.program_id(1) * BINS + tl.arange(0, BINS)
    total = tl.zeros((BINS,), acc_t)
    for begin in range(first, tl.minimum(first + CHUNK, S), VALUES):
        s = begin + tl.arange(0, VALUES)
        if LAST:
            at = (m // C * S + s) * C + m % C
        else:
            at = m * S + s
        b, share = _place(tl.load(x + at, mask=s < S, other=float("nan")).to(acc_t), edges, B, SOFT)
        here, after = b[:, None] == bins[None, :], (b[:, None] >= 0) & (b[:, None] + 1 == bins[None, :])
        weight = tl.where(here, share[:, None], 0.0) + tl.where(after, 1 - share[:, None], 0.0)
        total += tl.sum(weight, 0)
    tl.store(part + row * B + bins, total, mask=bins < B)


@triton.jit
def histogram_sum_kernel(part, y, B, CHUNKS, BINS: tl.constexpr):
    m = tl.program_id(0).to(tl.int64)
    bins = tl.program_id(1) * BINS + tl.arange(0, BINS)
    total = tl.zeros((BINS,), tl.float64)
    for j in range(CHUNKS):
        total += tl.load(part + (m * CHUNKS + j) * B + bins, mask=bins < B, other=0.0).to(tl.float64)
    if part.dtype.element_ty == tl.float32 and y.dtype.element_ty != tl.int64:
        tl.store(y + m * B + bins, total.to(tl.float32).to(y.dtype.element_ty), mask=bins < B)
    else:
        tl.store(y + m * B + bins, total.to(y.dtype.element_ty), mask=bins < B)


@triton.jit
def histogram_bwd_kernel(dy, x, edges, dx, S, C, B, TOTAL, LAST: tl.constexpr, BLOCK: tl.constexpr):
    acc_t: tl.constexpr = edges.dtype.element_ty
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b, share = _place(tl.load(x + e, mask=e < TOTAL, other=0.0).to(acc_t), edges, B, True)
    moves = (e < TOTAL) & (b >= 0) & (share < 1)
    if LAST:
        m = e // C // S * C + e % C
    else:
        m = e // S
    of = dy + m * B + b
    ahead = tl.load(of + 1, mask=moves, other=0.0).to(acc_t) - tl.load(of, mask=moves, other=0.0).to(acc_t)
    slope = ahead * (B / (tl.load(edges + B) - tl.load(edges)))
    tl.store(dx + e, slope.to(dx.dtype.element_ty), mask=e < TOTAL)


def histogram_fwd(x: torch.Tensor, edges: torch.Tensor, soft: bool, channels_last: bool) -> torch.Tensor:
    (n, *image), bins = x.shape, edges.shape[0] - 1
    s, c = image if channels_last else image[::-1]
    m, chunks = n * c, cdiv(s, CHUNK)
    y = x.new_empty(n, c, bins, dtype=x.dtype if soft else torch.int64)
    if x.numel() == 0:
        return y.zero_()
    part = edges.new_empty(m * chunks, bins)
    tiles = cdiv(bins, BINS)
    histogram_kernel[(m * chunks, tiles)](
        x, edges, part, s, c, bins, chunks, LAST=channels_last, SOFT=soft, CHUNK=CHUNK, VALUES=VALUES, BINS=BINS
    )
    histogram_sum_kernel[(m, tiles)](part, y, bins, chunks, BINS=BINS)
    return y


def histogram_bwd(dy: torch.Tensor, x: torch.Tensor, edges: torch.Tensor, channels_last: bool) -> torch.Tensor:
    s, c = x.shape[1:] if channels_last else reversed(x.shape[1:])
    dx = torch.empty_like(x)
    if x.numel():
        histogram_bwd_kernel[(cdiv(x.numel(), BLOCK),)](
            dy, x, edges, dx, s, c, edges.shape[0] - 1, x.numel(), LAST=channels_last, BLOCK=BLOCK
        )
    return dx


def specimens() -> list[Specimen]:
    """What tests/triton_compile.py compiles, by type of x."""
    found = []
    for t, a in SPECIMEN_TYPES:
        sizes = {"S": "i32", "C": "i32", "B": "i32"}
        for soft in (False, True):
            types = {"x": f"*{t}", "edges": f"*{a}", "part": f"*{a}", **sizes, "CHUNKS": "i32"}
            blocks = {"LAST": soft, "SOFT": soft, "CHUNK": CHUNK, "VALUES": VALUES, "BINS": BINS}
            found.append(Specimen(histogram_kernel, types, blocks, 4, hot=t != "fp64"))
            types = {"part": f"*{a}", "y": f"*{t}" if soft else "*i64", "B": "i32", "CHUNKS": "i32"}
            found.append(Specimen(histogram_sum_kernel, types, {"BINS": BINS}, 4))
        types = {"dy": f"*{t}", "x": f"*{t}", "edges": f"*{a}", "dx": f"*{t}", **sizes, "TOTAL": "i32"}
        found.append(Specimen(histogram_bwd_kernel, types, {"LAST": True, "BLOCK": BLOCK}, 4))
    return found
