import pytest
import torch

from pyops import backend as forced
from pyops import functional as F
from pyops import nn, testing, use
from pyops.ops import pool as room

from .harness import modules_agree, passes, refuses, same_refusal

torch_F = torch.nn.functional
OPS = ("max_pool2d", "avg_pool2d", "adaptive_max_pool2d", "adaptive_avg_pool2d")
ON_OTHERS = ("accuracy", "gradcheck")


@pytest.mark.parametrize("check", testing.checks())
@pytest.mark.parametrize("op", OPS)
def test_checks(backend, op, check):
    if check not in ON_OTHERS and (backend != "cpu" or (op.startswith("adaptive") and check != "layout")):
        pytest.skip("transforms and higher derivatives are the same Python on every backend, and for all windows")
    passes(op, backend, check)


@pytest.mark.race
@pytest.mark.parametrize("op", OPS)
def test_race(backend, op):
    passes(op, backend, "accuracy")


def grid(*shape, channels_last=False):
    """A permutation of small numbers, so that maxima are unique and every dtype holds them."""
    count = torch.Size(shape).numel()
    x = (torch.arange(count) * 37 % 251 - 125.0).reshape(shape) + torch.arange(count).reshape(shape) / 512
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def with_gradient(function, x, *args, **kwargs):
    x = x.clone().requires_grad_()
    y = function(x, *args, **kwargs)
    y, index = y if isinstance(y, tuple) else (y, None)
    (dx,) = torch.autograd.grad(y, x, torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape) % 7)
    return y, index, dx


def same(op, x, *args, backend, **kwargs):
    with forced(backend):
        ours = with_gradient(getattr(F, op), x, *args, **kwargs)
    # torch's own on the GPU chooses other maxima, and its gradient of avg_pool2d is wrong in channels last (2.11)
    for a, b in zip(ours, with_gradient(getattr(torch_F, op), x.cpu(), *args, **kwargs)):
        torch.testing.assert_close(a, b, equal_nan=True)


SHAPES = {1: (2, 3, 19), 2: (2, 3, 9, 11), 3: (1, 2, 5, 6, 7)}


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_every_rank(backend, rank):
    x = grid(*SHAPES[rank])
    for indices in (False, True):
        same(f"max_pool{rank}d", x, 3, 2, 1, backend=backend, return_indices=indices, ceil_mode=indices)
        same(f"adaptive_max_pool{rank}d", x, 3, backend=backend, return_indices=indices)
    same(f"avg_pool{rank}d", x, 3, 2, 1, backend=backend)
    same(f"avg_pool{rank}d", x[0], 2, backend=backend, ceil_mode=True, count_include_pad=False)
    same(f"adaptive_avg_pool{rank}d", x, 4, backend=backend)
    same(f"adaptive_avg_pool{rank}d", x[0], 1, backend=backend)
    same(f"lp_pool{rank}d", x.abs() + 1, 2.0, 2, backend=backend)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("indices", [False, True])
@pytest.mark.parametrize("how", [{}, {"dilation": 2, "padding": 1}, {"ceil_mode": True, "stride": (3, 2)}])
def test_max_pool_arguments(backend, how, indices, channels_last):
    x = grid(2, 17, 10, 12, channels_last=channels_last)
    same("max_pool2d", x, (3, 4), backend=backend, return_indices=indices, **how)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("how", [{"divisor_override": 5}, {"count_include_pad": False}, {"ceil_mode": True}])
def test_avg_pool_arguments(backend, how, channels_last):
    same("avg_pool2d", grid(2, 17, 10, 12, channels_last=channels_last), (3, 4), 3, 1, backend=backend, **how)


def test_windows_too_large_for_split_rows(backend):
    x = grid(1, 1, 40, 260)
    same("max_pool2d", x, (20, 17), (10, 1), backend=backend)
    same("max_pool2d", x, (20, 9), (20, 9), backend=backend, return_indices=True)
    same("avg_pool2d", x, (20, 9), (20, 9), backend=backend)


def test_equal_maxima_nan_and_infinity(backend):
    inf, nan = float("inf"), float("nan")
    rows = torch.tensor([[1.0, 1, -inf, -inf, nan, 2], [1, 1, -inf, -inf, 3, nan], [inf, 0, 0, 0, -inf, -inf]])
    x = rows.repeat(1, 2)[None, None]
    wide = x.expand(1, 17, 3, 12).contiguous(memory_format=torch.channels_last)
    for t in (x, wide):
        for kernel, stride in ((2, 1), ((3, 6), 6), (3, 3)):
            same("max_pool2d", t, kernel, stride, backend=backend, return_indices=True)
        same("adaptive_max_pool2d", t, (1, 5), backend=backend, return_indices=True)
        same("max_pool2d", t, 2, 1, backend=backend)
        same("avg_pool2d", t, 2, 2, backend=backend)


