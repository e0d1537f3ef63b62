"""nms: sparse, clustered and overlapping boxes, and 80 classes.

Baselines: torchvision's algorithm in plain torch, and as a scalar C++ loop. The former takes minutes for 100,000 boxes
on the CPU where nearly all are kept: there the loop alone is the baseline, and what pyops is checked against.
"""

import contextlib
import ctypes
from typing import Any

import torch

from pyops import functional, vision

from .case import Case, Function, Provider, Unavailable
from .peers import pyops_providers
from .scalar_loops import library

STEM = "nms"
OPS = ("nms", "batched_nms")
DIFFERENTIABLE = False
THRESHOLD = 0.5
CLASSES = 80


def cases(device: str) -> list[Case]:
    found = [
        Case("nms", (n,), device=device, args={"boxes": kind}, quick=n == 1000)
        for n in (1000, 10000, 100000)
        for kind in ("sparse", "clusters", "overlapping")
    ]
    return [*found, Case("batched_nms", (10000,), device=device, args={"boxes": "clusters"}, quick=True)]


def tiny(device: str) -> list[Case]:
    return [Case(op, (70,), device=device, args={"boxes": "clusters"}) for op in OPS]


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    return {}


def bytes(case: Case) -> int:
    """Boxes and scores are read once, the indices of all boxes written once at most."""
    return case.shape[0] * (4 * 4 + 4 + 8)


def flops(case: Case) -> int:
    """Thirteen operations for each box against each other, halved: the algorithm's bound, seldom reached."""
    return 13 * case.shape[0] ** 2 // 2


def scene(case: Case) -> torch.Tensor:
    """Boxes [N, 4]; the same each time."""
    n, kind = case.shape[0], case.args["boxes"]
    g = torch.Generator().manual_seed(n)
    if kind == "overlapping":
        centre = torch.rand(n, 2, generator=g) * 60
        side = 150 + torch.rand(n, 2, generator=g) * 30
    else:
        side = 10 + torch.rand(n, 2, generator=g) * 60
        centre = torch.rand(n, 2, generator=g) * (1000.0 if kind == "clusters" else 40 * n**0.5)
        if kind == "clusters":
            centre = centre[torch.randint(0, max(n // 20, 1), (n,), generator=g)]
            centre += torch.rand(n, 2, generator=g) * 8
            side = side.mean() + torch.rand(n, 2, generator=g) * 8
    return torch.cat((centre - side / 2, centre + side / 2), 1).to(case.device)


def plain_torch(boxes: torch.Tensor, scores: torch.Tensor, threshold: float) -> torch.Tensor:
    """Greedy suppression, a row of overlaps at a time, on what is left."""
    order = scores.argsort(descending=True, stable=True)
    left = boxes[order]
    kept = []
    while len(order):
        kept.append(order[:1])
        common = (torch.minimum(left[0, 2:], left[1:, 2:]) - torch.maximum(left[0, :2], left[1:, :2])).clamp(min=0)
        inter = common[:, 0] * common[:, 1]
        area = (left[:, 2] - left[:, 0]) * (left[:, 3] - left[:, 1])
        stays = ~(inter / (area[0] + area[1:] - inter) > threshold)
        order, left = order[1:][stays], left[1:][stays]
    return torch.cat(kept) if kept else order


def scalar(boxes: torch.Tensor, scores: torch.Tensor, threshold: float) -> torch.Tensor:
    order = scores.argsort(descending=True, stable=True)
    sorted_boxes = boxes[order].contiguous()
    keep = torch.empty(len(order), dtype=torch.int64)
    pointer = lambda t: ctypes.c_void_p(t.data_ptr())
    n = ctypes.c_int64(len(order))
    count = library().scalar_nms(pointer(sorted_boxes), n, ctypes.c_double(threshold), pointer(keep))
    return order[keep[:count]]


def minutes_in_torch(case: Case) -> bool:
    return case.device == "cpu" and case.shape[0] > 50000 and case.args["boxes"] == "sparse"


def definition(case: Case) -> Any:
    """What the others are checked against."""
    if minutes_in_torch(case):
        with contextlib.suppress(Unavailable):
            library()
            return scalar
    return plain_torch


def in_torch(case: Case) -> Function:
    if minutes_in_torch(case):
        raise Unavailable("plain torch takes minutes on this case: see scalar C++")
    return call(case, plain_torch)


def by_class(one: Any, boxes: torch.Tensor, scores: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for k in classes.unique():
        own = torch.where(classes == k)[0]
        kept[own[one(boxes[own], scores[own], THRESHOLD)]] = True
    kept = torch.where(kept)[0]
    return kept[scores[kept].argsort(descending=True, stable=True)]


def call(case: Case, one: Any) -> Function:
    boxes = scene(case)
    classes = torch.arange(case.shape[0], device=case.device) % CLASSES
    if case.op == "nms":
        return lambda t: one(boxes, t["x"].to(torch.float32), THRESHOLD)
    return lambda t: by_class(one, boxes, t["x"].to(torch.float32), classes)


def bind(namespace: Any, case: Case) -> Function:
    if namespace is not functional:
        return call(case, definition(case))
    boxes = scene(case)
    classes = torch.arange(case.shape[0], device=case.device) % CLASSES
    if case.op == "nms":
        return lambda t: vision.nms(boxes, t["x"], THRESHOLD)
    return lambda t: vision.batched_nms(boxes, t["x"], classes, THRESHOLD)


def providers(case: Case) -> dict[str, Provider]:
    found = pyops_providers(bind, case) | {"torch": Provider(lambda: in_torch(case))}
    if case.device == "cpu":
        found["scalar C++"] = Provider(lambda: (library(), call(case, scalar))[1])
    else:
        found["torchvision"] = Provider(lambda: torchvision(case))
    return found


def torchvision(case: Case) -> Function:
    from .peers import imported

    ops = imported("torchvision", "ops")
    boxes = scene(case)
    classes = torch.arange(case.shape[0], device=case.device) % CLASSES
    if case.op == "nms":
        return lambda t: ops.nms(boxes, t["x"], THRESHOLD)
    return lambda t: ops.batched_nms(boxes, t["x"], classes, THRESHOLD)
