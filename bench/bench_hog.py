"""hog: a photo's gradients, votes and norms; no framework has it, so the same formula in plain torch is measured."""

from typing import Any

from pyops import functional
from pyops.ops import hog as room

from .case import Case, Function, Provider, with_both_directions
from .peers import standard_providers

STEM = "hog"
OPS = ("hog",)


def _values(h: int, w: int) -> int:
    return (h // 8 - 2) * (w // 8 - 2) * 81


def case_of(shape: tuple[int, ...], **more: Any) -> Case:
    n, _, h, w = shape
    return Case("hog", shape, output=(n, _values(h, w)), **more)


def cases(device: str) -> list[Case]:
    batch = 1 if device == "cpu" else 64
    found = [
        case_of((batch, 3, 512, 512), device=device, quick=True),
        case_of((16 * batch, 1, 128, 64), device=device),
    ]
    return with_both_directions(found)


def tiny(device: str) -> list[Case]:
    return [case_of((1, 2, 24, 33), device=device, backward=True)]


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    return {}


def bytes(case: Case) -> int:
    """Forward x → y; backward x, dy → dx."""
    n, _, h, w = case.shape
    values = n * _values(h, w)
    return (case.numel * (3 if case.backward else 1) + values * (2 if case.backward else 1)) * case.dtype.itemsize


def flops(case: Case) -> int:
    """Differences, a length and eight boundaries a pixel, a sum and a quotient a value."""
    return case.numel * 30 * (3 if case.backward else 1)


def bind(namespace: Any, case: Case) -> Function:
    if namespace is functional:
        return lambda t: functional.hog(t["x"], channel_axis=1)
    return lambda t: room._reference(t["x"], 9, (8, 8), (3, 3), 3, False)[0].flatten(1)


def providers(case: Case) -> dict[str, Provider]:
    found = standard_providers(bind, case)
    found.pop("torch channels_last")
    return found
