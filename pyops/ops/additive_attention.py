"""Additive attention: a query is compared with a key by a small network instead of a product.

    score[l,s] = v . tanh(W_q query[l] + W_k key[s] + b) + mask[l,s]      p = softmax over s
    y[l]       = sum_s p[l,s] value[s]

    query: [*, L, Q]   key: [*, S, K]   value: [*, S, E]   W_q: [D, Q]   W_k: [D, K]   b, v: [D]   y: [*, L, E]

Source: Bahdanau, Cho, Bengio 2014, https://arxiv.org/abs/1409.0473. The gradient is derived in docs/math/attention.md.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..core import autocast, backend, check, library, product
from ..core.autograd import Formula, differentiable
from ..core.samples import Maker, Sample, checked

_kernels = library.triton_kernels("additive_attention")


def _fwd_fake(q, k, value, v, mask):
    lse = q.new_empty(q.shape[:2], dtype=check.accumulate_dtype(q.dtype))
    return q.new_empty(q.shape[0], q.shape[1], value.shape[2]), lse


_fwd = library.declare(
    "additive_attention_fwd(Tensor q, Tensor k, Tensor value, Tensor v, Tensor? mask) -> (Tensor, Tensor)",
    _fwd_fake,
    _kernels,
)
_bwd = library.declare(
    "additive_attention_bwd(Tensor dy, Tensor q, Tensor k, Tensor value, Tensor v, Tensor? mask, Tensor y, Tensor lse)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    lambda dy, q, k, value, v, mask, y, lse: (
        torch.empty_like(q),
        torch.empty_like(k),
        torch.empty_like(value),
        torch.empty_like(q, dtype=lse.dtype),
    ),
    _kernels,
)


def _reference(q, k, value, v, mask):
    wide = check.accumulate_dtype(q.dtype)
    score = (q.to(wide)[:, :, None] + k.to(wide)[:, None]).tanh() @ v.to(wide)
    score = score if mask is None else score + mask.to(wide)
    blind = (score == -math.inf).all(-1, keepdim=True)
    # a row that sees nothing: its scores are held apart, lest their gradient be NaN
    p = torch.where(blind, 0.0, torch.where(blind, 0.0, score).softmax(-1))
    lse = torch.where(blind[..., 0], math.inf, score.logsumexp(-1)).detach()
    return (p @ value.to(wide)).to(q.dtype), lse


def _fold(forward, batch, dims, inputs, constants):
    """A batch under one v is more of n."""
    mask = inputs[4]
    if dims[3] is not None:
        return None
    whole = [t.expand(batch, *t.shape) if d is None else t.movedim(d, 0) for t, d in zip(inputs[:3], dims[:3])]
    n = whole[0].shape[1]
    if mask is not None and (dims[4] is not None or mask.shape[0] != 1):
        mask = mask.expand(batch, *mask.shape) if dims[4] is None else mask.movedim(dims[4], 0)
        mask = mask.expand(batch, n, *mask.shape[2:]).reshape(batch * n, *mask.shape[2:]).contiguous()
    flat = [t.reshape(batch * n, *t.shape[2:]).contiguous() for t in whole]
    y, lse = forward(*flat, inputs[3], mask)
    return (y.reshape(batch, n, *y.shape[1:]), lse.reshape(batch, n, lse.shape[1])), (0, 0)


_apply = differentiable(
    Formula(
        _fwd, _bwd, 5, 4,
        lambda dy, inputs, kept, constants, needs: (dy, *inputs, *kept),
        _reference, _fold, keep=(0, 1),
        finish=lambda results, inputs, kept, needs: (*results[:3], results[3].sum((0, 1)).to(inputs[3].dtype)),
    )
)  # fmt: skip


def additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> Tensor:
    """Attention whose scores are ``v . tanh(w_q query + w_k key + bias)`` (Bahdanau et al. 2014).

    ``y[l] = sum_s softmax_s(score[l,s] + mask[l,s]) value[s]``. Both matrix products are as in ``linear``; of the
    L x S x D numbers under the tanh none is stored, in either direction.

    Args:
        query: Tensor[*, L, Q], float32, float64, bfloat16 or float16, any strides.
        key: Tensor[*, S, K].
        value: Tensor[*, S, E]; the leading dimensions of all three are equal.
        w_q: Tensor[D, Q].
        w_k: Tensor[D, K].
        v: Tensor[D].
        bias: Tensor[D] or None (0).
        attn_mask: broadcast to [*, L, S]: bool, True where a key takes part, or numbers in float32 or the dtype of
            query that are added to the scores (no gradient flows to them).

    Returns:
        Tensor[*, L, E]. A query that sees no key gives 0, with gradient 0.

    Raises:
        RuntimeError: shapes, devices or dtypes that do not fit together; a mask that requires a gradient.
        TypeError: something else than tensors.
        NotImplementedError: tensors that are not floating point.

    Scores and softmax are computed in float32 (float64 for float64) and again in the backward pass. Bitwise
    deterministic. Under autocast all runs in its low precision. Gradients of every order (from the second on in plain
    torch, which then stores L x S x D), forward mode (likewise), vmap and torch.compile.
    """
    _check(query, key, value, w_q, w_k, v, bias, attn_mask)
    if autocast.enabled(query):
        query, key, value, w_q, w_k, v, *rest = autocast.lower(
            query, key, value, w_q, w_k, v, *(() if bias is None else (bias,))
        )
        bias = rest[0] if rest else None
    batch, length, keys = query.shape[:-2], query.shape[-2], key.shape[-2]
    n = math.prod(batch)
    q = product.linear(query, w_q, bias).reshape(n, length, len(v)).contiguous()
    k = product.linear(key, w_k).reshape(n, keys, len(v)).contiguous()
    values = value.reshape(n, keys, value.shape[-1]).contiguous()
    mask = None if attn_mask is None else _added(attn_mask, batch, check.accumulate_dtype(q.dtype))
    y, _ = _apply(backend.namespace_for("additive_attention", query), q, k, values, v.contiguous(), mask)
    return y.reshape(*batch, length, values.shape[2])


def _added(mask: Tensor, batch: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The mask as numbers [N or 1, L or 1, S]."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -math.inf)
    mask = mask.reshape(*(1,) * (len(batch) + 2 - mask.dim()), *mask.shape)
    if any(size != 1 for size in mask.shape[:-2]):
        mask = mask.expand(*batch, *mask.shape[-2:])
    return mask.reshape(-1, *mask.shape[-2:]).to(dtype).contiguous()


def _check(query, key, value, w_q, w_k, v, bias, mask) -> None:
    op = "additive_attention"
    check.floating(op, "query", query)
    low = autocast.enabled(query)
    named = {"key": key, "value": value, "w_q": w_q, "w_k": w_k, "v": v, "bias": bias}
    for name, t in named.items():
        if t is None and name == "bias":
            continue
        check.floating(op, name, t)
        if t.device != query.device:
            check.fail(RuntimeError, op, name, f"a tensor on {t.device}", f"one on {query.device}, as the query")
        if t.dtype != query.dtype and not low:
            check.fail(RuntimeError, op, name, t.dtype, f"{query.dtype}, as the query")
    for name, t in (("query", query), ("key", key), ("value", value)):
        if t.dim() < 2 or t.shape[:-2] != query.shape[:-2]:
            expected = f"{[*query.shape[:-2], 'length', 'features']}".replace("'", "")
            check.fail(RuntimeError, op, name, f"shape {list(t.shape)}", f"shape {expected}")
    if value.shape[-2] != key.shape[-2]:
        check.fail(RuntimeError, op, "value", f"{value.shape[-2]} rows", f"{key.shape[-2]}, as the key")
    if v.dim() != 1:
        check.fail(RuntimeError, op, "v", f"shape {list(v.shape)}", "one dimension")
    size = v.shape[0]
    shapes = (("w_q", w_q, (size, query.shape[-1])), ("w_k", w_k, (size, key.shape[-1])), ("bias", bias, (size,)))
    for name, t, shape in shapes:
        if t is not None and t.shape != shape:
            check.fail(RuntimeError, op, name, f"shape {list(t.shape)}", f"shape {list(shape)}")
    if mask is None:
        return
    full = (*query.shape[:-1], key.shape[-2])
    if not isinstance(mask, Tensor):
        check.fail(TypeError, op, "attn_mask", type(mask).__name__, "a tensor or None")
    if mask.dtype not in (torch.bool, torch.float32, query.dtype) and not (low and mask.is_floating_point()):
        check.fail(RuntimeError, op, "attn_mask", mask.dtype, f"bool, float32 or {query.dtype}")
    if mask.device != query.device:
        check.fail(RuntimeError, op, "attn_mask", f"a tensor on {mask.device}", f"one on {query.device}, as the query")
    fits = mask.dim() <= len(full) and all(m in (1, f) for m, f in zip(mask.shape[::-1], full[::-1]))
    if not fits or mask.dim() == 0 or mask.shape[-1] != full[-1]:
        expected = f"a shape that broadcasts to {list(full)} with {full[-1]} keys"
        check.fail(RuntimeError, op, "attn_mask", f"shape {list(mask.shape)}", expected)
    if mask.requires_grad:
        check.fail(RuntimeError, op, "attn_mask", "a mask that requires a gradient", "one without: none is computed")


class AdditiveAttention(torch.nn.Module):
    """``additive_attention`` with its parameters.

    Args:
        query_size: Q.
        key_size: K.
        hidden_size: D.
        bias: whether there is a bias under the tanh.
        device, dtype: of the parameters.

    Parameters: ``query_proj.weight`` [D, Q], ``key_proj.weight`` [D, K], ``bias`` [D] and ``v`` [D], all uniform in
    +-1 / sqrt(number of inputs) at first, as in torch.nn.Linear.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(
        self,
        query_size: int,
        key_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("query_size", query_size), ("key_size", key_size), ("hidden_size", hidden_size)):
            if size < 1:
                check.fail(ValueError, "AdditiveAttention", name, size, "at least 1")
        self.query_proj = torch.nn.Linear(query_size, hidden_size, False, device, dtype)
        self.key_proj = torch.nn.Linear(key_size, hidden_size, False, device, dtype)
        self.v = torch.nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        shift = torch.nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", shift)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.query_proj.reset_parameters()
        self.key_proj.reset_parameters()
        bound = 1 / math.sqrt(len(self.v))
        torch.nn.init.uniform_(self.v, -bound, bound)
        if self.bias is not None:
            bound = 1 / math.sqrt(self.query_proj.in_features)
            torch.nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """query [*, L, Q], key [*, S, K], value [*, S, E] -> [*, L, E]."""
        weights = self.query_proj.weight, self.key_proj.weight, self.v, self.bias
        return additive_attention(query, key, value, *weights, attn_mask)


