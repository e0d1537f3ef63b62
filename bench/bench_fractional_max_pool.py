"""fractional_max_pool2d and 3d with given places, so that results can be compared."""

import math
from typing import Any

import torch

from .case import Case, Function, Provider, with_both_directions
from .peers import standard_providers

STEM = "fractional_max_pool"
OPS = ("fractional_max_pool2d", "fractional_max_pool3d")


def pool(shape: tuple[int, ...], out: int, device: str, quick: bool = False) -> Case:
    rank = len(shape) - 2
    output = (*shape[:2], *(out,) * rank)
    return Case(f"fractional_max_pool{rank}d", shape, device=device, quick=quick, args={"out": out}, output=output)


def cases(device: str) -> list[Case]:
    if device == "cuda":
        return with_both_directions([pool((64, 64, 112, 112), 79, device, quick=True)])
    return with_both_directions(
        [pool((8, 64, 112, 112), 79, device, quick=True), pool((1, 32, 28, 28, 28), 19, device)]
    )


def tiny(device: str) -> list[Case]:
    return with_both_directions([pool((1, 3, 11, 10), 7, device), pool((1, 2, 7, 6, 8), 4, device)])


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    return {}


def bytes(case: Case) -> int:
    """Forward x → y and int64 places; backward dy and the places → dx."""
    y = math.prod(case.output or ()) * (case.dtype.itemsize + 8)
    return (case.numel * case.dtype.itemsize + y) * (1 + case.backward)


def flops(case: Case) -> int:
    """Four comparisons for each window, eight in three dimensions."""
    return math.prod(case.output or ()) * 2 ** (len(case.shape) - 2) * (1 + case.backward)


def bind(functional: Any, case: Case) -> Function:
    rank = len(case.shape) - 2
    u = torch.rand(*case.shape[:2], rank, generator=torch.Generator().manual_seed(0)).to(case.device)
    pool_ = getattr(functional, case.op)
    return lambda t: pool_(t["x"], 2, case.args["out"], None, False, u.to(t["x"].dtype))


def providers(case: Case) -> dict[str, Provider]:
    return standard_providers(bind, case)
