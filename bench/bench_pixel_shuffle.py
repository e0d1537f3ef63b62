"""pixel_shuffle: a copy in another order; both directions move the same bytes."""

from typing import Any

from .case import Case, Function, Provider, with_both_directions
from .peers import standard_providers

STEM = "pixel_shuffle"
OPS = ("pixel_shuffle", "pixel_unshuffle", "channel_shuffle")


def case_of(op: str, shape: tuple[int, ...], factor: int, **more: Any) -> Case:
    if op == "channel_shuffle":
        return Case(op, shape, args={"factor": factor}, **more)
    n, c, h, w = shape
    q = factor * factor
    up = op == "pixel_shuffle"
    output = (n, c // q, h * factor, w * factor) if up else (n, c * q, h // factor, w // factor)
    return Case(op, shape, args={"factor": factor}, output=output, **more)


def cases(device: str) -> list[Case]:
    batch = 4 if device == "cpu" else 128
    found = [
        case_of("pixel_shuffle", (batch, 64, 112, 112), 2, device=device, quick=True),
        case_of("pixel_shuffle", (batch, 27, 112, 112), 3, device=device),
        case_of("pixel_shuffle", (batch, 64, 112, 112), 2, device=device, channels_last=True),
        case_of("pixel_unshuffle", (batch, 16, 224, 224), 2, device=device),
        case_of("channel_shuffle", (batch, 240, 28, 28), 3, device=device),
    ]
    return with_both_directions(found)


def tiny(device: str) -> list[Case]:
    return [
        case_of("pixel_shuffle", (1, 8, 3, 5), 2, device=device, backward=True),
        case_of("pixel_unshuffle", (1, 2, 6, 9), 3, device=device, backward=True),
        case_of("channel_shuffle", (1, 6, 3, 5), 3, device=device, backward=True),
    ]


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    return {}


def bytes(case: Case) -> int:
    """Forward x → y; backward dy → dx."""
    return 2 * case.numel * case.dtype.itemsize * (1 + case.backward)


def flops(case: Case) -> int:
    return 0


def bind(functional: Any, case: Case) -> Function:
    return lambda t: getattr(functional, case.op)(t["x"], case.args["factor"])


def providers(case: Case) -> dict[str, Provider]:
    return standard_providers(bind, case)
