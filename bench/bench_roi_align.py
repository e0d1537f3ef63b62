"""roi_align on a feature pyramid, all levels in one call; baselines: grid_sample per level in plain torch, and
torchvision's loop as scalar C++."""

import ctypes
import dataclasses
from collections import OrderedDict
from typing import Any

import torch

from pyops import functional, vision

from .case import Case, Function, Provider
from .peers import imported, pyops_providers
from .scalar_loops import library

STEM = "roi_align"
OPS = ("roi_align",)
RATIO = 2
SCALES = (1 / 4, 1 / 8, 1 / 16, 1 / 32)


def cases(device: str) -> list[Case]:
    side, channels, rois = (128, 64, 256) if device == "cpu" else (256, 256, 1000)
    dtypes = [torch.float32] if device == "cpu" else [torch.bfloat16, torch.float32]
    found = [
        fpn(device, dtype, channels, side, rois, bins, last)
        for dtype in dtypes
        for bins in (7, 14)
        for last in (False, True)
    ]
    return [dataclasses.replace(case, backward=b) for case in found for b in (False, True)]


def fpn(device: str, dtype: torch.dtype, channels: int, side: int, rois: int, bins: int, last: bool) -> Case:
    return Case(
        "roi_align", (2, channels, side, side), dtype, device, channels_last=last, quick=bins == 7,
        args={"R": rois, "bins": bins}, output=(rois, channels, bins, bins),
    )  # fmt: skip


def tiny(device: str) -> list[Case]:
    return [
        dataclasses.replace(fpn(device, torch.float32, 3, 32, 24, 2, last), backward=True) for last in (False, True)
    ]


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    n, c, h, w = case.shape
    return {f"x{k}": (n, c, h >> k, w >> k) for k in (1, 2, 3)}


def bytes(case: Case) -> int:
    """Forward reads the pyramid once and writes y; backward reads dy and writes the gradient of the pyramid."""
    pyramid = sum(case.numel >> (2 * k) for k in range(4))
    y = case.args["R"] * case.shape[1] * case.args["bins"] ** 2
    return (pyramid + y) * case.dtype.itemsize * (1 + case.backward)


def flops(case: Case) -> int:
    """Four products and sums for each of 2 x 2 samples of a bin."""
    return case.args["R"] * case.shape[1] * case.args["bins"] ** 2 * 4 * 8 * (1 + case.backward)


def regions(case: Case) -> tuple[list[torch.Tensor], torch.Tensor, int]:
    """Boxes of every image inside the picture, the level of each, and the side of the picture."""
    g = torch.Generator().manual_seed(0)
    side, n = case.shape[2] * 4, case.args["R"]
    size = torch.exp(torch.rand(n, 2, generator=g) * 2.7) * side / 32
    corner = torch.rand(n, 2, generator=g) * (side - size)
    boxes = torch.cat((corner, corner + size), 1)
    level = (4 + torch.log2(size.prod(1).sqrt() / canonical(case)) + 1e-6).floor().clamp(2, 5).long() - 2
    half = n // 2
    return [boxes[:half].to(case.device), boxes[half:].to(case.device)], level.to(case.device), side


def canonical(case: Case) -> int:
    """Side of a box of level 4: an eighth of the picture, so that every level has boxes."""
    return case.shape[2] * 4 // 8


