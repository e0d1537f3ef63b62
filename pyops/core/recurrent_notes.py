"""Which way a recurrent network would go, in words: what the rooms lstm, gru and rnn hand to ``explains``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import library, recurrent

_INTEGERS = ("blocks", "tiles", "cluster", "persistent", "shared", "workspace")
_NO_SHAPES = "give the shapes of input [T, B, I] and of state [layers, B, H], of one direction, to see the choice"


def declare_plan(stem: str) -> library.Op:
    """``<stem>_plan``: what the launch of a layer of D directions, or of D layers side by side, chooses by.

    It runs nothing: ``like`` says device and dtype. Returned are the integers of csrc/cuda/recurrent_stack.cuh, none on
    the CPU, which has no choice.
    """
    return library.declare(
        f"{stem}_plan(Tensor like, int steps, int batch, int directions, int hidden, bool stacked, bool backward)"
        " -> int[]",
        lambda *_: [],
        None,
    )


def explainer(
    gates: int, plan: library.Op, saved: Callable[[torch.Tensor, torch.Tensor], Sequence[torch.Tensor]]
) -> Callable[[Any, torch.dtype, str], Sequence[str]]:
    """Notes on a network of layers of one direction, without projection or dropout, with gradients.

    Args:
        gates: of a unit.
        plan: what ``declare_plan`` made.
        saved: ``(gates [T B, 1, gates H], h0 [1, B, H]) -> tensors`` that a layer keeps for its gradient.
    """

    def notes(shapes: Any, dtype: torch.dtype, name: str) -> Sequence[str]:
        if len(shapes) < 2 or len(shapes[0]) != 3 or len(shapes[1]) != 3 or 0 in (*shapes[0], *shapes[1]):
            return (_NO_SHAPES,)
        (steps, batch, features), (layers, _, hidden) = shapes[:2]
        of_layer = (steps * batch, 1, gates * hidden), (1, batch, hidden)
        kept = saved(*(torch.empty(shape, dtype=dtype, device="meta") for shape in of_layer))
        size = sum(t.numel() * t.element_size() for t in kept)
        first = f"{steps * batch} x {features} x {gates * hidden}"
        inputs = f"inputs of all steps: one matrix product a layer, of the first {first}"
        keeps = f"keeps {size} bytes a layer for its gradient, beside its output"
        if name == "cpu":
            ways = ["one call a layer: its weights are packed once; a thread takes rows, or, where they are few, units"]
        elif name == "triton":
            ways = ["a product and a kernel for each step of each layer"]
        else:
            ways = _on_cuda(plan, gates, shapes, dtype, name)
        return (inputs, *ways, keeps)

    return notes


def _on_cuda(plan: library.Op, gates: int, shapes: Any, dtype: torch.dtype, name: str) -> list[str]:
    (steps, batch, _), (layers, _, hidden) = shapes[:2]
    if library.why_not(name) is not None:
        return ["the kernel is chosen by the GPU's multiprocessors and shared memory: none is here"]
    namespace = library.NAMESPACE_OF[name]
    like = torch.empty((), dtype=dtype, device="cuda" if name == "cuda" else "cpu").expand(shapes[0])
    net = recurrent.Network(like, None, None, (), True, layers, 0.0, False, False, False)
    stacked = recurrent.runs_as_stack(namespace, net, gates, hidden)
    found = []
    if stacked:
        found.append(
            f"{layers} layers side by side, a step apart: {steps + layers - 1} barriers, not {steps * layers}; "
            "all but the first multiply their inputs in the step"
        )
    elif layers > 1:
        found.append(f"{layers} layers, one after the other")
    for backward in (False, True):
        numbers = plan(namespace, like.new_empty(0), steps, batch, layers if stacked else 1, hidden, stacked, backward)
        found.append(f"{'backward' if backward else 'forward'}: {_words(dict(zip(_INTEGERS, numbers)), dtype)}")
    return found


def _words(plan: dict[str, int], dtype: torch.dtype) -> str:
    if plan["cluster"] > 1:
        where = f"tensor cores, states by multicast in clusters of {plan['cluster']}"
    elif plan["tiles"]:
        where = f"tensor cores, {16 * plan['tiles']} rows of weights a block"
    elif dtype in (torch.float32, torch.float64):
        where = "CUDA cores: tensor cores take bfloat16 and float16"
    else:
        where = "CUDA cores: tensor cores take several rows of whole 16 bytes, where they fit"
    launches = "one persistent launch" if plan["persistent"] else "a launch for each step, weights from L2"
    return (
        f"{launches} of {plan['blocks']} blocks on {where}; {plan['shared']} bytes of shared memory a block, "
        f"workspace {plan['workspace']} bytes"
    )
