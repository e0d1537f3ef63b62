import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyops import functional as F
from pyops import testing
from pyops.core import backend as backends
from pyops.core.samples import all_checked

from .harness import accurate, passes, photo, properties, refuses, skimage

X = torch.arange(24.0).reshape(2, 3, 4)


@pytest.mark.parametrize("check", testing.checks())
def test_checks(backend, check):
    if backend != "cpu" and check not in ("accuracy", "opcheck", "determinism"):
        pytest.skip("derivatives of higher order, transforms and layouts are the same Python on every backend")
    passes("color_histogram", backend, check)


@pytest.mark.race
def test_race(backend):
    if backend == "emulator":
        passes("color_histogram", backend, "accuracy")
        with backends.backend(backend):
            F.color_histogram(torch.rand(1, 2, 3, 9000), 3)


@pytest.mark.parametrize("normalize", [False, True])
def test_photos_as_scikit_image(normalize):
    """Of each channel over the range of the whole image, as scikit-image counts an image of floats."""
    for file in ("astronaut.png", "chelsea.png"):
        image = photo(file).double() / 255
        for bins in (256, 10, 7):
            theirs, _ = skimage("exposure.exposure").histogram(
                image.numpy(), bins, normalize=normalize, channel_axis=-1
            )
            span = (image.min().item(), image.max().item())
            ours = F.color_histogram(image, bins, span, normalize=normalize, channel_axis=-1)
            theirs = torch.from_numpy(theirs).to(ours.dtype)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 if normalize else 0)


def test_float32_photo_as_numpy():
    """scikit-image rounds the edges of a float32 image step by step; NumPy takes a range in float64."""
    import numpy as np

    image = photo("chelsea.png").float() / 255
    for bins in (256, 10, 7):
        ours = F.color_histogram(image, bins, (0.0, 0.9), channel_axis=-1)
        theirs = [np.histogram(image[..., c].numpy(), bins, (0.0, 0.9))[0] for c in range(3)]
        assert torch.equal(ours, torch.from_numpy(np.stack(theirs)))


def test_bytes_as_numpy(backend):
    import numpy as np

    image = photo("coffee.png")[:20, :25]
    with backends.backend(backend):
        ours = F.color_histogram(image, 256, (0, 256), channel_axis=-1)
    theirs = [np.bincount(image[..., c].numpy().reshape(-1), minlength=256) for c in range(3)]
    assert ours.dtype == torch.int64 and torch.equal(ours, torch.from_numpy(np.stack(theirs)))


@properties
@given(
    shape=st.tuples(st.integers(0, 2), st.integers(1, 3), st.integers(1, 6), st.integers(1, 50)),
    bins=st.integers(1, 40), low=st.sampled_from([-2.0, 0.0, 0.1]), span=st.sampled_from([0.7, 1.0, 3.3]),
    last=st.booleans(), dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_counts_of_any_shape_as_numpy(shape, bins, low, span, last, dtype):
    import numpy as np

    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    x.flatten()[::5] = low  # on an edge
    x.flatten()[1::7] = torch.nan
    given_x = x.movedim(1, -1).contiguous() if last else x
    ours = F.color_histogram(given_x, bins, (low, low + span), channel_axis=-1 if last else None)
    assert ours.shape == (*shape[:2], bins)
    for row, counts in zip(x.flatten(0, 1).flatten(1), ours.flatten(0, 1)):
        theirs, _ = np.histogram(row[~row.isnan()].numpy(), bins, (low, low + span))
        assert counts.tolist() == theirs.tolist()


def test_every_edge_begins_its_bin(backend):
    for dtype in (torch.float32, torch.float64):
        edges = (torch.arange(11, dtype=torch.float64) * 0.1).to(dtype)
        edges[-1] = 1
        with backends.backend(backend):
            counts = F.color_histogram(edges[None], 10)
        assert counts.tolist() == [*(1,) * 9, 2]


@properties
@given(
    shape=st.lists(st.integers(1, 6), min_size=2, max_size=5), bins=st.integers(1, 12),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_soft_of_any_shape(shape, bins, dtype):
    make = lambda t: ((t.input(shape), bins, (-2.0123, 1.9321)), {"soft": True})
    accurate(F.color_histogram, all_checked()["color_histogram"].reference, make, dtype)


def test_soft_counts_every_pixel_in_range(backend):
    x = torch.rand(2, 9, 300, dtype=torch.float64)
    with backends.backend(backend):
        y = F.color_histogram(x, 6, soft=True)
        shares = F.color_histogram(x, 6, soft=True, normalize=True)
        nothing = F.color_histogram(x + 2, 6, normalize=True)
    torch.testing.assert_close(y.sum(-1), torch.full((2,), 2700.0, dtype=torch.float64))
    torch.testing.assert_close(shares.sum(-1), torch.ones(2, dtype=torch.float64))
    assert torch.equal(nothing, torch.zeros_like(nothing))


def test_gradient_keeps_the_memory_format():
    x = torch.rand(2, 3, 8, 9).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = F.color_histogram(x, 4, soft=True)
    (dx,) = torch.autograd.grad(y[..., 0].sum(), x)
    assert dx.is_contiguous(memory_format=torch.channels_last)
    (of_planes,) = torch.autograd.grad(
        F.color_histogram(z := x.detach().contiguous().requires_grad_(), 4, soft=True)[..., 0].sum(), z
    )
    assert torch.equal(dx, of_planes)


def test_gradient_moves_colours_to_those_of_a_photo():
    """Gradient descent on the pixels of one photo: its soft histogram comes near that of another."""
    first, second = (photo(file)[::16, ::16].double().movedim(-1, 0) / 255 for file in ("coffee.png", "chelsea.png"))
    target = F.color_histogram(second, 8, soft=True, normalize=True)
    x = first.contiguous().requires_grad_()
    distance = lambda: (F.color_histogram(x, 8, soft=True, normalize=True) - target).square().sum()
    start = distance().item()
    for _ in range(150):
        (dx,) = torch.autograd.grad(distance(), x)
        x.data = (x.data - 5 * dx).clamp(0, 1)
    assert distance().item() < start / 4


def test_bad_input():
    for args, kind, words in (
        ((X[0, 0],), ValueError, ("'input'", "[4]")),
        ((X, 0), ValueError, ("'bins'", "0")),
        ((X, 2.0), TypeError, ("'bins'", "2.0")),
        ((X, 4, (1, 1)), ValueError, ("'range'", "(1, 1)")),
        ((X, 4, (0.0, float("inf"))), ValueError, ("'range'", "inf")),
        ((X, 4, (0,)), ValueError, ("'range'", "(0,)")),
        ((X, 4, (0, 1, 2)), ValueError, ("'range'", "(0, 1, 2)")),
        ((X, 4, None), TypeError, ("'range'", "None")),
        ((X, 4, 5), TypeError, ("'range'", "5")),
        ((X, 4, ("a", "b")), TypeError, ("'range'", "('a', 'b')")),
        ((X.int(),), NotImplementedError, ("'input'", "int32")),
        (([1.0],), TypeError, ("'input'", "list")),
    ):
        refuses(kind, ("color_histogram", *words), F.color_histogram, *args)
    refuses(IndexError, ("'channel_axis'", "-4"), F.color_histogram, X, channel_axis=-4)
