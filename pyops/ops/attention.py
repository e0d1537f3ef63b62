"""Scaled dot-product attention with an online softmax: the L×S matrix of scores is never stored.

    o[i]   = Σ_j p[i,j] · v[j]        p = softmax_j(score[i,j])        lse[i] = log Σ_j exp(score[i,j])
    score[i,j] = softcap · tanh(scale · q[i]·k[j] / softcap) − slope · |i + shift − j| + mask[i,j]

    q: [B, H, L, D]   k: [B, H/G, S, D]   v: [B, H/G, S, E]   o: [B, H, L, E]   lse: [B, H, L]

Only the keys that query i sees take part; a query that sees none gives 0, with gradient 0 and lse −∞.

Source: torch.nn.functional.scaled_dot_product_attention; Dao et al. 2022, https://arxiv.org/abs/2205.14135. The online
softmax and the gradient are derived in docs/math/attention.md.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch

from ..core import attention_arguments as arguments_of
from ..core import autocast, backend, blocking, check, library, product, random
from ..core.attention import reference, with_weights
from ..core.autograd import Formula, Tensors, differentiable
from ..core.explain import explains
from ..core.intercept import Unsupported, route
from ..core.samples import Maker, Sample, checked

_NAME = "scaled_dot_product_attention"
_VARLEN = "attention_varlen"

_kernels = library.triton_kernels("attention")
_ARGUMENTS = (
    "Tensor? mask, Tensor? mask_examples, Tensor? lengths, Tensor? cu_q, Tensor? cu_k, Tensor? slopes, Tensor? random, "
    "float scale, float softcap, int left, int right, bool bottom_right, float dropout, int max_q, int max_k"
)


def _fwd_fake(q, k, v, mask, mask_examples, lengths, cu_q, cu_k, *_):
    o = q.new_empty((*q.shape[:-1], v.shape[-1]))
    rows = (q.shape[1], q.shape[0]) if cu_q is not None else q.shape[:-1]
    return o, q.new_empty(rows, dtype=check.accumulate_dtype(q.dtype))


def _bwd_fake(dy, dlse, q, k, v, *_):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_fwd = library.declare(
    f"attention_fwd(Tensor q, Tensor k, Tensor v, {_ARGUMENTS}) -> (Tensor, Tensor)", _fwd_fake, _kernels
)
_bwd = library.declare(
    f"attention_bwd(Tensor dy, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, {_ARGUMENTS})"
    " -> (Tensor, Tensor, Tensor)",
    _bwd_fake,
    _kernels,
)


def _backward_arguments(dy, inputs: Tensors, kept: Tensors, constants: Tensors, needs) -> Tensors:
    do, dlse = dy
    q, k, v, *rest = inputs
    o, lse = kept
    return torch.zeros_like(o) if do is None else do, dlse, q, k, v, o, lse, *rest, *constants


def _fold(forward, batch, dims, inputs, constants):
    """A batch of calls is one call with more examples; not with packed rows, nor with a dropout mask to be the same."""
    q, k, v, mask, chosen, lengths, cu_q, _, slopes, state = inputs
    if cu_q is not None or state is not None or dims[4] is not None or (slopes is not None and dims[8] is not None):
        return None
    examples = q.shape[0] if dims[0] is None else q.movedim(dims[0], 0).shape[1]

    def spread(t, dim):
        if t is None:
            return t
        t = t[None] if dim is None else t.movedim(dim, 0)
        return t.expand(batch, examples, *t.shape[2:]).reshape(batch * examples, *t.shape[2:])

    if mask is not None:
        masks = mask.shape[0] if dims[3] is None else mask.movedim(dims[3], 0).shape[1]
        if dims[3] is not None:
            mask = mask.movedim(dims[3], 0).flatten(0, 1)
        if chosen is None and (dims[3] is None) != (masks == 1):
            chosen = torch.arange(masks, device=q.device).expand(examples)
        if chosen is not None:  # that of the call, and of all calls
            calls = torch.arange(batch, device=q.device) * (0 if dims[3] is None else masks)
            chosen = (calls[:, None] + chosen).flatten()
    per_example = slopes.repeat(batch, 1) if slopes is not None and slopes.dim() == 2 else slopes
    q, k, v, lengths = (spread(inputs[n], dims[n]) for n in (0, 1, 2, 5))
    k, v = (arguments_of.dense_but_for_the_batch(t) for t in (k, v))
    lengths = lengths if lengths is None else lengths.contiguous()
    o, lse = forward(q.contiguous(), k, v, mask, chosen, lengths, None, None, per_example, None, *constants)
    return (o.reshape(batch, examples, *o.shape[1:]), lse.reshape(batch, examples, *lse.shape[1:])), (0, 0)


_apply = differentiable(Formula(_fwd, _bwd, 10, 3, _backward_arguments, reference, _fold, outputs=2, keep=(0, 1)))


def _attend(op: str, *arguments: Any) -> Tensors:
    """The op; the same in plain torch where a gradient of the mask is asked for, which has the size of the scores."""
    if arguments_of.is_differentiated(arguments[3]):
        return reference(*arguments)
    return _apply(backend.namespace_for(op, arguments[0]), *arguments)


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    causal: Literal["top_left", "bottom_right"] | None = None,
    key_lengths: torch.Tensor | None = None,
    window: int | tuple[int, int] | None = None,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention of queries over keys; drops in for torch.nn.functional.scaled_dot_product_attention.

    ``softmax(scale · query @ keyᵀ + attn_mask) @ value``, without storing the scores: memory grows with L + S.

    Args:
        query: Tensor[..., H, L, D], float32, float64, bfloat16 or float16; D from 1 (on a GPU to 256).
        key: Tensor[..., H, S, D]. Leading dimensions broadcast.
        value: Tensor[..., H, S, E]; E may differ from D.
        attn_mask: broadcasts to [..., H, L, S]. bool: True takes part; float32 or the dtype of query: added to the
            scores. A gradient of the mask is computed in plain torch, with L×S memory.
        dropout_p: probability of dropping a weight, in [0, 1]; the mask comes from torch's generator.
        is_causal: query i sees keys j <= i; as torch's documentation has it, not together with attn_mask.
        scale: factor of query·key; 1/sqrt(D) by default.
        enable_gqa: key and value may have fewer heads, a divisor of query's: neighbouring query heads share one.
        causal: "top_left" is is_causal, and goes with a mask; "bottom_right" aligns the last query with the last key
            (decoding).
        key_lengths: Tensor[...] of integers, one per example: keys from there on are ignored.
        window: (left, right), or one number for both: query i sees keys from i - left to i + right, aligned as
            ``causal`` says; -1 is no bound.
        alibi_slopes: Tensor[H] or Tensor[B, H] of constants: ``slope · |i - j|`` is subtracted from the scores.
        softcap: scores become ``softcap · tanh(score / softcap)`` before bias and mask; None or 0: not.
        return_lse: also return the log-sum-exp of the scores.

    Returns:
        Tensor[..., H, L, E] in the dtype of query; with return_lse also Tensor[..., H, L] in float32 (float64 for
        float64), differentiable. A query that sees no key gives 0, and -inf for its log-sum-exp.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit together; dropout_p outside [0, 1].
        ValueError: an unknown causal, a bad window, a negative softcap.
        TypeError: something else than tensors, a scale that is no number.
        IndexError: a mask without dimensions; matrices with enable_gqa.
        NotImplementedError: complex numbers, and what torch computes on some device, which pyops.use() leaves to it:
            is_causal with attn_mask, key and value with different numbers of keys or of grouped heads, heads of size 0.

    What is stored beside the result: a mask is read where it is, by its strides and in its dtype, and never expanded;
    it is copied if it is float32 beside float64, or if several leading dimensions of it cannot be viewed as one. Keys
    and values that broadcast over the whole batch are read where they are as well, and copied where they broadcast over
    some leading dimensions only. torch.compile makes mask, keys and values contiguous before the kernel. Hopper's
    warpgroup products keep a byte for 1024 elements of a mask, or less, while they run.
    The gradient takes weights from the log-sum-exp, whose digits a mask of 1e4 and more uses up, as torch's fused
    kernels do.

    Softmax and sums are in float32 (float64 for float64). Bitwise deterministic, gradients too. Gradients of every
    order, forward mode, vmap and torch.compile are supported; second gradients and forward mode store the scores.
    """
    return _sdpa(
        _attend, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
        causal, key_lengths, window, alibi_slopes, softcap, return_lse,
    )  # fmt: skip


