"""conv: dense convolutions, layers of ResNet-50 and EfficientNet; the end of a residual block in the same pass."""

import dataclasses
from typing import Any

import torch

from .case import Case, Function, Provider, with_both_directions
from .peers import convolution_algorithms, standard_providers

STEM = "conv"
OPS = ("conv2d", "conv2d_act")
# Winograd's algorithm rounds more than a sum over taps: docs/adr/0005.
SLACK = 8
MATRIX = True

# (input, output channels, taps, stride)
LAYERS: dict[tuple[int, ...], tuple[int, ...]] = {
    (64, 56, 56): (64, 3, 1),
    (128, 28, 28): (128, 3, 1),
    (256, 14, 14): (256, 3, 1),
    (512, 7, 7): (512, 3, 1),
    (256, 56, 56): (64, 1, 1),
    (96, 112, 112): (24, 1, 1),
    (3, 224, 224): (32, 3, 2),
    (256, 112, 112): (512, 3, 1),
    # small ones for the check before the timing
    (5, 9, 7): (6, 3, 1),
    (16, 6, 6): (24, 1, 1),
}


def layer(case: Case) -> tuple[int, ...]:
    return LAYERS[case.shape[1:]]


def convolution(batch: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, **fields: Any) -> Case:
    """The case of one layer, with the shape of its output."""
    k, taps, stride = LAYERS[shape]
    p, q = ((s + 2 * (taps // 2) - taps) // stride + 1 for s in shape[1:])
    return Case("conv2d", (batch, *shape), dtype, output=(batch, k, p, q), **fields)


def block(
    batch: int, shape: tuple[int, ...], activation: str, dtype: torch.dtype = torch.float32, **fields: Any
) -> Case:
    """The last layer of a residual block."""
    plain = convolution(batch, shape, dtype, **fields)
    return dataclasses.replace(plain, op="conv2d_act", args={"activation": activation})


def cases(device: str) -> list[Case]:
    layers = [shape for shape in LAYERS if shape[-1] > 7 or shape[0] == 512][:7]
    if device == "cpu":
        both = [convolution(n, shape, quick=n == 1) for shape in layers for n in (1, 8)]
        both += [block(1, (64, 56, 56), "relu", quick=True), block(8, (256, 56, 56), "silu")]
        return with_both_directions(both)
    half = [convolution(64, shape, torch.bfloat16, device=device, quick=shape[0] == 64) for shape in layers]
    half.append(convolution(1, (256, 112, 112), torch.bfloat16, device=device))
    half.append(block(64, (256, 56, 56), "silu", torch.bfloat16, device=device))
    return with_both_directions([*half, convolution(64, (64, 56, 56), device=device)])


def tiny(device: str) -> list[Case]:
    how: dict[str, Any] = {"device": device, "backward": True}
    plain = [convolution(n, shape, **how) for n, shape in ((2, (5, 9, 7)), (1, (16, 6, 6)))]
    return [*plain, block(2, (5, 9, 7), "relu", **how), block(1, (16, 6, 6), "silu", **how)]


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    k, taps, _ = layer(case)
    weight: dict[str, tuple[int, ...]] = {"weight": (k, case.shape[1], taps, taps)}
    return weight if case.op == "conv2d" else {**weight, "bias": (k,), "residual": case.output or case.shape}


def _positions(case: Case) -> int:
    n, _, p, q = case.output or case.shape
    return n * p * q


def bytes(case: Case) -> int:
    """Forward x, w → y; backward dy, x, w → dx, dw. A block reads r and keeps the sum, whose gradient is that of r."""
    k, taps, _ = layer(case)
    x, y, w = case.numel, _positions(case) * k, k * case.shape[1] * taps * taps
    ends = (y + 4 * y * case.backward) * (case.op == "conv2d_act")
    return (x + y + w + (y + 2 * x + 2 * w) * case.backward + ends) * case.dtype.itemsize


def flops(case: Case) -> int:
    """A product and a sum per tap, channel and output; the backward is two convolutions of the same size."""
    k, taps, _ = layer(case)
    return 2 * _positions(case) * k * case.shape[1] * taps * taps * (1 + 2 * case.backward)


def traffic(case: Case) -> tuple[int, int]:
    """Bytes and launches of the kernels for Hopper: wgrad's tiles are written and added, dgrad is stride^2 kernels."""
    _, _, stride = layer(case)
    parts = 2 * 132 * 128 * 256 * 4 if case.backward else 0
    return bytes(case) + parts, 1 + (2 + stride**2) * case.backward


def bind(functional: Any, case: Case) -> Function:
    _, taps, stride = layer(case)
    if case.op == "conv2d":
        return lambda t: functional.conv2d(t["x"], t["weight"], None, stride, taps // 2)
    name = case.args["activation"]
    if functional is not torch.nn.functional:
        return lambda t: functional.conv2d_act(
            t["x"], t["weight"], t["bias"], t["residual"], name, stride, taps // 2
        )  # fmt: skip
    function = getattr(functional, name)
    return lambda t: function(functional.conv2d(t["x"], t["weight"], t["bias"], stride, taps // 2) + t["residual"])


def algorithm(case: Case, provider: str) -> str:
    return convolution_algorithms(case, provider, shapes(case)["weight"], layer(case)[2], 1)


def providers(case: Case) -> dict[str, Provider]:
    return standard_providers(bind, case)
