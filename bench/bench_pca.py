"""pca, and rows whitened by it: a singular value decomposition by torch.linalg, then a product.

A component has no sign of its own, so squares are compared. Forward alone: the gradient is that of torch.linalg.svd.
"""

from typing import Any

import torch

from pyops import functional as F

from .case import Case, Function, Provider
from .peers import pyops_providers

STEM = "pca"
OPS = ("pca",)
DIFFERENTIABLE = False


def case_of(rows: int, columns: int, components: int, **more: Any) -> Case:
    return Case("pca", (rows, columns), args={"components": components}, output=(rows, components), **more)


def cases(device: str) -> list[Case]:
    rows = 4096 if device == "cpu" else 65536
    return [case_of(rows, 64, 16, device=device, quick=True), case_of(512, 512, 64, device=device)]


def tiny(device: str) -> list[Case]:
    return [case_of(9, 5, 3, device=device), case_of(5, 9, 2, device=device)]


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    return {}


def bytes(case: Case) -> int:
    """Forward x → y."""
    return (case.numel + case.shape[0] * case.args["components"]) * case.dtype.itemsize


def flops(case: Case) -> int:
    """A decomposition of some 4 R C² operations for R >= C, and a product."""
    short, long = sorted(case.shape)
    return 4 * long * short * short + 2 * case.numel * case.args["components"]


def bind(functional: Any, case: Case) -> Function:
    count = case.args["components"]
    if functional is F:
        return lambda t: F.pca_transform(t["x"], F.pca(t["x"], count), whiten=True).square()

    def plain(t: dict[str, torch.Tensor]) -> torch.Tensor:
        u, _, _ = torch.linalg.svd(t["x"] - t["x"].mean(0), full_matrices=False)
        return u[:, :count].square() * (case.shape[0] - 1)

    return plain


def providers(case: Case) -> dict[str, Provider]:
    return pyops_providers(bind, case) | {"torch": Provider(lambda: bind(torch.nn.functional, case))}