def _sdpa(
    attend, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
    causal, key_lengths, window, alibi_slopes, softcap, return_lse,
):  # fmt: skip
    """Checks and folds the arguments of scaled_dot_product_attention, which `attend` then computes."""
    query, key, value, attn_mask = arguments_of.lowered(_NAME, query, key, value, attn_mask)
    arguments_of.check_inputs(_NAME, query, key, value, 2)
    constants = arguments_of.scalars(_NAME, query, dropout_p, is_causal, scale, causal, window, softcap)
    # torch's documentation forbids both, its CPU kernels compute both
    if is_causal and attn_mask is not None:
        check.fail(Unsupported, _NAME, "attn_mask", "a tensor", "None where is_causal=True; causal= goes with a mask")
    if key.shape[-2] != value.shape[-2]:
        check.fail(Unsupported, _NAME, "value", f"{value.shape[-2]} keys", f"{key.shape[-2]}, as key")
    if enable_gqa and min(query.dim(), key.dim(), value.dim()) < 3:
        check.fail(
            IndexError, _NAME, "query", "2 dimensions", "3 or more where enable_gqa=True: heads are the third last"
        )
    q, k, v = (t if t.dim() > 2 else t[None] for t in (query, key, value))
    heads, key_heads = q.shape[-3], k.shape[-3]
    if enable_gqa:
        if key_heads != v.shape[-3] or (heads != key_heads and (key_heads == 0 or heads % key_heads != 0)):
            got = f"{key_heads} and {v.shape[-3]} heads of key and value"
            kind = RuntimeError if key_heads == v.shape[-3] else Unsupported  # which torch repeats each on its own
            check.fail(kind, _NAME, "key", got, f"the same divisor of query's {heads}")
    elif len({heads, key_heads, v.shape[-3]} - {1}) > 1:
        got = f"{key_heads} and {v.shape[-3]} heads of key and value"
        check.fail(RuntimeError, _NAME, "key", got, f"{heads}, as query, or 1")
    else:
        heads = max(heads, key_heads, v.shape[-3]) if 0 not in (heads, key_heads, v.shape[-3]) else 0
        key_heads = key_heads if key_heads == v.shape[-3] else heads
    try:
        batch = torch.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    except RuntimeError:
        got = f"leading dimensions {list(k.shape[:-3])} and {list(v.shape[:-3])} of key and value"
        check.fail(RuntimeError, _NAME, "key", got, f"ones that broadcast with query's {list(q.shape[:-3])}")
    count = math.prod(batch)
    queries, keys = q.shape[-2], k.shape[-2]
    mask = arguments_of.checked_mask(_NAME, attn_mask, query, batch, heads, queries, keys)
    slopes = arguments_of.checked_slopes(_NAME, alibi_slopes, query, ((heads,), (count, heads)))
    lengths = None
    if key_lengths is not None:
        if not isinstance(key_lengths, torch.Tensor) or key_lengths.dtype not in (torch.int32, torch.int64):
            check.fail(RuntimeError, _NAME, "key_lengths", type(key_lengths).__name__, "an int32 or int64 tensor")
        if tuple(key_lengths.shape) != tuple(batch):
            check.fail(RuntimeError, _NAME, "key_lengths", f"shape {list(key_lengths.shape)}", f"{list(batch)}")
        lengths = key_lengths.reshape(count).long().contiguous()
    mask, mask_examples = arguments_of.folded_mask(mask, batch, query.dtype)
    q = arguments_of.folded(q, batch, heads).contiguous()
    k, v = (arguments_of.folded(t, batch, key_heads) for t in (k, v))
    state = random.draw(query.device) if dropout_p > 0 else None
    o, lse = attend(_NAME, q, k, v, mask, mask_examples, lengths, None, None, slopes, state, *constants, queries, keys)
    shape = (*batch, heads, queries) if query.dim() > 2 or key.dim() > 2 or value.dim() > 2 else (queries,)
    o = o.reshape(*shape, value.shape[-1])
    return (o, lse.reshape(shape)) if return_lse else o


