"""Convolutions of at most four channels on CUDA (csrc/cuda/conv_few.cuh), on the emulator."""

import pytest
import torch

from pyops import functional as F
from pyops.core import backend as backends
from pyops.core import library

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
}
RACE = ("first layer of a small network", "7x7, several steps of the sum", "volume")


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
