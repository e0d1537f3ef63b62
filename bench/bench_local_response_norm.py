"""local_response_norm: a window of channels, a logarithm and an exponential an element; torch runs seven ops."""

from typing import Any

from .case import Case, Function, Provider, with_both_directions
from .peers import standard_providers

STEM = "local_response_norm"
OPS = ("local_response_norm",)


def case_of(shape: tuple[int, ...], size: int, **more: Any) -> Case:
    return Case("local_response_norm", shape, args={"size": size}, **more)


def cases(device: str) -> list[Case]:
    batch = 4 if device == "cpu" else 256
    found = [
        case_of((batch, 96, 55, 55), 5, device=device, quick=True),
        case_of((batch, 96, 55, 55), 5, device=device, channels_last=True),
        case_of((batch, 256, 27, 27), 5, device=device),
    ]
    return with_both_directions(found)


def tiny(device: str) -> list[Case]:
    return [
        case_of((1, 6, 3, 5), 3, device=device, backward=True, channels_last=channels_last)
        for channels_last in (False, True)
    ]


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    return {}


def bytes(case: Case) -> int:
    """Forward x → y; backward x, dy → dx."""
    return case.numel * case.dtype.itemsize * (5 if case.backward else 2)


def flops(case: Case) -> int:
    """A product and a sum for each channel of a window, and what scales; two windows backward."""
    return case.numel * (2 * case.args["size"] + 4) * (3 if case.backward else 1)


def bind(functional: Any, case: Case) -> Function:
    return lambda t: functional.local_response_norm(t["x"], case.args["size"])


def providers(case: Case) -> dict[str, Provider]:
    return standard_providers(bind, case)
