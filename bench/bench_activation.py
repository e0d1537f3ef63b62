"""activation: element by element, bound by memory; the cheap ones measure the stores, the dear ones the polynomials."""

import dataclasses
from typing import Any

import torch

from .case import Case, Function, Provider, with_both_directions
from .peers import standard_providers

STEM = "activation"
CHEAP = (
    "relu", "hardswish", "prelu", "leaky_relu", "rrelu", "hardsigmoid", "hardtanh", "relu6", "softsign", "hardshrink",
    "softshrink", "threshold",
)  # fmt: skip
DEAR = (
    "gelu", "silu", "mish", "elu", "sigmoid", "tanh", "selu", "celu", "softplus", "logsigmoid", "tanhshrink", "glu",
)  # fmt: skip
OPS = CHEAP + DEAR


def cases(device: str) -> list[Case]:
    batch, dtype = (8, torch.float32) if device == "cpu" else (256, torch.bfloat16)
    return with_both_directions([case_of(op, (batch, 64, 112, 112), dtype, device) for op in OPS])


def case_of(op: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Case:
    output = (shape[0], shape[1] // 2, *shape[2:]) if op == "glu" else None
    args = {"threshold": 0.1, "value": -0.2} if op == "threshold" else {}
    return Case(op, shape, dtype, device, quick=op in ("relu", "gelu"), args=args, output=output)


def tiny(device: str) -> list[Case]:
    ops = ("relu", "gelu", "prelu", "softplus", "glu")
    return [dataclasses.replace(case_of(op, (2, 4, 5, 7), torch.float32, device), backward=True) for op in ops]


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    return {"weight": (case.shape[1],)} if case.op == "prelu" else {}


def bytes(case: Case) -> int:
    """Forward x → y; backward dy, x → dx."""
    y = case.numel // 2 if case.op == "glu" else case.numel
    return (case.numel + y + case.backward * (2 * case.numel + y)) * case.dtype.itemsize


def flops(case: Case) -> int:
    """Some ten operations for a polynomial, one otherwise; the limit is memory in any case."""
    return case.numel * (1 if case.op in CHEAP else 10) * (1 + case.backward)


def bind(functional: Any, case: Case) -> Function:
    function = getattr(functional, case.op)
    if case.op == "prelu":
        return lambda t: function(t["x"], t["weight"])
    if case.op == "glu":
        return lambda t: function(t["x"], 1)
    return lambda t: function(t["x"], **case.args)


def providers(case: Case) -> dict[str, Provider]:
    return standard_providers(bind, case)
