import pytest
import torch

from pyops import functional as F
from pyops import testing
from pyops.core import backend as backends
from pyops.core import convolution, explain

from .harness import passes, refuses

X, W = torch.ones(2, 4, 5, 6), torch.ones(8, 1, 3, 3)


@pytest.mark.parametrize("check", [c for c in testing.checks() if c != "autocast"])
def test_checks(backend, check):
    passes("depthwise_conv", backend, check)


@pytest.mark.race
def test_race(backend):
    if backend == "emulator":
        passes("depthwise_conv", backend, "accuracy")


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("taps", [1, 2, 3, 5, 7, 31])
def test_sizes_of_filters_on_the_cpu(taps, stride, channels_last):
    x, w = torch.randn(2, 20, 37, 35), torch.randn(20, 1, taps, taps)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    results = []
    for f, wide in ((F, torch.float32), (torch.nn.functional, torch.float64)):
        inputs = [x.to(wide).detach().requires_grad_(), w.to(wide).detach().requires_grad_()]
        y = f.conv2d(*inputs, stride=stride, padding=taps // 2, groups=20)
        dy = torch.sin(torch.arange(y.numel(), dtype=torch.float64)).reshape(y.shape).to(wide)
        results.append((y, *torch.autograd.grad(y, inputs, dy)))
    for a, b in zip(*results):
        assert (a.double() - b).abs().max() < 1e-5 * b.abs().max()


def test_an_infinity_stays_where_the_filter_reaches(backend):
    """Padding and tails of vectors must not multiply it by zero."""
    x, w = torch.zeros(1, 2, 5, 21), torch.ones(2, 1, 3, 3)
    x[0, 0, 2, 20] = float("inf")
    inputs = [x.requires_grad_(), w.requires_grad_()]
    theirs = torch.nn.functional.conv2d(*inputs, stride=(1, 2), groups=2)
    with backends.backend(backend):
        ours = F.conv2d(*inputs, stride=(1, 2), groups=2)
        dw = torch.autograd.grad(ours, w, torch.ones_like(ours))[0]
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(dw, torch.autograd.grad(theirs, w, torch.ones_like(theirs))[0])


def test_convolutions_choose_the_room():
    assert convolution.family_for(4, (8, 1, 3, 3), 4).stem == "depthwise_conv"
    assert convolution.family_for(4, (8, 2, 3, 3), 2).stem == "conv"
    assert "room depthwise_conv" in str(explain.explain("conv2d", [(1, 8, 9, 9), (8, 1, 3, 3)]))


def test_transposed_convolution_is_depthwise_too(backend):
    x, w = torch.randn(2, 6, 4, 5), torch.randn(6, 2, 3, 3)[:, :1]
    with backends.backend(backend):
        y = F.conv_transpose2d(x, w, stride=2, padding=1, output_padding=1, groups=6)
    theirs = torch.nn.functional.conv_transpose2d(x, w, stride=2, padding=1, output_padding=1, groups=6)
    torch.testing.assert_close(y, theirs, rtol=1e-5, atol=1e-5)


def test_more_channels_than_an_axis_of_a_grid_counts():
    """On CUDA axes 1 and 2 of a grid end at 65535."""
    c = 65537
    x, w = torch.randn(1, c, 3), torch.randn(c, 1, 2)
    results = []
    with backends.backend("emulator"):
        for f in (F, torch.nn.functional):
            inputs = [x.detach().requires_grad_(), w]
            y = f.conv1d(*inputs, groups=c)
            results.append((y, torch.autograd.grad(y, inputs[0], torch.ones_like(y))[0]))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs)


def test_bad_input():
    refuses(RuntimeError, ("depthwise_conv", "'input'", "channels"), F.depthwise_conv, X, W.expand(8, 2, 3, 3))
    refuses(RuntimeError, ("depthwise_conv", "'groups'", "4"), F.depthwise_conv, X, torch.ones(6, 1, 3, 3))
    refuses(RuntimeError, ("depthwise_conv", "'weight'", "2 dimensions"), F.depthwise_conv, X, W[0, 0])
    refuses(RuntimeError, ("depthwise_conv", "'input'", "2 dimensions"), F.depthwise_conv, X[0, 0], W)