def attention_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    causal: Literal["top_left", "bottom_right"] | None = None,
    window: int | tuple[int, int] | None = None,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention within each of B sequences that lie one after the other in packed tensors.

    Sequence b has the queries ``cu_seqlens_q[b] : cu_seqlens_q[b + 1]`` and the keys
    ``cu_seqlens_k[b] : cu_seqlens_k[b + 1]``; it is computed as scaled_dot_product_attention would.

    Args:
        query: Tensor[T, H, D], float32, float64, bfloat16 or float16.
        key: Tensor[U, K, D]; H is a multiple of K, neighbouring query heads share a key head.
        value: Tensor[U, K, E].
        cu_seqlens_q: int32 or int64 Tensor[B + 1], increasing from 0 to T.
        cu_seqlens_k: the same for keys, from 0 to U; cu_seqlens_q by default.
        max_seqlen_q: length of the longest sequence of queries, or more; read from cu_seqlens_q by default, which on a
            GPU waits for the device, and which torch.compile(fullgraph=True) cannot do: give it there.
        max_seqlen_k: the same for keys.
        dropout_p, is_causal, scale, causal, window, alibi_slopes, softcap: as in scaled_dot_product_attention.
        return_lse: also return the log-sum-exp of the scores.

    Returns:
        Tensor[T, H, E]; with return_lse also Tensor[H, T], float32 (float64 for float64).

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit together; offsets that are not increasing from 0 to
            the number of rows, or a max_seqlen that a sequence exceeds (on a GPU: by a device-side assertion).

    Source: the varlen interface of FlashAttention. Numerics, determinism and derivatives as
    scaled_dot_product_attention.
    """
    query, key, value, _ = arguments_of.lowered(_VARLEN, query, key, value)
    arguments_of.check_inputs(_VARLEN, query, key, value, 3)
    for name, t in (("query", query), ("key", key), ("value", value)):
        if t.dim() != 3:
            check.fail(RuntimeError, _VARLEN, name, f"{t.dim()} dimensions", "3: [rows, heads, head size]")
    constants = arguments_of.scalars(_VARLEN, query, dropout_p, is_causal, scale, causal, window, softcap)
    if key.shape[:2] != value.shape[:2]:
        check.fail(RuntimeError, _VARLEN, "value", f"shape {list(value.shape)}", "the rows and heads of key")
    heads, key_heads = query.shape[1], key.shape[1]
    if heads != key_heads and (key_heads == 0 or heads % key_heads != 0):
        check.fail(RuntimeError, _VARLEN, "key", f"{key_heads} heads", f"a divisor of query's {heads}")
    cu_q = arguments_of.checked_offsets(_VARLEN, "cu_seqlens_q", cu_seqlens_q, query.shape[0], query)
    cu_k = cu_q
    if cu_seqlens_k is not None:
        cu_k = arguments_of.checked_offsets(_VARLEN, "cu_seqlens_k", cu_seqlens_k, key.shape[0], query)
    if cu_seqlens_k is None and key.shape[0] != query.shape[0]:
        check.fail(RuntimeError, _VARLEN, "cu_seqlens_k", "None", f"offsets of the {key.shape[0]} rows of key")
    if len(cu_k) != len(cu_q):
        check.fail(RuntimeError, _VARLEN, "cu_seqlens_k", f"{len(cu_k)} offsets", f"{len(cu_q)}, as cu_seqlens_q")
    max_q = arguments_of.longest(_VARLEN, "max_seqlen_q", max_seqlen_q, cu_q)
    max_k = arguments_of.longest(_VARLEN, "max_seqlen_k", max_seqlen_k, cu_k)
    slopes = arguments_of.checked_slopes(_VARLEN, alibi_slopes, query, ((heads,), (len(cu_q) - 1, heads)))
    state = random.draw(query.device) if dropout_p > 0 else None
    o, lse = _attend(
        _VARLEN, query.contiguous(), key.contiguous(), value.contiguous(), None,
        None, None, cu_q, cu_k, slopes, state, *constants, max_q, max_k,
    )  # fmt: skip
    return (o, lse) if return_lse else o


class MultiheadAttention(torch.nn.MultiheadAttention):
    """torch.nn.MultiheadAttention on pyops.functional.scaled_dot_product_attention.

    Parameters, state_dict and options are torch's. A query that sees no key gives the bias of the output projection,
    where torch gives NaN. With ``need_weights`` the weights [.., L, S] are the result, so the scores are stored.
    """

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of every head over linear projections, then the output projection.

        Args:
            query: Tensor[N, L, embed_dim] with batch_first, Tensor[L, N, embed_dim] without, or Tensor[L, embed_dim].
            key: the same with S and kdim.
            value: the same with S and vdim.
            key_padding_mask: Tensor[N, S] or Tensor[S]; bool: True is ignored; floating: added to the scores.
            need_weights: also return the weights.
            attn_mask: Tensor[L, S] or Tensor[N * num_heads, L, S]; bool: True is *not* allowed; floating: added.
            average_attn_weights: return the mean of the weights over the heads, else [N, num_heads, L, S].
            is_causal: a hint that attn_mask is the causal mask. As in torch it is not read then, but for need_weights
                or with a key_padding_mask; with add_bias_kv or add_zero_attn it is read here, so that queries see the
                added keys (torch hides those from every query i < S).

        Returns:
            The output in the layout of query, and the weights or None.

        Raises:
            AssertionError: numbers of dimensions, sizes or key_padding_mask that do not fit; integer masks.
            RuntimeError: another batch, an attn_mask of another shape or dtype; is_causal without attn_mask.
        """
        op = "MultiheadAttention"
        batched = self._check_shapes(op, query, key, value, key_padding_mask, attn_mask)
        if is_causal and attn_mask is None:
            check.fail(RuntimeError, op, "attn_mask", "None", "a mask together with the is_causal hint")
        inputs = (query, key, value)
        if not batched:
            inputs = tuple(t[None] for t in inputs)
        elif not self.batch_first:
            inputs = tuple(t.transpose(0, 1) for t in inputs)
        n = inputs[0].shape[0]
        weights: Any = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        if self._qkv_same_embed_dim:
            weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (product.linear(t, w, b) for t, w, b in zip(inputs, weights, biases))
        added = 0
        if self.bias_k is not None and self.bias_v is not None:
            added += 1
            k = torch.cat([k, self.bias_k.to(k.dtype).expand(n, 1, -1)], 1)
            v = torch.cat([v, self.bias_v.to(v.dtype).expand(n, 1, -1)], 1)
        if self.add_zero_attn:
            added += 1
            k, v = (torch.cat([t, t.new_zeros(n, 1, t.shape[-1])], 1) for t in (k, v))
        q, k, v = (t.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for t in (q, k, v))

        causal = is_causal and not need_weights and added == 0 and key_padding_mask is None
        mask = self._mask(op, key_padding_mask, None if causal else attn_mask, n, q.shape[2], k.shape[2] - added, q)
        if added and mask is not None:
            mask = torch.nn.functional.pad(mask, (0, added), value=True if mask.dtype == torch.bool else 0.0)
        dropout = self.dropout if self.training else 0.0
        shares = None
        if need_weights:
            o, shares = with_weights(q, k, v, mask, dropout)
        else:
            aligned: Literal["top_left"] | None = "top_left" if causal else None
            o = scaled_dot_product_attention(q, k, v, mask, dropout, causal=aligned)
        y = self.out_proj(o.transpose(1, 2).flatten(2))
        if shares is not None:
            shares = shares.mean(1) if average_attn_weights else shares
            shares = shares if batched else shares[0]
        return (y[0] if not batched else y if self.batch_first else y.transpose(0, 1)), shares

    def _check_shapes(self, op, query, key, value, padding, mask) -> bool:
        """Whether the input is batched, with the exceptions of torch."""
        rank = query.dim()
        if rank not in (2, 3):
            check.fail(AssertionError, op, "query", f"{rank} dimensions", "3, or 2 without a batch")
        for name, t in (("key", key), ("value", value)):
            if t.dim() != rank:
                check.fail(AssertionError, op, name, f"{t.dim()} dimensions", f"{rank}, as query")
        if padding is not None and padding.dim() != rank - 1:
            check.fail(AssertionError, op, "key_padding_mask", f"{padding.dim()} dimensions", f"{rank - 1}")
        if mask is not None and mask.dim() not in (2, 3):
            check.fail(AssertionError, op, "attn_mask", f"{mask.dim()} dimensions", "2 or 3")
        unbatched = (self.num_heads, query.shape[0], key.shape[0])
        if rank == 2 and mask is not None and mask.dim() == 3 and mask.shape != unbatched:
            check.fail(AssertionError, op, "attn_mask", f"shape {list(mask.shape)}", f"{list(unbatched)}")
        if query.shape[-1] != self.embed_dim:
            check.fail(AssertionError, op, "query", f"size {query.shape[-1]}", f"{self.embed_dim}")
        same = key.shape[:-1] == value.shape[:-1] if not self._qkv_same_embed_dim else key.shape == value.shape
        if not same:
            check.fail(
                AssertionError, op, "value", f"shape {list(value.shape)}", f"keys and batch of {list(key.shape)}"
            )
        for name, t, width in (("key", key, self.kdim), ("value", value, self.vdim)):
            if t.shape[-1] != width:
                check.fail(RuntimeError, op, name, f"size {t.shape[-1]}", f"{width}")
        at = 0 if self.batch_first else 1
        if rank == 3 and key.shape[at] != query.shape[at]:
            check.fail(RuntimeError, op, "key", f"shape {list(key.shape)}", f"a batch of {query.shape[at]}, as query")
        return rank == 3

    def _mask(self, op, padding, mask, n, queries, keys, like):
        """Both masks as one that broadcasts to [N, H, L, S]: bool where True takes part, or added to the scores."""
        parts = []
        if padding is not None:
            if tuple(padding.shape) not in ((n, keys), (keys,)):
                check.fail(AssertionError, op, "key_padding_mask", f"shape {list(padding.shape)}", f"{[n, keys]}")
            parts.append(("key_padding_mask", padding.reshape(n, 1, 1, keys)))
        if mask is not None:
            full = (n * self.num_heads, queries, keys)
            if tuple(mask.shape) not in (full[1:], full):
                got, expected = f"shape {list(mask.shape)}", f"{list(full[1:])} or {list(full)}"
                check.fail(RuntimeError, op, "attn_mask", got, expected)
            split = (n, self.num_heads, queries, keys) if mask.dim() == 3 else (1, 1, queries, keys)
            parts.append(("attn_mask", mask.reshape(split)))
        for name, part in parts:
            if part.dtype != torch.bool and not part.is_floating_point():
                check.fail(AssertionError, op, name, part.dtype, "bool or a floating dtype")
        if all(part.dtype == torch.bool for _, part in parts):
            allowed = [~part for _, part in parts]
            return None if not allowed else allowed[0] if len(allowed) == 1 else allowed[0] & allowed[1]
        wide = check.accumulate_dtype(like.dtype)
        floats = [(name, part.dtype) for name, part in parts if part.dtype != torch.bool]
        low = autocast.enabled(like)
        for name, dtype in floats:
            if (dtype == torch.float64 if low else dtype not in (like.dtype, torch.float32)) and dtype != like.dtype:
                check.fail(RuntimeError, op, name, dtype, f"bool, float32 or {like.dtype}, as the projections")
        if len(parts) == 1:
            return parts[0][1]
        zero = torch.zeros((), dtype=wide, device=like.device)
        summands = [zero.masked_fill(p, -math.inf) if p.dtype == torch.bool else p.to(wide) for _, p in parts]
        return summands[0] + summands[1]


