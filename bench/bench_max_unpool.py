"""max_unpool: the decoder's half of a pooled network, of sequences, images and volumes."""

from typing import Any

import torch

from .case import Case, Function, Provider, with_both_directions
from .peers import standard_providers

STEM = "max_unpool"
OPS = ("max_unpool1d", "max_unpool2d", "max_unpool3d")


def unpool(shape: tuple[int, ...], device: str, quick: bool = False) -> Case:
    op = f"max_unpool{len(shape) - 2}d"
    return Case(op, shape, device=device, quick=quick, output=(*shape[:2], *(2 * size for size in shape[2:])))


def cases(device: str) -> list[Case]:
    if device == "cuda":
        return with_both_directions([unpool((64, 64, 112, 112), device, quick=True)])
    others = [unpool((8, 64, 3136), device), unpool((1, 64, 8, 28, 28), device)]
    return with_both_directions([unpool((8, 64, 56, 56), device, quick=True), *others])


def tiny(device: str) -> list[Case]:
    return with_both_directions([unpool(shape, device) for shape in ((1, 2, 3, 5), (2, 3, 7), (1, 2, 3, 2, 4))])


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    return {}


def bytes(case: Case) -> int:
    """Forward x and the int64 places → y; backward dy where the places say, the places → dx."""
    x = case.numel * case.dtype.itemsize
    y = 2 ** (len(case.shape) - 2) * x
    return x + y + 8 * case.numel + case.backward * (2 * x + 8 * case.numel)


def flops(case: Case) -> int:
    return 0


def places(case: Case) -> torch.Tensor:
    """One place in each window of 2 × 2, as max_pool2d would give, or of 2, or of 2 × 2 × 2."""
    g = torch.Generator().manual_seed(0)
    index = torch.zeros(case.shape, dtype=torch.int64)
    for k, size in enumerate(case.shape[2:]):
        at = torch.arange(size).reshape(-1, *(1,) * (len(case.shape) - 3 - k))
        index = index * (2 * size) + 2 * at + torch.randint(0, 2, case.shape, generator=g)
    return index.to(case.device)


def bind(functional: Any, case: Case) -> Function:
    index = places(case)
    return lambda t: getattr(functional, case.op)(t["x"], index, 2)


def providers(case: Case) -> dict[str, Provider]:
    return standard_providers(bind, case)
