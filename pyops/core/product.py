"""The matrix products of layers: torch's, or on some CPUs our own, which is the convolution of one tap.

    linear(x, w, b)          y  = x wᵀ + b      x [*, I], w [O, I], b [O]
    weight_gradient(dy, x)   dw = dyᵀ x         dy [M, O]

Rows are positions and columns are channels, so both are ops of the room conv, channels last, with all their
derivatives. Where and why they are faster: docs/adr/0010-own-matrix-product-on-the-cpu.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from . import autocast, backend, convolution, library, tracing

# Fewer rows, or fewer multiply-adds, are left to torch: packing a weight and calling an op cost more than is gained.
_ROWS, _PRODUCTS = 128, 2**23
_DTYPES = (torch.float32, torch.float64)  # half types are oneDNN's in torch too
_GEOMETRY = ([1, 1, 1], [0, 0, 0], [1, 1, 1], 1, True, "")


@tracing.constant
def beats_torch() -> bool:
    """Whether torch's product, MKL's, leaves half of this CPU unused: AVX-512 on a CPU that is not Intel's."""
    return library.cpu_capability() == "avx512" and not library.cpu_is_intel() and torch.backends.mkl.is_available()


def _is_large(rows: int, inputs: int, outputs: int) -> bool:
    return rows >= _ROWS and rows * inputs * outputs >= _PRODUCTS


def _pays(namespace: str, x: torch.Tensor, outputs: int) -> bool:
    """Whether a product with the rows of x [*, I] and ``outputs`` columns on the other side is ours."""
    if not _is_large(math.prod(x.shape[:-1]), x.shape[-1], outputs):
        return False
    if namespace != "pyops" or x.device.type != "cpu" or x.dtype not in _DTYPES or not beats_torch():
        return False
    return not torch._C._are_functorch_transforms_active() and not autocast.enabled(x)


def is_ours(namespace: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether x wᵀ + b runs as a convolution. What does not fit together is torch's, which says so."""
    if weight.dim() != 2 or x.dim() < 2 or not _pays(namespace, x, weight.shape[0]):
        return False
    if x.shape[-1] != weight.shape[1] or (bias is not None and bias.shape != weight.shape[:1]):
        return False
    return all(t is None or (t.dtype == x.dtype and t.device == x.device) for t in (weight, bias))


def _image(matrix: torch.Tensor) -> torch.Tensor:
    """[*, I] as one example of positions in a line."""
    return matrix.contiguous().view(1, 1, 1, -1, matrix.shape[-1])


def _taps(weight: torch.Tensor) -> torch.Tensor:
    """[O, I] as filters of one tap."""
    return weight.contiguous().view(weight.shape[0], 1, 1, 1, weight.shape[1])


def _family(channels: int) -> convolution.Family:
    return convolution.family_for(channels, (channels, channels, 1, 1, 1), 1)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x wᵀ + b for x [*, I], w [O, I], b [O] or None."""
    namespace = backend.namespace_for("linear", x)
    if not is_ours(namespace, x, weight, bias):
        return torch.nn.functional.linear(x, weight, bias)
    fwd = _family(x.shape[-1]).fwd
    return fwd(namespace, _image(x), _taps(weight), bias, *_GEOMETRY).view(*x.shape[:-1], weight.shape[0])


def weight_gradient(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """dyᵀ x for dy [M, O], x [M, I]."""
    namespace = backend.namespace_for("linear", x)
    if not _pays(namespace, x, dy.shape[1]):
        return dy.mT @ x
    wgrad = _family(x.shape[1]).wgrad
    return wgrad(namespace, _image(dy), _image(x), [1, 1, 1], *_GEOMETRY).view(dy.shape[1], x.shape[1])


def explanation(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, name: str) -> tuple[str, ...]:
    """What ``pyops explain`` says about a product: whose it is, and why."""
    if name != "cpu" or dtype not in _DTYPES:
        return ("the product is torch's",)
    if not beats_torch():
        return ("the product is torch's, which uses the vectors of this CPU",)
    if len(shapes) < 2:
        return ("give the shapes of input and weight to see the choice",)
    rows, (outputs, inputs) = math.prod(shapes[0][:-1]), shapes[1]
    sizes = f"{rows} rows, {rows * inputs * outputs} multiply-adds"
    least = f"from {_ROWS} rows and {_PRODUCTS} multiply-adds on"
    if not _is_large(rows, inputs, outputs):
        return (f"the product is torch's: {sizes}; ours pays {least}",)
    return (f"the product is a convolution of one tap, csrc/cpu/conv.cpp: {sizes}; it pays {least}",)
