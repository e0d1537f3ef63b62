"""additive_attention · Triton
  score[l,s] = v . tanh(q[l] + k[s]) + mask[l,s]     p = softmax over s     y[l] = sum_s p[l,s] value[s]
  ds = p (dy . value - delta),  dq[l] = sum_s ds v (1 - tanh²),  dk[s] = sum_l of the same,  dv = sum ds tanh
  delta = sum_s p dy . value = dy . y but for the rounding of y, which is taken back afterwards: ds sums to 0
layout   head of csrc/common/additive_attention_binding.h
mapping  a program takes a row (n, l) and walks over tiles of BLOCK keys; gradients of k and value: a program takes
         (n, s) and walks over tiles of rows; D and E whole in registers
memory   never L x S x D, nor L x S: scores live in registers, and backward computes them again in both of its kernels
numerics online softmax in fp32 (fp64 for fp64), no atomics
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._math import tanh
from ._toolbox import SPECIMEN_TYPES, Specimen, accumulate_dtype, power_of_two, warps


@triton.jit
def load_tile(p, row, live, col, valid, stride, acc_t: tl.constexpr):
    at = row.to(tl.int64)[:, None] * stride + col[None, :]
    return tl.load(p + at, mask=live[:, None] & valid[None, :], other=0.0).to(acc_t)


@triton.jit
def load_vector(p, col, valid, acc_t: tl.constexpr):
    return tl.load(p + col, mask=valid, other=0.0).to(acc_t)


@triton.jit
def additive_attention_fwd_kernel(
    q, k, value, v, mask, y, lse, L, S, D, E, mask_n, mask_l,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    acc_t: tl.constexpr = lse.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    n, j = row // L, row % L
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    q_row = load_vector(q + row * D, d, d < D, acc_t)
    v_row = load_vector(v, d, d < D, acc_t)
    most = tl.full((), float("-inf"), acc_t)
    total = tl.zeros((), acc_t)
    acc = tl.zeros((BLOCK_E,), acc_t)
    for start in range(0, S, BLOCK):
        s = start + tl.arange(0, BLOCK)
        live = s < S
        t = tanh(q_row[None, :] + load_tile(k + n * S * D, s, live, d, d < D, D, acc_t))
        score = tl.where(live, tl.sum(t * v_row[None, :], 1), float("-inf"))
        if mask is not None:
            score += tl.load(mask + n * mask_n + j * mask_l + s, mask=live, other=0.0)
        now = tl.maximum(most, tl.max(score, 0))
        shift = tl.where(now == float("-inf"), 0.0, now)
        p = tl.exp(score - shift)
        scale = tl.exp(most - shift)
        total = total * scale + tl.sum(p, 0)
        tile = load_tile(value + n * S * E, s, live, e, e < E, E, acc_t)
        acc = acc * scale + tl.sum(p[:, None] * tile, 0)
        most = now
    blind = total == 0.0
    acc = tl.where(blind, 0.0, acc / tl.where(blind, 1.0, total))
    tl.store(y + row * E + e, acc.to(y.dtype.element_ty), mask=e < E)
    tl.store(lse + row, tl.where(blind, float("inf"), most + tl.log(total)))


@triton.jit
def additive_attention_bwd_rows_kernel(
    dy, q, k, value, v, mask, lse, y, delta, dq, dv, L, S, D, E, mask_n, mask_l,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    acc_t: tl.constexpr = lse.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    n, j = row // L, row % L
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    q_row = load_vector(q + row * D, d, d < D, acc_t)
    v_row = load_vector(v, d, d < D, acc_t)
    dy_row = load_vector(dy + row * E, e, e < E, acc_t)
    about = tl.sum(dy_row * load_vector(y + row * E, e, e < E, acc_t), 0)
    rest = tl.zeros((), acc_t)
    lse_row = tl.load(lse + row)
    acc_q = tl.zeros((BLOCK_D,), acc_t)
    acc_v = tl.zeros((BLOCK_D,), acc_t)
    acc_q_p = tl.zeros((BLOCK_D,), acc_t)
    acc_v_p = tl.zeros((BLOCK_D,), acc_t)
    for start in range(0, S, BLOCK):
        s = start + tl.arange(0, BLOCK)
        live = s < S
        t = tanh(q_row[None, :] + load_tile(k + n * S * D, s, live, d, d < D, D, acc_t))
        score = tl.sum(t * v_row[None, :], 1)
        if mask is not None:
            score += tl.load(mask + n * mask_n + j * mask_l + s, mask=live, other=0.0)
        p = tl.where(live, tl.exp(score - lse_row), 0.0)
        tile = load_tile(value + n * S * E, s, live, e, e < E, E, acc_t)
        ds = p * (tl.sum(dy_row[None, :] * tile, 1) - about)
        rest += tl.sum(ds, 0)
        slope = 1.0 - t * t
        acc_q += tl.sum(ds[:, None] * slope, 0)
        acc_v += tl.sum(ds[:, None] * t, 0)
        acc_q_p += tl.sum(p[:, None] * slope, 0)
        acc_v_p += tl.sum(p[:, None] * t, 0)
    tl.store(delta + row, about + rest)
    tl.store(dq + row * D + d, ((acc_q - rest * acc_q_p) * v_row).to(dq.dtype.element_ty), mask=d < D)
    tl.store(dv + row * D + d, acc_v - rest * acc_v_p, mask=d < D)


@triton.jit
def additive_attention_bwd_keys_kernel(
    dy, q, k, value, v, mask, lse, delta, dk, dvalue, L, S, D, E, mask_n, mask_l,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    acc_t: tl.constexpr = lse.dtype.element_ty
    at = tl.program_id(0).to(tl.int64)
    n, s = at // S, at % S
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    k_row = load_vector(k + at * D, d, d < D, acc_t)
    v_row = load_vector(v, d, d < D, acc_t)
    value_row = load_vector(value + at * E, e, e < E, acc_t)
    acc_k = tl.zeros((BLOCK_D,), acc_t)
    acc_value = tl.zeros((BLOCK_E,), acc_t)
    for start in range(0, L, BLOCK):
        j = start + tl.arange(0, BLOCK)
        live = j < L
        t = tanh(load_tile(q + n * L * D, j, live, d, d < D, D, acc_t) + k_row[None, :])
        score = tl.sum(t * v_row[None, :], 1)
        if mask is not None:
            score += tl.load(mask + n * mask_n + j.to(tl.int64) * mask_l + s, mask=live, other=0.0)
        p = tl.where(live, tl.exp(score - tl.load(lse + n * L + j, mask=live, other=0.0)), 0.0)
        dy_tile = load_tile(dy + n * L * E, j, live, e, e < E, E, acc_t)
        ds = p * (tl.sum(dy_tile * value_row[None, :], 1) - tl.load(delta + n * L + j, mask=live, other=0.0))
        acc_k += tl.sum(ds[:, None] * (1.0 - t * t), 0)
        acc_value += tl.sum(p[:, None] * dy_tile, 0)
    tl.store(dk + at * D + d, (acc_k * v_row).to(dk.dtype.element_ty), mask=d < D)
    tl.store(dvalue + at * E + e, acc_value.to(dvalue.dtype.element_ty), mask=e < E)


TILE, BACKWARD_TILE = 4096, 2048  # keys × features that fit in registers


def _launch(D: int, E: int, tile: int = TILE) -> dict[str, int]:
    block_d, block_e = max(power_of_two(D), 16), max(power_of_two(E), 16)
    block = max(1, min(32, tile // max(block_d, block_e)))
    return {
        "BLOCK": block,
        "BLOCK_D": block_d,
        "BLOCK_E": block_e,
        "num_warps": warps(block * max(block_d, block_e), 16),
    }


def _strides(mask: torch.Tensor | None) -> tuple[int, int]:
    """Elements from one n and one length to the next: 0 where the mask serves all."""
    if mask is None:
        return 0, 0
    n, length, s = mask.shape
    return 0 if n == 1 else length * s, 0 if length == 1 else s


def additive_attention_fwd(
    q: torch.Tensor, k: torch.Tensor, value: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    (n, length, d), (s, e) = q.shape, value.shape[1:]
    y, lse = q.new_empty(n, length, e), q.new_empty(n, length, dtype=accumulate_dtype(q.dtype))
    if n * length:
        sizes = length, s, d, e, *_strides(mask)
        additive_attention_fwd_kernel[(n * length,)](q, k, value, v, mask, y, lse, *sizes, **_launch(d, e))
    return y, lse


def additive_attention_bwd(
    dy: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    value: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    y: torch.Tensor,
    lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    (n, length, d), (s, e) = q.shape, value.shape[1:]
    dq, dk, dvalue = torch.empty_like(q), torch.empty_like(k), torch.empty_like(value)
    dv, delta = torch.empty_like(q, dtype=lse.dtype), torch.empty_like(lse)
    sizes, inputs = (length, s, d, e, *_strides(mask)), (dy, q, k, value, v, mask, lse)
    if n * length:
        additive_attention_bwd_rows_kernel[(n * length,)](
            *inputs, y, delta, dq, dv, *sizes, **_launch(d, e, BACKWARD_TILE)
        )
    if n * s:
        additive_attention_bwd_keys_kernel[(n * s,)](*inputs, delta, dk, dvalue, *sizes, **_launch(d, e, BACKWARD_TILE))
    return dq, dk, dvalue, dv


def specimens() -> list[Specimen]:
    """What tests/triton_compile.py compiles: every kernel in every type, with a mask, D = E = 128."""
    found = []
    for t, a in SPECIMEN_TYPES:
        inputs = dict.fromkeys(("q", "k", "value", "v"), f"*{t}") | dict.fromkeys(("mask", "lse"), f"*{a}")
        inputs |= dict.fromkeys(("L", "S", "D", "E", "mask_n", "mask_l"), "i32")
        rows = dict.fromkeys(("dy", "y", "dq"), f"*{t}") | dict.fromkeys(("delta", "dv"), f"*{a}")
        keys = dict.fromkeys(("dy", "dk", "dvalue"), f"*{t}") | {"delta": f"*{a}"}
        for kernel, more, tile in (
            (additive_attention_fwd_kernel, {"y": f"*{t}"}, TILE),
            (additive_attention_bwd_rows_kernel, rows, BACKWARD_TILE),
            (additive_attention_bwd_keys_kernel, keys, BACKWARD_TILE),
        ):
            launch = _launch(128, 128, tile)
            found.append(Specimen(kernel, inputs | more, launch, launch.pop("num_warps"), hot=t != "fp64"))
    return found
