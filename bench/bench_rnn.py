"""rnn_tanh_cell, rnn_relu_cell: one step of an RNN."""

from typing import Any

import torch

from .case import Case, Function, Provider, with_both_directions
from .peers import standard_providers

STEM = "rnn"
OPS = ("rnn_tanh_cell", "rnn_relu_cell")
CENTRED = ("w_ih", "w_hh", "b_ih", "b_hh")
MATRIX = True
GATES = 1


def cell(op: str, batch: int, size: int, dtype: torch.dtype, device: str, quick: bool = False) -> Case:
    """A step from as many features as hidden units."""
    return Case(op, (batch, size), dtype, device, quick=quick)


def cases(device: str) -> list[Case]:
    if device == "cpu":
        sizes, dtype = [(16, 256), (1, 512), (256, 512)], torch.float32
    else:
        sizes, dtype = [(64, 1024), (1, 1024), (4096, 512)], torch.bfloat16
    cells = [cell(op, *size, dtype, device, quick=i == 0) for op in OPS for i, size in enumerate(sizes)]
    return with_both_directions(cells)


def tiny(device: str) -> list[Case]:
    return [Case(op, (3, 17), device=device, backward=True) for op in OPS]


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    size = case.shape[-1]
    state = {"h": case.shape, "c": case.shape} if GATES == 4 else {"h": case.shape}
    weights = dict.fromkeys(("w_ih", "w_hh"), (GATES * size, size))
    return {**state, **weights, **dict.fromkeys(("b_ih", "b_hh"), (GATES * size,))}


def bytes(case: Case) -> int:
    """Forward: every tensor once, and the states written; backward: the same and a gradient of each."""
    numels = [torch.Size(s).numel() for s in shapes(case).values()]
    total = case.numel + sum(numels)
    states = case.numel * (2 if GATES == 4 else 1)
    return (total + states + case.backward * (2 * total + states)) * case.dtype.itemsize


def flops(case: Case) -> int:
    """Two products of 2 B (gates H) H, each twice more in the backward pass."""
    batch, size = case.shape
    return 4 * batch * GATES * size * size * (1 + 2 * case.backward)


def bind(functional: Any, case: Case) -> Function:
    # torch's cells are functions of torch itself
    function = getattr(torch if functional is torch.nn.functional else functional, case.op)
    if GATES == 4:
        return lambda t: function(t["x"], (t["h"], t["c"]), t["w_ih"], t["w_hh"], t["b_ih"], t["b_hh"])[0]
    return lambda t: function(t["x"], t["h"], t["w_ih"], t["w_hh"], t["b_ih"], t["b_hh"])


def providers(case: Case) -> dict[str, Provider]:
    return standard_providers(bind, case)
