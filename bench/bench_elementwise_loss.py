"""Losses element by element, reduced to their mean in the pass that reads the input."""

from typing import Any

import torch

from .case import Case, Function, Provider, with_both_directions
from .peers import standard_providers

STEM = "elementwise_loss"
OPS = (
    "mse_loss", "smooth_l1_loss", "binary_cross_entropy_with_logits", "kl_div", "l1_loss", "huber_loss",
    "binary_cross_entropy",
)  # fmt: skip
QUICK = ("mse_loss", "binary_cross_entropy_with_logits")
SMALL = 1024  # a loss over little is the price of a call


def cases(device: str) -> list[Case]:
    shape, dtype = ((4096, 1024), torch.float32) if device == "cpu" else ((32768, 4096), torch.bfloat16)
    found = [Case(op, shape, dtype, device, quick=op in QUICK, output=(), args=arguments(op)) for op in OPS]
    return with_both_directions([*found, Case("mse_loss", (SMALL,), dtype, device, output=())])


def arguments(op: str) -> dict[str, Any]:
    return {"reduction": "batchmean"} if op == "kl_div" else {}


def tiny(device: str) -> list[Case]:
    found = [Case(op, (3, 1400), device=device, backward=True, output=(), args=arguments(op)) for op in OPS]
    return [*found, Case("mse_loss", (3, 70), device=device, backward=True, args={"reduction": "none"})]


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    return {"target": case.shape}


def bytes(case: Case) -> int:
    """Forward x, t → a number; backward x, t → dx, dt."""
    y = case.numel if case.output is None else 1
    return (2 * case.numel * (1 + 2 * case.backward) + y) * case.dtype.itemsize


def flops(case: Case) -> int:
    """A handful of operations; ten more for each exponential and logarithm."""
    each = {
        "mse_loss": 3, "l1_loss": 2, "smooth_l1_loss": 6, "huber_loss": 6, "binary_cross_entropy_with_logits": 28,
        "binary_cross_entropy": 54, "kl_div": 14,
    }[case.op]  # fmt: skip
    return case.numel * each * (1 + case.backward)


def bind(functional: Any, case: Case) -> Function:
    """Probabilities are made of ``x`` and ``target``, in every provider alike."""
    function = getattr(functional, case.op)
    if case.op == "binary_cross_entropy":
        return lambda t: function(t["x"].sigmoid(), t["target"].sigmoid())
    return lambda t: function(t["x"], t["target"], **case.args)


def providers(case: Case) -> dict[str, Provider]:
    return standard_providers(bind, case)
