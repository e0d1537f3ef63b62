"""fractional_max_pool2d with given places, so that results can be compared."""

import math
from typing import Any

import torch

from .case import Case, Function, Provider, with_both_directions
from .peers import standard_providers

STEM = "fractional_max_pool"
OPS = ("fractional_max_pool2d",)


def pool(shape: tuple[int, ...], out: int, device: str, quick: bool = False) -> Case:
    return Case(
        "fractional_max_pool2d", shape, device=device, quick=quick, args={"out": out}, output=(*shape[:2], out, out)
    )


def cases(device: str) -> list[Case]:
    shape = (64, 64, 112, 112) if device == "cuda" else (8, 64, 112, 112)
    return with_both_directions([pool(shape, 79, device, quick=True)])


def tiny(device: str) -> list[Case]:
    return with_both_directions([pool((1, 3, 11, 10), 7, device)])


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    return {}


def bytes(case: Case) -> int:
    """Forward x → y and int64 places; backward dy and the places → dx."""
    y = math.prod(case.output or ()) * (case.dtype.itemsize + 8)
    return (case.numel * case.dtype.itemsize + y) * (1 + case.backward)


def flops(case: Case) -> int:
    """Four comparisons for each window."""
    return math.prod(case.output or ()) * 4 * (1 + case.backward)


def bind(functional: Any, case: Case) -> Function:
    u = torch.rand(*case.shape[:2], 2, generator=torch.Generator().manual_seed(0)).to(case.device)
    pool_ = functional.fractional_max_pool2d
    return lambda t: pool_(t["x"], 2, case.args["out"], None, False, u.to(t["x"].dtype))


def providers(case: Case) -> dict[str, Provider]:
    return standard_providers(bind, case)
