"""Convolutions on the warpgroup tensor cores of sm_90a (csrc/cuda/conv_hopper.cu)."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from pyops import functional as F
from pyops.core import backend as backends
from pyops.core import explain, library

from .harness import agrees, emulated_device

# reason: (input, filters, arguments); the backward of each takes its gradients through the same kernels
CASES = {
    "one small tile, 1x1": ((1, 8, 5, 6), (8, 8, 1, 1), {}),
    "same padding": ((1, 64, 9, 9), (64, 64, 3, 3), {"padding": 1}),
    "batch of 3, stride 2": ((3, 8, 7, 6), (16, 8, 3, 3), {"stride": 2, "padding": 1}),
    "sides differ": ((2, 72, 9, 11), (136, 72, 3, 2), {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}),
    "many tiles of pixels, 1x1": ((3, 40, 17, 19), (24, 40, 1, 1), {}),
    "1x1 with stride": ((2, 72, 9, 8), (80, 72, 1, 1), {"stride": 2}),
    "dilation, channels past a tile": ((2, 136, 6, 5), (200, 136, 3, 1), {"padding": 2, "dilation": 2}),
    "stride larger than the filter": ((2, 64, 12, 12), (64, 64, 2, 2), {"stride": 3}),
    "a tile of 128 filters and 256 outputs": ((1, 16, 18, 15), (128, 16, 3, 3), {"padding": 1}),
    "256 filters": ((1, 64, 20, 20), (256, 64, 3, 3), {"stride": 2, "padding": 1}),
    "one dimension": ((2, 32, 40), (40, 32, 5), {"stride": 3, "padding": 2}),
    "wide dilation in a line, as in a causal convolution": (
        (1, 32, 300),
        (32, 32, 3),
        {"padding": 512, "dilation": 256},
    ),
    "132 taps": ((1, 8, 13, 12), (8, 8, 12, 11), {}),
    "volume": ((2, 24, 5, 4, 6), (72, 24, 3, 2, 3), {"stride": (1, 2, 1), "padding": (1, 0, 1)}),
    "groups of one block each": ((2, 192, 7, 6), (192, 64, 3, 3), {"groups": 3, "padding": 1}),
    "groups, more filters than a tile": ((2, 128, 5, 6), (384, 64, 3, 2), {"groups": 2, "stride": 2, "padding": 1}),
    "groups, more channels than a tile": ((1, 384, 6, 5), (128, 192, 1, 3), {"groups": 2, "padding": (0, 1)}),
    "groups, blocks of a tile in two taps": ((1, 256, 9, 4), (256, 128, 3, 1), {"groups": 2}),
    "groups in one dimension": ((2, 128, 23), (128, 64, 5), {"groups": 2, "dilation": 2, "padding": 3}),
    "groups of a volume": ((1, 128, 3, 4, 5), (128, 64, 2, 1, 3), {"groups": 2, "stride": (1, 2, 1)}),
}
RACE = (
    *("one small tile, 1x1", "batch of 3, stride 2", "one dimension", "volume", "1x1 with stride"),
    *("groups, more filters than a tile", "groups, more channels than a tile"),
)


def inputs(shape, filters, dtype=torch.bfloat16, bias=True):
    g = torch.Generator().manual_seed(0)
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(shape), torch.contiguous_format)
    x, w = (torch.randn(s, generator=g).to(dtype).to(memory_format=last) for s in (shape, filters))
    return (x, w, torch.randn(filters[0], generator=g).to(dtype)) if bias else (x, w)


def conv(functional, x, w, b=None, **arguments):
    return getattr(functional, f"conv{x.dim() - 2}d")(x, w, b, **arguments)


@contextmanager
def products(expected: bool, backend: str = "emulator") -> Iterator[None]:
    """The block multiplies by wgmma, or it does not; a GPU does not tell."""
    if backend == "emulator":
        library.configure_emulator(statistics="reset")
    yield
    assert backend != "emulator" or (library.emulator_statistic("wgmma") > 0) == expected


def passes(case, dtype, backend="emulator", capability=90):
    shape, filters, arguments = CASES[case]
    with backends.backend(backend), emulated_device(backend, capability), products(capability == 90, backend):
        agrees(
            lambda *t: conv(F, *t, **arguments),
            lambda *t: conv(torch.nn.functional, *t, **arguments),
            *inputs(shape, filters, dtype),
        )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_forward_and_gradients(backend, case, dtype):
    if backend not in ("emulator", "cuda"):
        pytest.skip("kernels of csrc/cuda")
    passes(case, dtype, backend)


@pytest.mark.parametrize("case", CASES)
def test_an_older_device(case):
    passes(case, torch.bfloat16, capability=80)


@pytest.mark.race
@pytest.mark.parametrize("case", RACE)
def test_race(backend, case):
    if backend == "emulator":
        passes(case, torch.bfloat16)


@pytest.mark.parametrize("stride", [1, 2])
def test_transposed(stride):
    x, w = inputs((2, 32, 5, 6), (32, 40, 3, 3), bias=False)
    b = torch.randn(40).to(x.dtype)
    arguments = {"stride": stride, "padding": 1, "output_padding": stride - 1}
    with backends.backend("emulator"), products(True):
        agrees(
            lambda *t: F.conv_transpose2d(*t, **arguments),
            lambda *t: torch.nn.functional.conv_transpose2d(*t, **arguments),
            *(x, w, b),
        )


@pytest.mark.parametrize("schedule", ["reverse", "deep", "deep-reverse", "random:3"])
def test_same_bits_in_every_order(schedule):
    def run():
        x, w, b = (t.requires_grad_() for t in inputs((2, 72, 19, 17), (136, 72, 3, 3)))
        y = F.conv2d(x, w, b, padding=1)
        return y, *torch.autograd.grad(y, (x, w), torch.ones_like(y))

    with backends.backend("emulator"):
        expected = run()
        try:
            library.configure_emulator(schedule=schedule)
            results = run()
        finally:
            library.configure_emulator(schedule="forward")
    assert all(torch.equal(a, b) for a, b in zip(results, expected))


def test_switched_off():
    x, w = inputs((1, 16, 6, 6), (16, 16, 3, 3), bias=False)
    with backends.backend("emulator"):
        with products(False), F.conv_algorithm("gemm"):
            plain = F.conv2d(x, w)
        with products(True):
            torch.testing.assert_close(F.conv2d(x, w), plain, rtol=1e-2, atol=1e-1)


@pytest.mark.parametrize(
    ("shape", "filters", "arguments"),
    [
        ((1, 12, 6, 6), (16, 12, 3, 3), {}),  # channels that are no whole 16 bytes
        ((1, 16, 6, 6), (12, 16, 3, 3), {}),  # filters that are none
        ((1, 16, 6, 6), (16, 8, 3, 3), {"groups": 2}),
        ((1, 144, 6, 6), (128, 72, 3, 3), {"groups": 2}),  # a block of 64 channels would reach into the next group
        ((1, 128, 6, 6), (144, 64, 3, 3), {"groups": 2}),  # in the gradient of the input
        ((1, 8, 4, 3), (8, 8, 2, 2), {"padding": 130, "dilation": 131}),  # the corners of an image have 8 bits
        ((1, 8, 2, 2, 2), (8, 8, 2, 1, 1), {"padding": (17, 0, 0), "dilation": (33, 1, 1)}),  # those of a volume 5
        ((1, 8, 19, 1), (8, 8, 1, 1), {"stride": (9, 1)}),  # steps are at most 8
    ],
)
def test_what_the_tensor_map_cannot_say_runs_elsewhere(shape, filters, arguments):
    x, w = inputs(shape, filters, bias=False)
    with backends.backend("emulator"), products(False):
        y = conv(F, x, w, **arguments)
    exact = conv(torch.nn.functional, x.double(), w.double(), **arguments)
    torch.testing.assert_close(y.double(), exact, rtol=1e-2, atol=1e-2 * exact.abs().max().item())


def test_explain_tells_who_is_served():
    notes = lambda x, w, **more: str(explain.explain("conv2d", [x, w], torch.bfloat16, wanted="emulator", **more))
    assert "algorithm wgmma" in notes((2, 64, 9, 9), (64, 64, 3, 3))
    assert "algorithm gemm" in notes((2, 12, 9, 9), (64, 12, 3, 3))
    assert "algorithm grouped" in notes((2, 64, 9, 9), (64, 32, 3, 3))
    assert notes((2, 128, 9, 9), (128, 64, 3, 3)).count("algorithm wgmma") == 3
    assert "algorithm gemm" in notes((2, 144, 9, 9), (128, 72, 3, 3))
    assert "algorithm direct" in notes((2, 64, 9, 9), (64, 1, 3, 3))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_stay_where_they_belong(value):
    """Half a tile of channels and of filters: what fills the rest must not meet them."""
    x, w, b = inputs((2, 24, 7, 7), (40, 24, 3, 3))
    x[1, 23, 3, 3] = value
    w[39, 0, 1, 1] = value
    with backends.backend("emulator"), products(True):
        y = F.conv2d(x, w, b)
    exact = torch.nn.functional.conv2d(x.double(), w.double(), b.double())
    assert torch.equal(y.isnan(), exact.isnan()) and torch.equal(y.isinf(), exact.isinf())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_group(value):
    x, w, b = inputs((1, 128, 6, 5), (256, 64, 3, 3))
    x[0, 64, 2, 2] = value
    with backends.backend("emulator"), products(True):
        y = F.conv2d(x, w, b, padding=1, groups=2)
        x.requires_grad_(), w.requires_grad_()
        dx, dw = torch.autograd.grad(F.conv2d(x, w, b, padding=1, groups=2), (x, w), torch.ones_like(y))
    assert y[:, :128].isfinite().all() and not y[:, 128:].isfinite().all()
    assert dx.isfinite().all() and dw[:128].isfinite().all() and not dw[128:, 0].isfinite().any()
    assert dw[128:, 1:].isfinite().all()


def test_planes_in_large_groups_pass_through_channels_last():
    x, w = (t.contiguous() for t in inputs((2, 128, 6, 5), (128, 64, 3, 3), bias=False))
    with backends.backend("emulator"), products(True):
        y = F.conv2d(x, w, groups=2)
    assert y.is_contiguous()
    torch.testing.assert_close(y, torch.nn.functional.conv2d(x, w, groups=2), rtol=2e-2, atol=0.1)


def test_products_of_groups_are_those_of_one_group_each():
    x, w = inputs((1, 256, 9, 9), (256, 64, 3, 3), bias=False)
    with backends.backend("emulator"):
        counts = []
        for call in (lambda: F.conv2d(x, w, groups=4), lambda: F.conv2d(x[:, :64], w[:64])):
            library.configure_emulator(statistics="reset")
            call()
            counts.append(library.emulator_statistic("wgmma"))
    assert counts[0] == 4 * counts[1] > 0
