"""deform_conv2d with a mask, 3 × 3; the baseline samples all taps with grid_sample and multiplies with the filters."""

import dataclasses
from typing import Any

import torch

from pyops import functional, vision

from .case import Case, Function, Provider
from .peers import imported, pyops_providers

STEM = "deform_conv"
OPS = ("deform_conv2d",)
TAPS = 3


def cases(device: str) -> list[Case]:
    if device == "cpu":
        found = [layer(device, (4, 64, 32, 32), quick=True), layer(device, (2, 128, 28, 28), True)]
    else:
        found = [
            layer(device, (8, c, s, s), True, t, c == 256) for t in (torch.bfloat16, torch.float32) for c, s in SIZES
        ]
    return [dataclasses.replace(case, backward=b) for case in found for b in (False, True)]


SIZES = ((128, 100), (256, 50), (512, 25))  # stages of a ResNet on 800 pixels


def layer(
    device: str, shape: tuple[int, ...], last: bool = False, dtype: torch.dtype = torch.float32, quick: bool = False
) -> Case:
    return Case("deform_conv2d", shape, dtype, device, channels_last=last, quick=quick)


def tiny(device: str) -> list[Case]:
    return [
        dataclasses.replace(layer(device, (2, c, 5, 6), last), backward=True) for c, last in ((3, False), (8, True))
    ]


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    """Offsets, mask, and as many filters as channels."""
    n, c, h, w = case.shape
    return {"offset": (n, 2 * TAPS**2, h, w), "mask": (n, TAPS**2, h, w), "w": (c, c, TAPS, TAPS)}


def bytes(case: Case) -> int:
    """x, offsets and mask are read once, y is written; backward reads them and dy, and writes their gradients."""
    n, c, h, w = case.shape
    moves, filters = n * 3 * TAPS**2 * h * w, (c * TAPS) ** 2
    return (2 * case.numel + moves + filters) * case.dtype.itemsize * (1 + 2 * case.backward)


def flops(case: Case) -> int:
    """The product, and backward two of them; the samples take eight operations for each element of the columns."""
    n, c, h, w = case.shape
    columns = n * c * TAPS**2 * h * w
    return columns * (2 * c * (1 + 2 * case.backward) + 8 * (1 + 3 * case.backward))


def bind(namespace: Any, case: Case) -> Function:
    if namespace is functional:
        return lambda t: vision.deform_conv2d(t["x"], t["offset"], t["w"], padding=1, mask=t["mask"])
    return by_grid_sample


def by_grid_sample(t: dict[str, torch.Tensor]) -> torch.Tensor:
    x, offset, mask, w = t["x"], t["offset"], t["mask"], t["w"]
    n, c, height, width = x.shape
    line = lambda count: torch.arange(count, dtype=x.dtype, device=x.device)
    tap = torch.cartesian_prod(line(TAPS) - 1, line(TAPS) - 1)
    moves = offset.reshape(n, TAPS**2, 2, height, width) + tap[:, :, None, None]
    rows, columns = moves[:, :, 0] + line(height)[:, None], moves[:, :, 1] + line(width)
    grid = torch.stack((columns / (width - 1) * 2 - 1, rows / (height - 1) * 2 - 1), -1)
    col = torch.nn.functional.grid_sample(x, grid.reshape(n, TAPS**2 * height, width, 2), align_corners=True)
    col = col.reshape(n, c, TAPS**2, height, width) * mask[:, None]
    y = w.reshape(c, c * TAPS**2) @ col.reshape(n, c * TAPS**2, height * width)
    return y.reshape(n, c, height, width)


def torchvision(case: Case) -> Function:
    ops = imported("torchvision", "ops")
    return lambda t: ops.deform_conv2d(t["x"], t["offset"], t["w"], padding=1, mask=t["mask"])


def providers(case: Case) -> dict[str, Provider]:
    found = pyops_providers(bind, case) | {"torch": Provider(lambda: bind(torch.nn.functional, case))}
    if case.device == "cuda":
        found["torchvision"] = Provider(lambda: torchvision(case))
    return found
