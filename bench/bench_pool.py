"""Pooling: the first layer of ResNet, non-overlapping windows, averages, global average pooling, adaptive bins."""

import dataclasses
import math
from typing import Any

import torch

from .case import Case, Function, Provider, with_both_directions
from .peers import standard_providers

STEM = "pool"
OPS = (
    *(f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_max", "adaptive_avg", "lp") for n in (1, 2, 3)),
)  # fmt: skip


def pool(op: str, shape: tuple[int, ...], output: tuple[int, ...], device: str, **args: Any) -> Case:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return Case(op, shape, dtype, device, args=args, output=(*shape[:2], *output))


def cases(device: str) -> list[Case]:
    if device == "cuda":
        found = [
            pool("max_pool2d", (256, 64, 112, 112), (56, 56), device, kernel_size=3, stride=2, padding=1),
            pool("max_pool2d", (32, 64, 512, 512), (509, 509), device, kernel_size=4, stride=1),
            pool("avg_pool2d", (256, 64, 112, 112), (56, 56), device, kernel_size=2),
            pool("adaptive_avg_pool2d", (256, 2048, 7, 7), (1, 1), device, output_size=1),
            pool("lp_pool2d", (256, 64, 112, 112), (56, 56), device, norm_type=2.0, kernel_size=2),
            pool("avg_pool1d", (256, 512, 1024), (512,), device, kernel_size=2),
            pool("max_pool3d", (16, 64, 16, 56, 56), (8, 28, 28), device, kernel_size=2),
        ]
    else:
        found = [
            pool("max_pool2d", (8, 64, 112, 112), (56, 56), device, kernel_size=3, stride=2, padding=1),
            pool("max_pool2d", (8, 64, 112, 112), (56, 56), device, kernel_size=2),
            pool("avg_pool2d", (8, 64, 112, 112), (56, 56), device, kernel_size=2),
            pool("adaptive_avg_pool2d", (8, 1280, 7, 7), (1, 1), device, output_size=1),
            pool("adaptive_max_pool2d", (8, 256, 50, 50), (7, 7), device, output_size=7),
            pool("lp_pool2d", (8, 64, 112, 112), (56, 56), device, norm_type=2.0, kernel_size=2),
            pool("avg_pool1d", (8, 512, 1024), (512,), device, kernel_size=2),
            pool("max_pool3d", (1, 64, 16, 56, 56), (8, 28, 28), device, kernel_size=2),
            pool("max_pool1d", (8, 512, 1024), (512,), device, kernel_size=2),
            pool("avg_pool3d", (1, 64, 16, 56, 56), (8, 28, 28), device, kernel_size=2),
            pool("lp_pool1d", (8, 512, 1024), (512,), device, norm_type=2.0, kernel_size=2),
            pool("lp_pool3d", (1, 64, 16, 56, 56), (8, 28, 28), device, norm_type=2.0, kernel_size=2),
            pool("adaptive_max_pool1d", (8, 512, 1000), (7,), device, output_size=7),
            pool("adaptive_avg_pool1d", (8, 512, 1000), (7,), device, output_size=7),
            pool("adaptive_max_pool3d", (1, 64, 16, 50, 50), (7, 7, 7), device, output_size=7),
            pool("adaptive_avg_pool3d", (1, 64, 16, 50, 50), (7, 7, 7), device, output_size=7),
        ]
    quick = [dataclasses.replace(case, quick=i in (0, 2)) for i, case in enumerate(found)]
    last = dataclasses.replace(found[0], channels_last=True)
    return with_both_directions([*quick, last])


def tiny(device: str) -> list[Case]:
    images = [
        dataclasses.replace(case, backward=True, channels_last=last)
        for last in (False, True)
        for case in (
            pool("max_pool2d", (1, 3, 9, 8), (5, 4), device, kernel_size=3, stride=2, padding=1),
            pool("avg_pool2d", (1, 3, 9, 8), (4, 4), device, kernel_size=2),
            pool("adaptive_max_pool2d", (1, 3, 7, 8), (3, 3), device, output_size=3),
            pool("adaptive_avg_pool2d", (1, 3, 7, 8), (3, 3), device, output_size=3),
            pool("lp_pool2d", (1, 3, 9, 8), (4, 4), device, norm_type=2.0, kernel_size=2),
        )
    ]
    window: dict[str, Any] = {"kernel_size": 2}
    bins: dict[str, Any] = {"output_size": 3}
    kinds = {
        "max": window,
        "avg": window,
        "lp": {"norm_type": 2.0, **window},
        "adaptive_max": bins,
        "adaptive_avg": bins,
    }
    others = [
        pool(f"{kind}_pool{n}d", (1, 2, *(7,) * n), (3,) * n, device, **how)
        for n in (1, 3)
        for kind, how in kinds.items()
    ]
    return [*images, *(dataclasses.replace(case, backward=True) for case in others)]


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    return {}


def outputs(case: Case) -> int:
    return math.prod(case.output or case.shape)


def bytes(case: Case) -> int:
    """Forward x → y, and a byte for each maximum where a gradient follows; backward dy and the bytes → dx; with powers
    x and y as well."""
    if case.op.startswith("lp"):
        return (case.numel + outputs(case)) * case.dtype.itemsize * (1 + 2 * case.backward)
    place = 1 if "max" in case.op and case.backward else 0
    y = outputs(case) * (case.dtype.itemsize + place)
    return (case.numel * case.dtype.itemsize + y) * (1 + case.backward)


def flops(case: Case) -> int:
    """A comparison or an addition for each element of each window, and its square."""
    kernel = case.args.get("kernel_size")
    taps = kernel ** (len(case.shape) - 2) * (1 + case.op.startswith("lp")) if kernel else case.numel // outputs(case)
    return outputs(case) * taps * (1 + case.backward)


def bind(functional: Any, case: Case) -> Function:
    return lambda t: getattr(functional, case.op)(t["x"], **case.args)


def providers(case: Case) -> dict[str, Provider]:
    return standard_providers(bind, case)
