"""stochastic_depth: a residual branch, one number an example; the baseline is torchvision's algorithm in plain torch.

p is so small that nothing is dropped: only so can results be compared.
"""

from typing import Any

import torch

from pyops import functional as F
from pyops import vision

from .case import Case, Function, Provider, with_both_directions
from .peers import pyops_providers

STEM = "stochastic_depth"
OPS = ("stochastic_depth",)
P = 1e-12


def cases(device: str) -> list[Case]:
    shape, dtype = ((8, 96, 56, 56), torch.float32) if device == "cpu" else ((256, 96, 56, 56), torch.bfloat16)
    modes = [
        Case("stochastic_depth", shape, dtype, device, quick=m == "row", args={"mode": m}) for m in ("row", "batch")
    ]
    return with_both_directions(modes)


def tiny(device: str) -> list[Case]:
    return [
        Case("stochastic_depth", (3, 2, 5), device=device, backward=True, args={"mode": m}) for m in ("row", "batch")
    ]


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    return {}


def bytes(case: Case) -> int:
    """Forward x → y; backward dy → dx."""
    return 2 * case.numel * case.dtype.itemsize * (1 + case.backward)


def flops(case: Case) -> int:
    return case.numel * (1 + case.backward)


def bind(functional: Any, case: Case) -> Function:
    mode = case.args["mode"]
    if functional is F:
        return lambda t: vision.stochastic_depth(t["x"], P, mode)

    def plain(t: dict[str, torch.Tensor]) -> torch.Tensor:
        x = t["x"]
        size = [x.shape[0] if mode == "row" else 1] + [1] * (x.dim() - 1)
        noise = torch.empty(size, dtype=x.dtype, device=x.device).bernoulli_(1 - P)
        return x * noise.div_(1 - P)

    return plain


def providers(case: Case) -> dict[str, Provider]:
    return pyops_providers(bind, case) | {"torch": Provider(lambda: bind(torch.nn.functional, case))}