def _accepts(query: Any = None, *_: Any, **__: Any) -> str | None:
    if isinstance(query, torch.Tensor) and query.dtype not in check.FLOATING:
        return str(query.dtype).replace("torch.", "dtype ")
    return None


explains(_NAME, blocking.attention)
route((torch.nn.functional.scaled_dot_product_attention,), _NAME, scaled_dot_product_attention, _accepts)


def _oracle(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False,
            causal=None, key_lengths=None, window=None, alibi_slopes=None, softcap=None, return_lse=False):  # fmt: skip
    """scaled_dot_product_attention in plain torch; tests hold it against torch's own."""
    return _sdpa(
        lambda op, *arguments: reference(*arguments), query, key, value, attn_mask, dropout_p, is_causal, scale,
        enable_gqa, causal, key_lengths, window, alibi_slopes, softcap, return_lse,
    )  # fmt: skip


def _sample(q, k, v, mask=None, slopes=None, lengths=None, **options):
    def make(t: Maker):
        given: dict[str, Any] = dict(options)
        arguments = (t.input(q), t.input(k), t.input(v))
        if mask == "additive":
            given["attn_mask"] = t.constant((q[-2], k[-2]))
        elif mask is not None:
            allowed = t.constant((q[0], 1, q[-2], k[-2])) > 0
            allowed[0, 0, 1] = False  # a query that sees nothing
            given["attn_mask"] = allowed
        if slopes is not None:
            given["alibi_slopes"] = t.constant(slopes, positive=True)
        if lengths is not None:
            given["key_lengths"] = torch.tensor(lengths, device=t.device)
        return arguments, given

    return make


