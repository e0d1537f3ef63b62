"""depthwise_conv: layers of MobileNetV2 and ConvNeXt."""

import math
from typing import Any

import torch

from .case import Case, Function, Provider, with_both_directions
from .peers import convolution_algorithms, standard_providers

STEM = "depthwise_conv"
OPS = ("conv2d",)

# (channels, height, width) -> taps, stride
LAYERS: dict[tuple[int, ...], tuple[int, ...]] = {
    (144, 56, 56): (3, 1),
    (96, 112, 112): (3, 2),
    (240, 28, 28): (5, 1),
    (96, 56, 56): (7, 1),
    (3, 9, 7): (3, 1),
    (5, 8, 9): (5, 2),
}


def convolution(batch: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, **fields: Any) -> Case:
    """The case of one layer, with the shape of its output."""
    taps, stride = LAYERS[shape]
    p, q = ((s + 2 * (taps // 2) - taps) // stride + 1 for s in shape[1:])
    return Case("conv2d", (batch, *shape), dtype, output=(batch, shape[0], p, q), **fields)


def cases(device: str) -> list[Case]:
    layers = list(LAYERS)[:4]
    if device == "cpu":
        return with_both_directions([convolution(8, shape, quick=shape[1] == 56) for shape in layers])
    batch: dict[tuple[int, ...], int] = {(96, 56, 56): 128}
    return with_both_directions(
        [convolution(batch.get(s, 256), s, torch.bfloat16, device=device, quick=s[1] == 56) for s in layers]
    )


def tiny(device: str) -> list[Case]:
    return [convolution(2, shape, device=device, backward=True) for shape in list(LAYERS)[4:]]


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    taps, _ = LAYERS[case.shape[1:]]
    return {"weight": (case.shape[1], 1, taps, taps)}


def _outputs(case: Case) -> int:
    return math.prod(case.output or case.shape)


def bytes(case: Case) -> int:
    """Forward x → y; backward dy, x → dx. The filters are small."""
    x, y = case.numel, _outputs(case)
    return (x + y + (2 * x + y) * case.backward) * case.dtype.itemsize


def flops(case: Case) -> int:
    """A product and a sum per tap and output; the backward is two convolutions of the same size."""
    taps, _ = LAYERS[case.shape[1:]]
    return 2 * _outputs(case) * taps * taps * (1 + 2 * case.backward)


def bind(functional: Any, case: Case) -> Function:
    taps, stride = LAYERS[case.shape[1:]]
    return lambda t: functional.conv2d(t["x"], t["weight"], None, stride, taps // 2, 1, case.shape[1])


def algorithm(case: Case, provider: str) -> str:
    return convolution_algorithms(case, provider, shapes(case)["weight"], LAYERS[case.shape[1:]][1], case.shape[1])


def providers(case: Case) -> dict[str, Provider]:
    return standard_providers(bind, case)
