"""im2col: unfold and fold, copies of sliding blocks."""

from typing import Any

import torch

from .case import Case, Function, Provider, with_both_directions
from .peers import standard_providers

STEM = "im2col"
OPS = ("unfold",)
KERNEL, PADDING = 3, 1


def unfold(shape: tuple[int, ...], dtype: torch.dtype, device: str, **fields: Any) -> Case:
    """x [N, C, H, W] → columns [N, C · 9, H · W]."""
    N, C, H, W = shape
    return Case("unfold", shape, dtype, device, output=(N, C * KERNEL * KERNEL, H * W), **fields)


def cases(device: str) -> list[Case]:
    if device == "cpu":
        shapes = [((4, 64, 64, 64), True), ((1, 16, 256, 256), False)]
        return with_both_directions([unfold(shape, torch.float32, device, quick=quick) for shape, quick in shapes])
    shapes = [((32, 64, 56, 56), True), ((8, 256, 128, 128), False)]
    return with_both_directions([unfold(s, torch.bfloat16, device, quick=quick) for s, quick in shapes])


def tiny(device: str) -> list[Case]:
    return [unfold(shape, torch.float32, device, backward=True) for shape in ((1, 2, 5, 7), (2, 3, 4, 20))]


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    return {}


def bytes(case: Case) -> int:
    """Forward x → col; backward dcol → dx. The columns hold each pixel 9 times."""
    return (1 + KERNEL * KERNEL) * case.numel * case.dtype.itemsize * (1 + case.backward)


def flops(case: Case) -> int:
    """The backward adds 9 columns into each pixel."""
    return KERNEL * KERNEL * case.numel * case.backward


def bind(functional: Any, case: Case) -> Function:
    return lambda t: functional.unfold(t["x"], KERNEL, padding=PADDING)


def providers(case: Case) -> dict[str, Provider]:
    return standard_providers(bind, case)