checked(
    _NAME,
    scaled_dot_product_attention,
    _oracle,
    Sample(
        "causal, grouped heads, another value size",
        _sample((1, 2, 2, 2), (1, 1, 3, 2), (1, 1, 3, 1), is_causal=True, enable_gqa=True, scale=0.7),
        derivatives=True,
    ),
    Sample(
        "a query that sees nothing", _sample((1, 1, 2, 2), (1, 1, 3, 2), (1, 1, 3, 2), mask="boolean"), derivatives=True
    ),
    Sample(
        "everything at once, with lse",
        _sample(
            (2, 1, 2, 2),
            (2, 1, 3, 2),
            (2, 1, 3, 1),
            "additive",
            (1,),
            (2, 3),
            causal="bottom_right",
            window=(2, 0),
            softcap=1.5,
            return_lse=True,
        ),
        derivatives=True,
    ),
    Sample("tail of a tile", _sample((2, 3, 9, 4), (2, 3, 7, 4), (2, 3, 7, 4), mask="boolean")),
    Sample(
        "grouped heads over several tiles",
        _sample(
            (2, 4, 20, 8),
            (2, 2, 70, 8),
            (2, 2, 70, 8),
            "additive",
            (4,),
            (40, 70),
            softcap=3.0,
            enable_gqa=True,
        ),
    ),
    Sample("several tiles", _sample((1, 2, 70, 32), (1, 2, 100, 32), (1, 2, 100, 24))),
    Sample("several tiles, causal", _sample((1, 1, 100, 16), (1, 1, 100, 16), (1, 1, 100, 16), is_causal=True)),
    Sample(
        "window over several tiles",
        _sample((1, 1, 90, 8), (1, 1, 130, 8), (1, 1, 130, 8), causal="bottom_right", window=(40, 0), slopes=(1, 1)),
    ),
    Sample("heads between two widths", _sample((1, 1, 9, 72), (1, 1, 20, 72), (1, 1, 20, 130))),
    Sample("no keys", _sample((1, 2, 3, 4), (1, 2, 0, 4), (1, 2, 0, 4))),
    Sample("no queries", _sample((1, 2, 0, 4), (1, 2, 3, 4), (1, 2, 3, 4))),
    Sample("two dimensions", _sample((3, 4), (5, 4), (5, 4))),
)
