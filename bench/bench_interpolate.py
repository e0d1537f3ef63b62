"""interpolate: a few inputs an output, so bound by memory where the kernel is good; backward gathers."""

import math
from typing import Any

from .case import Case, Function, Provider, with_both_directions
from .peers import standard_providers

STEM = "interpolate"
OPS = ("interpolate",)


def case_of(shape: tuple[int, ...], size: tuple[int, ...], mode: str, antialias: bool = False, **more: Any) -> Case:
    args = {"size": size, "mode": mode, **({"antialias": True} if antialias else {})}
    return Case("interpolate", shape, args=args, output=(*shape[:2], *size), **more)


def cases(device: str) -> list[Case]:
    batch = 4 if device == "cpu" else 64
    maps, photo = (batch, 64, 56, 56), (max(batch // 2, 1), 3, 480, 640)
    found = [
        case_of(maps, (112, 112), "bilinear", device=device, quick=True),
        case_of(maps, (112, 112), "nearest", device=device),
        case_of(maps, (112, 112), "bilinear", device=device, channels_last=True),
        case_of(maps, (112, 112), "nearest", device=device, channels_last=True),
        case_of((batch, 16, 56, 56), (112, 112), "bicubic", device=device),
        case_of(photo, (224, 224), "bilinear", True, device=device),
        case_of(photo, (170, 227), "area", device=device, channels_last=True),
        case_of((max(batch // 2, 1), 16, 16, 32, 32), (32, 64, 64), "trilinear", device=device),
        case_of((1, 64, 4096), (8192,), "linear", device=device),
    ]
    return with_both_directions(found)


def tiny(device: str) -> list[Case]:
    found = [
        case_of((1, 2, 5, 6), (7, 4), mode, device=device, backward=True)
        for mode in ("nearest", "nearest-exact", "bilinear", "bicubic", "area")
    ]
    return [*found, case_of((1, 2, 19, 20), (3, 4), "bicubic", True, device=device, backward=True)]


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    return {}


def bytes(case: Case) -> int:
    """Forward x → y; backward dy → dx."""
    return (case.numel + math.prod(case.output or case.shape)) * case.dtype.itemsize * (1 + case.backward)


def flops(case: Case) -> int:
    """A product and a sum for each input that an output reads."""
    size, mode = case.args["size"], case.args["mode"]
    reads = 1.0
    for here, there in zip(case.shape[2:], size):
        wide = max(here / there, 1.0)
        if mode == "area":
            reads *= wide
        elif not mode.startswith("nearest"):
            reads *= (4 if mode == "bicubic" else 2) * (wide if case.args.get("antialias") else 1)
    once = 0 if mode.startswith("nearest") else int(2 * reads * math.prod(case.output or case.shape))
    return once * (1 + case.backward)


def bind(functional: Any, case: Case) -> Function:
    return lambda t: functional.interpolate(t["x"], **case.args)


def providers(case: Case) -> dict[str, Provider]:
    return standard_providers(bind, case)
