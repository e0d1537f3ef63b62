"""Groups that share tiles on CUDA (csrc/cuda/conv_grouped.cuh), on the emulator."""

import math

import pytest
import torch

from pyops import functional as F
from pyops.core import backend as backends
from pyops.core import library

from .harness import agrees, emulated_device

# reason: (input, filters, arguments)
CASES = {
    "four by four, whole units": ((2, 32, 6, 7), (32, 4, 3, 3), {"padding": 1, "groups": 8}),
    "odd groups, the last unit ragged": ((1, 15, 5, 6), (25, 3, 3, 2), {"padding": (1, 0), "groups": 5}),
    "more summed channels than a step": ((2, 48, 4, 5), (16, 24, 1, 3), {"groups": 2, "stride": (2, 1)}),
    "several blocks of units and of pixels": ((2, 72, 7, 9), (72, 8, 1, 1), {"groups": 9}),
    "two by two, many groups": ((1, 66, 3, 5), (66, 2, 2, 2), {"groups": 33, "dilation": (1, 2)}),
    "stride leaves taps out of a phase": ((1, 8, 7, 6), (12, 4, 3, 3), {"groups": 2, "stride": 2, "padding": 1}),
    "one filter for each of many channels": ((1, 24, 5, 5), (2, 12, 3, 3), {"groups": 2}),
    "32 filters a group": ((1, 6, 4, 5), (64, 3, 3, 3), {"groups": 2, "padding": 1}),
    "volume": ((1, 8, 3, 4, 3), (8, 4, 2, 2, 2), {"groups": 2, "stride": (1, 2, 1)}),
}
RACE = ("four by four, whole units", "odd groups, the last unit ragged", "more summed channels than a step")


def inputs(shape, filters, dtype, channels_last):
    g = torch.Generator().manual_seed(0)
    last = {4: torch.channels_last, 5: torch.channels_last_3d}[len(shape)]
    layout = last if channels_last else torch.contiguous_format
    x, w, b = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in (shape, filters, filters[:1]))
    return x.to(memory_format=layout), w, b


def passes(case, dtype, channels_last):
    shape, filters, arguments = CASES[case]
    call = lambda f: lambda *t: getattr(f, f"conv{len(shape) - 2}d")(*t, **arguments)
    with backends.backend("emulator"), emulated_device("emulator"):
        agrees(call(F), call(torch.nn.functional), *inputs(shape, filters, dtype, channels_last))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
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
@pytest.mark.parametrize("case", ["four by four, whole units", "odd groups, the last unit ragged"])
def test_tensor_core_products_of_float32(case, algorithm):
    shape, filters, arguments = CASES[case]
    x, w, b = inputs(shape, filters, torch.float32, True)
    exact = [t.double().requires_grad_() for t in (x, w, b)]
    ours = [t.clone().requires_grad_() for t in (x, w, b)]
    y = torch.nn.functional.conv2d(*exact, **arguments)
    dy = torch.randn(y.shape)
    library.configure_emulator(statistics="reset")
    with backends.backend("emulator"), F.conv_algorithm(algorithm):
        z = F.conv2d(*ours, **arguments)
        grads = torch.autograd.grad(z, ours, dy)
    assert library.emulator_statistic("mma") > 0
    terms = [filters[1] * 9, filters[0] // arguments["groups"] * 9, shape[0] * 42, shape[0] * 42]
    for a, t, n in zip((z, *grads), (y, *torch.autograd.grad(y, exact, dy.double())), terms):
        error = (a.double() - t).abs().max().item()
        assert error < 8 * math.sqrt(n) * 2 ** (-11 if algorithm == "tf32" else -22), error


def test_groups_of_four_take_a_fraction_of_the_tensor_core_products():
    x, w, _ = inputs((1, 32, 8, 8), (32, 4, 3, 3), torch.bfloat16, True)
    library.configure_emulator(statistics="reset")
    with backends.backend("emulator"):
        F.conv2d(x, w, padding=1, groups=8)
    # two units of four groups, nine taps, 64 pixels by 16 channels in 4 x 2 products of 16 x 8 x 16
    assert library.emulator_statistic("mma") == 2 * 9 * 4 * 2
    # a tile of 64 x 64 for each group, 36 summed channels in four steps of 16: 8 * 4 * 8 * 4 products


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("dtype", "groups", "c", "k"),
    [
        (torch.bfloat16, 8, 34, 40),  # a tile for each group: two launches, and one split of the weight gradient
        (torch.float32, 9, 33, 36),
        (torch.bfloat16, 26, 2, 32),  # one group a unit, four units a block
        (torch.bfloat16, 202, 2, 2),  # eight groups a unit
        (torch.float64, 70, 3, 2),
        (torch.bfloat16, 26, 34, 2),  # in units the one way, in tiles of their own the other
    ],
)
def test_more_groups_than_an_axis_of_a_grid_counts(dtype, groups, c, k, channels_last):
    """The device counts to 6 in place of 65535: groups beyond come in launches of their own."""
    g = torch.Generator().manual_seed(0)
    whole = lambda *shape: torch.randint(-2, 3, shape, generator=g).to(dtype)  # whose sums are exact
    x, w, b = whole(2, groups * c, 3, 4), whole(groups * k, c, 1, 2), whole(groups * k)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    r = whole(2, groups * k, 3, 3).contiguous(
        memory_format=torch.channels_last if channels_last else torch.preserve_format
    )
    results = []
    with backends.backend("emulator"):
        library.configure_emulator(grid_axis=6)
        try:
            plain = F.conv2d_act(x, w, b, r, activation="relu", groups=groups)
            for f, t in ((F, dtype), (torch.nn.functional, torch.float64)):
                leaves = [v.detach().to(t).requires_grad_() for v in (x, w, b)]
                y = f.conv2d(*leaves, groups=groups)
                results.append((y, *torch.autograd.grad(y, leaves, torch.ones_like(y))))
        finally:
            library.configure_emulator(grid_axis=65535)
    for ours, exact in zip(*results):
        assert torch.equal(ours.double(), exact.to(dtype).double())
    assert torch.equal(plain, (results[1][0] + r).relu().to(dtype))
