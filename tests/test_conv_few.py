"""Convolutions of at most four channels on CUDA (csrc/cuda/conv_few.cuh), on the emulator."""

import pytest
import torch

from pyops import functional as F
from pyops.core import backend as backends
from pyops.core import explain, library

from .harness import agrees, emulated_device

# reason: (input, filters, arguments)
CASES = {
    "first layer of a small network": ((2, 3, 19, 21), (32, 3, 3, 3), {"stride": 2, "padding": 1}),
    "7x7, several steps of the sum": ((1, 3, 20, 17), (8, 3, 7, 7), {"stride": 2, "padding": 3}),
    "four channels, two blocks of filters": ((2, 4, 11, 9), (70, 4, 3, 3), {"padding": 2, "dilation": (1, 2)}),
    "one channel, a long row": ((1, 1, 9, 70), (5, 1, 5, 5), {}),
    "patches that do not overlap": ((1, 3, 16, 16), (16, 3, 4, 4), {"stride": 4}),
    "stride larger than the filter": ((1, 2, 11, 13), (3, 2, 1, 2), {"stride": (3, 5)}),
    "one dimension": ((2, 3, 200), (16, 3, 9), {"stride": 3, "padding": 4}),
    "volume": ((1, 2, 5, 6, 7), (9, 2, 3, 3, 3), {"padding": 1, "stride": (2, 1, 1)}),
    "two blocks of columns, whole vectors of filters": ((2, 3, 23, 17), (24, 3, 7, 7), {"stride": 2, "padding": 3}),
    "rows and columns that no output reads": ((3, 4, 30, 31), (8, 4, 4, 4), {"stride": 5}),
}
RACE = (
    *("first layer of a small network", "7x7, several steps of the sum", "volume"),
    "two blocks of columns, whole vectors of filters",
)


def inputs(case, dtype, channels_last):
    shape, filters, _ = CASES[case]
    g = torch.Generator().manual_seed(0)
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(shape), torch.contiguous_format)
    x, w, b = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in (shape, filters, filters[:1]))
    return x.to(memory_format=last if channels_last else torch.contiguous_format), w, b


def passes(case, dtype, channels_last):
    name = f"conv{len(CASES[case][0]) - 2}d"
    call = lambda f: lambda *t: getattr(f, name)(*t, **CASES[case][2])
    with backends.backend("emulator"), emulated_device("emulator"):
        agrees(call(F), call(torch.nn.functional), *inputs(case, dtype, channels_last))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_forward_and_gradients(case, dtype, channels_last):
    passes(case, dtype, channels_last)


@pytest.mark.race
@pytest.mark.parametrize("case", RACE)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_race(backend, case, channels_last, dtype):
    if backend == "emulator":
        passes(case, dtype, channels_last)


@pytest.mark.parametrize("algorithm", ["tf32", "3xtf32"])
def test_tensor_core_products_of_float32(algorithm):
    x, w, b = inputs("7x7, several steps of the sum", torch.float32, True)
    want = torch.nn.functional.conv2d(x.double(), w.double(), b.double(), stride=2, padding=3)
    with backends.backend("emulator"), F.conv_algorithm(algorithm):
        got = F.conv2d(x, w, b, stride=2, padding=3)
    assert (got.double() - want).abs().max() < 8 * 147**0.5 * 2 ** (-11 if algorithm == "tf32" else -22)


def test_tiles_follow_the_shape_of_the_output_and_the_sum_is_padded_once():
    """5 x 65 outputs are nine tiles of 8 x 8; 27 terms of a sum take two products of 16, not one for every tap."""
    x, w = torch.randn(1, 3, 5, 65).bfloat16(), torch.randn(64, 3, 3, 3).bfloat16()
    library.configure_emulator(statistics="reset")
    with backends.backend("emulator"):
        F.conv2d(x, w, padding=1)
    assert library.emulator_statistic("mma") == 9 * 2 * 4 * 8


@pytest.mark.parametrize(("taps", "blocks"), [(3, 1), (7, 3)])
def test_the_gradient_of_the_filters_lays_out_each_rectangle_once(taps, blocks):
    """64 filters by 27 or 147 columns, of which 128 stand in one block: 64 x 64 x 64 products a tile and 64 columns."""
    x, w = torch.randn(2, 3, 16, 16).bfloat16(), torch.randn(64, 3, taps, taps).bfloat16().requires_grad_()
    with backends.backend("emulator"):
        y = F.conv2d(x, w, padding=taps // 2)
        library.configure_emulator(statistics="reset")
        torch.autograd.grad(y, w, torch.ones_like(y))
    padded = 1 if blocks == 1 else 4
    assert library.emulator_statistic("mma") == 2 * 4 * padded * 4 * 32


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_no_output_reads_reaches_no_gradient(value):
    """Stride 5 leaves a row and a column of the last patch out, which the rectangle holds."""
    x, w = torch.randn(1, 3, 21, 21).bfloat16(), torch.randn(8, 3, 2, 2).bfloat16().requires_grad_()
    x[:, :, 17:20], x[..., 17:20] = value, value
    with backends.backend("emulator"):
        y = F.conv2d(x, w, stride=5)
        (dw,) = torch.autograd.grad(y, w, torch.ones_like(y))
    assert y.isfinite().all() and dw.isfinite().all()


@pytest.mark.parametrize("schedule", ["reverse", "deep", "random:3"])
def test_the_gradient_of_the_filters_is_the_same_bits_in_every_order(schedule):
    x, w, _ = inputs("first layer of a small network", torch.bfloat16, True)
    w.requires_grad_()

    def run():
        y = F.conv2d(x, w, stride=2, padding=1)
        return torch.autograd.grad(y, w, torch.ones_like(y))[0]

    with backends.backend("emulator"):
        expected = run()
        try:
            library.configure_emulator(schedule=schedule)
            assert torch.equal(run(), expected)
        finally:
            library.configure_emulator(schedule="forward")


def test_explain_tells_what_is_served():
    def algorithms(x, w, **geometry):
        notes = explain.explain("conv2d", [x, w], torch.bfloat16, wanted="emulator", geometry=geometry)
        found = str(notes).splitlines()
        return [line.split("algorithm ")[1].split(" (")[0] for line in found if " algorithm " in line]

    assert algorithms((2, 3, 32, 32), (64, 3, 3, 3)) == ["few channels", "few filters", "few channels"]
    assert algorithms((2, 64, 32, 32), (9, 64, 3, 3)) == ["gemm"] * 3
    assert algorithms((2, 64, 32, 32), (3, 64, 3, 3))[1] == "gemm"  # dy has few channels, but taps run backwards
    assert algorithms((2, 4, 32, 32), (64, 4, 8, 8)) == ["gemm"] * 3  # more columns than shared memory holds
    assert algorithms((2, 4, 400, 400), (64, 4, 2, 2), stride=40)[::2] == ["gemm"] * 2  # nor a rectangle
    assert algorithms((2, 3, 32, 32), (64, 3, 3, 3), padding=1, stride=2)[2] == "few channels"
