"""How the kernels cut their work, in words: what the rooms hand to ``explains``.

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


class _Attention:
    """Sizes of one call of attention, and what the kernels' own conditions say of them."""

    def __init__(self, shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> None:
        query, key, value = shapes[0], shapes[1], shapes[2] if len(shapes) > 2 else shapes[1]
        self.dtype = dtype
        self.heads, key_heads = (shape[-3] if len(shape) > 2 else 1 for shape in (query, key))
        self.batch, self.groups = math.prod(query[:-3]), self.heads // max(key_heads, 1)
        self.queries, self.keys, self.value_width = query[-2], key[-2], value[-1]
        self.width = max(query[-1], value[-1])
        self.plan = _plan("attention_choice", self.queries, self.keys, self.groups, query[-1], value[-1])
        self.triton: Any = library.triton_kernels("attention")

    def parts(self, backend: str, processors: int) -> int:
        """In how many parts few queries cut the keys on a GPU."""
        sizes = (self.batch, self.heads, self.groups, self.queries, self.keys)
        if backend == "triton":
            return self.triton.parts_of(*sizes, self.dtype, self.width, processors) if self.triton is not None else 0
        if self.dtype == torch.float64 or self.plan is None:
            return 0
        half = self.dtype != torch.float32
        parts: int = importlib.import_module("pyops._host").attention_decode_parts(
            *sizes, self.value_width, half, processors
        )
        return parts


def attention(shapes: Sequence[Sequence[int]], dtype: torch.dtype, backend: str) -> list[str]:
    """Notes on the kernel that attention of query, key and value takes, by the conditions of the kernels themselves.

    Whether a GPU has Hopper's products, and processors to fill with parts of the keys, is not asked here.
    """
    if len(shapes) < 2 or min(len(shape) for shape in shapes) < 2:
        return ["give the shapes of query, key and value to see the kernel"]
    call = _Attention(shapes, dtype)
    if backend == "triton":
        return [] if call.triton is None else _attention_in_triton(call)
    plan = call.plan
    if plan is None:
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


def _attention_in_triton(call: _Attention) -> list[str]:
    fits = f"as {str(call.dtype).removeprefix('torch.')} and {call.width} columns fit shared memory and registers"
    rows, tile, warps = call.triton.tile(call.dtype, call.width)
    notes = []
    if call.parts("triton", 1 << 20) > 0:  # as many processors as it takes
        notes.append(
            f"forward: few queries, {call.triton.FEW} rows of the {call.groups} heads that share keys a program, "
            f"through one part of the keys in tiles of {tile}, 4 warps; parts for two programs per processor, merged "
            "in order" + (", where that is more than one" if call.groups == 1 else "")
        )
    if not notes or call.groups == 1:
        notes.append(f"forward: {rows} queries a program through tiles of {tile} keys, {warps} warps, {fits}")
    rows, tile, warps = call.triton.tile(call.dtype, call.width, True)
    notes.append(
        f"backward: {rows} queries a program through tiles of {tile} keys, then {rows} keys through tiles of {tile} "
        f"queries, {warps} warps, {fits}"
    )
    return notes


def attention_algorithms(shapes: Sequence[Sequence[int]], dtype: torch.dtype, backend: str) -> tuple[str, str]:
    """The kernels, in a word, that a call without extras takes forward and backward on this machine; where it has no
    GPU, those that one of them may take."""
    call = _Attention(shapes, dtype)
    if backend == "cpu":
        return "few queries" if call.plan is not None and call.plan["few"] else "blocks", "blocks"
    gpu = torch.cuda.get_device_properties() if torch.cuda.is_available() else None
    if backend == "triton":
        rows, tile, _ = call.triton.tile(dtype, call.width)
        forward, (rows, tile, _) = f"{rows} x {tile}", call.triton.tile(dtype, call.width, True)
        backward = f"{rows} x {tile}"
    else:
        forward = backward = "plain" if dtype.itemsize > 2 else "mma"
        if dtype.itemsize == 2 and call.plan is not None and call.plan["hopper"]:
            if gpu is None:
                forward = backward = "wgmma or mma"
            elif (gpu.major, gpu.minor) == (9, 0) and "90" in library.cuda_architectures():
                forward = backward = "wgmma"
    if call.parts(backend, 1 << 20 if gpu is None else gpu.multi_processor_count) > 0:
        return "parts of the keys", backward
    return forward, backward
