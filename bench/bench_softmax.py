"""softmax, softmin, log_softmax: rows of classes or of attention scores, and channels of images."""

from typing import Any

import torch

from .case import Case, Function, Provider, with_both_directions
from .peers import standard_providers

STEM = "softmax"
OPS = ("softmax", "log_softmax", "softmin")


def cases(device: str) -> list[Case]:
    if device == "cpu":
        shapes = [((4096, 1024), -1, True), ((64, 32000), -1, False), ((8, 21, 256, 256), 1, False)]
        dtype = torch.float32
    else:
        shapes = [((32768, 4096), -1, True), ((8192, 128256), -1, False), ((64, 21, 512, 512), 1, False)]
        dtype = torch.bfloat16
    return with_both_directions(
        [
            Case(op, s, dtype, device, quick=q and op != "softmin", args={"dim": d})
            for op in OPS
            for s, d, q in (shapes[:1] if op == "softmin" else shapes)
        ]
    )


def tiny(device: str) -> list[Case]:
    return [
        Case(op, shape, device=device, backward=True, args={"dim": 1})
        for op in OPS
        for shape in ((3, 17), (2, 5, 7), (2, 1100))
    ]


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    return {}


def bytes(case: Case) -> int:
    """Forward x → y; backward dy, x → dx."""
    return case.numel * case.dtype.itemsize * (2 + 3 * case.backward)


def flops(case: Case) -> int:
    """An exponential of some ten operations, a difference, a sum and a product."""
    return case.numel * 13 * (1 + case.backward)


def bind(functional: Any, case: Case) -> Function:
    return lambda t: getattr(functional, case.op)(t["x"], case.args["dim"])


def providers(case: Case) -> dict[str, Provider]:
    return standard_providers(bind, case)
