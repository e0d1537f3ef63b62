"""roi_pool: the maximum of 7 × 7 bins of boxes on one map; the baseline takes adaptive_max_pool2d of every box."""

import dataclasses
from typing import Any

import torch

from pyops import functional, vision

from .case import Case, Function, Provider
from .peers import imported, pyops_providers

STEM = "roi_pool"
OPS = ("roi_pool",)
BINS = 7


def cases(device: str) -> list[Case]:
    rois, shape = (128, (2, 64, 50, 50)) if device == "cpu" else (1000, (2, 256, 200, 304))
    found = [pool(device, shape, rois, last) for last in (False, True)]
    return [dataclasses.replace(case, backward=b) for case in found for b in (False, True)]


def pool(device: str, shape: tuple[int, ...], rois: int, last: bool) -> Case:
    return Case(
        "roi_pool", shape, device=device, channels_last=last, quick=not last, args={"R": rois},
        output=(rois, shape[1], BINS, BINS),
    )  # fmt: skip


def tiny(device: str) -> list[Case]:
    return [dataclasses.replace(pool(device, (2, 5, 12, 12), 4, last), backward=True) for last in (False, True)]


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    return {}


def bytes(case: Case) -> int:
    """Forward reads x, writes y and its pixels; backward reads dy and the pixels, writes dx."""
    y = case.args["R"] * case.shape[1] * BINS**2
    return (case.numel * case.dtype.itemsize + y * (case.dtype.itemsize + 4)) * (1 + case.backward)


def flops(case: Case) -> int:
    """A comparison for every pixel of every RoI: about an eighth of the map each."""
    return case.args["R"] * case.numel // case.shape[0] // 8


def regions(case: Case) -> torch.Tensor:
    """Whole-pixel boxes inside the map, of a multiple of 7 pixels, where every pooling agrees on the bins."""
    g = torch.Generator().manual_seed(0)
    n, side = case.args["R"], min(case.shape[2:])
    size = BINS * torch.randint(1, max(side // BINS // 2, 1) + 1, (n, 2), generator=g)
    corner = (torch.rand(n, 2, generator=g) * (side - size + 1)).long()
    image = torch.randint(0, case.shape[0], (n, 1), generator=g)
    return torch.cat((image, corner, corner + size - 1), 1).float().to(case.device)


def bind(namespace: Any, case: Case) -> Function:
    rois = regions(case)
    if namespace is functional:
        return lambda t: vision.roi_pool(t["x"], rois.to(t["x"].dtype), BINS)
    boxes = rois.long().tolist()

    def one_by_one(t: dict[str, torch.Tensor]) -> torch.Tensor:
        cuts = (t["x"][n, :, y1 : y2 + 1, x1 : x2 + 1] for n, x1, y1, x2, y2 in boxes)
        return torch.stack([torch.nn.functional.adaptive_max_pool2d(cut, BINS) for cut in cuts])

    return one_by_one


def torchvision(case: Case) -> Function:
    ops = imported("torchvision", "ops")
    rois = regions(case)
    return lambda t: ops.roi_pool(t["x"], rois.to(t["x"].dtype), BINS)


def providers(case: Case) -> dict[str, Provider]:
    found = pyops_providers(bind, case)
    found["torch"] = Provider(lambda: bind(torch.nn.functional, case))
    if case.device == "cuda":
        found["torchvision"] = Provider(lambda: torchvision(case))
    return found