def _truth(query, key, value, w_q, w_k, v, bias=None, attn_mask=None):
    """The same in plain torch, by softmax; rows that see nothing are 0."""
    hidden = (query @ w_q.mT).unsqueeze(-2) + (key @ w_k.mT).unsqueeze(-3)
    score = (hidden if bias is None else hidden + bias).tanh() @ v
    if attn_mask is not None:
        dtype = attn_mask.dtype
        score = score.masked_fill(~attn_mask, -math.inf) if dtype == torch.bool else score + attn_mask
    blind = (score == -math.inf).all(-1, keepdim=True)
    return score.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0) @ value


def _sample(batch, sizes, bias=True, mask=None):
    """sizes: L, S, Q, K, D, E. mask: shape of a mask, of numbers where it is given as a list."""

    def make(t: Maker):
        length, s, n_q, n_k, d, e = sizes
        inputs = [t.input((*batch, length, n_q)), t.input((*batch, s, n_k)), t.input((*batch, s, e))]
        inputs += [t.input((d, n_q)), t.input((d, n_k)), t.input((d,)), *([t.input((d,))] if bias else [])]
        if mask is None:
            return tuple(inputs), {}
        numbers = t.constant(tuple(mask))
        if isinstance(mask, tuple):
            numbers = numbers > 0
            numbers[..., 0, :] = False
        return tuple(inputs), {"attn_mask": numbers}

    return make


checked(
    "additive_attention",
    additive_attention,
    _truth,
    Sample("a row that sees nothing", _sample((2,), (2, 3, 2, 1, 3, 2), mask=(2, 2, 3)), derivatives=True),
    Sample("numbers as a mask, no bias", _sample((2,), (3, 5, 3, 4, 7, 5), bias=False, mask=[3, 5])),
    Sample("one query against many keys", _sample((3,), (1, 37, 4, 4, 35, 33), mask=(3, 1, 37))),
    Sample("two batch dimensions", _sample((2, 2), (5, 3, 3, 2, 17, 3), mask=(2, 1, 5, 3))),
    Sample("no keys", _sample((2,), (3, 0, 2, 2, 3, 4))),
    Sample("no batch", _sample((0,), (2, 3, 2, 2, 3, 4))),
)
