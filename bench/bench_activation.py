"""activation: element by element, bound by memory; the cheap ones measure the stores, the dear ones the polynomials."""

from typing import Any

import torch

from .case import Case, Function, Provider, with_both_directions
from .peers import standard_providers

STEM = "activation"
OPS = ("relu", "gelu", "silu", "mish", "hardswish", "elu", "sigmoid", "prelu")


def cases(device: str) -> list[Case]:
    if device == "cpu":
        shape = (8, 64, 112, 112)
        return with_both_directions([Case(op, shape, quick=op in ("relu", "gelu")) for op in OPS])
    shape = (256, 64, 112, 112)
    return with_both_directions([Case(op, shape, torch.bfloat16, device, quick=op in ("relu", "gelu")) for op in OPS])


def tiny(device: str) -> list[Case]:
    return [Case(op, (2, 3, 5, 7), device=device, backward=True) for op in ("relu", "gelu", "prelu")]


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    return {"weight": (case.shape[1],)} if case.op == "prelu" else {}


def bytes(case: Case) -> int:
    """Forward x → y; backward dy, x → dx."""
    return case.numel * case.dtype.itemsize * (2 + 3 * case.backward)


def flops(case: Case) -> int:
    """Some ten operations for a polynomial, one otherwise; the limit is memory in any case."""
    return case.numel * (1 if case.op in ("relu", "prelu", "hardswish") else 10) * (1 + case.backward)


def bind(functional: Any, case: Case) -> Function:
    function = getattr(functional, case.op)
    if case.op == "prelu":
        return lambda t: function(t["x"], t["weight"])
    return lambda t: function(t["x"])


def providers(case: Case) -> dict[str, Provider]:
    return standard_providers(bind, case)
