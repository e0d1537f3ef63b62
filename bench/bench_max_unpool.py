"""max_unpool2d: the decoder's half of a pooled network."""

from typing import Any

import torch

from .case import Case, Function, Provider, with_both_directions
from .peers import standard_providers

STEM = "max_unpool"
OPS = ("max_unpool2d",)


def unpool(shape: tuple[int, ...], device: str, quick: bool = False) -> Case:
    n, c, h, w = shape
    return Case("max_unpool2d", shape, device=device, quick=quick, output=(n, c, 2 * h, 2 * w))


def cases(device: str) -> list[Case]:
    shape = (64, 64, 112, 112) if device == "cuda" else (8, 64, 56, 56)
    return with_both_directions([unpool(shape, device, quick=True)])


def tiny(device: str) -> list[Case]:
    return with_both_directions([unpool((1, 2, 3, 5), device)])


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    return {}


def bytes(case: Case) -> int:
    """Forward x and the int64 places → y; backward dy where the places say, the places → dx."""
    x, y = case.numel * case.dtype.itemsize, 4 * case.numel * case.dtype.itemsize
    return x + y + 8 * case.numel + case.backward * (2 * x + 8 * case.numel)


def flops(case: Case) -> int:
    return 0


def places(case: Case) -> torch.Tensor:
    """One place in each window of 2 × 2, as max_pool2d would give."""
    h, w = case.shape[2:]
    g = torch.Generator().manual_seed(0)
    row, column = (torch.randint(0, 2, case.shape, generator=g) for _ in range(2))
    index = (2 * torch.arange(h)[:, None] + row) * (2 * w) + 2 * torch.arange(w) + column
    return index.to(case.device)


def bind(functional: Any, case: Case) -> Function:
    index = places(case)
    return lambda t: functional.max_unpool2d(t["x"], index, 2)


def providers(case: Case) -> dict[str, Provider]:
    return standard_providers(bind, case)
