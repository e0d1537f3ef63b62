"""How the CPU kernels cut their work, in words: what the rooms hand to ``explains``.

The numbers come from the compiled kernels' own headers (csrc/cpu/blocking.h, conv_choice.h) through ``pyops._host``;
where that module was not built, nothing is said. Layouts and strides are not known here: notes on planes hold for
contiguous inputs.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any

import torch

from . import library

_VECTOR_BYTES = {"baseline": 16, "avx2": 32, "avx512": 64}


def _plan(function: str, *sizes: Any) -> dict[str, Any] | None:
    try:
        host = importlib.import_module("pyops._host")
    except ImportError:
        return None
    plan: dict[str, Any] = getattr(host, function)(*sizes)
    return plan


def _stores(streamed: bool, what: str) -> str:
    return f"{what} is written {'past the caches' if streamed else 'through the caches'}"


def rows(shape: Sequence[int], columns: int, dtype: torch.dtype, grouped: bool) -> list[str]:
    """Notes on rows [M, N]; ``grouped``: the op works on several short rows at a time."""
    count = math.prod(shape) // columns if columns > 0 else 0
    plan = _plan("row_blocking", count, columns, dtype.itemsize)
    if plan is None:
        return []
    if plan["shared"]:
        notes = [f"{count} rows of {columns}: the threads share each row in blocks of {plan['block']}"]
    else:
        notes = [f"{count} rows of {columns}: a thread takes whole rows"]
    forward, backward = plan["forward_group"] if grouped else 1, plan["backward_group"] if grouped else 1
    at_a_time = {1: "one row", 2: "two rows", 4: "four rows"}
    if not plan["shared"]:
        notes.append(f"forward: {at_a_time[forward]} at a time; backward: {at_a_time[backward]} at a time")
    vector = _VECTOR_BYTES[library.cpu_capability() or "baseline"]
    aligned = columns * dtype.itemsize % vector == 0
    notes.append(_stores(plan["streamed"] and (forward == 1 or aligned), "the output"))
    return notes


def planes(shape: Sequence[int], dtype: torch.dtype, statistic: str) -> list[str]:
    """Notes on contiguous [N, C, *]; a ``statistic`` belongs to a ``"channel"`` of all samples, a ``"group"`` of
    channels of one sample, or a ``"plane"``."""
    n, c, positions = shape[0], shape[1], math.prod(shape[2:])
    plan = _plan("plane_blocking", n, c, positions, dtype.itemsize)
    if plan is None:
        return []
    size = f"{n} x {c} planes of {positions}"
    if positions == 1:
        notes = [f"{size}: lanes over channels, in rows of {c}"]
    else:
        notes = [f"{size}: a thread takes whole {statistic}s, in blocks of {plan['block']}"]
    return [*notes, _stores(plan["streamed"], "the output")]


def convolution(*arguments: Any) -> dict[str, Any] | None:
    """What csrc/host/module.cpp's conv_plan says of a convolution and its gradients; None where it was not built."""
    return _plan("conv_plan", *arguments)


def attention(shapes: Sequence[Sequence[int]], dtype: torch.dtype, backend: str) -> list[str]:
    """Notes on the kernel that attention of query, key and value takes, by the conditions of the kernels themselves.

    Whether a GPU has Hopper's products, and processors to fill with parts of the keys, is not asked here.
    """
    if len(shapes) < 2 or min(len(shape) for shape in shapes) < 2:
        return ["give the shapes of query, key and value to see the kernel"]
    query, key, value = shapes[0], shapes[1], shapes[2] if len(shapes) > 2 else shapes[1]
    heads, key_heads = (shape[-3] if len(shape) > 2 else 1 for shape in (query, key))
    plan = _plan("attention_choice", query[-2], key[-2], heads // max(key_heads, 1), query[-1], value[-1])
    if plan is None or backend not in ("cpu", "cuda", "emulator"):
        return []
    if backend == "cpu":
        if plan["few"]:
            return ["few queries: keys are read once, where they are, in parts that are merged in order"]
        return ["blocks of queries through blocks of keys, which are transposed once"]
    if dtype == torch.float64:
        return ["CUDA cores"]
    half = dtype != torch.float32
    notes = ["tensor cores (mma)" if half else "CUDA cores"]
    if half and plan["hopper"]:
        notes.insert(0, "on compute capability 9.0: warpgroup products fed by TMA")
    if plan["decode"]:
        notes.insert(
            0, "forward: keys in parts for a few blocks per processor, merged in order, where that is more than one"
        )
    return notes
