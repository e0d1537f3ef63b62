"""cross_entropy · Triton
  labels         loss[m,s] = -(1 - ε) w_t log p_t - (ε / N) Σ_n w_n log p_n + z lse²,  log p = x - lse
                 dx = g (p_n A - B_n),  A = (1 - ε) w_t + ε Σ w / N + 2 z lse,  B_n = (1 - ε) w_t [n = t] + ε w_n / N
                 x already log p (LOGITS false): lse = 0, A = 0
  probabilities  loss[m,s] = -Σ_n w_n t'_n log p_n,  t' = (1 - ε) t + ε / N
                 dx = g (p_n Σ_k w_k t'_k - w_n t'_n),  dt = -g (1 - ε) w_n log p_n
layout   x, dx, probabilities: [M, N, S] · target, loss, divisor, max, sum, g: [M, S] · w: [N]
mapping  a program takes BLOCK_R rows (m, s) and walks over n in steps of BLOCK_N
memory   forward reads x once (max and sum in one pass), again from the cache where labels are smoothed; backward reads
         x, writes dx; max and sum are all that is kept
numerics in fp32 (fp64 for fp64); a label outside [0, N) gives NaN and reads nothing
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._toolbox import Specimen, accumulate_dtype, cdiv, power_of_two, warps

LARGEST_BLOCK = 2048


@triton.jit
def statistics(x, at, live, N, S, acc_t: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr):
    """Largest logit and Σ exp(x - max) in one pass: the sum is scaled anew where a larger logit comes."""
    most = tl.full((BLOCK_R,), float("-inf"), acc_t)
    total = tl.zeros((BLOCK_R,), acc_t)
    for k in range(0, N, BLOCK_N):
        n = k + tl.arange(0, BLOCK_N)
        valid = live[:, None] & (n < N)[None, :]
        v = tl.load(x + at[:, None] + n[None, :] * S, mask=valid, other=float("-inf")).to(acc_t)
        higher = tl.maximum(most, tl.max(v, 1))
        # A NaN that the maximum passes over comes back through the sum.
        e = tl.where((v == float("-inf")) | ~valid, 0.0, tl.exp(v - higher[:, None]))
        total = tl.where(most == float("-inf"), 0.0, total * tl.exp(most - higher)) + tl.sum(e, 1)
        most = higher
    total = tl.where((most == float("-inf")) & (total == 0.0), float("nan"), total)
    return most, total


@triton.jit
def cross_entropy_fwd_kernel(
    x, target, w, w_sum, loss, divisor, top, sums, ROWS, N, S, IGNORE, SMOOTHING: tl.constexpr, Z: tl.constexpr,
    LOGITS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    acc_t: tl.constexpr = loss.dtype.element_ty
    spread = tl.full((), SMOOTHING, acc_t) / N
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = row < ROWS
    at = row // S * N * S + row % S
    if LOGITS:
        most, total = statistics(x, at, live, N, S, acc_t, BLOCK_R, BLOCK_N)
    else:
        most = tl.zeros((BLOCK_R,), acc_t)
        total = most + 1.0
    t = tl.load(target + row, mask=live, other=0)
    counts = live & (t != IGNORE)
    inside = counts & (t >= 0) & (t < N)
    label = tl.load(x + at + t * S, mask=inside, other=0.0).to(acc_t)
    weight = most * 0.0 + 1.0
    if w is not None:
        weight = tl.load(w + t, mask=inside, other=1.0)
    log_sum = tl.log(total)
    losses = (1.0 - SMOOTHING) * weight * (log_sum - (label - most))
    if SMOOTHING != 0.0:
        weighted = tl.zeros((BLOCK_R,), acc_t)
        mass = N * 1.0
        if w is not None:
            mass = tl.load(w_sum)
        for k in range(0, N, BLOCK_N):
            n = k + tl.arange(0, BLOCK_N)
            valid = live[:, None] & (n < N)[None, :]
            v = tl.load(x + at[:, None] + n[None, :] * S, mask=valid, other=0.0).to(acc_t) - most[:, None]
            if w is not None:
                v = v * tl.load(w + n, mask=n < N, other=0.0)[None, :]
            weighted += tl.sum(tl.where(valid, v, 0.0), 1)
        losses += (log_sum * mass - weighted) * spread
    if Z != 0.0:
        lse = most + log_sum
        losses += Z * lse * lse
    wrong = counts & ~inside
    tl.store(loss + row, tl.where(wrong, float("nan"), tl.where(counts, losses, 0.0)), mask=live)
    tl.store(divisor + row, tl.where(wrong, float("nan"), tl.where(counts, weight, 0.0)), mask=live)
    tl.store(top + row, most, mask=live)
    tl.store(sums + row, total, mask=live)


@triton.jit
def cross_entropy_bwd_kernel(
    g, x, target, w, w_sum, top, sums, dx, ROWS, N, S, IGNORE, SMOOTHING: tl.constexpr, Z: tl.constexpr,
    LOGITS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    acc_t: tl.constexpr = g.dtype.element_ty
    spread = tl.full((), SMOOTHING, acc_t) / N
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = row < ROWS
    at = row // S * N * S + row % S
    t = tl.load(target + row, mask=live, other=0)
    counts = live & (t != IGNORE)
    inside = counts & (t >= 0) & (t < N)
    cotangent = tl.load(g + row, mask=counts, other=0.0)
    cotangent = tl.where(counts & ~inside, float("nan"), cotangent)
    most = tl.load(top + row, mask=live, other=0.0)
    total = tl.load(sums + row, mask=live, other=1.0)
    label = most * 0.0 + (1.0 - SMOOTHING)
    if w is not None:
        label = (1.0 - SMOOTHING) * tl.load(w + t, mask=inside, other=1.0)
    factor = label
    if SMOOTHING != 0.0:
        mass = N * 1.0
        if w is not None:
            mass = tl.load(w_sum)
        factor += mass * spread
    if Z != 0.0:
        factor += 2.0 * Z * (most + tl.log(total))
    for k in range(0, N, BLOCK_N):
        n = k + tl.arange(0, BLOCK_N)
        valid = live[:, None] & (n < N)[None, :]
        p = tl.zeros((BLOCK_R, BLOCK_N), acc_t)
        if LOGITS:
            v = tl.load(x + at[:, None] + n[None, :] * S, mask=valid & counts[:, None], other=0.0).to(acc_t)
            p = tl.where(counts[:, None], tl.exp(v - most[:, None]) * (factor / total)[:, None], 0.0)
        if SMOOTHING != 0.0:
            share = p * 0.0 + 1.0
            if w is not None:
                share = tl.load(w + n, mask=n < N, other=0.0)[None, :]
            p -= share * spread
        p -= tl.where(n[None, :] == t[:, None], label[:, None], 0.0)
        d = tl.where(counts[:, None], cotangent[:, None] * p, 0.0)
        tl.store(dx + at[:, None] + n[None, :] * S, d.to(dx.dtype.element_ty), mask=valid)


@triton.jit
def soft_cross_entropy_fwd_kernel(
    x, q, w, loss, top, sums, ROWS, N, S, SMOOTHING: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr
):
    acc_t: tl.constexpr = loss.dtype.element_ty
    spread = tl.full((), SMOOTHING, acc_t) / N
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = row < ROWS
    at = row // S * N * S + row % S
    most, total = statistics(x, at, live, N, S, acc_t, BLOCK_R, BLOCK_N)
    log_sum = tl.log(total)
    losses = tl.zeros((BLOCK_R,), acc_t)
    for k in range(0, N, BLOCK_N):
        n = k + tl.arange(0, BLOCK_N)
        valid = live[:, None] & (n < N)[None, :]
        v = tl.load(x + at[:, None] + n[None, :] * S, mask=valid, other=0.0).to(acc_t)
        t = tl.load(q + at[:, None] + n[None, :] * S, mask=valid, other=0.0).to(acc_t)
        t = t * (1.0 - SMOOTHING) + spread
        if w is not None:
            t = t * tl.load(w + n, mask=n < N, other=0.0)[None, :]
        losses += tl.sum(tl.where(valid, t * (log_sum[:, None] - (v - most[:, None])), 0.0), 1)
    tl.store(loss + row, losses, mask=live)
    tl.store(top + row, most, mask=live)
    tl.store(sums + row, total, mask=live)


@triton.jit
def soft_cross_entropy_bwd_kernel(
    g, x, q, w, top, sums, dx, dq, ROWS, N, S, SMOOTHING: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr
):
    acc_t: tl.constexpr = g.dtype.element_ty
    spread = tl.full((), SMOOTHING, acc_t) / N
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = row < ROWS
    at = row // S * N * S + row % S
    most = tl.load(top + row, mask=live, other=0.0)[:, None]
    total = tl.load(sums + row, mask=live, other=1.0)[:, None]
    cotangent = tl.load(g + row, mask=live, other=0.0)[:, None]
    log_sum = tl.log(total)
    mass = tl.zeros((BLOCK_R,), acc_t)
    for k in range(0, N, BLOCK_N):
        n = k + tl.arange(0, BLOCK_N)
        valid = live[:, None] & (n < N)[None, :]
        t = tl.load(q + at[:, None] + n[None, :] * S, mask=valid, other=0.0).to(acc_t)
        t = t * (1.0 - SMOOTHING) + spread
        if w is not None:
            t = t * tl.load(w + n, mask=n < N, other=0.0)[None, :]
        mass += tl.sum(tl.where(valid, t, 0.0), 1)
    for k in range(0, N, BLOCK_N):
        n = k + tl.arange(0, BLOCK_N)
        valid = live[:, None] & (n < N)[None, :]
        to = at[:, None] + n[None, :] * S
        centred = tl.load(x + to, mask=valid, other=0.0).to(acc_t) - most
        t = tl.load(q + to, mask=valid, other=0.0).to(acc_t) * (1.0 - SMOOTHING) + spread
        share = t * 0.0 + 1.0
        if w is not None:
            share = share * tl.load(w + n, mask=n < N, other=0.0)[None, :]
        d = cotangent * (tl.exp(centred) / total * mass[:, None] - t * share)
        tl.store(dx + to, d.to(dx.dtype.element_ty), mask=valid)
        if dq is not None:
            d = cotangent * (1.0 - SMOOTHING) * share * (log_sum - centred)
            tl.store(dq + to, d.to(dq.dtype.element_ty), mask=valid)


def _blocks(rows: int, n: int, per_thread: int = 8) -> dict[str, int]:
    block_n = min(power_of_two(n), LARGEST_BLOCK)
    block_r = min(max(LARGEST_BLOCK // (4 * block_n), 1), power_of_two(rows))
    return {"BLOCK_R": block_r, "BLOCK_N": block_n, "num_warps": warps(block_r * block_n, per_thread)}


def _statistics(x: torch.Tensor, count: int) -> list[torch.Tensor]:
    m, _, s = x.shape
    return [torch.empty((m, s), dtype=accumulate_dtype(x.dtype), device=x.device) for _ in range(count)]


def cross_entropy_fwd(
    x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, ignore: int, smoothing: float, z: float,
    logits: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    m, n, s = x.shape
    loss, divisor, top, total = _statistics(x, 4)
    if m * s:
        b = _blocks(m * s, n, 4)  # with eight elements a thread it spills
        cross_entropy_fwd_kernel[(cdiv(m * s, b["BLOCK_R"]),)](
            x, target, weight, None if weight is None else weight.sum(), loss, divisor, top, total, m * s, n, s, ignore,
            SMOOTHING=smoothing, Z=z, LOGITS=logits, **b,
        )  # fmt: skip
    return loss, divisor, top, total


def cross_entropy_bwd(
    g: torch.Tensor, x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, top: torch.Tensor,
    total: torch.Tensor, ignore: int, smoothing: float, z: float, logits: bool,
) -> torch.Tensor:  # fmt: skip
    m, n, s = x.shape
    dx = torch.empty_like(x)
    if x.numel():
        b = _blocks(m * s, n)
        cross_entropy_bwd_kernel[(cdiv(m * s, b["BLOCK_R"]),)](
            g, x, target, weight, None if weight is None else weight.sum(), top, total, dx, m * s, n, s, ignore,
            SMOOTHING=smoothing, Z=z, LOGITS=logits, **b,
        )  # fmt: skip
    return dx


def soft_cross_entropy_fwd(
    x: torch.Tensor, q: torch.Tensor, weight: torch.Tensor | None, smoothing: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    m, n, s = x.shape
    loss, top, total = _statistics(x, 3)
    if m * s:
        b = _blocks(m * s, n)
        soft_cross_entropy_fwd_kernel[(cdiv(m * s, b["BLOCK_R"]),)](
            x, q, weight, loss, top, total, m * s, n, s, SMOOTHING=smoothing, **b
        )
    return loss, top, total


def soft_cross_entropy_bwd(
    g: torch.Tensor, x: torch.Tensor, q: torch.Tensor, weight: torch.Tensor | None, top: torch.Tensor,
    total: torch.Tensor, smoothing: float, need_dq: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    m, n, s = x.shape
    dx, dq = torch.empty_like(x), x.new_empty(m if need_dq else 0, n, s)
    if x.numel():
        b = _blocks(m * s, n)
        soft_cross_entropy_bwd_kernel[(cdiv(m * s, b["BLOCK_R"]),)](
            g, x, q, weight, top, total, dx, dq if need_dq else None, m * s, n, s, SMOOTHING=smoothing, **b
        )
    return dx, dq


def specimens() -> list[Specimen]:
    """What tests/triton_compile.py compiles: plain labels in every type, all that can be asked for in fp32."""
    found = []
    for t, a, asked in (("fp32", "fp32", 0.1), ("fp32", "fp32", 0.0), ("bf16", "fp32", 0.0), ("fp64", "fp64", 0.0)):
        acc = {"g": f"*{a}", "loss": f"*{a}", "divisor": f"*{a}", "top": f"*{a}", "sums": f"*{a}"}
        acc |= {"w": f"*{a}", "w_sum": f"*{a}"}
        all_of = {"x": f"*{t}", "q": f"*{t}", "target": "*i64", "dx": f"*{t}", "dq": f"*{t}"} | acc
        all_of |= dict.fromkeys(("ROWS", "N", "S", "IGNORE"), "i32")
        for r, b in ((8, 64), (1, 2048)):
            blocks = {"SMOOTHING": asked, "BLOCK_R": r, "BLOCK_N": b}
            for kernel in (cross_entropy_fwd_kernel, cross_entropy_bwd_kernel):
                signature = {k: all_of[k] for k in kernel.arg_names if k in all_of}
                threads = warps(r * b, 4 if kernel is cross_entropy_fwd_kernel else 8)
                found.append(Specimen(kernel, signature, blocks | {"Z": asked, "LOGITS": True}, threads))
            for kernel in (soft_cross_entropy_fwd_kernel, soft_cross_entropy_bwd_kernel):
                signature = {k: all_of[k] for k in kernel.arg_names if k in all_of}
                found.append(Specimen(kernel, signature, blocks, warps(r * b, 8)))
    return found
