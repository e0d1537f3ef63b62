"""Attention in plain torch, with the scores as a tensor: the truth for derivatives of higher order and for tests, and
what gives the weights away.

The formula stands in pyops/ops/attention.py.
"""

from __future__ import annotations

import math

import torch

from . import check, random


def _positions(q, k, lengths, cu_q, cu_k):
    """Example, query and key index of every score, the number of keys of its example, its shift, its being there."""
    arange = lambda n: torch.arange(n, device=q.device)
    if cu_q is None:
        b = arange(q.shape[0])[:, None, None, None]
        i, j = arange(q.shape[2])[:, None], arange(k.shape[2])
        keys = torch.full((), k.shape[2], device=q.device) if lengths is None else lengths[:, None, None, None]
        return b, i, j, keys, q.shape[2], torch.ones((), dtype=torch.bool, device=q.device)
    row, column = arange(q.shape[0]), arange(k.shape[0])
    of_row = torch.searchsorted(cu_q, row, right=True) - 1
    of_column = torch.searchsorted(cu_k, column, right=True) - 1
    b, i, j = of_row[:, None], (row - cu_q[of_row])[:, None], column - cu_k[of_column]
    return b, i, j, cu_k.diff()[b], cu_q.diff()[b], of_column == b


def _kept(state, group, word, dropout):
    """Dropout mask of the elements `word` of the groups `group`."""
    drawn = random.words(state, group)
    bits = drawn[3]
    for n in range(3):
        bits = torch.where(word == n, drawn[n], bits)
    return (bits >> 1) >= random.drop_threshold(dropout)


def reference(
    q, k, v, mask, mask_examples, lengths, cu_q, cu_k, slopes, state,
    scale, softcap, left, right, bottom_right, dropout, max_q, max_k,
):  # fmt: skip
    """Output and log-sum-exp of the op attention_fwd, by its arguments."""
    packed = cu_q is not None
    wide = check.accumulate_dtype(q.dtype)
    heads = q.shape[1]
    spread = lambda t: t.to(wide).repeat_interleave(heads // max(t.shape[1], 1), 1)
    bring = (lambda t: t.movedim(0, 1)) if packed else (lambda t: t)  # packed: [T, H, D] to [H, T, D]
    wide_q, wide_k, wide_v = bring(q.to(wide)), bring(spread(k)), bring(spread(v))
    b, i, j, keys, queries, seen = _positions(q, k, lengths, cu_q, cu_k)
    shift = keys - queries if bottom_right else 0
    h = torch.arange(heads, device=q.device)[:, None, None]

    s = wide_q @ wide_k.mT * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    if slopes is not None:
        slope = (
            slopes[:, None, None] if slopes.dim() == 1 else (slopes.mT[:, b] if packed else slopes[:, :, None, None])
        )
        s = s - slope * (i + shift - j).abs()
    seen = seen & (j < keys)
    if left >= 0:
        seen = seen & (j >= i + shift - left)
    if right >= 0:
        seen = seen & (j <= i + shift + right)
    if mask_examples is not None:
        mask = mask[mask_examples]
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    elif mask is not None:
        s = s + mask.to(wide)
    s = torch.where(seen, s, -math.inf)

    top = s.amax(-1, keepdim=True).detach() if s.shape[-1] else s.new_full((*s.shape[:-1], 1), -math.inf)
    top = torch.where(top == -math.inf, 0.0, top)
    p = torch.exp(s - top)
    total = p.sum(-1, keepdim=True)
    none = total == 0
    safe = torch.where(none, 1.0, total)
    lse = torch.where(none, -math.inf, top + safe.log()).squeeze(-1)
    p = p / safe
    if dropout > 0:
        group = ((b * heads + h) * max_q + i) * ((max_k + 3) // 4) + j // 4
        factor = 1 / (1 - dropout) if dropout < 1 else 0.0
        p = p * _kept(state, group, j % 4, dropout).to(wide) * factor
    return bring(p @ wide_v).to(q.dtype), lse


def with_weights(q, k, v, mask, dropout):
    """Attention and its weights, in plain torch: the weights have the size of the scores."""
    wide = check.accumulate_dtype(q.dtype)
    s = (q * (1 / math.sqrt(q.shape[-1]))) @ k.mT
    s = s.to(wide)
    if mask is not None:
        s = s.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else s + mask
    top = s.amax(-1, keepdim=True).detach() if s.shape[-1] else s.new_zeros(*s.shape[:-1], 1)
    p = torch.exp(s - torch.where(top == -math.inf, 0.0, top))
    total = p.sum(-1, keepdim=True)
    p = (p / torch.where(total == 0, 1.0, total)).to(q.dtype)
    p = torch.nn.functional.dropout(p, dropout) if dropout > 0 else p
    return p @ v, p
