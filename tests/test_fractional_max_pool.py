import pytest
import torch

from pyops import backend as forced
from pyops import functional as F
from pyops import nn, testing, use

from .harness import passes, refuses, same_refusal

torch_F = torch.nn.functional
X = torch.randn(2, 3, 9, 11, generator=torch.Generator().manual_seed(0))
VOLUME = torch.randn(2, 3, 6, 7, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("check", testing.checks())
def test_checks(backend, check):
    if backend != "cpu" and check not in ("accuracy", "gradcheck", "opcheck"):
        pytest.skip("transforms and higher derivatives are the same Python on every backend")
    passes("fractional_max_pool2d", backend, check)


@pytest.mark.race
def test_race(backend):
    passes("fractional_max_pool2d", backend, "accuracy")


def drawn(function, x, *args, **how):
    torch.manual_seed(5)
    x = x.clone().requires_grad_()
    y, index = function(x, *args, return_indices=True, **how)
    (dx,) = torch.autograd.grad(y, x, torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape) % 7)
    return y, index, dx


@pytest.mark.parametrize(
    ("rank", "args", "how"),
    [
        (2, (3, 4), {}),
        (2, ((2, 3), (8, 5)), {}),
        (2, (2,), {"output_ratio": (0.5, 0.7)}),
        (2, (9, 1), {}),
        (3, (2, (4, 3, 4)), {}),
        (3, ((1, 2, 3),), {"output_ratio": (0.7, 0.4, 0.5)}),
    ],
)
def test_places_maxima_and_gradients_are_those_of_torch(backend, rank, args, how):
    x, name = (X, "fractional_max_pool2d") if rank == 2 else (VOLUME, "fractional_max_pool3d")
    for v in (x, x[0]):
        with forced(backend):
            ours = drawn(getattr(F, name), v, *args, **how)
        for a, b in zip(ours, drawn(getattr(torch_F, name), v, *args, **how)):
            torch.testing.assert_close(a, b)


def test_every_start_of_every_window(backend):
    """Samples near both ends of [0, 1), and sizes whose windows lie 1 apart or far."""
    u = torch.tensor([0.0, 1e-6, 0.3, 0.5, 0.999999]).repeat(4, 1).reshape(1, 10, 2)
    for size, kernel, out in ((12, 2, 11), (12, 3, 7), (40, 2, 3), (13, 13, 1), (13, 6, 2)):
        x = torch.randn(1, 10, size, size)
        with forced(backend):
            y, index = F.fractional_max_pool2d(x, kernel, out, None, True, u)
        want, places = torch_F.fractional_max_pool2d(x, kernel, out, None, True, u)
        assert torch.equal(y, want) and torch.equal(index, places)


def test_samples_outside_read_nothing_outside(backend):
    u = torch.full((1, 2, 2), -7.5)
    u[0, 1] = 1e30
    with forced(backend):
        y = F.fractional_max_pool2d(torch.ones(1, 2, 6, 6), 2, 3, _random_samples=u)
    assert torch.equal(y, torch.ones(1, 2, 3, 3))


def test_nan_wins(backend):
    x = X.clone()
    x[0, 0, 4] = float("nan")
    with forced(backend):
        ours = drawn(F.fractional_max_pool2d, x, 3, 5)
    for a, b in zip(ours[:2], drawn(torch_F.fractional_max_pool2d, x, 3, 5)):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("width", "out"), [(45, 31), (45, 3), (600, 5)], ids=["many windows", "few", "far apart"])
def test_rows_of_many_vectors(backend, width, out, dtype):
    """Ties, NaN and windows of -inf in rows of several vectors and a rest."""
    g = torch.Generator().manual_seed(3)
    x = torch.randint(-2, 3, (1, 3, 7, width), generator=g).to(dtype)
    x[0, 0, 2, ::7] = float("nan")
    x[0, 1] = -torch.inf
    u = torch.rand(1, 3, 2, generator=g).to(dtype)
    with forced(backend):
        y, index = F.fractional_max_pool2d(x, (2, 3), (4, out), None, True, u)
    # torch places the windows of half types in their own arithmetic
    wide = torch.promote_types(dtype, torch.float32)
    want, places = torch_F.fractional_max_pool2d(x.to(wide), (2, 3), (4, out), None, True, u.to(wide))
    torch.testing.assert_close(y, want.to(dtype), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(index, places)


@pytest.mark.parametrize(("name", "x"), [("FractionalMaxPool2d", X), ("FractionalMaxPool3d", VOLUME)])
def test_module_and_route(name, x):
    ours, theirs = getattr(nn, name)(2, output_size=3), getattr(torch.nn, name)(2, output_size=3)
    torch.manual_seed(0)
    expected = theirs(x)
    torch.manual_seed(0)
    assert torch.equal(ours(x), expected)
    torch.manual_seed(0)
    with use() as report:
        assert torch.equal(theirs(x), expected)
        getattr(torch.nn, name)(2, output_size=3, return_indices=True)(x)
    assert not report.unrouted() and not any(e.kept for e in report.entries.values())


def test_empty():
    assert F.fractional_max_pool2d(X[:0], 2, 3).shape == (0, 3, 3, 3)
    x = X.clone().requires_grad_()
    for pool in (F.fractional_max_pool2d, torch_F.fractional_max_pool2d):
        y, index = pool(x, 2, output_ratio=(0.1, 0.5), return_indices=True)
        assert y.shape == index.shape == (*X.shape[:2], 0, X.shape[3] // 2) and index.dtype == torch.int64
        assert not torch.autograd.grad(y.sum(), x)[0].any()


@pytest.mark.parametrize(
    ("args", "how"),
    [((X, 3), {}), ((X, 3, (8, 4)), {}), ((X, (2, 2, 2), 3), {}), ((X, 2, 3, None, False, torch.rand(2, 3, 3)), {})],
)
def test_refuses_as_torch(args, how):
    same_refusal(F.fractional_max_pool2d, torch_F.fractional_max_pool2d, *args, **how)


def test_no_channels_as_torch():
    for rank, op in ((2, "fractional_max_pool2d"), (3, "fractional_max_pool3d")):
        ours, theirs = getattr(F, op), getattr(torch_F, op)
        for lead in ((0,), (0, 2)):
            x = torch.ones(*lead, *(6,) * rank)
            y, index = ours(x, 2, 3, return_indices=True)
            assert y.shape == index.shape == theirs(x, 2, 3).shape and index.dtype == torch.int64
        same_refusal(ours, theirs, torch.ones(2, 0, *(6,) * rank), 2, 3)


def test_messages():
    refuses(ValueError, ("fractional_max_pool2d", "'output_size'", "None"), F.fractional_max_pool2d, X, 3)
    refuses(RuntimeError, ("fractional_max_pool2d", "'kernel_size'"), F.fractional_max_pool2d, X, 3, 8)
    refuses(NotImplementedError, ("'input'", "int64"), F.fractional_max_pool2d, X.long(), 3, 2)
