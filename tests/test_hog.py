import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyops import functional as F
from pyops import testing
from pyops.core import backend as backends
from pyops.core.samples import all_checked

from .harness import accurate, passes, photo, properties, refuses, skimage

X = torch.arange(240.0).reshape(2, 10, 12)
SIZES = {"pixels_per_cell": (8, 8), "cells_per_block": (3, 3)}
NORMS = ("L1", "L1-sqrt", "L2", "L2-Hys")


@pytest.mark.parametrize("check", testing.checks())
def test_checks(backend, check):
    if backend != "cpu" and check not in ("accuracy", "opcheck", "determinism"):
        pytest.skip("derivatives of higher order, transforms and layouts are the same Python on every backend")
    passes("hog", backend, check)


@pytest.mark.race
def test_race(backend):
    if backend == "emulator":
        passes("hog", backend, "accuracy")


def of_skimage(image: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    return torch.from_numpy(skimage("feature._hog").hog(image.cpu().numpy(), *args, **kwargs))


# scikit-image adds the votes of a cell in float32, whatever the image is
@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-6), (torch.float32, 1e-4)])
@pytest.mark.parametrize("norm", NORMS)
def test_photos_as_scikit_image(norm, dtype, atol):
    # roots of whole numbers can lie on a boundary but for their last bit (√3 to 1 at 60°), so those get a fraction
    for file, shift, how in (("astronaut.png", 0, {}), ("coffee.png", 0.37, {"transform_sqrt": True})):
        image = photo(file).to(dtype) + shift
        ours = F.hog(image, block_norm=norm, channel_axis=-1, **how)
        theirs = of_skimage(image, block_norm=norm, channel_axis=-1, **how)
        assert ours.dtype == theirs.dtype
        if how and dtype == torch.float32:
            # float32 roots differ from those in their last bit: one pixel in a million falls on the other side
            assert ((ours - theirs).abs() > atol).double().mean() < 1e-3
        else:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize(
    "orientations, cell, block", [(1, (8, 8), (2, 2)), (7, (5, 7), (3, 1)), (8, (8, 8), (2, 2)), (12, (16, 12), (1, 1))]
)
def test_grey_photo_as_scikit_image(backend, orientations, cell, block):
    """Whole numbers: many gradients lie on a diagonal, on the boundary of two bins."""
    image = photo("camera.png")[..., 0].double()[200:233, 180:217]
    with backends.backend(backend):
        ours = F.hog(image, orientations, cell, block, feature_vector=False)
    theirs = of_skimage(image, orientations, cell, block, feature_vector=False)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_batches_are_single_images(backend):
    images = torch.stack([photo("astronaut.png")[y : y + 17, y : y + 26] for y in (60, 100)]).float()
    alone = torch.stack([of_skimage(image, 9, (8, 8), (2, 2), channel_axis=-1) for image in images])
    planes = images.movedim(-1, 1)
    with backends.backend(backend):
        for batch, axis in ((images, -1), (planes, 1), (planes.contiguous(), 1), (planes.contiguous(), -3)):
            torch.testing.assert_close(F.hog(batch, 9, (8, 8), (2, 2), channel_axis=axis), alone, rtol=0, atol=1e-5)
        of_bytes = F.hog(images.to(torch.uint8).unflatten(0, (1, 2)), 9, (8, 8), (2, 2), channel_axis=4)
    torch.testing.assert_close(of_bytes, alone[None], rtol=0, atol=1e-5)


@properties
@given(
    batch=st.integers(1, 2), channels=st.integers(1, 3), height=st.integers(1, 13), width=st.integers(1, 40),
    cell=st.tuples(st.integers(1, 4), st.integers(1, 9)), block=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    orientations=st.integers(1, 10), norm=st.sampled_from(NORMS), last=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_any_shape(batch, channels, height, width, cell, block, orientations, norm, last, dtype):
    height, width = (max(size, c * b) for size, c, b in zip((height, width), cell, block))
    shape = (batch, height, width, channels) if last else (batch, channels, height, width)
    make = lambda t: ((t.input(shape), orientations, cell, block, norm), {"channel_axis": -1 if last else 1})
    accurate(F.hog, all_checked()["hog"].reference, make, dtype)


def test_gradient_keeps_the_memory_format():
    x = torch.randn(2, 3, 8, 9).contiguous(memory_format=torch.channels_last).requires_grad_()
    (dx,) = torch.autograd.grad(F.hog(x, 4, (2, 2), (2, 2), channel_axis=1).sum(), x)
    assert dx.is_contiguous(memory_format=torch.channels_last)


def test_gradient_moves_an_image_towards_a_descriptor():
    """Gradient descent on pixels: the descriptor of noise comes near that of a photo."""
    wanted = photo("camera.png")[..., 0].float()[180:212, 180:212] / 255
    target = F.hog(wanted, block_norm="L2", **SIZES)
    x = (wanted + 0.3 * torch.randn(32, 32, generator=torch.Generator().manual_seed(0))).requires_grad_()
    distance = lambda: (F.hog(x, block_norm="L2", **SIZES) - target).square().sum()
    first = distance().item()
    for _ in range(60):
        (dx,) = torch.autograd.grad(distance(), x)
        x.data -= 0.05 * dx / dx.norm() * 32
    assert distance().item() < first / 2


def test_flat_images_have_gradient_zero():
    for norm in NORMS:
        x = torch.ones(16, 16, requires_grad=True)
        y = F.hog(x, 9, (4, 4), (2, 2), norm, transform_sqrt=True)
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(y, torch.zeros_like(y)) and torch.equal(dx, torch.zeros_like(x))


def test_not_a_number_reaches_its_blocks_alone(backend):
    x = torch.randn(24, 24)
    x[3, 4] = torch.nan
    with backends.backend(backend):
        y = F.hog(x, 9, (8, 8), (1, 2), feature_vector=False)
    theirs = of_skimage(x, 9, (8, 8), (1, 2), feature_vector=False)
    assert torch.equal(y.isnan().flatten(2).all(-1), theirs.isnan().flatten(2).all(-1))


def test_bad_input():
    for args, kind, words in (
        ((X[0, 0],), ValueError, ("'input'", "[12]")),
        ((X, 0), RuntimeError, ("'orientations'", "0")),
        ((X, 65), RuntimeError, ("'orientations'", "64")),
        ((X, 2.5), TypeError, ("'orientations'", "2.5")),
        ((X, 9, (4, 0)), RuntimeError, ("'pixels_per_cell'", "0")),
        ((X, 9, 4.0), TypeError, ("'pixels_per_cell'", "4.0")),
        ((X, 9, (4, 4), (1, 1, 1)), RuntimeError, ("'cells_per_block'", "[1, 1, 1]")),
        ((X, 9, (4, 4), (3, 3)), ValueError, ("'input'", "at least 12 by 12 pixels")),
        ((X, 9, (4, 4), (1, 1), "L3"), ValueError, ("'block_norm'", "L3")),
        ((X.long(), 9, (4, 4), (1, 1)), NotImplementedError, ("'input'", "int64")),
        (("x",), TypeError, ("'input'", "str")),
    ):
        refuses(kind, ("hog", *words), F.hog, *args)
    refuses(IndexError, ("'channel_axis'", "3"), F.hog, X, 9, (2, 2), (1, 1), channel_axis=3)
    refuses(ValueError, ("'input'", "[10, 12]"), F.hog, X[0], channel_axis=0)
    refuses(ValueError, ("'input'", "one channel"), F.hog, X[None, :0], 9, (2, 2), (1, 1), channel_axis=1)
