"""The gradients of a convolution on the CPU, by each way of packing their operands (conv_weight.h, conv_planes.h)."""

import pytest
import torch

from pyops import functional as F

torch_F = torch.nn.functional

WEIGHT = [  # input, filters, arguments
    ((2, 5, 33, 31), (40, 5, 3, 3), {"padding": 1}),  # copies of the image, several blocks of rows
    ((1, 3, 70, 70), (33, 3, 3, 3), {"stride": 2, "padding": 1}),  # copies in two phases
    ((1, 8, 20, 300), (6, 4, 1, 5), {"groups": 2, "padding": (0, 2), "dilation": (1, 2)}),  # wide ones
    ((2, 130, 9, 9), (300, 130, 3, 3), {"padding": 1}),  # blocks of rows and of lanes, rows that are packed tap by tap
    ((3, 20, 17, 17), (65, 20, 1, 1), {}),  # the image itself
    ((2, 6, 3, 9, 10), (10, 3, 2, 3, 3), {"groups": 2, "padding": (1, 0, 1)}),
    ((2, 4, 5, 5), (6, 4, 7, 7), {"padding": 3}),  # margins wider than the image
]


INPUT = [
    ((1, 33, 7, 7), (48, 33, 3, 3), {"padding": 1}),  # weights turned panel by panel
    ((2, 14, 13, 11), (32, 14, 3, 2), {"padding": 1, "dilation": 2}),  # by two examples
    ((5, 14, 13, 11), (32, 14, 3, 2), {"padding": 1}),  # copied, for five examples share them
    ((1, 20, 9, 9), (40, 20, 3, 3), {"padding": 1}),  # copied, for 40 channels are not chunks of 16
    ((1, 40, 12, 12), (56, 20, 3, 3), {"stride": 2, "padding": 1, "groups": 2}),  # some taps of each filter
    ((1, 24, 10, 10), (64, 12, 3, 3), {"padding": 1, "groups": 2}),
    ((1, 30, 21, 19), (37, 30, 1, 1), {}),  # one tap
    ((1, 70, 6, 5), (16, 70, 5, 5), {"padding": 2}),
    ((1, 6, 3, 9, 10), (16, 6, 2, 3, 3), {"padding": (1, 0, 1)}),
]


def _gradient(convolve, x, w, how, dy=None, wanted=1):
    leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate((x, w))]
    y = convolve(*leaves, None, **how)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.dtype) if dy is None else dy
    return torch.autograd.grad(y, leaves[wanted], dy)[0], dy


@pytest.mark.parametrize("algorithm", ["gemm", "winograd2", "winograd4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape, filters, how", INPUT)
def test_input_gradient(shape, filters, how, last, dtype, algorithm):
    convolve = getattr(F, f"conv{len(shape) - 2}d")
    x, w = torch.randn(shape).to(dtype), torch.randn(filters).to(dtype)
    if last:
        x = x.contiguous(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d)
    with F.conv_algorithm(algorithm):
        dx, dy = _gradient(convolve, x, w, how, wanted=0)
    exact, _ = _gradient(getattr(torch_F, convolve.__name__), x.double(), w.double(), how, dy.double(), wanted=0)
    # Winograd rounds more (docs/adr/0005-winograd-by-default.md)
    roundings = 32 if dtype == torch.float64 else 8 if algorithm == "gemm" or dtype == torch.bfloat16 else 128
    assert (dx.double() - exact).abs().max() <= roundings * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape, filters, how", WEIGHT)
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
@pytest.mark.parametrize("shape, filters, how", WEIGHT)
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
