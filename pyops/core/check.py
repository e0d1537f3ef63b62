"""Argument checks: the exception type torch raises, naming op, argument, what was got and what was expected."""

from __future__ import annotations

import operator
from typing import Any, NoReturn

import torch

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def fail(kind: type[Exception], op: str, argument: str, got: Any, expected: str) -> NoReturn:
    """Raises ``kind`` with the one message form of pyops."""
    raise kind(f"{op}: argument '{argument}': got {got}, expected {expected}")


def floating(op: str, argument: str, x: torch.Tensor) -> None:
    """x is a tensor of a floating dtype that pyops has kernels for."""
    if not isinstance(x, torch.Tensor):
        fail(TypeError, op, argument, type(x).__name__, "a tensor")
    if x.dtype not in FLOATING:
        fail(NotImplementedError, op, argument, x.dtype, "float32, float64, bfloat16 or float16")


def affine(op: str, x: torch.Tensor, shape: tuple[int, ...], **parameters: torch.Tensor | None) -> None:
    """Each given parameter has this shape, x's device, and x's dtype or the dtype of its sums."""
    dtype = None
    for name, p in parameters.items():
        if p is None:
            continue
        if not isinstance(p, torch.Tensor):
            fail(TypeError, op, name, type(p).__name__, "a tensor or None")
        if p.shape != shape:
            fail(RuntimeError, op, name, f"shape {list(p.shape)}", f"shape {list(shape)}")
        if p.device != x.device:
            fail(RuntimeError, op, name, f"a tensor on {p.device}", f"one on {x.device}, as the input")
        if p.dtype != x.dtype and p.dtype != accumulate_dtype(x.dtype):
            wide = accumulate_dtype(x.dtype)
            fail(RuntimeError, op, name, p.dtype, f"{x.dtype} or {wide} for an input of {x.dtype}")
        if dtype is not None and p.dtype != dtype:
            fail(RuntimeError, op, name, p.dtype, f"{dtype}, as the other parameters")
        dtype = p.dtype


def non_negative(op: str, argument: str, value: float) -> None:
    """A scalar that must be a number >= 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        fail(TypeError, op, argument, type(value).__name__, "a number")
    if not value >= 0:
        fail(ValueError, op, argument, value, "a number >= 0")


def ints(op: str, argument: str, value: Any, count: int, spread: bool = False) -> list[int]:
    """One int for every dimension, from an int or a sequence; ``spread``: a sequence of one serves all as well."""
    if type(value) is int:
        return [value] * count
    values = [value] * count if isinstance(value, int) else value
    if not isinstance(values, (list, tuple)) or not all(isinstance(v, int) for v in values):
        fail(TypeError, op, argument, repr(value), f"an int or a sequence of {count} ints")
    values = list(values) * count if spread and len(values) == 1 else list(values)
    if len(values) != count:
        fail(RuntimeError, op, argument, values, f"an int or {count} ints")
    return values


def outside(
    kind: type[Exception], op: str, argument: str, numbers: torch.Tensor, count: int, ignore: int | None = None
) -> NoReturn:
    """Of ``numbers`` one is outside [0, count), as a kernel found: which one, in the name of the public op."""
    got = "a number"
    if not torch._C._are_functorch_transforms_active():  # there nothing has a value
        strays = (numbers < 0) | (numbers >= count)
        got = str(int(numbers[strays if ignore is None else strays & (numbers != ignore)][0]))
    wanted = f"numbers in [0, {count})" + ("" if ignore is None else f" or ignore_index {ignore}")
    fail(kind, op, argument, f"{got} out of bounds", wanted)


def broadcast(op: str, name: str, x: torch.Tensor, other: str, shape: torch.Size) -> torch.Size:
    """The shape to which x and ``shape``, that of another argument, broadcast."""
    try:
        return torch.broadcast_shapes(x.shape, shape)
    except RuntimeError:
        fail(
            RuntimeError, op, name, f"shape {list(x.shape)}", f"one that broadcasts with {list(shape)}, that of {other}"
        )


def sides(op: str, argument: str, value: Any, count: int, low: int) -> list[int]:
    """One integer >= low for every dimension, from one or a sequence of one or ``count``, as torch reads them."""
    if type(value) is int and value >= low:
        return [value] * count
    if is_integer(value):
        values = [value] * count
    elif isinstance(value, (list, tuple)) and all(is_integer(v) or isinstance(v, bool) for v in value):
        values = list(value)
    else:
        fail(TypeError, op, argument, repr(value), f"an integer or {count}")
    values = [v if isinstance(v, (int, torch.SymInt)) else operator.index(v) for v in values]
    if len(values) == 1:
        values *= count
    if len(values) != count:
        fail(RuntimeError, op, argument, value, f"an integer or {count}")
    for v in values:
        if v < low:
            fail(RuntimeError, op, argument, value, f"integers >= {low}")
    return values


def is_integer(value: Any) -> bool:
    """Whether torch takes a value as one integer: no bool, but NumPy's integers and a tensor of one integer."""
    if isinstance(value, (int, torch.SymInt)):
        return not isinstance(value, bool)
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and not value.is_floating_point() and value.dtype != torch.bool
    return hasattr(value, "__index__")


def exact(*sizes: Any) -> bool:
    """Integers, tuples of integers or words: what equals one of these means the same, as True and 1.0 do not."""
    return all(type(s) is int or type(s) is str or (type(s) is tuple and set(map(type, s)) == {int}) for s in sizes)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over elements of ``dtype``: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def normalized_shape(op: str, x: torch.Tensor, shape: Any) -> tuple[int, ...]:
    """The trailing sizes to normalise over, as a tuple that fits x."""
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    if not sizes:
        fail(RuntimeError, op, "normalized_shape", list(sizes), "at least one dimension")
    if x.shape[-len(sizes) :] != sizes:
        fail(RuntimeError, op, "normalized_shape", list(sizes), f"the last sizes of an input of shape {list(x.shape)}")
    return sizes


def statistics(op: str, x: torch.Tensor, shape: tuple[int, ...], **running: torch.Tensor | None) -> None:
    """Each given running statistic is a floating tensor of this shape on x's device."""
    for name, t in running.items():
        if t is None:
            continue
        floating(op, name, t)
        if tuple(t.shape) != shape:
            fail(RuntimeError, op, name, f"shape {list(t.shape)}", f"shape {list(shape)}")
        if t.device != x.device:
            fail(RuntimeError, op, name, f"a tensor on {t.device}", f"one on {x.device}, as the input")
