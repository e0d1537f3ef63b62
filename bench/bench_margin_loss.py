"""multi_margin_loss: the hinge over the classes of a linear support vector machine."""

from typing import Any

import torch

from .case import Case, Function, Provider, with_both_directions
from .peers import standard_providers

STEM = "margin_loss"
OPS = ("multi_margin_loss",)


def cases(device: str) -> list[Case]:
    shape = (32768, 1000) if device == "cuda" else (4096, 1000)
    return with_both_directions([Case("multi_margin_loss", shape, device=device, quick=True, output=())])


def tiny(device: str) -> list[Case]:
    shapes = ((3, 17), (2, 1100))
    return [Case("multi_margin_loss", shape, device=device, backward=True, output=()) for shape in shapes]


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    return {}


def bytes(case: Case) -> int:
    """Forward x; backward x → dx."""
    return case.numel * case.dtype.itemsize * (1 + 2 * case.backward)


def flops(case: Case) -> int:
    """A difference, a comparison and a sum."""
    return case.numel * 3 * (1 + case.backward)


def bind(functional: Any, case: Case) -> Function:
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, case.shape[1], case.shape[:1], generator=generator).to(case.device)
    return lambda t: functional.multi_margin_loss(t["x"], target)


def providers(case: Case) -> dict[str, Provider]:
    return standard_providers(bind, case)
