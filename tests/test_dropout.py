import math

import pytest
import torch

from pyops import backend as forced
from pyops import functional as F
from pyops import nn, testing, use

from .harness import passes, refuses, same_refusal

torch_F = torch.nn.functional
FUNCTIONS = ("dropout", "alpha_dropout", "dropout1d", "dropout2d", "dropout3d", "feature_alpha_dropout")


@pytest.mark.parametrize("check", testing.checks())
def test_checks(backend, check):
    if backend != "cpu" and check not in ("accuracy", "gradcheck", "opcheck"):
        pytest.skip("transforms and higher derivatives are the same Python on every backend")
    passes("dropout", backend, check)


@pytest.mark.race
def test_race(backend):
    passes("dropout", backend, "accuracy")


def drawn(function, x, *args, seed=0, **kwargs):
    torch.manual_seed(seed)
    return function(x, *args, **kwargs)


SHAPES = {"dropout1d": (8, 3, 5), "dropout2d": (2, 33, 4, 4), "dropout3d": (2, 5, 2, 3, 4)}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_backend_drops_the_same(backend, name):
    shape = SHAPES.get(name, (37, 41))
    for x in (torch.randn(shape), torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]):
        with forced(backend):
            y = drawn(getattr(F, name), x, 0.4, True)
        torch.testing.assert_close(y, drawn(getattr(F, name), x, 0.4, True))


def test_elements_are_numbered_as_they_lie_in_memory(backend):
    x = torch.ones(2, 5, 3, 4).contiguous(memory_format=torch.channels_last)
    with forced(backend):
        y = drawn(F.dropout, x)
        apart = drawn(F.dropout, torch.ones(2, 3, 4, 10)[..., ::2].permute(0, 3, 1, 2))
        rows = drawn(F.dropout, torch.ones(2, 3, 4, 5))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y.permute(0, 2, 3, 1), rows) and torch.equal(apart, y)
    wide = torch.ones(3, 1).expand(3, 40)
    with forced(backend):
        assert torch.equal(drawn(F.dropout, wide), drawn(F.dropout, wide.contiguous()))


def test_the_rate_and_the_scale(backend):
    x = torch.ones(1000, 40)
    for p in (0.1, 0.5, 0.85):
        with forced(backend):
            y = drawn(F.dropout, x, p)
        assert set(y.unique().tolist()) <= {0.0, torch.tensor(1 / (1 - p)).item()}
        assert abs((y == 0).float().mean() - p) < 4 * math.sqrt(p * (1 - p) / x.numel())


def test_moments_of_alpha_dropout():
    x = torch.randn(300_000)
    y = drawn(F.alpha_dropout, x, 0.3, True)
    assert abs(y.mean()) < 0.02 and abs(y.var() - 1) < 0.03


def test_whole_channels_are_dropped(backend):
    for name, shape in (("dropout1d", (20, 30, 7)), ("dropout2d", (20, 30, 3, 3)), ("dropout3d", (20, 30, 2, 2, 2))):
        for x in (torch.ones(shape), torch.ones(shape).movedim(1, -1).contiguous().movedim(-1, 1)):
            with forced(backend):
                y = drawn(getattr(F, name), x, 0.5)
            assert y.stride() == x.stride()
            channels = y.flatten(2)
            assert torch.equal(channels, channels[..., :1].expand_as(channels))
            assert 0.35 < (channels[..., 0] == 0).float().mean() < 0.65
            assert torch.equal(y.contiguous(), drawn(getattr(F, name), x.contiguous(), 0.5))
    with pytest.warns(UserWarning, match="dropout3d"):  # as torch, of three dimensions the first is the channels
        whole = drawn(F.dropout3d, torch.ones(30, 7, 5), 0.5)
    assert torch.equal(whole, whole[:, :1, :1].expand_as(whole)) and whole.unique().numel() == 2
    single = drawn(F.dropout1d, torch.ones(30, 7), 0.5)
    assert torch.equal(single, single[:, :1].expand(30, 7)) and single.unique().numel() == 2


