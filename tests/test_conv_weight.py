"""The gradient of a convolution in its weight on the CPU, by each way of packing its operands (conv_weight.h)."""

import pytest
import torch

from pyops import functional as F

torch_F = torch.nn.functional

SHAPES = [  # input, filters, arguments
    ((2, 5, 33, 31), (40, 5, 3, 3), {"padding": 1}),  # copies of the image, several blocks of rows
    ((1, 3, 70, 70), (33, 3, 3, 3), {"stride": 2, "padding": 1}),  # copies in two phases
    ((1, 8, 20, 300), (6, 4, 1, 5), {"groups": 2, "padding": (0, 2), "dilation": (1, 2)}),  # wide ones
    ((2, 130, 9, 9), (300, 130, 3, 3), {"padding": 1}),  # blocks of rows and of lanes, rows that are packed tap by tap
    ((3, 20, 17, 17), (65, 20, 1, 1), {}),  # the image itself
    ((2, 6, 3, 9, 10), (10, 3, 2, 3, 3), {"groups": 2, "padding": (1, 0, 1)}),
    ((2, 4, 5, 5), (6, 4, 7, 7), {"padding": 3}),  # margins wider than the image
]


def _gradient(convolve, x, w, how, dy=None):
    w = w.clone().requires_grad_()
    y = convolve(x, w, None, **how)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.dtype) if dy is None else dy
    return torch.autograd.grad(y, w, dy)[0], dy


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape, filters, how", SHAPES)
def test_weight_gradient(shape, filters, how, dtype, last):
    convolve = getattr(F, f"conv{len(shape) - 2}d")
    x, w = torch.randn(shape).to(dtype), torch.randn(filters).to(dtype)
    if last:
        x = x.contiguous(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d)
    dw, dy = _gradient(convolve, x, w, how)
    exact, _ = _gradient(getattr(torch_F, convolve.__name__), x.double(), w.double(), how, dy.double())
    allowed = (32 if dtype == torch.float64 else 8) * torch.finfo(dtype).eps * exact.abs().max()
    assert (dw.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape, filters, how", SHAPES)
def test_weight_gradient_gives_the_same_bits_on_any_number_of_threads(shape, filters, how, last):
    convolve, before = getattr(F, f"conv{len(shape) - 2}d"), torch.get_num_threads()
    x, w = torch.randn(shape), torch.randn(filters)
    if last:
        x = x.contiguous(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d)
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(_gradient(convolve, x, w, how)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
