"""Convolutions with at most eight output channels on CUDA (csrc/cuda/conv_narrow.cuh), on the emulator."""

import pytest
import torch

from pyops import functional as F
from pyops.core import backend as backends
from pyops.core import explain, library

from .harness import agrees, emulated_device

# reason: (input, filters, arguments); with filters for few outputs, or of few channels, whose input gradient is one
CASES = {
    "last layer of a decoder": ((2, 40, 11, 9), (3, 40, 3, 3), {"padding": 1}),
    "eight outputs, several tiles": ((1, 32, 19, 21), (8, 32, 3, 3), {"padding": 2, "dilation": 2}),
    "25 taps, stride": ((1, 20, 17, 14), (1, 20, 5, 5), {"stride": 2, "padding": 2}),
    "49 taps": ((1, 16, 9, 20), (3, 16, 7, 7), {"padding": 3}),
    "gradient of an image": ((2, 3, 21, 18), (48, 3, 3, 3), {"padding": 1}),
    "gradient of an image, stride": ((1, 3, 23, 25), (24, 3, 7, 7), {"stride": 2, "padding": 3}),
    "gradient, dilation beside stride": (
        (1, 5, 19, 16),
        (33, 5, 3, 4),
        {"stride": (2, 3), "dilation": (3, 2), "padding": 4},
    ),
    "one dimension": ((2, 24, 300), (4, 24, 9), {"padding": 4}),
    "volume": ((1, 16, 4, 5, 6), (2, 16, 2, 3, 3), {"padding": (0, 1, 1), "stride": (2, 1, 1)}),
}
RACE = ("last layer of a decoder", "gradient of an image, stride", "volume")


def inputs(case, dtype, channels_last):
    shape, filters, _ = CASES[case]
    g = torch.Generator().manual_seed(0)
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(shape), torch.contiguous_format)
    x, w, b = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in (shape, filters, filters[:1]))
    return x.to(memory_format=last if channels_last else torch.contiguous_format), w, b


def passes(case, dtype, channels_last):
    name = f"conv{len(CASES[case][0]) - 2}d"
    call = lambda f: lambda *t: getattr(f, name)(*t, **CASES[case][2])
    with backends.backend("emulator"), emulated_device("emulator", 80):  # eight outputs in half types: wgmma's on a 90
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
    x, w, b = inputs("last layer of a decoder", torch.float32, True)
    want = torch.nn.functional.conv2d(x.double(), w.double(), b.double(), padding=1)
    with backends.backend("emulator"), F.conv_algorithm(algorithm):
        got = F.conv2d(x, w, b, padding=1)
    assert (got.double() - want).abs().max() < 8 * 360**0.5 * 2 ** (-11 if algorithm == "tf32" else -22)


def test_transposed_with_bias_residue_by_residue():
    """The last layer of a generator: 64 to 3 channels, 4 x 4 taps, stride 2."""
    g = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(s, generator=g).bfloat16() for s in ((2, 64, 5, 6), (64, 3, 4, 4), (3,)))
    call = lambda f: lambda *t: f.conv_transpose2d(*t, stride=2, padding=1)
    with backends.backend("emulator"):
        agrees(call(F), call(torch.nn.functional), x.contiguous(memory_format=torch.channels_last), w, b)


def test_activation_and_residual_in_the_same_pass():
    x, w, b = inputs("last layer of a decoder", torch.float32, True)
    r = torch.randn(2, 3, 11, 9).contiguous(memory_format=torch.channels_last)
    with backends.backend("emulator"), torch.no_grad():
        y = F.conv2d_act(x, w, b, r, activation="silu", padding=1)
    exact = torch.nn.functional.silu(torch.nn.functional.conv2d(x, w, b, padding=1) + r)
    torch.testing.assert_close(y, exact, rtol=1e-4, atol=1e-4)


def test_products_are_of_eight_outputs():
    """Two tiles of 128 outputs, nine taps and two steps of 16 channels by eight products; conv_kernel takes 64."""
    x, w = torch.randn(1, 32, 16, 16).bfloat16(), torch.randn(3, 32, 3, 3).bfloat16()
    library.configure_emulator(statistics="reset")
    with backends.backend("emulator"):
        F.conv2d(x, w, padding=1)
    assert library.emulator_statistic("mma") == 2 * 9 * 2 * 8


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_stay_where_they_belong(value):
    x, w, b = inputs("last layer of a decoder", torch.bfloat16, True)
    x[1, 39, 5, 5] = value
    w[2, 0, 1, 1] = value
    with backends.backend("emulator"):
        y = F.conv2d(x, w, b)
    exact = torch.nn.functional.conv2d(x.double(), w.double(), b.double())
    assert torch.equal(y.isnan(), exact.isnan()) and torch.equal(y.isinf(), exact.isinf())


def test_explain_tells_what_is_served():
    def algorithms(x, w, **geometry):
        notes = explain.explain("conv2d", [x, w], torch.float32, wanted="emulator", geometry=geometry)
        return [line.split("algorithm ")[1].split(" (")[0] for line in str(notes).splitlines() if " algorithm " in line]

    assert algorithms((2, 64, 32, 32), (3, 64, 3, 3), padding=1) == ["few filters", "ieee", "ieee"]
    assert algorithms((2, 3, 32, 32), (64, 3, 3, 3), padding=1) == ["few channels", "few filters", "few channels"]
    assert algorithms((2, 64, 32, 32), (3, 64, 1, 1)) == ["ieee"] * 3  # one tap reads the input once as it is
    assert algorithms((2, 64, 32, 32), (9, 64, 3, 3)) == ["ieee"] * 3
    assert algorithms((2, 64, 32, 32), (3, 64, 9, 9)) == ["ieee"] * 3  # more taps than shared memory holds
    assert algorithms((2, 64, 90, 90), (3, 64, 2, 2), dilation=64)[0] == "ieee"  # a rectangle that does not fit