def test_the_gradient_drops_what_the_forward_dropped(backend):
    x = torch.randn(50, 31, requires_grad=True)
    with forced(backend):
        y = drawn(F.dropout, x, 0.5)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.testing.assert_close(dx, torch.where(y == 0, 0.0, 2.0))


def test_only_the_random_state_is_kept():
    x, kept = torch.randn(64, 64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()), lambda t: t):
        F.dropout(x, 0.5)
    assert kept == [2]


def test_generator_of_torch():
    x = torch.ones(100)
    assert torch.equal(drawn(F.dropout, x, seed=3), drawn(F.dropout, x, seed=3))
    assert not torch.equal(drawn(F.dropout, x, seed=3), drawn(F.dropout, x, seed=4))
    torch.manual_seed(0)
    first, second = F.dropout(x), F.dropout(x)
    assert not torch.equal(first, second)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert torch.equal(F.dropout(x), first)


def test_vmap_randomness():
    x = torch.ones(4, 50)
    same = torch.vmap(F.dropout, randomness="same")(x)
    assert all(torch.equal(row, same[0]) for row in same)
    different = torch.vmap(F.dropout, randomness="different")(x)
    assert not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError):
        torch.vmap(F.dropout)(x)


def test_compiled_draws_anew_each_time():
    testing.fresh_compiler()
    compiled = torch.compile(F.dropout, fullgraph=True, backend="aot_eager")
    x = torch.ones(200, requires_grad=True)
    first, second = compiled(x), compiled(x)
    assert not torch.equal(first, second)
    (dx,) = torch.autograd.grad(second, x, torch.ones(200))
    assert torch.equal(dx, second.detach())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_eval_p_0_p_1_and_in_place(name):
    x = torch.randn(2, 3, *(4,) * {"dropout1d": 1, "dropout3d": 3}.get(name, 2))
    function = getattr(F, name)
    assert function(x, 0.5, False) is x and function(x, 0.0, True) is x and function(x[:0], 0.5, True).numel() == 0
    assert not function(x, 1.0, True).any()
    y = x.clone()
    assert drawn(function, y, 0.5, True, inplace=True) is y
    assert torch.equal(y, drawn(function, x, 0.5, True))


def test_in_place_on_what_needs_a_gradient():
    x = torch.randn(40, requires_grad=True)
    y = x * 1
    z = drawn(F.dropout, y, 0.5, inplace=True)
    assert z is y
    (dx,) = torch.autograd.grad(z.sum(), x)
    assert set(dx.tolist()) == {0.0, 2.0}
    same_refusal(F.dropout, torch_F.dropout, x, 0.5, True, True)


def test_nan_as_torch(backend):
    with forced(backend):
        y = drawn(F.dropout, torch.full((64,), float("inf")), 0.5)
    assert y.isnan().any() and y.isinf().any() and not y.isfinite().any()


