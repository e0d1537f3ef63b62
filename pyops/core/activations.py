"""The activations by number, in plain torch: what csrc/common/activation.h and kernels/_activation.py say once more.

The room `activation` and the rooms that fuse an activation into their kernels read the numbers here. A function has
three parameters a, b, c; csrc/common/activation.h says what they mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import check

_torch = torch.nn.functional

SELU_ALPHA, SELU_SCALE = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946


def _elu(x, a, b, c):
    return torch.where(x > 0, x * b, (a * b) * torch.expm1(torch.where(x > 0, torch.zeros_like(x), x) * c))


def hardsigmoid(x: torch.Tensor) -> torch.Tensor:
    """torch's own has no second derivative, and multiplies by 1/6 in float32 in every dtype."""
    return torch.where((x > -3) & (x < 3), (x + 3) / 6, torch.where(x != x, x.detach(), (x >= 3).to(x.dtype)))


def hardswish(x: torch.Tensor) -> torch.Tensor:
    """torch's own multiplies by 1/6 in float32 on the GPU; kinks and infinities fall as there."""
    outside = (x <= -3) | (x >= 3)
    t = torch.where(outside, torch.zeros_like(x), x)
    return torch.where(outside, torch.where(x >= 3, x, x * 0), t * (t + 3) / 6)


# name -> (number in csrc/common/activation.h, the same in plain torch with parameters a, b, c)
FUNCTIONS: dict[str, tuple[int, Callable[..., torch.Tensor]]] = {
    "relu": (0, lambda x, a, b, c: torch.relu(x)),
    "leaky_relu": (1, lambda x, a, b, c: _torch.leaky_relu(x, a)),
    "elu": (2, _elu),
    "gelu": (3, lambda x, a, b, c: _torch.gelu(x)),
    "gelu_tanh": (4, lambda x, a, b, c: _torch.gelu(x, approximate="tanh")),
    "silu": (5, lambda x, a, b, c: _torch.silu(x)),
    "mish": (6, lambda x, a, b, c: _torch.mish(x)),
    "sigmoid": (7, lambda x, a, b, c: torch.sigmoid(x)),
    "hardsigmoid": (8, lambda x, a, b, c: hardsigmoid(x)),
    "hardswish": (9, lambda x, a, b, c: hardswish(x)),
    "hardtanh": (10, lambda x, a, b, c: _torch.hardtanh(x, a, b)),
    "softplus": (11, lambda x, a, b, c: _torch.softplus(x, a, b)),
    "softsign": (12, lambda x, a, b, c: x / (1 + x.abs())),
    "tanh": (13, lambda x, a, b, c: torch.tanh(x)),
    "logsigmoid": (14, lambda x, a, b, c: _torch.logsigmoid(x)),
    "hardshrink": (15, lambda x, a, b, c: _torch.hardshrink(x, a)),
    "softshrink": (16, lambda x, a, b, c: _torch.softshrink(x, a)),
    "tanhshrink": (17, lambda x, a, b, c: x - torch.tanh(x)),
    "threshold": (18, lambda x, a, b, c: _torch.threshold(x, a, b)),
}
TRUTH = dict(FUNCTIONS.values())

# What a fused op can be asked for: name -> (function, a, b, c), with the defaults of torch.nn.functional.
FUSED: dict[str, tuple[str, float, float, float]] = {
    **{
        name: (name, 0.0, 0.0, 0.0)
        for name in (
            *("relu", "gelu", "gelu_tanh", "silu", "mish", "sigmoid", "hardsigmoid", "hardswish"),
            *("softsign", "tanh", "logsigmoid", "tanhshrink"),
        )
    },
    "identity": ("leaky_relu", 1.0, 0.0, 0.0),
    "relu6": ("hardtanh", 0.0, 6.0, 0.0),
    "hardtanh": ("hardtanh", -1.0, 1.0, 0.0),
    "leaky_relu": ("leaky_relu", 0.01, 0.0, 0.0),
    "elu": ("elu", 1.0, 1.0, 1.0),
    "selu": ("elu", SELU_ALPHA, SELU_SCALE, 1.0),
    "celu": ("elu", 1.0, 1.0, 1.0),
    "softplus": ("softplus", 1.0, 20.0, 0.0),
    "hardshrink": ("hardshrink", 0.5, 0.0, 0.0),
    "softshrink": ("softshrink", 0.5, 0.0, 0.0),
}


def fused(op: str, activation: Any) -> tuple[int, float, float, float]:
    """Number and parameters of an activation by name.

    Raises:
        ValueError: a name that is not in ``FUSED``.
    """
    if not isinstance(activation, str) or activation not in FUSED:
        check.fail(ValueError, op, "activation", repr(activation), f"one of {', '.join(sorted(FUSED))}")
    function, a, b, c = FUSED[activation]
    return FUNCTIONS[function][0], a, b, c


def truth(activation: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The activation in plain torch, by the name under which a fused op is asked for it."""
    function, a, b, c = FUSED[activation]
    return lambda x: FUNCTIONS[function][1](x, a, b, c)
