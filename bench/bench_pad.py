"""pad: a copy with a rim; rows of the inside are copied whole."""

from typing import Any

from .case import Case, Function, Provider, with_both_directions
from .peers import standard_providers

STEM = "pad"
OPS = ("pad",)


def case_of(shape: tuple[int, ...], amounts: tuple[int, ...], mode: str, **more: Any) -> Case:
    output = list(shape)
    for k in range(len(amounts) // 2):
        output[-1 - k] += amounts[2 * k] + amounts[2 * k + 1]
    return Case("pad", shape, args={"amounts": amounts, "mode": mode}, output=tuple(output), **more)


def cases(device: str) -> list[Case]:
    batch = 8 if device == "cpu" else 128
    found = [
        case_of((batch, 96, 112, 112), (0, 1, 0, 1), "constant", device=device, quick=True),
        case_of((batch, 96, 112, 112), (0, 1, 0, 1), "constant", device=device, channels_last=True),
        case_of((batch, 64, 56, 56), (3, 3, 3, 3), "reflect", device=device),
        case_of((batch, 64, 56, 56), (1, 1, 1, 1), "circular", device=device),
        case_of((batch, 64, 56, 56), (1, 1, 1, 1), "replicate", device=device),
    ]
    return with_both_directions(found)


def tiny(device: str) -> list[Case]:
    return [
        case_of((2, 3, 4, 5), (1, 2, 0, 1), mode, device=device, backward=True)
        for mode in ("constant", "reflect", "replicate", "circular")
    ]


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    return {}


def bytes(case: Case) -> int:
    """Forward x → y; backward dy → dx."""
    out = 1
    for size in case.output or case.shape:
        out *= size
    return (case.numel + out) * case.dtype.itemsize * (1 + case.backward)


def flops(case: Case) -> int:
    return 0


def bind(functional: Any, case: Case) -> Function:
    return lambda t: functional.pad(t["x"], case.args["amounts"], case.args["mode"])


def providers(case: Case) -> dict[str, Provider]:
    return standard_providers(bind, case)
