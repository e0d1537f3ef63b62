"""Checks of the arguments of attention, and their form for its kernels.

The room is pyops/ops/attention.py; what torch does and pyops leaves to it raises ``Unsupported``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.autograd import forward_ad

from . import autocast, backend, check
from .intercept import Unsupported

# The widest head of the GPU kernels.
WIDEST = 256


def lowered(op: str, query: Any, key: Any, value: Any, mask: Any = None) -> tuple[Any, Any, Any, Any]:
    """query, key, value, mask in the low precision of autocast, if it is active; a mask in float32 stays so."""
    check_tensors(op, query, key, value)
    if not autocast.enabled(query):
        return query, key, value, mask
    query, key, value = autocast.lower(query, key, value)
    if isinstance(mask, torch.Tensor) and mask.dtype in autocast.HALF:
        (mask,) = autocast.lower(mask)
    return query, key, value, mask


def check_tensors(op: str, query: Any, key: Any, value: Any) -> None:
    for name, t in (("query", query), ("key", key), ("value", value)):
        if not isinstance(t, torch.Tensor):
            check.fail(TypeError, op, name, type(t).__name__, "a tensor")


def check_inputs(op: str, query: Any, key: Any, value: Any, rank: int) -> None:
    check_tensors(op, query, key, value)
    for name, t in (("query", query), ("key", key), ("value", value)):
        if t.dtype not in check.FLOATING:
            kind = NotImplementedError if t.is_complex() else RuntimeError
            check.fail(kind, op, name, t.dtype, "float32, float64, bfloat16 or float16")
        if t.dtype != query.dtype or t.device != query.device:
            expected = f"{query.dtype} on {query.device}, as query"
            check.fail(RuntimeError, op, name, f"{t.dtype} on {t.device}", expected)
        if t.dim() < rank:
            check.fail(RuntimeError, op, name, f"{t.dim()} dimensions", f"at least {rank}")
    if key.shape[-1] != query.shape[-1]:
        check.fail(RuntimeError, op, "key", f"head size {key.shape[-1]}", f"{query.shape[-1]}, as query")
    for name, t in (("query", query), ("value", value)):
        if t.shape[-1] == 0:
            check.fail(Unsupported, op, name, "head size 0", "a head size of at least 1")
        if t.shape[-1] > WIDEST and backend.name_for(t.device) != "cpu":
            check.fail(Unsupported, op, name, f"head size {t.shape[-1]}", f"at most {WIDEST}")


def scalars(op, query, dropout_p, is_causal, scale, causal, window, softcap):
    """(scale, softcap, left, right, bottom_right, dropout) as the kernels take them."""
    if not 0 <= dropout_p <= 1:
        check.fail(RuntimeError, op, "dropout_p", dropout_p, "a probability in [0, 1]")
    if causal not in (None, "top_left", "bottom_right"):
        check.fail(ValueError, op, "causal", repr(causal), "'top_left', 'bottom_right' or None")
    left = right = -1
    if window is not None:
        bounds = (window, window) if isinstance(window, int) else window
        if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
            check.fail(ValueError, op, "window", window, "an integer or (left, right)")
        left, right = bounds
        if not (isinstance(left, int) and isinstance(right, int) and left >= -1 and right >= -1):
            check.fail(ValueError, op, "window", window, "(left, right), integers >= 0 or -1 for no bound")
    if is_causal or causal is not None:
        right = 0
    softcap = 0.0 if softcap is None else float(softcap)
    check.non_negative(op, "softcap", softcap)
    if scale is not None and (isinstance(scale, str) or not hasattr(scale, "__float__")):
        check.fail(TypeError, op, "scale", repr(scale), "a number or None")
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    return scale, softcap, left, right, causal == "bottom_right", float(dropout_p)


def checked_slopes(op, slopes, query, shapes):
    if slopes is None:
        return None
    if not isinstance(slopes, torch.Tensor) or tuple(slopes.shape) not in shapes:
        got = list(slopes.shape) if isinstance(slopes, torch.Tensor) else type(slopes).__name__
        check.fail(RuntimeError, op, "alibi_slopes", got, " or ".join(str(list(s)) for s in shapes))
    if slopes.requires_grad:
        check.fail(NotImplementedError, op, "alibi_slopes", "a tensor that requires a gradient", "constants")
    return slopes.to(check.accumulate_dtype(query.dtype)).contiguous()


def _compact(mask: torch.Tensor) -> torch.Tensor:
    """One element in place of each dimension along which a mask merely repeats it."""
    for d in range(mask.dim()):
        if mask.shape[d] > 1 and mask.stride(d) == 0:
            mask = mask.narrow(d, 0, 1)
    return mask


def checked_mask(op, mask, query, batch, heads, queries, keys):
    """The mask with the rank of the scores, [... or 1, H or 1, L or 1, S or 1]."""
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor):
        check.fail(TypeError, op, "attn_mask", type(mask).__name__, "a tensor or None")
    if mask.dtype not in (torch.bool, torch.float32, query.dtype):
        check.fail(RuntimeError, op, "attn_mask", mask.dtype, f"bool, float32 or {query.dtype}, as query")
    if mask.device != query.device:
        check.fail(RuntimeError, op, "attn_mask", f"a tensor on {mask.device}", f"one on {query.device}, as query")
    full = (*batch, heads, queries, keys)
    if mask.dim() == 0:
        check.fail(IndexError, op, "attn_mask", "0 dimensions", f"a shape that broadcasts to {list(full)}")
    sizes = (1,) * (len(full) - mask.dim()) + tuple(mask.shape)
    if len(sizes) != len(full) or any(m not in (1, n) for m, n in zip(sizes, full)):
        check.fail(RuntimeError, op, "attn_mask", f"shape {list(mask.shape)}", f"one that broadcasts to {list(full)}")
    mask = mask.reshape(sizes)
    # a leaf may repeat itself in memory and still want the gradient of each element
    return mask if is_differentiated(mask) else _compact(mask)


def folded_mask(
    mask: torch.Tensor | None, batch: torch.Size, dtype: torch.dtype
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """[M, H or 1, L or 1, S or 1] from [..., H, L, S] as it lies in memory, and which of the M is that of an example:
    None where M is 1 or the number of examples."""
    if mask is None:
        return None, None
    leading = mask.shape[:-3]
    count, chosen = math.prod(leading), None
    if count != 1 and tuple(leading) != tuple(batch):
        chosen = torch.arange(count, device=mask.device).reshape(leading).expand(batch).reshape(-1)
    mask = mask.reshape(count, *mask.shape[-3:])
    wide = check.accumulate_dtype(dtype)
    return mask if mask.dtype in (torch.bool, dtype, wide) else mask.to(wide), chosen


def folded(t: torch.Tensor, batch: torch.Size, heads: int) -> torch.Tensor:
    """[B, heads, rows, width], contiguous; the batch has stride 0 where the examples share it."""
    shape = (*batch, heads, *t.shape[-2:])
    if t.shape != shape:
        if all(n == 1 for n in t.shape[:-3]):  # what the examples share is put in order once
            t = t.contiguous()
        t = t.expand(shape)
    if len(batch) != 1:
        t = t.reshape(math.prod(batch), *shape[-3:])
    return dense_but_for_the_batch(t)


def dense_but_for_the_batch(t: torch.Tensor) -> torch.Tensor:
    """t [B, ...], contiguous, or such that its examples are one example in memory, which is contiguous."""
    if t.is_contiguous():
        return t
    shared = t.shape[0] > 1 and t.stride(0) == 0 and t.narrow(0, 0, 1).is_contiguous()
    return t if shared else t.contiguous()


def is_differentiated(mask: torch.Tensor | None) -> bool:
    if mask is None or mask.dtype == torch.bool:
        return False
    if mask.requires_grad and torch.is_grad_enabled():
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(mask).tangent is not None


# Packed sequences


def checked_offsets(op: str, name: str, cu: Any, rows: int, like: torch.Tensor) -> torch.Tensor:
    if not isinstance(cu, torch.Tensor) or cu.dtype not in (torch.int32, torch.int64) or cu.dim() != 1 or len(cu) < 1:
        got = f"{cu.dtype} of shape {list(cu.shape)}" if isinstance(cu, torch.Tensor) else type(cu).__name__
        check.fail(RuntimeError, op, name, got, "an int32 or int64 tensor [B + 1]")
    if cu.device != like.device:
        check.fail(RuntimeError, op, name, f"a tensor on {cu.device}", f"one on {like.device}, as query")
    right = (cu[0] == 0) & (cu[-1] == rows) & (cu.diff() >= 0).all()
    _expect(right, op, name, cu, f"increasing offsets from 0 to {rows}")
    return cu.long().contiguous()


def longest(op: str, name: str, given: int | None, cu: torch.Tensor) -> int:
    """The length of the longest sequence; of a given one that it is not too small, or rows would not be written."""
    if given is None:
        return int(cu.diff().max()) if len(cu) > 1 else 0
    if not isinstance(given, (int, torch.SymInt)) or isinstance(given, bool):
        check.fail(TypeError, op, name, type(given).__name__, "an integer or None")
    if given < 0:
        check.fail(RuntimeError, op, name, given, "the length of the longest sequence")
    _expect((cu.diff() <= given).all(), op, name, given, "at least the length of the longest sequence")
    return given


def _expect(right: torch.Tensor, op: str, name: str, got: Any, expected: str) -> None:
    """Asks the CPU at once; a GPU, or a compiled program, when it comes to it."""
    if right.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(right, f"{op}: argument '{name}': expected {expected}")
    elif not bool(right):
        check.fail(RuntimeError, op, name, got.tolist() if isinstance(got, torch.Tensor) else got, expected)
