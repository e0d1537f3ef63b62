"""grid_sample: four scattered reads a channel and point; backward gives both gradients, that of the image in order."""

import math
from typing import Any

import torch

from .case import Case, Function, Provider, with_both_directions
from .peers import standard_providers

STEM = "grid_sample"
OPS = ("grid_sample",)
CENTRED = ("grid",)  # three quarters of the points lie in the image
APART = "grid"


def case_of(shape: tuple[int, ...], out: tuple[int, ...], mode: str, **more: Any) -> Case:
    return Case("grid_sample", shape, args={"out": out, "mode": mode}, output=(*shape[:2], *out), **more)


def cases(device: str) -> list[Case]:
    batch = 4 if device == "cpu" else 64
    found = [
        case_of((batch, 32, 56, 56), (56, 56), "bilinear", device=device, quick=True),
        case_of((batch, 32, 56, 56), (56, 56), "bilinear", device=device, channels_last=True),
        case_of((batch, 32, 56, 56), (56, 56), "nearest", device=device),
        case_of((batch, 3, 224, 224), (224, 224), "bicubic", device=device),
        case_of((1, 8, 16, 32, 32), (16, 32, 32), "bilinear", device=device),
    ]
    return with_both_directions(found)


def tiny(device: str) -> list[Case]:
    return [
        case_of((1, 2, 4, 5), (3, 6), mode, device=device, backward=True) for mode in ("bilinear", "nearest", "bicubic")
    ]


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    out = case.args["out"]
    return {"grid": (case.shape[0], *out, len(out))}


def apart(case: Case, grid: torch.Tensor) -> torch.Tensor:
    """The nearest pixel jumps between two pixels, and the gradients of the others on one: every half pixel."""
    sizes = torch.tensor(case.shape[:1:-1], device=grid.device)
    halves = (grid.double() + 1) * sizes - 1
    from_kink = halves - halves.round()
    moved = grid + from_kink.sign().where(from_kink != 0, 1.0) * 4e-3 / sizes
    return torch.where(from_kink.abs() < 2e-3, moved.to(grid.dtype), grid)


def bytes(case: Case) -> int:
    """Forward x, grid → y; backward x, grid, dy → dx, dgrid."""
    out, points = (
        math.prod(case.output or case.shape),
        case.shape[0] * math.prod(case.args["out"]) * len(case.args["out"]),
    )
    once = case.numel + points + out
    return (once + case.backward * (once + case.numel + points)) * case.dtype.itemsize


def flops(case: Case) -> int:
    """A product and a sum for each tap and channel, twice as many again for each gradient."""
    taps = {"nearest": 1, "bilinear": 2, "bicubic": 4}[case.args["mode"]] ** len(case.args["out"])
    return 2 * taps * math.prod(case.output or case.shape) * (1 + 2 * case.backward)


def bind(functional: Any, case: Case) -> Function:
    return lambda t: functional.grid_sample(t["x"], t["grid"], case.args["mode"], "zeros", False)


def providers(case: Case) -> dict[str, Provider]:
    return standard_providers(bind, case)