def test_dropconnect():
    x, layer = torch.randn(5, 30), nn.DropConnectLinear(30, 20, p=0.4)
    plain = torch.nn.Linear(30, 20)
    layer.load_state_dict(plain.state_dict())
    assert repr(layer) == "DropConnectLinear(in_features=30, out_features=20, bias=True, p=0.4)"
    weight = drawn(F.dropout, layer.weight, 0.4)
    y = drawn(layer, x)
    torch.testing.assert_close(y, torch_F.linear(x, weight, layer.bias))
    (dw,) = torch.autograd.grad(y.sum(), layer.weight)
    torch.testing.assert_close(dw, torch.where(weight == 0, 0.0, x.sum(0).expand(20, 30) / 0.6))
    torch.testing.assert_close(layer.eval()(x), plain(x))
    for args, kind, words in (
        ((x, torch.ones(4, 5)), RuntimeError, ("'weight'", "[4, 5]", "[5, 30]")),
        ((x, torch.ones(30)), RuntimeError, ("'weight'", "[30]")),
        ((x[0, 0], layer.weight), RuntimeError, ("'weight'", "[]")),
        ((x, layer.weight.double()), RuntimeError, ("'weight'", "float64", "float32")),
        ((x, layer.weight, torch.ones(3)), RuntimeError, ("'bias'", "[3]", "[20]")),
        ((x, layer.weight, plain.bias.double()), RuntimeError, ("'bias'", "float64", "float32")),
        ((x, layer.weight, 1.0), TypeError, ("'bias'", "float")),
        ((x.long(), layer.weight), NotImplementedError, ("'input'", "int64")),
        ((x, layer.weight, None, 1.5), ValueError, ("'p'", "1.5")),
    ):
        refuses(kind, ("dropconnect_linear: ", *words), F.dropconnect_linear, *args)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.dropconnect_linear(x, layer.weight.bfloat16(), None).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["Dropout", "Dropout1d", "AlphaDropout", "FeatureAlphaDropout"])
def test_module(name):
    ours, theirs = getattr(nn, name)(0.3), getattr(torch.nn, name)(0.3)
    x = torch.randn(20, 30, 2)
    assert repr(ours) == repr(theirs) and ours.eval()(x) is x
    y = drawn(ours.train(), x)
    assert not torch.equal(y, x) and torch.equal(y, drawn(ours, x))


@pytest.mark.parametrize(("name", "rank"), [("Dropout2d", 2), ("Dropout3d", 3)])
def test_channel_module(name, rank):
    x = torch.ones(20, 30, *(2,) * rank)
    y = drawn(getattr(nn, name)(0.5), x).flatten(2)
    assert torch.equal(y, y[..., :1].expand_as(y)) and y.unique().numel() == 2


def test_every_spelling_is_routed():
    x = torch.ones(4, 5, 6, 7)
    with use() as report:
        torch_F.dropout(x, 0.5, False), torch_F.dropout(x), torch.dropout(x, 0.5, train=True), torch.nn.Dropout()(x)
        torch_F.alpha_dropout(x, 0.5, True), torch.nn.Dropout2d()(x), torch_F.dropout3d(x[None])
        torch.nn.Dropout1d()(x[0])
        torch.feature_dropout(x, 0.5, True), torch_F.feature_alpha_dropout(x, 0.5, True)
        torch.dropout_(x.clone(), 0.5, True)
    assert not report.unrouted() and not any(e.kept for e in report.entries.values())
    assert report.entries["dropout"].calls == 5


@pytest.mark.filterwarnings("ignore:dropout")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_refuses_as_torch(name):
    x = torch.ones(2, 3, 4)
    for p in (-0.1, 1.5, "a", float("nan")):
        same_refusal(getattr(F, name), getattr(torch_F, name), x, p, True)
    if name in ("dropout1d", "feature_alpha_dropout"):
        same_refusal(getattr(F, name), getattr(torch_F, name), x[0, 0], 0.5, True)


@pytest.mark.filterwarnings("ignore:dropout")
@pytest.mark.parametrize("name", ["dropout2d", "dropout3d", "feature_alpha_dropout"])
@pytest.mark.parametrize("shape", [(), (3,), (0,)])
def test_nothing_to_draw_needs_no_channels(name, shape):
    ours, theirs = getattr(F, name), getattr(torch_F, name)
    for p in (0.0, 1.0):
        torch.testing.assert_close(ours(torch.ones(shape), p, True), theirs(torch.ones(shape), p, True))
    if 0 not in shape and name != "dropout3d":
        same_refusal(ours, theirs, torch.ones(shape), 0.5, True)


def test_messages():
    refuses(ValueError, ("dropout", "'p'", "1.5"), F.dropout, torch.ones(3), 1.5)
    refuses(NotImplementedError, ("dropout", "'input'", "int64"), F.dropout, torch.ones(3, dtype=torch.int64))
