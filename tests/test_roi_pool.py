import math

import pytest
import torch

from pyops import backend as forced
from pyops import testing, vision
from pyops.ops import roi_pool as room

from .harness import passes, refuses

X = torch.arange(2 * 4 * 5 * 6, dtype=torch.float32).reshape(2, 4, 5, 6)
ROIS = torch.tensor([[0.0, 0, 0, 5, 4], [1.0, 1, 1, 3, 3]])
OPS = ("roi_pool", "ps_roi_pool")


def unless_triton(backend):
    if backend == "triton":
        pytest.skip("RoI Pool has no Triton kernel")


@pytest.mark.parametrize("check", testing.checks())
@pytest.mark.parametrize("op", OPS)
def test_checks(backend, op, check):
    unless_triton(backend)
    if backend != "cpu" and check not in ("accuracy", "opcheck"):
        pytest.skip("derivatives of higher order, transforms and layouts are the same Python on every backend")
    passes(op, backend, check)


@pytest.mark.race
@pytest.mark.parametrize("op", OPS)
def test_race(backend, op):
    if backend == "emulator":
        passes(op, backend, "accuracy")


def slow(x, rois, size, scale, mean):
    """Pixel by pixel, as the papers say it."""
    away = lambda v: int(math.copysign(math.floor(abs(v) + 0.5), v))
    (p, q), (_, c, h, w) = size, x.shape
    y = torch.zeros(len(rois), c // (p * q) if mean else c, p, q, dtype=x.dtype)
    for r, (image, *box) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = (away(v * scale) for v in box)
        more = 0 if mean else 1
        height, width = max(y2 - y1 + more, 1), max(x2 - x1 + more, 1)
        cut = lambda v, n: min(max(v, 0), n - (1 if mean else 0))
        for i in range(p):
            for j in range(q):
                h0, h1 = (cut(f + y1, h) for f in (i * height // p, -(-(i + 1) * height // p)))
                w0, w1 = (cut(f + x1, w) for f in (j * width // q, -(-(j + 1) * width // q)))
                planes = x[int(image), i * q + j :: p * q] if mean else x[int(image)]
                if h1 > h0 and w1 > w0:
                    bin_ = planes[:, h0:h1, w0:w1].flatten(1)
                    y[r, :, i, j] = bin_.mean(1) if mean else bin_.amax(1)
    return y


@pytest.mark.parametrize("mean", [False, True])
def test_against_the_definition(backend, mean):
    unless_triton(backend)
    x = torch.randn(2, 4, 9, 11, dtype=torch.float64)
    rois = torch.tensor(room._MORE, dtype=torch.float64)
    op = vision.ps_roi_pool if mean else vision.roi_pool
    with forced(backend):
        for scale in (1.0, 0.5):
            torch.testing.assert_close(op(x, rois, 2, scale), slow(x, rois, (2, 2), scale, mean))


def test_ties_nan_and_not_finite_rois(backend):
    unless_triton(backend)
    nan, inf = float("nan"), float("inf")
    x = torch.ones(1, 1, 3, 3, requires_grad=True)
    with forced(backend):
        vision.roi_pool(x, torch.tensor([[0.0, 0, 0, 2, 2]]), 1).backward()
        assert x.grad.flatten().tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0]
        x = torch.tensor([[nan, 2.0], [1.0, nan]]).reshape(1, 1, 2, 2)
        assert vision.roi_pool(x, torch.tensor([[0.0, 0, 0, 1, 1]]), 1).item() == 2
        bad = torch.tensor([[0, nan, 0, 1, 1], [0, 0, 0, inf, 1], [0, -inf, 0, 1, 1.0]])
        assert not vision.roi_pool(X, bad, 2).any() and not vision.ps_roi_pool(X, bad, 2).any()


@pytest.mark.parametrize("image", [-1.0, 2.0, 1e30, float("nan"), float("-inf")])
@pytest.mark.parametrize("op", OPS)
def test_image_index_out_of_range(backend, image, op):
    unless_triton(backend)
    with forced(backend), pytest.raises(RuntimeError):
        getattr(vision, op)(X, torch.tensor([[image, 0, 0, 3, 3]]), 1)


def test_modules_and_bad_input():
    torch.testing.assert_close(vision.RoIPool(2, 0.5)(X, ROIS), vision.roi_pool(X, ROIS, 2, 0.5))
    torch.testing.assert_close(vision.PSRoIPool(2, 0.5)(X, ROIS), vision.ps_roi_pool(X, ROIS, 2, 0.5))
    assert repr(vision.RoIPool((2, 3), 0.5)) == "RoIPool(output_size=(2, 3), spatial_scale=0.5)"
    refuses(RuntimeError, ("roi_pool", "'boxes'", "[2, 4]"), vision.roi_pool, X, ROIS[:, 1:], 2)
    refuses(ValueError, ("roi_pool", "'output_size'"), vision.roi_pool, X, ROIS, 0)
    refuses(RuntimeError, ("ps_roi_pool", "'input'", "4 channels"), vision.ps_roi_pool, X, ROIS, 3)
