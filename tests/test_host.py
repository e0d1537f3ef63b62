"""pyops._host: the oracle against torch in float64 and against cases with a closed form; probe and ceilings."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

host = pytest.importorskip("pyops._host")

F = torch.nn.functional
EPS = 1e-5


def sample(*shape: int, seed: int = 0, offset: float = 0.5) -> np.ndarray:
    return np.random.default_rng(seed).normal(offset, 2.0, shape)


def torch_gradients(function, dy: np.ndarray, *inputs: np.ndarray | None) -> list[np.ndarray]:
    """y, then the gradients of the inputs that are there, in float64."""
    tensors = [None if x is None else torch.from_numpy(x).requires_grad_() for x in inputs]
    y = function(*tensors)
    present = [t for t in tensors if t is not None]
    return [t.detach().numpy() for t in (y, *torch.autograd.grad(y, present, torch.from_numpy(dy)))]


def assert_near(got, expected) -> None:
    np.testing.assert_allclose(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("shape", [(4, 8), (1, 1), (3, 17), (5, 1)], ids=str)
def test_layer_norm_agrees_with_torch(shape, affine):
    x, dy, (w, b) = sample(*shape), sample(*shape, seed=1), sample(2, shape[1], seed=2)
    weight, bias = (w, b) if affine else (None, None)
    expected = torch_gradients(lambda x, w, b: F.layer_norm(x, x.shape[1:], w, b, EPS), dy, x, weight, bias)
    y, mean, rstd = host.layer_norm(x, weight, bias, EPS)
    dx, dw, db = host.layer_norm_backward(dy, x, weight, EPS)
    assert_near(y, expected[0])
    assert_near(mean, x.mean(1))
    assert_near(rstd, 1 / np.sqrt(x.var(1) + EPS))
    for got, wanted in zip((dx, dw, db), expected[1:]):
        assert_near(got, wanted)


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("shape", [(4, 8), (1, 1), (3, 17)], ids=str)
def test_rms_norm_agrees_with_torch(shape, affine):
    x, dy, weight = sample(*shape), sample(*shape, seed=1), sample(shape[1], seed=2) if affine else None
    expected = torch_gradients(lambda x, w: F.rms_norm(x, x.shape[1:], w, EPS), dy, x, weight)
    y, rstd = host.rms_norm(x, weight, EPS)
    assert_near(y, expected[0])
    assert_near(rstd, 1 / np.sqrt((x**2).mean(1) + EPS))
    for got, wanted in zip(host.rms_norm_backward(dy, x, weight, EPS), expected[1:]):
        assert_near(got, wanted)


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("shape", [(4, 3, 5), (2, 1, 1), (1, 6, 7)], ids=str)
def test_batch_norm_agrees_with_torch(shape, affine):
    x, dy, (w, b) = sample(*shape), sample(*shape, seed=1), sample(2, shape[1], seed=2)
    weight, bias = (w, b) if affine else (None, None)
    call = lambda x, w, b: F.batch_norm(x, None, None, w, b, True, 0.1, EPS)
    expected = torch_gradients(call, dy, x, weight, bias)
    y, mean, rstd, var = host.batch_norm(x, weight, bias, EPS)
    assert_near(y, expected[0])
    assert_near(mean, x.mean((0, 2)))
    assert_near(var, x.var((0, 2)))
    assert_near(rstd, 1 / np.sqrt(var + EPS))
    for got, wanted in zip(host.batch_norm_backward(dy, x, weight, EPS), expected[1:]):
        assert_near(got, wanted)


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("groups", [1, 2, 6], ids=["one_group", "two_groups", "instance_norm"])
def test_group_norm_agrees_with_torch(groups, affine):
    x, dy, (w, b) = sample(3, 6, 5), sample(3, 6, 5, seed=1), sample(2, 6, seed=2)
    weight, bias = (w, b) if affine else (None, None)
    expected = torch_gradients(lambda x, w, b: F.group_norm(x, groups, w, b, EPS), dy, x, weight, bias)
    y, mean, rstd, var = host.group_norm(x, groups, weight, bias, EPS)
    assert_near(y, expected[0])
    assert_near(mean, x.reshape(3, groups, -1).mean(2))
    assert_near(rstd, 1 / np.sqrt(var + EPS))
    for got, wanted in zip(host.group_norm_backward(dy, x, groups, weight, EPS), expected[1:]):
        assert_near(got, wanted)


def test_two_values_have_a_closed_form():
    # x = (-a, a): mean 0, var a^2, so y = ±a / sqrt(a^2 + eps); rms_norm says the same.
    a, eps = 3.0, 0.25
    y, mean, rstd = host.layer_norm([[-a, a]], eps=eps)
    expected = a / math.sqrt(a * a + eps)
    assert_near(y, [[-expected, expected]])
    assert_near(mean, [0.0])
    assert_near(rstd, [1 / math.sqrt(a * a + eps)])
    assert_near(host.rms_norm([[-a, a]], eps=eps)[0], y)


def test_constant_input_gives_the_bias_and_gradients_orthogonal_to_one():
    x, dy = np.full((2, 4), 7.0), sample(2, 4)
    y, _, rstd = host.layer_norm(x, None, [1.0, 2.0, 3.0, 4.0], EPS)
    assert_near(y, [[1.0, 2.0, 3.0, 4.0]] * 2)
    assert_near(rstd, [1 / math.sqrt(EPS)] * 2)
    assert_near(host.layer_norm_backward(dy, x, None, EPS)[0], (dy - dy.mean(1, keepdims=True)) * rstd[:, None])


def test_variance_survives_a_mean_far_larger_than_the_spread():
    # Exactly representable values 1e9 ± 1; E[x^2] - E[x]^2 would lose every digit in float64.
    x = 1e9 + np.array([[1.0, -1.0, 1.0, -1.0]])
    y, mean, rstd = host.layer_norm(x, eps=0.0)
    assert (y == [[1.0, -1.0, 1.0, -1.0]]).all()
    assert (mean == 1e9).all() and (rstd == 1.0).all()


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)], ids=str)
def test_empty_rows_have_mean_zero_and_no_gradient(shape):
    x = np.empty(shape)
    y, mean, rstd = host.layer_norm(x, eps=0.25)
    dx, dw, db = host.layer_norm_backward(x, x, eps=0.25)
    assert y.shape == dx.shape == shape
    assert (mean == 0).all() and (rstd == 2.0).all() and mean.shape == (shape[0],)
    assert dw.shape == db.shape == (shape[1],) and not dw.any() and not db.any()


def test_empty_channels_and_positions():
    assert host.batch_norm(np.empty((0, 3, 4)))[1].tolist() == [0.0] * 3
    assert host.group_norm(np.empty((2, 4, 0)), 2)[1].shape == (2, 2)
    assert host.group_norm(np.empty((2, 0, 3)), 1)[0].shape == (2, 0, 3)


def test_nan_stays_in_its_row():
    x = sample(2, 4)
    x[0, 1] = np.nan
    y = host.layer_norm(x)[0]
    assert np.isnan(y[0]).all() and np.isfinite(y[1]).all()


@pytest.mark.parametrize(
    "call",
    [
        lambda: host.layer_norm(np.ones(3)),
        lambda: host.layer_norm(np.ones((2, 3)), np.ones(2)),
        lambda: host.layer_norm_backward(np.ones((2, 2)), np.ones((2, 3))),
        lambda: host.batch_norm(np.ones((2, 3))),
        lambda: host.group_norm(np.ones((2, 4, 3)), 3),
        lambda: host.group_norm(np.ones((2, 4, 3)), 0),
        lambda: host.ceilings(threads=0),
        lambda: host.ceilings(seconds=0),
    ],
    ids=["rank", "weight", "dy", "batch_rank", "groups", "no_groups", "threads", "seconds"],
)
def test_bad_arguments_name_the_function(call):
    with pytest.raises(ValueError, match=r"_host\."):
        call()


def test_build_info_names_the_compiler_and_is_the_same_every_time():
    build = host.build_info()
    assert build["compiler"] in ("gcc", "clang") and build["cxx_standard"] >= 20
    assert build == host.build_info()


def test_features_agree_with_the_kernels_chosen():
    from pyops.core import library

    features = host.cpu_features()
    assert features["model"] and 1 <= features["usable_cores"] <= features["logical_cores"]
    assert all(size > 0 for size in features["caches"].values())
    assert all(isinstance(value, bool) for value in features["instructions"].values())
    supported = [v["capability"] for v in host.variants() if v["supported"]]
    assert supported and tuple(supported) == library.cpu_capabilities()


def test_ceilings_are_positive_and_sane():
    measured = host.ceilings(threads=1, seconds=0.05)
    assert 1e8 < measured["copy_bandwidth"] < 1e13
    assert 1e8 < measured["fma_rate"] < 1e13
    assert measured["copy_bandwidth"] == max(measured["copy_stream"], measured["copy_memcpy"])
    assert measured["fma_rate"] == max(measured["fma_by_capability"].values())
    assert set(measured["fma_by_capability"]) == {v["capability"] for v in host.variants() if v["supported"]}


def test_ceilings_of_two_threads():
    measured = host.ceilings(threads=2, seconds=0.05)
    assert measured["copy_bandwidth"] > 0 and measured["fma_rate"] > 0


def offset(n: int, channel: int, count: int, at, sides, last: bool) -> int:
    """Of an element of [N, C, D, H, W] or [N, D, H, W, C] in Python's integers, which have no end."""
    flat = (at[0] * sides[1] + at[1]) * sides[2] + at[2]
    plane = math.prod(sides)
    return (n * plane + flat) * count + channel if last else (n * count + channel) * plane + flat


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("depthwise", [False, True])
def test_offsets_of_a_convolution_beyond_2_31(last, depthwise):
    """Large planes, many channels, many examples."""
    sides, taps, stride, padding, dilation = (2, 40_000, 70_000), (1, 3, 5), (1, 1, 2), (0, 1, 2), (1, 2, 1)
    geometry = sides, taps, stride, padding, dilation
    positions = [(s + 2 * p - d * (t - 1) - 1) // st + 1 for s, t, st, p, d in zip(*geometry)]
    counts, most = (96, 192 if depthwise else 128), 0
    for n, c, k in ((0, 0, 0), (1, 95, 127), (300, 17, 90)):
        for at in ((0, 0, 0), (1, 20_000, 30_001), tuple(p - 1 for p in positions)):
            for tap in ((0, 0, 0), (0, 1, 2), (0, 2, 4)):
                found = host.conv_offsets(*geometry, (n, *at), tap, (c, k), counts, last)
                x = [o * st - p + t * d for o, st, p, t, d in zip(at, stride, padding, tap, dilation)]
                inside = all(0 <= v < s for v, s in zip(x, sides))
                wanted = offset(n, c, counts[0], x, sides, last) if inside else -1
                assert found == (wanted, offset(n, k, counts[1], at, positions, last))
                most = max(most, *found)
    assert most > 2**40


def test_offsets_of_im2col_beyond_2_31():
    h, w, kernel, stride, padding, dilation = 60_000, 80_000, (3, 2), (2, 1), (1, 0), (1, 3)
    counts = [
        (s + 2 * a - d * (k - 1) - 1) // st + 1 for s, k, st, a, d in zip((h, w), kernel, stride, padding, dilation)
    ]
    for plane in (0, 5, 1_000):
        for p, q in ((0, 0), (17, 70_000), (counts[0] - 1, counts[1] - 1)):
            for r, s in ((0, 0), (2, 1)):
                found = host.im2col_offsets(h, w, kernel, stride, padding, dilation, plane, p, q, r, s)
                row, column = p * 2 - 1 + r, q + 3 * s
                image = (plane * h + row) * w + column if 0 <= row < h and 0 <= column < w else -1
                columns = (((plane * 3 + r) * 2 + s) * counts[0] + p) * counts[1] + q
                assert found == (image, columns)
    assert columns > 2**40 and image > 2**40
