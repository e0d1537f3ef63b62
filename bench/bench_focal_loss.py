"""focal_loss: RetinaNet's logits, one number per anchor and class; the baseline is torchvision's composite."""

from typing import Any

import torch

from pyops import functional, vision
from pyops.ops import focal_loss as room

from .case import Case, Function, Provider, with_both_directions
from .peers import standard_providers

STEM = "focal_loss"
OPS = ("sigmoid_focal_loss",)


def cases(device: str) -> list[Case]:
    anchors = 12000 if device == "cpu" else 400000
    found = [Case("sigmoid_focal_loss", (anchors, 80), device=device, quick=True)]
    found += [Case("sigmoid_focal_loss", (anchors, 80), torch.bfloat16, device)] * (device != "cpu")
    return with_both_directions(found)


def tiny(device: str) -> list[Case]:
    return [Case("sigmoid_focal_loss", (7, 5), device=device, backward=True)]


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    return {}


def bytes(case: Case) -> int:
    """Forward reads x and t, writes y; backward reads dy, x and t, writes dx."""
    return case.numel * case.dtype.itemsize * (3 + 4 * case.backward)


def flops(case: Case) -> int:
    """Three transcendental functions at 15 operations each, and the formula."""
    return case.numel * 70 * (1 + case.backward)


def bind(namespace: Any, case: Case) -> Function:
    g = torch.Generator().manual_seed(0)
    targets = (torch.rand(case.shape, generator=g) < 0.01).to(case.device)
    if namespace is functional:
        return lambda t: vision.sigmoid_focal_loss(t["x"], targets.to(t["x"].dtype))
    return lambda t: room._truth(t["x"], targets.to(t["x"].dtype))


def providers(case: Case) -> dict[str, Provider]:
    return standard_providers(bind, case)