def test_empty_outputs_and_batches():
    x = torch.ones(2, 3, 4, 5, requires_grad=True)
    assert F.adaptive_avg_pool2d(x, (0, 2)).shape == (2, 3, 0, 2)
    y, index = F.adaptive_max_pool2d(x, (2, 0), return_indices=True)
    assert y.shape == index.shape == (2, 3, 2, 0) and index.dtype == torch.int64
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert not dx.any()
    assert F.max_pool2d(x[:0], 2).shape == (0, 3, 2, 2)
    for op in ("adaptive_avg_pool2d", "adaptive_max_pool2d"):  # torch takes no channels there
        assert getattr(F, op)(x[0, :0], 2).shape == getattr(torch_F, op)(x[0, :0], 2).shape == (0, 2, 2)


@pytest.mark.parametrize("op", ["avg_pool1d", "avg_pool2d"])
def test_second_gradient_of_a_window_larger_than_the_input(op):
    x = grid(1, 2, 3) + 1
    square = lambda x: getattr(F, op)(x, 3, 2, ceil_mode=True) ** 2
    assert torch.autograd.gradgradcheck(square, (x.double().requires_grad_(),))


def test_positions_take_one_byte_where_nobody_asks_for_them():
    x, kept = torch.randn(1, 2, 8, 8, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append((t.dtype, t.numel())), lambda t: t):
        F.max_pool2d(x, 2)
    assert (torch.uint8, 32) in kept and not any(dtype == torch.int64 for dtype, _ in kept)


def test_infinite_norm(backend):
    x = grid(1, 2, 6, 6)
    with forced(backend):
        torch.testing.assert_close(F.lp_pool2d(x, float("inf"), 2), torch_F.max_pool2d(x.abs(), 2))
        torch.testing.assert_close(F.lp_pool2d(x, -float("inf"), 3, 1), -torch_F.max_pool2d(-x.abs(), 3, 1))


MODULES = [
    "MaxPool{r}d(3, 2, padding=1, dilation=2)", "MaxPool{r}d(2, ceil_mode=True)", "AvgPool{r}d(3, 2, padding=1)",
    "AvgPool{r}d(2, count_include_pad=False)", "AdaptiveMaxPool{r}d(3)", "AdaptiveAvgPool{r}d(2)",
    "LPPool{r}d(2, 3, stride=2)",
]  # fmt: skip


@pytest.mark.parametrize("text", MODULES)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_module(text, rank):
    text = text.format(r=rank)
    modules_agree(eval(f"nn.{text}"), eval(f"torch.nn.{text}"), grid(*SHAPES[rank]).abs(), "cpu")


def test_module_with_indices():
    y, index = nn.MaxPool2d(2, return_indices=True)(grid(1, 2, 4, 4))
    want, places = torch.nn.MaxPool2d(2, return_indices=True)(grid(1, 2, 4, 4))
    assert torch.equal(y, want) and torch.equal(index, places)
    assert nn.AdaptiveMaxPool2d(2, return_indices=True)(grid(1, 2, 4, 4))[1].dtype == torch.int64


def test_every_spelling_is_routed():
    x, line = grid(1, 2, 6, 6), grid(1, 2, 9)
    with use() as report:
        found = [torch_F.max_pool2d(x, 2), torch.max_pool2d(x, 2), torch.nn.MaxPool2d(2)(x)]
        y, index = torch_F.max_pool2d(x, 2, return_indices=True)
        a, _ = torch.nn.AdaptiveMaxPool1d(2, return_indices=True)(line)
        b, _ = torch.adaptive_max_pool1d(line, 2)
        torch.nn.AdaptiveAvgPool2d(1)(x), torch.nn.AvgPool2d(2)(x), torch.avg_pool1d(line, 2), torch_F.avg_pool3d(x, 2)
        torch.nn.LPPool2d(2, 2)(x)
    for t in (*found, y):
        assert torch.equal(t, torch_F.max_pool2d(x, 2))
    assert torch.equal(index, torch_F.max_pool2d(x, 2, return_indices=True)[1]) and torch.equal(a, b)
    assert not report.unrouted() and not any(e.kept for e in report.entries.values())
    assert report.entries["max_pool2d"].calls == 4 and report.entries["lp_pool2d"].calls == 1


X = torch.ones(1, 2, 5, 5)


