"""attention · Triton
  o[i] = sum_j p[i,j] v[j],  p = softmax_j(score),  lse[i] = log sum_j exp(score[i,j])
  dv[j] = sum_i p do[i],  ds = p * (do[i].v[j] - delta[i]) * scale,  delta[i] = do[i].o[i] - dlse[i]
  dq[i] = sum_j ds k[j],  dk[j] = sum_i ds q[i];  score as in csrc/common/attention.h
layout   q: [B, H, L, D] · k: [B, H / G, S, D] · v: [B, H / G, S, E] · o: [B, H, L, E] · lse: [B, H, L], or packed
mapping  a program owns BLOCK_M rows of one side and walks over tiles of BLOCK_N rows of the other:
         queries for o and dq, keys for dk and dv (there everything is transposed); few queries: those of all heads that
         share a key head against a part of the keys, then a program per row merges the parts, in order
memory   lse and delta beyond inputs and outputs
numerics softmax and sums in fp32 (fp64 for fp64); no atomics: deterministic
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _random
from ._toolbox import Specimen, accumulate_dtype, cdiv, power_of_two

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
MINUS_INFINITY: tl.constexpr = tl.constexpr(float("-inf"))


@triton.jit
def tanh(x):
    """Series where 1 - exp(-2x) would cancel."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    z = x * x
    series = -1382.0 / 155925 + z * (21844.0 / 6081075)
    series = -17.0 / 315 + z * (62.0 / 2835 + z * series)
    near = x + x * z * (-1.0 / 3 + z * (2.0 / 15 + z * series))
    return tl.where(tl.abs(x) < 0.1, near, tl.where(x < 0, -far, far))


@triton.jit
def dot(a, b):
    """a @ b, in full precision for fp32 and fp64."""
    if a.dtype == tl.float64:
        product = tl.dot(a, b, input_precision="ieee", out_dtype=tl.float64)
    else:
        product = tl.dot(a, b, input_precision="ieee")
    return product


@triton.jit
def example(b, lengths, cu_q, cu_k, L, S):
    """First query row, first key row, number of queries and keys of example b."""
    q0, k0 = b * 0, b * 0
    rows, keys = q0 + L, k0 + S
    if cu_q is not None:
        q0, k0 = tl.load(cu_q + b), tl.load(cu_k + b)
        rows = tl.minimum(tl.load(cu_q + b + 1) - q0, rows)
        keys = tl.minimum(tl.load(cu_k + b + 1) - k0, keys)
    if lengths is not None:
        keys = tl.maximum(tl.minimum(tl.load(lengths + b), keys), 0)
    return q0, k0, rows, keys


@triton.jit
def load_rows(matrix, b, h, first, HEADS, ROWS, width, row, limit, BLOCK: tl.constexpr, PACKED: tl.constexpr):
    """Rows `row` of one head, zero beyond `limit` rows and `width` columns."""
    col = tl.arange(0, BLOCK)
    if PACKED:
        at = ((first + row.to(tl.int64)) * HEADS + h) * width
    else:
        at = ((b * HEADS + h) * ROWS + row.to(tl.int64)) * width
    valid = (row < limit)[:, None] & (col < width)[None, :]
    return tl.load(matrix + at[:, None] + col[None, :], mask=valid, other=0.0)


@triton.jit
def store_rows(matrix, tile, b, h, first, HEADS, ROWS, width, row, limit, BLOCK: tl.constexpr, PACKED: tl.constexpr):
    col = tl.arange(0, BLOCK)
    if PACKED:
        at = ((first + row.to(tl.int64)) * HEADS + h) * width
    else:
        at = ((b * HEADS + h) * ROWS + row.to(tl.int64)) * width
    valid = (row < limit)[:, None] & (col < width)[None, :]
    tl.store(matrix + at[:, None] + col[None, :], tile.to(matrix.dtype.element_ty), mask=valid)


@triton.jit
def statistic(b, h, first, H, ROWS, i, PACKED: tl.constexpr):
    """Where row i of a head is in lse [B, H, L] or [H, rows]."""
    if PACKED:
        at = h * ROWS + first + i
    else:
        at = (b * H + h) * ROWS + i
    return at


