"""Convolution of channels last on the CPU, by each way of bringing pixels and weights together (conv_pixels.h)."""

import pytest
import torch

from pyops import functional as F

SHAPES = [  # input, filters, arguments
    ((2, 3, 30, 31), (40, 3, 3, 3), {"stride": 2, "padding": 1}),  # few channels: planes in two phases
    ((1, 2, 17, 200), (33, 2, 5, 5), {"padding": 2}),  # wide rows
    ((2, 4, 23, 9), (7, 4, 3, 2), {"padding": (1, 2), "dilation": (2, 1)}),
    ((1, 2, 5, 12, 11), (18, 2, 2, 3, 3), {"padding": 1}),
    ((1, 3, 4, 4), (16, 3, 9, 9), {"padding": 8}),  # margins wider than the image
    ((1, 300, 7, 7), (170, 300, 3, 3), {"padding": 1}),  # few pixels
    ((2, 280, 5, 6), (330, 140, 3, 3), {"groups": 2, "stride": 2, "padding": 1}),  # few pixels of two groups
    ((1, 700, 3, 3), (900, 700, 1, 1), {}),
    ((3, 20, 19, 18), (45, 20, 3, 3), {"padding": 1}),  # many pixels
]


def _image(shape, dtype):
    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    return torch.randn(shape).to(dtype).contiguous(memory_format=last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape, filters, how", SHAPES)
def test_forward(shape, filters, how, dtype):
    name = f"conv{len(shape) - 2}d"
    x, w, b = _image(shape, dtype), torch.randn(filters).to(dtype), torch.randn(filters[0]).to(dtype)
    with F.conv_algorithm("gemm"):
        y = getattr(F, name)(x, w, b, **how)
    exact = getattr(torch.nn.functional, name)(x.double(), w.double(), b.double(), **how)
    assert y.is_contiguous(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d)
    allowed = (32 if dtype == torch.float64 else 8) * torch.finfo(dtype).eps * exact.abs().max()
    assert (y.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("shape, filters, how", [s for s in SHAPES if len(s[0]) == 4])
def test_epilogue(shape, filters, how):
    x, w, b = _image(shape, torch.float32), torch.randn(filters), torch.randn(filters[0])
    with F.conv_algorithm("gemm"):
        plain = F.conv2d(x, w, b, **how)
        residual = torch.randn_like(plain)
        y = F.conv2d_act(x, w, b, activation="relu", residual=residual, **how)
    assert torch.equal(y, (plain + residual).relu())


@pytest.mark.parametrize("shape, filters, how", SHAPES)
def test_the_same_bits_on_any_number_of_threads(shape, filters, how):
    x, w, before = _image(shape, torch.float32), torch.randn(filters), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5, 40):
            torch.set_num_threads(threads)
            with F.conv_algorithm("gemm"):
                found.append(getattr(F, f"conv{len(shape) - 2}d")(x, w, None, **how))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], y) for y in found[1:])
