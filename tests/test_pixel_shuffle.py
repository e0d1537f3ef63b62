import pytest
import torch

from pyops import functional as F
from pyops import nn, testing, use
from pyops.core import backend as backends

from .harness import modules_agree, passes, refuses, same_refusal

X = torch.arange(192.0).reshape(2, 8, 3, 4)
OPS = ("pixel_shuffle", "pixel_unshuffle")


@pytest.mark.parametrize("check", testing.checks())
def test_channel_shuffle(check):
    passes("channel_shuffle", "cpu", check)


def test_channel_shuffle_keeps_the_memory_format():
    for dims in ((5,), (4, 5), (2, 4, 5)):
        x = torch.randn(2, 6, *dims).movedim(1, -1).contiguous().movedim(-1, 1).requires_grad_()
        y = F.channel_shuffle(x, 3)
        torch.testing.assert_close(y, torch.nn.functional.channel_shuffle(x, 3), rtol=0, atol=0)
        (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
        assert y.stride() == x.stride() and dx.stride() == x.stride()


@pytest.mark.parametrize("check", testing.checks())
@pytest.mark.parametrize("op", OPS)
def test_checks(backend, op, check):
    if backend != "cpu" and check not in ("accuracy", "opcheck"):
        pytest.skip("derivatives of higher order, transforms and layouts are the same Python on every backend")
    passes(op, backend, check)


@pytest.mark.race
def test_race(backend):
    if backend == "emulator":
        for op in OPS:
            passes(op, backend, "accuracy")


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("factor", [1, 2, 3, 4, 5])
def test_is_an_exact_copy_and_its_inverse(factor, dtype):
    for channels_last in (False, True):
        x = torch.randn(2, 3 * factor * factor, 4, 19).to(dtype)
        x[0, 0, 0, 0] = torch.nan
        x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
        y = F.pixel_shuffle(x, factor)
        torch.testing.assert_close(y, torch.nn.functional.pixel_shuffle(x, factor), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(F.pixel_unshuffle(y, factor), x, rtol=0, atol=0, equal_nan=True)


def test_nothing():
    """An empty batch has an empty gradient; torch's own cannot be asked for one."""
    for shape in ((0, 4, 2, 3), (2, 0, 2, 3)):
        x = torch.randn(shape, requires_grad=True)
        y = F.pixel_shuffle(x, 2)
        assert y.shape == torch.nn.functional.pixel_shuffle(x, 2).shape
        assert torch.autograd.grad(y.sum(), x)[0].shape == shape


def test_modules_and_routes():
    modules_agree(nn.PixelShuffle(2), torch.nn.PixelShuffle(2), X, "cpu")
    modules_agree(nn.PixelUnshuffle(2), torch.nn.PixelUnshuffle(2), torch.randn(1, 2, 4, 6), "cpu")
    modules_agree(nn.ChannelShuffle(4), torch.nn.ChannelShuffle(4), X, "cpu")
    with use() as report, backends.backend("cpu"):
        torch.nn.ChannelShuffle(2)(X)
        torch.nn.PixelShuffle(2)(X)
        torch.nn.functional.pixel_shuffle(X.long(), 2)
    assert sum(report.entries["channel_shuffle"].backends.values()) == 1
    entry = report.entries["pixel_shuffle"]
    assert sum(entry.backends.values()) == 1 and entry.kept == {"dtype int64": 1}


def test_bad_input():
    refuses(RuntimeError, ("pixel_shuffle", "'upscale_factor'", "0"), F.pixel_shuffle, X, 0)
    refuses(RuntimeError, ("pixel_shuffle", "'input'", "[2, 8, 3, 4]"), F.pixel_shuffle, X, 3)
    refuses(RuntimeError, ("pixel_unshuffle", "'input'", "[2, 8, 3, 4]"), F.pixel_unshuffle, X, 2)
    refuses(RuntimeError, ("channel_shuffle", "'input'", "8 channels"), F.channel_shuffle, X, 3)
    refuses(RuntimeError, ("channel_shuffle", "'groups'", "0"), F.channel_shuffle, X, 0)
    refuses(NotImplementedError, ("pixel_shuffle", "'input'", "int64"), F.pixel_shuffle, X.long(), 2)


@pytest.mark.parametrize(
    ("op", "args"),
    [
        ("pixel_shuffle", (X, 3)), ("pixel_shuffle", (X, 0)), ("pixel_shuffle", (X[0, 0], 2)),
        ("pixel_shuffle", (X, 2.0)), ("pixel_unshuffle", (X, 2)), ("pixel_unshuffle", (X, -1)),
        ("pixel_unshuffle", (X[0, 0], 2)), ("channel_shuffle", (X, 3)), ("channel_shuffle", (X, 2.0)),
        ("channel_shuffle", (X[0, 0], 1)), ("channel_shuffle", (X, -1)),
    ],
)  # fmt: skip
def test_refuses_as_torch(op, args):
    same_refusal(getattr(F, op), getattr(torch.nn.functional, op), *args)