@triton.jit
def is_seen(i, j, rows, keys, shift, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    seen = (i < rows) & (j < keys)
    if LEFT >= 0:
        seen &= j >= i + shift - LEFT
    if RIGHT >= 0:
        seen &= j <= i + shift + RIGHT
    return seen


@triton.jit
def mask_of(mask, mask_examples, b, mask_b):
    """Where the mask of example b begins."""
    if mask is None:
        at = mask
    elif mask_examples is None:
        at = mask + b * mask_b
    else:
        at = mask + tl.load(mask_examples + b) * mask_b
    return at


@triton.jit
def score_of(
    product, i, j, seen, b, h, shift, mask, slopes, mask_h, mask_l, mask_s, slopes_b,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Scores from products q.k, -inf where unseen; and d score / d (scale * q.k). `mask` is that of the example."""
    s = product * SCALE
    slope = s * 0.0 + 1.0
    if SOFTCAP > 0:
        t = tanh(s / SOFTCAP)
        slope = 1.0 - t * t
        s = t * SOFTCAP
    if slopes is not None:
        s -= tl.load(slopes + b * slopes_b + h) * tl.abs(i + shift - j).to(s.dtype)
    if mask is not None:
        at = h * mask_h + i.to(tl.int64) * mask_l + j.to(tl.int64) * mask_s
        if mask.dtype.element_ty == tl.uint8:
            seen &= tl.load(mask + at, mask=seen, other=0) != 0
        else:
            s += tl.load(mask + at, mask=seen, other=0.0).to(s.dtype)
    return tl.where(seen, s, MINUS_INFINITY), slope


@triton.jit
def kept(state, threshold, b, h, i, j, H, L, S, acc_t: tl.constexpr, KEEP_SCALE: tl.constexpr):
    """Factor of each weight under dropout."""
    group = ((b * H + h) * L + i.to(tl.int64)) * ((S + 3) // 4) + j // 4
    w0, w1, w2, w3 = _random.words(state, group)
    word = j % 4 + i * 0
    drawn = tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))
    return _random.is_kept(drawn, threshold).to(acc_t) * KEEP_SCALE


@triton.jit
def mask_shows(mask, seen, i, j, h, mask_h, mask_l, mask_s):
    """Whether the mask of an example shows any of the scores that are `seen`: a vote of the program on a tile."""
    at = h * mask_h + i.to(tl.int64) * mask_l + j.to(tl.int64) * mask_s
    if mask.dtype.element_ty == tl.uint8:
        shown = tl.load(mask + at, mask=seen, other=0) != 0
    else:
        shown = tl.load(mask + at, mask=seen, other=MINUS_INFINITY) != MINUS_INFINITY
    return tl.max(tl.max(shown.to(tl.int32), 1), 0) != 0


@triton.jit
def attention_fwd_step(
    top, total, out, own, k, v, mask, slopes, state, seen, i, j, column, b, kh, heads, k0, keys, shift,
    H, G, L, S, rows_k, D, E, k_b, v_b, mask_h, mask_l, mask_s, slopes_b, threshold,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, KEEP_SCALE: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The online softmax through one tile of keys."""
    s = dot(own, tl.trans(load_rows(k, b * k_b, kh, k0, H // G, rows_k, D, column, keys, BLOCK_D, PACKED)))
    s, _ = score_of(s, i, j, seen, b, heads, shift, mask, slopes, mask_h, mask_l, mask_s, slopes_b, SCALE, SOFTCAP)
    if mask is None:
        s *= LOG2_E
    now = tl.maximum(top, tl.max(s, 1))
    base = tl.where(now == MINUS_INFINITY, 0.0, now)
    fall, rise = top - base, s - base[:, None]
    if mask is not None:  # a mask of 3e38 has no multiple
        fall, rise = fall * LOG2_E, rise * LOG2_E
    factor, p = tl.exp2(fall), tl.exp2(rise)
    total = total * factor + tl.sum(p, 1)
    if state is not None:
        p *= kept(state, threshold, b, heads, i, j, H, L, S, total.dtype, KEEP_SCALE)
    values = load_rows(v, b * v_b, kh, k0, H // G, rows_k, E, column, keys, BLOCK_E, PACKED)
    return now, total, out * factor[:, None] + dot(p.to(values.dtype), values)


@triton.jit
def attention_fwd_kernel(
    q, k, v, o, lse, total_of_part, mask, mask_examples, lengths, cu_q, cu_k, slopes, state,
    H, G, L, S, rows_q, rows_k, D, E, blocks, k_b, v_b, parts, mask_b, mask_h, mask_l, mask_s, slopes_b, threshold,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr,
    KEEP_SCALE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, DECODE: tl.constexpr,
):  # fmt: skip
    """One block of queries through all the keys it sees: online softmax. DECODE: one part of the keys; its sum over
    values to o [parts, B, H, L, E], the largest score to lse [parts, B, H, L], sums of exp(score - largest) to
    total_of_part. Not a log-sum-exp: beside a mask of 1e38 the logarithm would be lost, and so the size of the part."""
    acc_t: tl.constexpr = lse.dtype.element_ty
    PACKED: tl.constexpr = cu_q is not None
    pid = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    if DECODE:  # rows of a block: the queries of the first head, of the second, ...
        b, kh = pid // (blocks * parts) // (H // G), pid // (blocks * parts) % (H // G)
        part = pid % parts
        r = (pid // parts % blocks).to(tl.int32) * BLOCK_M + tl.arange(0, BLOCK_M)
        there = r < G * L
        row = tl.where(there, r % L, L)
        h = kh * G + tl.where(there, r // L, 0)
        heads = h[:, None]
        i0, span = 0, L
    else:
        b, h = pid // blocks // H, pid // blocks % H
        kh, heads = h // G, h
        i0, span = (pid % blocks).to(tl.int32) * BLOCK_M, BLOCK_M
        row = i0 + tl.arange(0, BLOCK_M)
    q0, k0, rows, keys = example(b, lengths, cu_q, cu_k, L, S)
    shift = keys - rows if BOTTOM_RIGHT else keys * 0
    bias = mask_of(mask, mask_examples, b, mask_b)
    i = row[:, None]
    own = load_rows(q, b, h, q0, H, rows_q, D, row, rows, BLOCK_D, PACKED)
    low, high = keys * 0, keys
    if LEFT >= 0:
        low = tl.maximum(i0 + shift - LEFT, 0) // BLOCK_N * BLOCK_N
    if RIGHT >= 0:
        high = tl.minimum(keys, i0 + (tl.minimum(rows, span) if DECODE else span) + shift + RIGHT)
    if DECODE:
        each = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), BLOCK_N), parts) * BLOCK_N
        low += part * each
        high = tl.minimum(high, low + each)
    top = tl.full((BLOCK_M,), MINUS_INFINITY, acc_t)
    total = tl.zeros((BLOCK_M,), acc_t)
    out = tl.zeros((BLOCK_M, BLOCK_E), acc_t)
    for j0 in range(low.to(tl.int32), high.to(tl.int32), BLOCK_N):
        column = j0 + tl.arange(0, BLOCK_N)
        j = column[None, :]
        seen = is_seen(i, j, rows, keys, shift, LEFT, RIGHT)
        if mask is None or mask_shows(bias, seen, i, j, heads, mask_h, mask_l, mask_s):
            top, total, out = attention_fwd_step(
                top, total, out, own, k, v, bias, slopes, state, seen, i, j, column, b, kh, heads, k0, keys, shift,
                H, G, L, S, rows_k, D, E, k_b, v_b, mask_h, mask_l, mask_s, slopes_b, threshold,
                SCALE, SOFTCAP, KEEP_SCALE, BLOCK_D, BLOCK_E, PACKED,
            )  # fmt: skip
    if mask is None:
        top *= LN_2
    if DECODE:
        batch = tl.num_programs(0) // (blocks * parts) // (H // G)
        store_rows(o, out, part * batch + b, h, 0, H, L, E, row, rows, BLOCK_E, False)
        at = statistic(part * batch + b, h, 0, H, L, row, False)
        tl.store(lse + at, top, mask=row < rows)
        tl.store(total_of_part + at, total, mask=row < rows)
    else:
        none = total == 0.0  # a score that is no number leaves no total either, but not 0
        safe = tl.where(none, 1.0, total)
        out = tl.where(none[:, None], 0.0, out / safe[:, None])
        result = tl.where(none, MINUS_INFINITY, top + tl.log2(safe) * LN_2)
        store_rows(o, out, b, h, q0, H, rows_q, E, row, rows, BLOCK_E, PACKED)
        tl.store(lse + statistic(b, h, q0, H, rows_q, row, PACKED), result, mask=row < rows)


@triton.jit
def attention_merge_kernel(part_o, part_top, part_total, o, lse, cu_q, H, L, rows_q, E, parts, BLOCK_E: tl.constexpr):
    """With w = exp(top_part - top): o = sum over parts of w o_part / total,  total = sum w total_part, of one row."""
    acc_t: tl.constexpr = lse.dtype.element_ty
    PACKED: tl.constexpr = cu_q is not None
    pid = tl.program_id(0).to(tl.int64)
    rows_of_part = tl.num_programs(0)
    b, h, i = pid // L // H, pid // L % H, (pid % L).to(tl.int32)
    q0, _, rows, _ = example(b, None, cu_q, cu_q, L, L)
    top = tl.full((), MINUS_INFINITY, acc_t)
    for part in range(parts):
        top = tl.maximum(top, tl.load(part_top + part * rows_of_part + pid))
    base = tl.where(top == MINUS_INFINITY, 0.0, top)
    column = tl.arange(0, BLOCK_E)
    total = tl.zeros((), acc_t)
    out = tl.zeros((BLOCK_E,), acc_t)
    for part in range(parts):
        at = part * rows_of_part + pid
        weight = tl.exp(tl.load(part_top + at) - base)
        total += weight * tl.load(part_total + at)
        out += weight * tl.load(part_o + at * E + column, mask=column < E, other=0.0)
    none = total == 0.0
    safe = tl.where(none, 1.0, total)
    row = i + tl.arange(0, 1)
    store_rows(o, (out / safe)[None, :], b, h, q0, H, rows_q, E, row, rows, BLOCK_E, PACKED)
    result = tl.where(none, MINUS_INFINITY, base + tl.log(safe))
    tl.store(lse + statistic(b, h, q0, H, rows_q, i, PACKED), result, mask=i < rows)


@triton.jit
def attention_delta_kernel(
    dy, o, dlse, delta, cu_q, H, L, rows_q, E, blocks, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr
):
    """delta[i] = do[i].o[i] - dlse[i]."""
    acc_t: tl.constexpr = delta.dtype.element_ty
    PACKED: tl.constexpr = cu_q is not None
    pid = tl.program_id(0).to(tl.int64)
    b, h, block = pid // blocks // H, pid // blocks % H, (pid % blocks).to(tl.int32)
    q0, _, rows, _ = example(b, None, cu_q, cu_q, L, L)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    d = load_rows(dy, b, h, q0, H, rows_q, E, row, rows, BLOCK_E, PACKED).to(acc_t)
    y = load_rows(o, b, h, q0, H, rows_q, E, row, rows, BLOCK_E, PACKED).to(acc_t)
    value = tl.sum(d * y, 1)
    at = statistic(b, h, q0, H, rows_q, row, PACKED)
    if dlse is not None:
        value -= tl.load(dlse + at, mask=row < rows, other=0.0)
    tl.store(delta + at, value, mask=row < rows)


@triton.jit
def attention_bwd_step(
    sum_first, sum_second, own_first, own_second, dy, q, k, v, delta, mask, slopes, state, seen, log_sum,
    i, j, at, other, b, h, kh, q0, k0, rows, keys, shift, H, G, L, S, rows_q, rows_k, D, E, k_b, v_b,
    mask_h, mask_l, mask_s, slopes_b, threshold,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, KEEP_SCALE: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, BY_QUERY: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """What one tile of the other side adds to the sums of the owned rows."""
    if BY_QUERY:
        first = load_rows(k, b * k_b, kh, k0, H // G, rows_k, D, other, keys, BLOCK_D, PACKED)
        second = load_rows(v, b * v_b, kh, k0, H // G, rows_k, E, other, keys, BLOCK_E, PACKED)
    else:
        first = load_rows(q, b, h, q0, H, rows_q, D, other, rows, BLOCK_D, PACKED)
        second = load_rows(dy, b, h, q0, H, rows_q, E, other, rows, BLOCK_E, PACKED)
    s, slope = score_of(
        dot(own_first, tl.trans(first)), i, j, seen, b, h, shift,
        mask, slopes, mask_h, mask_l, mask_s, slopes_b, SCALE, SOFTCAP,
    )  # fmt: skip
    p = tl.exp2((s - tl.where(log_sum == MINUS_INFINITY, 0.0, log_sum)) * LOG2_E)
    dp = dot(own_second, tl.trans(second))
    weight = p
    if state is not None:
        factor = kept(state, threshold, b, h, i, j, H, L, S, sum_first.dtype, KEEP_SCALE)
        dp *= factor
        weight = p * factor
    ds = p * (dp - tl.load(delta + at, mask=i < rows, other=0.0)) * slope * SCALE
    sum_first += dot(ds.to(first.dtype), first)
    if not BY_QUERY:
        sum_second += dot(weight.to(second.dtype), second)
    return sum_first, sum_second


@triton.jit
def attention_bwd_kernel(
    dy, q, k, v, lse, delta, dq, dk, dv, mask, mask_examples, lengths, cu_q, cu_k, slopes, state,
    H, G, L, S, rows_q, rows_k, D, E, blocks, k_b, v_b, mask_b, mask_h, mask_l, mask_s, slopes_b, threshold,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr,
    KEEP_SCALE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, BY_QUERY: tl.constexpr,
):  # fmt: skip
    """dq of a block of queries (BY_QUERY), or dk and dv of a block of keys, summed over the heads that share it."""
    acc_t: tl.constexpr = lse.dtype.element_ty
    PACKED: tl.constexpr = cu_q is not None
    pid = tl.program_id(0).to(tl.int64)
    heads = H if BY_QUERY else H // G
    b, head, block = pid // blocks // heads, pid // blocks % heads, (pid % blocks).to(tl.int32)
    q0, k0, rows, keys = example(b, lengths, cu_q, cu_k, L, S)
    shift = keys - rows if BOTTOM_RIGHT else keys * 0
    bias = mask_of(mask, mask_examples, b, mask_b)
    own0 = block * BLOCK_M
    own = own0 + tl.arange(0, BLOCK_M)
    low = keys * 0
    if BY_QUERY:
        high = keys
        if LEFT >= 0:
            low = tl.maximum(own0 + shift - LEFT, 0)
        if RIGHT >= 0:
            high = tl.minimum(keys, own0 + BLOCK_M + shift + RIGHT)
    else:
        high = rows
        if RIGHT >= 0:
            low = tl.maximum(own0 - shift - RIGHT, 0)
        if LEFT >= 0:
            high = tl.minimum(rows, own0 + BLOCK_M - shift + LEFT)
    sum_first = tl.zeros((BLOCK_M, BLOCK_D), acc_t)
    sum_second = tl.zeros((BLOCK_M, BLOCK_E), acc_t)
    for g in range(1 if BY_QUERY else G):
        h = head if BY_QUERY else head * G + g
        kh = h // G
        if BY_QUERY:
            own_first = load_rows(q, b, h, q0, H, rows_q, D, own, rows, BLOCK_D, PACKED)
            own_second = load_rows(dy, b, h, q0, H, rows_q, E, own, rows, BLOCK_E, PACKED)
        else:
            own_first = load_rows(k, b * k_b, kh, k0, H // G, rows_k, D, own, keys, BLOCK_D, PACKED)
            own_second = load_rows(v, b * v_b, kh, k0, H // G, rows_k, E, own, keys, BLOCK_E, PACKED)
        for other0 in range((low // BLOCK_N * BLOCK_N).to(tl.int32), high.to(tl.int32), BLOCK_N):
            other = other0 + tl.arange(0, BLOCK_N)
            if BY_QUERY:
                i, j = own[:, None], other[None, :]
            else:
                i, j = other[None, :], own[:, None]
            at = statistic(b, h, q0, H, rows_q, i, PACKED)
            log_sum = tl.load(lse + at, mask=i < rows, other=MINUS_INFINITY)
            seen = is_seen(i, j, rows, keys, shift, LEFT, RIGHT) & (log_sum != MINUS_INFINITY)
            if mask is None or mask_shows(bias, seen, i, j, h, mask_h, mask_l, mask_s):
                sum_first, sum_second = attention_bwd_step(
                    sum_first, sum_second, own_first, own_second, dy, q, k, v, delta, bias, slopes, state, seen,
                    log_sum, i, j, at, other, b, h, kh, q0, k0, rows, keys, shift, H, G, L, S, rows_q, rows_k, D, E,
                    k_b, v_b, mask_h, mask_l, mask_s, slopes_b, threshold,
                    SCALE, SOFTCAP, KEEP_SCALE, BLOCK_D, BLOCK_E, BY_QUERY, PACKED,
                )  # fmt: skip
    if BY_QUERY:
        store_rows(dq, sum_first, b, head, q0, H, rows_q, D, own, rows, BLOCK_D, PACKED)
    else:  # keys beyond a length are in memory and have gradient 0
        limit = keys if PACKED else keys * 0 + S
        store_rows(dk, sum_first, b, head, k0, H // G, rows_k, D, own, limit, BLOCK_D, PACKED)
        store_rows(dv, sum_second, b, head, k0, H // G, rows_k, E, own, limit, BLOCK_E, PACKED)


def tile(dtype: torch.dtype, width: int, backward: bool = False) -> tuple[int, int, int]:
    """Block sizes (BLOCK_M, BLOCK_N) and warps whose tiles fit shared memory, and registers but for a few."""
    if dtype == torch.float64:
        return 16, 16, 4
    if dtype == torch.float32:
        return (32, 16 if backward else 32, 8) if width <= 128 else (16, 16, 8)
    return 64, 64 if width <= 64 else 16 if backward else 32, 8


# Few queries: so many of them at most, and of the programs of one part at least twice as many as processors.
FEW = 16


def _processors(device: torch.device) -> int:
    """Triton's interpreter runs one program after the other; a few parts are enough there."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def parts_of(
    batch: int, heads: int, groups: int, queries: int, keys: int, dtype: torch.dtype, width: int, processors: int
) -> int:
    """How many parts few queries cut the keys into; 0 where that gains nothing."""
    programs = batch * heads // max(groups, 1) * cdiv(groups * queries, FEW)
    if queries > FEW or programs * keys == 0:
        return 0
    parts = min(cdiv(2 * processors, programs), cdiv(keys, tile(dtype, width)[1]))
    return parts if parts > 1 or groups > 1 else 0


class _Call:
    """Sizes, constants and mask of one call, as the kernels take them."""

    def __init__(
        self, backward, q, k, v, mask, cu_q, slopes, scale, softcap, left, right, bottom_right, dropout, max_q, max_k
    ):  # fmt: skip
        self.packed = cu_q is not None
        self.batch = len(cu_q) - 1 if self.packed else q.shape[0]
        self.heads, key_heads = q.shape[1], k.shape[1]
        rows = 0 if self.packed else 2
        self.groups = self.heads // max(key_heads, 1)
        self.queries, self.keys = max_q, max_k
        d, e = q.shape[-1], v.shape[-1]
        # examples that share their keys or values find them all at the first example's place
        self.own = tuple(int(self.packed or t.shape[0] == 1 or t.stride(0) != 0) for t in (k, v))
        self.mask = mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask
        strides = (0, 0, 0, 0) if mask is None else tuple(0 if n == 1 else s for n, s in zip(mask.shape, mask.stride()))
        self.sizes = (self.heads, self.groups, max_q, max_k, q.shape[rows], k.shape[rows], d, e)
        self.offsets = (*strides, self.heads if slopes is not None and slopes.dim() == 2 else 0)
        self.threshold = round(dropout * 2**31)
        self.tile = tile(q.dtype, max(d, e), backward)
        self.constants = {
            "SCALE": scale, "SOFTCAP": softcap, "LEFT": left, "RIGHT": right, "BOTTOM_RIGHT": bottom_right,
            "KEEP_SCALE": 1 / (1 - dropout) if dropout < 1 else 0.0,
            "BLOCK_M": self.tile[0], "BLOCK_N": self.tile[1],
            "BLOCK_D": max(power_of_two(d), 16), "BLOCK_E": max(power_of_two(e), 16),
            "num_warps": self.tile[2], "num_stages": 2,
        }  # fmt: skip


def attention_fwd(
    q, k, v, mask, mask_examples, lengths, cu_q, cu_k, slopes, random,
    scale, softcap, left, right, bottom_right, dropout, max_q, max_k,
):  # fmt: skip
    c = _Call(False, q, k, v, mask, cu_q, slopes, scale, softcap, left, right, bottom_right, dropout, max_q, max_k)
    o = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype, device=q.device)
    shape = (q.shape[1], q.shape[0]) if c.packed else q.shape[:-1]
    lse = torch.empty(shape, dtype=accumulate_dtype(q.dtype), device=q.device)
    width = max(q.shape[-1], v.shape[-1])
    parts = parts_of(c.batch, c.heads, c.groups, max_q, max_k, q.dtype, width, _processors(q.device))
    if parts:
        blocks, constants = (
            cdiv(c.groups * max_q, FEW),
            c.constants | {"BLOCK_M": FEW, "num_warps": 4, "DECODE": True},
        )
        programs = c.batch * c.heads // c.groups * blocks * parts
        to = tuple(
            torch.empty(parts, c.batch, c.heads, max_q, *e, dtype=lse.dtype, device=q.device)
            for e in ((v.shape[-1],), (), ())
        )
    else:
        blocks, constants = cdiv(max_q, c.tile[0]), c.constants | {"DECODE": False}
        programs, to = c.batch * c.heads * blocks, (o, lse, None)
    if programs:
        attention_fwd_kernel[(programs,)](
            q, k, v, *to, c.mask, mask_examples, lengths, cu_q, cu_k, slopes, random if dropout > 0 else None,
            *c.sizes, blocks, *c.own, parts, *c.offsets, c.threshold, **constants,
        )  # fmt: skip
    if parts:
        attention_merge_kernel[(c.batch * c.heads * max_q,)](
            *to, o, lse, cu_q, c.heads, max_q, c.sizes[4], c.sizes[7], parts, BLOCK_E=c.constants["BLOCK_E"]
        )
    return o, lse


def attention_bwd(
    dy, dlse, q, k, v, o, lse, mask, mask_examples, lengths, cu_q, cu_k, slopes, random,
    scale, softcap, left, right, bottom_right, dropout, max_q, max_k,
):  # fmt: skip
    c = _Call(True, q, k, v, mask, cu_q, slopes, scale, softcap, left, right, bottom_right, dropout, max_q, max_k)
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    delta = torch.empty_like(lse)
    m = c.tile[0]
    blocks, key_blocks = cdiv(max_q, m), cdiv(max_k, m)
    if c.batch * c.heads * blocks:
        attention_delta_kernel[(c.batch * c.heads * blocks,)](
            dy, o, dlse, delta, cu_q, c.heads, max_q, c.sizes[4], c.sizes[7], blocks,
            BLOCK_M=m, BLOCK_E=c.constants["BLOCK_E"],
        )  # fmt: skip
    for by_query, count in ((True, c.heads * blocks), (False, c.heads // c.groups * key_blocks)):
        if c.batch * count:
            attention_bwd_kernel[(c.batch * count,)](
                dy, q, k, v, lse, delta, dq, dk, dv, c.mask, mask_examples, lengths, cu_q, cu_k, slopes,
                random if dropout > 0 else None,
                *c.sizes, blocks if by_query else key_blocks, *c.own, *c.offsets, c.threshold,
                **c.constants, BY_QUERY=by_query,
            )  # fmt: skip
    return dq, dk, dv


def specimens() -> list[Specimen]:
    """What tests/triton_compile.py compiles: every kernel, by type and head size, plain and with everything."""
    found = []
    sizes = dict.fromkeys(("H", "G", "L", "S", "rows_q", "rows_k", "D", "E", "blocks", "k_b", "v_b"), "i32")
    offsets = dict.fromkeys(("mask_b", "mask_h", "mask_l", "mask_s", "slopes_b", "threshold"), "i32")
    for t, dtype, a, width in (("bf16", torch.bfloat16, "fp32", 128), ("fp32", torch.float32, "fp32", 64)):
        m, n, warps = tile(dtype, width)
        back = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_D", "BLOCK_E"), (*tile(dtype, width, True)[:2], width, width)))
        whole = {"divisible": ("D", "E")}
        tiles = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_D": width, "BLOCK_E": width}
        shape = {"SCALE": 0.125, "SOFTCAP": 0.0, "LEFT": -1, "RIGHT": 0, "BOTTOM_RIGHT": False, "KEEP_SCALE": 1.0}
        absent = dict.fromkeys(("mask", "mask_examples", "lengths", "cu_q", "cu_k", "slopes", "state"))
        tensors = {"mask": f"*{a}", "mask_examples": "*i64", "lengths": "*i64", "slopes": f"*{a}", "state": "*i64"}
        read = dict.fromkeys(("q", "k", "v"), f"*{t}")
        for extras in ({}, {"mask": f"*{t}" if t == "bf16" else "*u8"}, tensors):
            constants = shape | tiles | {name: None for name in absent if name not in extras}
            given = extras | sizes | offsets
            hot = extras is not tensors  # with everything at once some spill a few registers
            forward = read | {"o": f"*{t}", "lse": f"*{a}", "parts": "i32"} | given
            whole_rows = constants | {"total_of_part": None, "DECODE": False}
            found.append(Specimen(attention_fwd_kernel, forward, whole_rows, warps, hot, **whole))
            decode = constants | {"DECODE": True, "BLOCK_M": FEW}
            parts = {"o": f"*{a}", "total_of_part": f"*{a}"}
            found.append(Specimen(attention_fwd_kernel, forward | parts, decode, 4, True, **whole))
            backward = {"dy": f"*{t}", "lse": f"*{a}", "delta": f"*{a}"} | read | given
            backward |= dict.fromkeys(("dq", "dk", "dv"), f"*{t}")
            for by_query in (True, False):
                found.append(
                    Specimen(
                        attention_bwd_kernel, backward, constants | back | {"BY_QUERY": by_query}, warps, hot, **whole
                    )
                )
        delta = {"dy": f"*{t}", "o": f"*{t}", "dlse": f"*{a}", "delta": f"*{a}"}
        delta |= dict.fromkeys(("H", "L", "rows_q", "E", "blocks"), "i32")
        found.append(
            Specimen(attention_delta_kernel, delta, {"cu_q": None, "BLOCK_M": m, "BLOCK_E": width}, 4, True, **whole)
        )
        merge = {"part_o": f"*{a}", "part_top": f"*{a}", "part_total": f"*{a}", "o": f"*{t}", "lse": f"*{a}"}
        merge |= dict.fromkeys(("H", "L", "rows_q", "E", "parts"), "i32")
        found.append(Specimen(attention_merge_kernel, merge, {"cu_q": None, "BLOCK_E": width}, 4, **whole))
    return found