@pytest.mark.parametrize(
    ("op", "args", "kwargs"),
    [
        ("max_pool2d", (torch.ones(5, 5), 2), {}),
        ("max_pool2d", (X, 0), {}),
        ("max_pool2d", (X, 2, 0), {}),
        ("max_pool2d", (X, 6), {}),
        ("max_pool2d", (X, 3, 1, 2), {}),
        ("max_pool2d", (X, (2, 2, 2)), {}),
        ("max_pool2d", (X, "2"), {}),
        ("max_pool2d", (X, 2), {"dilation": 0}),
        ("max_pool2d", (torch.ones(1, 0, 5, 5), 2), {}),
        ("avg_pool2d", (X, 2), {"divisor_override": 0}),
        ("avg_pool2d", (X, 2, 1, -1), {}),
        ("avg_pool2d", (torch.ones(1, 2, 5, 5, dtype=torch.int32), 2), {}),
        ("adaptive_avg_pool2d", (X, -1), {}),
        ("adaptive_avg_pool2d", (X, (1, 2, 3)), {}),
        ("adaptive_max_pool2d", (torch.ones(5, 5), 2), {}),
        ("adaptive_max_pool2d", (torch.ones(5, 5), (2, 2)), {}),
        ("adaptive_avg_pool2d", (torch.ones(5, 5), (None, 2)), {}),
        ("adaptive_avg_pool2d", (torch.ones(1, 1, 2, 5, 5), (2, 2)), {}),
        ("adaptive_avg_pool3d", (torch.ones(1, 5, 5), (2, 2, 2)), {}),
        ("adaptive_avg_pool1d", (torch.ones(5), 2), {}),
        ("avg_pool2d", (torch.ones(5, 5), 2), {}),
        ("avg_pool2d", (torch.ones(()), 2), {}),
        ("avg_pool2d", (torch.ones(1, 1, 2, 5, 5), 2), {}),
        ("avg_pool1d", (torch.ones(5), 2), {}),
        ("avg_pool3d", (torch.ones(5, 5), 2), {}),
        ("lp_pool2d", (torch.ones(5, 5), 2.0, 2), {}),
        ("lp_pool1d", (X[0], 0, 2), {}),
        ("lp_pool2d", (X, 0.0, 2), {}),
        ("lp_pool2d", (X, 0.0, 6), {}),
        ("lp_pool2d", (X, None, 2), {}),
        ("lp_pool2d", (X, 2.0, 6), {}),
    ],
)
def test_refuses_as_torch(op, args, kwargs):
    same_refusal(getattr(F, op), getattr(torch_F, op), *args, **kwargs)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("kind", ["avg", "max"])
def test_adaptive_pools_without_channels(rank, kind):
    """What torch takes, it takes, and refuses the rest."""
    op = f"adaptive_{kind}_pool{rank}d"
    ours, theirs = getattr(F, op), getattr(torch_F, op)
    spatial = (4,) * rank
    assert ours(torch.ones(0, *spatial), 2).shape == theirs(torch.ones(0, *spatial), 2).shape
    assert ours(torch.ones(0, 2, *spatial), 2).shape == theirs(torch.ones(0, 2, *spatial), 2).shape
    none = torch.ones(2, 0, *spatial)
    if kind == "avg" and rank < 3:
        assert ours(none, 2).shape == theirs(none, 2).shape
    else:
        same_refusal(ours, theirs, none, 2)


def test_messages():
    refuses(RuntimeError, ("max_pool2d", "'padding'", "2"), F.max_pool2d, X, 3, 1, 2)
    refuses(NotImplementedError, ("avg_pool2d", "'input'", "int32"), F.avg_pool2d, X.int(), 2)
    for rank, x in ((1, X[0]), (2, X), (3, X[None])):
        op = f"lp_pool{rank}d"
        refuses(RuntimeError, (f"{op}: ", "'kernel_size'", "[6"), getattr(F, op), x, 2.0, 6)
        refuses(RuntimeError, (f"{op}: ", "'kernel_size'", "[6"), getattr(F, op), x, float("inf"), 6)
        refuses(ZeroDivisionError, (f"{op}: ", "'norm_type'", "0"), getattr(F, op), x, 0, 2)
        refuses(TypeError, (f"{op}: ", "'norm_type'", "str"), getattr(F, op), x, "2", 2)


def test_windows_that_came_before_are_checked_as_at_first(monkeypatch):
    """What only equals a window that was found, as 2.0 or True does, is looked at again."""
    monkeypatch.setattr(room, "_windows", {})
    monkeypatch.setattr(room, "_MOST_WINDOWS", 3)
    x = torch.randn(2, 3, 9, 9)
    for kernel, stride, padding in (
        (2, None, 0),
        (2, 2, 0),
        ((3, 1), (1, 1), (1, 0)),
        ([3, 1], [1, 1], [1, 0]),
        (1, 1, 0),
    ):
        for _ in range(2):
            ours = F.max_pool2d(x, kernel, stride, padding)
            assert torch.equal(ours, torch.nn.functional.max_pool2d(x, kernel, stride, padding))
            small = F.max_pool2d(x[:, :, :6, :5], kernel, stride, padding)
            assert torch.equal(small, torch.nn.functional.max_pool2d(x[:, :, :6, :5], kernel, stride, padding))
            whole = F.max_pool2d(x, kernel, stride, padding, ceil_mode=True)
            assert torch.equal(whole, torch.nn.functional.max_pool2d(x, kernel, stride, padding, ceil_mode=True))
        assert len(room._windows) <= 3
    for _ in range(2):
        refuses(TypeError, ("max_pool2d", "'kernel_size'", "2.0"), F.max_pool2d, x, 2.0)
        refuses(TypeError, ("max_pool2d", "'stride'", "2.0"), F.max_pool2d, x, 2, (2, 2.0))
        refuses(RuntimeError, ("max_pool2d", "'padding'"), F.max_pool2d, x, 2, 2, 2)
        refuses(RuntimeError, ("max_pool2d", "'stride'"), F.max_pool2d, x, 2, 0)
