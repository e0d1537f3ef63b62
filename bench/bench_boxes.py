"""boxes: the overlap of every pair of N and M boxes; the baseline is torchvision's algorithm in plain torch."""

import dataclasses
from typing import Any

import torch

from pyops import functional, vision
from pyops.ops import boxes as room

from .case import Case, Function, Provider
from .peers import standard_providers

STEM = "boxes"
OPS = ("box_iou", "generalized_box_iou", "complete_box_iou")


def cases(device: str) -> list[Case]:
    sizes = [(2000, 100), (8192, 300)] if device == "cpu" else [(2000, 100), (262144, 100)]
    found = [
        Case(op, (n, 4), device=device, args={"M": m}, output=(n, m), quick=n == 2000 and op != OPS[1])
        for op in OPS
        for n, m in sizes
    ]
    return [dataclasses.replace(case, backward=b) for case in found for b in (False, True)]


def tiny(device: str) -> list[Case]:
    return [Case(op, (5, 4), device=device, backward=True, args={"M": 7}, output=(5, 7)) for op in OPS]


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    return {"others": (case.args["M"], 4)}


def bytes(case: Case) -> int:
    """Forward writes the matrix, backward reads it; the boxes are small beside it."""
    pairs = case.shape[0] * case.args["M"]
    return (pairs + 4 * (case.shape[0] + case.args["M"])) * case.dtype.itemsize * (1 + case.backward)


def flops(case: Case) -> int:
    """Per pair and direction: 13 for IoU, 20 for generalised, 35 for complete; backward three times that."""
    each = {"box_iou": 13, "generalized_box_iou": 20, "complete_box_iou": 35}[case.op]
    return case.shape[0] * case.args["M"] * each * (1 + 3 * case.backward)


def corners(x: torch.Tensor) -> torch.Tensor:
    """Boxes of sides 1/4 and more from any numbers."""
    return torch.cat((x[:, :2], x[:, :2] + x[:, 2:].abs() + 0.25), 1)


def bind(namespace: Any, case: Case) -> Function:
    if namespace is functional:
        op = getattr(vision, case.op)
    else:
        kind = ("box_iou", "generalized_box_iou", "distance_box_iou", "complete_box_iou").index(case.op)
        op = lambda a, b: room._reference(a, b, kind, 1e-7)[0]
    return lambda t: op(corners(t["x"]), corners(t["others"]))


def providers(case: Case) -> dict[str, Provider]:
    return standard_providers(bind, case)