def maps_of(t: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [t["x"], t["x1"], t["x2"], t["x3"]]


def bind(namespace: Any, case: Case) -> Function:
    boxes, level, side = regions(case)
    if namespace is functional:
        module = vision.MultiScaleRoIAlign(list("abcd"), case.args["bins"], RATIO, canonical_scale=canonical(case))
        return lambda t: module(OrderedDict(zip("abcd", maps_of(t))), boxes, [(side, side)] * 2)
    return lambda t: by_grid_sample(maps_of(t), boxes, level, case)


def by_grid_sample(
    maps: list[torch.Tensor], boxes: list[torch.Tensor], level: torch.Tensor, case: Case
) -> torch.Tensor:
    samples = case.args["bins"] * RATIO
    step = (torch.arange(samples, device=case.device) + 0.5) / samples
    y = maps[0].new_zeros(case.output or ())
    start = 0
    for image, own in enumerate(boxes):
        for k, (m, scale) in enumerate(zip(maps, SCALES)):
            chosen = torch.where(level[start : start + len(own)] == k)[0]
            if len(chosen) == 0:
                continue
            b = own[chosen].to(m.dtype if m.dtype == torch.float64 else torch.float32) * scale
            length = (b[:, 2:] - b[:, :2]).clamp(min=1)
            at = b[:, None, :2] + step[:, None].to(b.dtype) * length[:, None]
            size = torch.tensor([m.shape[3] - 1, m.shape[2] - 1], device=case.device, dtype=b.dtype)
            at = (at / size * 2 - 1).to(m.dtype)
            grid = torch.stack(
                (at[:, None, :, 0].expand(-1, samples, -1), at[:, :, None, 1].expand(-1, -1, samples)), -1
            )
            picked = torch.nn.functional.grid_sample(
                m[image : image + 1], grid.reshape(1, -1, samples, 2), padding_mode="border", align_corners=True
            )
            picked = picked.reshape(-1, len(chosen), samples, samples).movedim(1, 0)
            y = y.index_put((start + chosen,), torch.nn.functional.avg_pool2d(picked, RATIO))
        start += len(own)
    return y


class Scalar(torch.autograd.Function):
    """The loops of scalar_loops.cpp over the RoIs [R_k, 5] of every level, whose rows of y are `index[k]`."""

    @staticmethod
    def forward(ctx: Any, own: list[torch.Tensor], index: list[torch.Tensor], bins: int, *maps: torch.Tensor) -> Any:
        ctx.own, ctx.index, ctx.shapes = own, index, [m.shape for m in maps]
        y = torch.empty(sum(map(len, own)), maps[0].shape[1], bins, bins)
        for m, i, r in zip(maps, index, own):
            part = y.new_empty(len(i), *y.shape[1:])
            planes = m.contiguous()  # held while the loop reads it
            Scalar.call(library().scalar_roi_align, planes, r, part)
            y[i] = part
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        grads = [dy.new_zeros(shape) for shape in ctx.shapes]
        for dx, i, r in zip(grads, ctx.index, ctx.own):
            Scalar.call(library().scalar_roi_align_backward, dx, r, dy[i].contiguous())
        return None, None, None, *grads

    @staticmethod
    def call(loop: Any, planes: torch.Tensor, rois: torch.Tensor, pooled: torch.Tensor) -> None:
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (planes, rois, pooled)]
        loop(*pointers, *map(ctypes.c_int64, (*planes.shape[1:], len(rois), pooled.shape[-1], RATIO)))


def scalar(case: Case) -> Function:
    library()  # not while it is timed
    boxes, level, _ = regions(case)
    rois = torch.cat([torch.cat((torch.full_like(b[:, :1], i), b), 1) for i, b in enumerate(boxes)])
    index = [torch.where(level == k)[0] for k in range(4)]
    own = [(rois[i] * torch.tensor([1.0] + [s] * 4)).contiguous() for i, s in zip(index, SCALES)]
    return lambda t: Scalar.apply(own, index, case.args["bins"], *maps_of(t))


def torchvision(case: Case) -> Function:
    ops = imported("torchvision", "ops")
    boxes, _, side = regions(case)
    module = ops.MultiScaleRoIAlign(list("abcd"), case.args["bins"], RATIO, canonical_scale=canonical(case))
    own = [b.to(case.dtype) for b in boxes]
    return lambda t: module(OrderedDict(zip("abcd", maps_of(t))), own, [(side, side)] * 2)


def providers(case: Case) -> dict[str, Provider]:
    found = pyops_providers(bind, case) | {"torch": Provider(lambda: bind(torch.nn.functional, case))}
    if case.device == "cpu":
        found["scalar C++"] = Provider(lambda: scalar(case))
    if case.device == "cuda":
        found["torchvision"] = Provider(lambda: torchvision(case))
    return found
