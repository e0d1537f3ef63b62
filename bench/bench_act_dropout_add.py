"""act_dropout_add: three passes of torch in one, each way; bound by memory."""

from typing import Any

import torch

from .case import Case, Function, Provider, with_both_directions
from .peers import standard_providers

STEM = "act_dropout_add"
OPS = ("act_dropout_add",)


def cases(device: str) -> list[Case]:
    args = {"activation": "gelu"}
    if device == "cpu":
        return with_both_directions([Case("act_dropout_add", (4096, 1024), args=args, quick=True)])
    how: dict[str, Any] = {"args": args, "dtype": torch.bfloat16, "device": device}
    return with_both_directions([Case("act_dropout_add", (32768, 4096), quick=True, **how)])


def tiny(device: str) -> list[Case]:
    return [Case("act_dropout_add", (3, 7), args={"activation": "gelu"}, device=device, backward=True)]


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    return {"residual": case.shape}


def bytes(case: Case) -> int:
    """Forward x, r → y; backward dy, x → dx (dy is the gradient of the residual)."""
    return case.numel * case.dtype.itemsize * (3 + 3 * case.backward)


def flops(case: Case) -> int:
    return 12 * case.numel * (1 + case.backward)


def bind(functional: Any, case: Case) -> Function:
    """A p so small that nothing is dropped, so that all providers agree; the numbers are drawn nevertheless."""
    name = case.args["activation"]
    if functional is torch.nn.functional:
        function = getattr(functional, name)
        return lambda t: functional.dropout(function(t["x"]), 1e-12) + t["residual"]
    return lambda t: functional.act_dropout_add(t["x"], t["residual"], 1e-12, name)


def providers(case: Case) -> dict[str, Provider]:
    return standard_providers(bind, case)
