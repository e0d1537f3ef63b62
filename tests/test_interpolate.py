import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyops import functional as F
from pyops import nn, testing, use
from pyops.core import backend as backends

from .harness import (
    accurate,
    floating,
    laid_out,
    layouts,
    modules_agree,
    passes,
    properties,
    refuses,
    same_refusal,
)

X = torch.arange(24.0).reshape(1, 2, 3, 4)
MODES = {
    1: ("nearest", "nearest-exact", "linear", "area"),
    2: ("nearest", "nearest-exact", "bilinear", "bicubic", "area"),
    3: ("nearest", "nearest-exact", "trilinear", "area"),
}


@pytest.mark.parametrize("check", testing.checks())
def test_checks(backend, check):
    if backend != "cpu" and check not in ("accuracy", "opcheck"):
        pytest.skip("derivatives of higher order, transforms and layouts are the same Python on every backend")
    passes("interpolate", backend, check)


@pytest.mark.race
def test_race(backend):
    if backend == "emulator":
        passes("interpolate", backend, "accuracy")


@pytest.mark.parametrize("scale", [(1.3, 1.1), (2.3, 1.7), (1.0, 2.05)])
def test_an_image_that_keeps_or_doubles_a_size_as_torch(backend, scale):
    """torch on the CPU takes whole steps there, whatever the scale says."""
    x = torch.arange(24.0).view(1, 2, 3, 4)
    with backends.backend(backend):
        ours = F.interpolate(x, scale_factor=scale)
    assert torch.equal(ours, torch.nn.functional.interpolate(x, scale_factor=scale))


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
def test_nearest_chooses_as_torch(backend, mode):
    """Bit for bit, for sizes at which the position in float32 decides."""
    with backends.backend(backend):
        for size in (1, 3, 7, 49, 41) if backend == "cpu" else (7, 41):
            x = torch.randn(1, 1, size)
            for scale in (1.0, 2.0, 1 / 3, 2 / 3, 1.1, 3.0, 2.5, 1.7):
                if int(size * scale) < 1:
                    continue
                for more in ({"scale_factor": scale}, {"size": int(size * scale)}):
                    ours, theirs = (
                        F.interpolate(x, mode=mode, **more),
                        torch.nn.functional.interpolate(x, mode=mode, **more),
                    )
                    assert torch.equal(ours, theirs), (size, more)
        torch.testing.assert_close(
            F.interpolate(X.to(torch.uint8), scale_factor=2, mode=mode),
            torch.nn.functional.interpolate(X.to(torch.uint8), scale_factor=2, mode=mode),
        )


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_bytes_are_rounded(mode, align_corners):
    x = torch.randint(0, 256, (1, 3, 11, 13), dtype=torch.uint8)
    for size in ((7, 29), (30, 5)):
        for antialias in (False, True):
            arguments = {"size": size, "mode": mode, "align_corners": align_corners, "antialias": antialias}
            ours, theirs = F.interpolate(x, **arguments), torch.nn.functional.interpolate(x, **arguments)
            assert ours.dtype == torch.uint8
            assert (ours.int() - theirs.int()).abs().max() <= 1


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_large_steps(backend, mode, antialias):
    """Windows of many inputs, and many outputs that read one input."""
    if backend == "triton":
        pytest.skip("the interpreter is slow, and the tables of the accuracy check have every form")
    x = torch.randn(1, 1, 30, 37, dtype=torch.float64)
    with backends.backend(backend):
        for size in ((2, 3), (31, 70)):
            for align_corners in (False, True):
                arguments = {"size": size, "mode": mode, "antialias": antialias, "align_corners": align_corners}
                a, b = x.clone().requires_grad_(), x.cpu().clone().requires_grad_()  # torch's on a GPU has limits
                ours, theirs = F.interpolate(a, **arguments), torch.nn.functional.interpolate(b, **arguments)
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
                along = torch.randn_like(theirs)
                (da,), (db,) = torch.autograd.grad(ours, a, along.to(a)), torch.autograd.grad(theirs, b, along)
                torch.testing.assert_close(da, db, rtol=0, atol=1e-12)


@properties
@given(
    dims=st.integers(1, 3),
    dtype=floating,
    layout=layouts,
    data=st.data(),
)
def test_any_shape_and_layout(dims, dtype, layout, data):
    shape = tuple(data.draw(st.lists(st.integers(1, 7), min_size=dims + 2, max_size=dims + 2)))
    mode = data.draw(st.sampled_from(MODES[dims]))
    arguments = {"mode": mode}
    if mode not in ("nearest", "nearest-exact", "area"):
        arguments["align_corners"] = data.draw(st.booleans())
    if data.draw(st.booleans()):
        arguments["size"] = data.draw(st.lists(st.integers(1, 9), min_size=dims, max_size=dims))
    else:
        arguments["scale_factor"] = data.draw(st.sampled_from([1.0, 1.25, 2.0, 3.1]))
        arguments["recompute_scale_factor"] = data.draw(st.booleans())
    make = lambda t: ((laid_out(t, shape, layout),), arguments)
    accurate(F.interpolate, torch.nn.functional.interpolate, make, dtype)


def test_not_a_number_stays_where_it_is():
    x = torch.randn(1, 1, 4, 40)
    x[..., 20] = torch.nan
    for mode in MODES[2]:
        for size in ((8, 80), (3, 20)):
            ours, theirs = (f.interpolate(x, size, mode=mode) for f in (F, torch.nn.functional))
            assert torch.equal(ours.isnan(), theirs.isnan()), (mode, size)


def test_modules():
    for name, arguments in (
        ("Upsample", {"scale_factor": 2, "mode": "bilinear", "align_corners": True}),
        ("Upsample", {"size": (3, 5)}),
        ("UpsamplingNearest2d", {"scale_factor": 3}),
        ("UpsamplingBilinear2d", {"size": 7}),
    ):
        ours, theirs = getattr(nn, name)(**arguments), getattr(torch.nn, name)(**arguments)
        modules_agree(ours, theirs, torch.randn(2, 3, 4, 5), "cpu")
        assert isinstance(ours, getattr(torch.nn, name))


def test_a_model_is_routed():
    x = torch.randn(2, 3, 12, 10).contiguous(memory_format=torch.channels_last)
    with use() as report:
        y = torch.nn.functional.interpolate(x, size=(5, 4), mode="area")
        torch.nn.Upsample(scale_factor=2, mode="bicubic")(x)
        torch.nn.functional.interpolate(torch.ones(1, 1, 4, 4, dtype=torch.int64).float(), 8)
        torch.nn.functional.interpolate(x, 5, mode="lanczos", antialias=True)
    torch.testing.assert_close(y, torch.nn.functional.adaptive_avg_pool2d(x, (5, 4)))
    assert y.is_contiguous(memory_format=torch.channels_last)
    entry = report.entries["interpolate"]
    assert sum(entry.backends.values()) == 3 and entry.kept == {"mode lanczos": 1}


def test_bad_input():
    op = "interpolate"
    refuses(ValueError, (op, "'size'"), F.interpolate, X)
    refuses(ValueError, (op, "'size'"), F.interpolate, X, 3, 2.0)
    refuses(ValueError, (op, "'size'", "[3]"), F.interpolate, X, (3,))
    refuses(TypeError, (op, "'size'", "2.5"), F.interpolate, X, 2.5)
    refuses(ValueError, (op, "'scale_factor'"), F.interpolate, X, None, (2.0,))
    refuses(RuntimeError, (op, "'size'", "[0, 0]"), F.interpolate, X, None, 0.1)
    refuses(ValueError, (op, "'align_corners'"), F.interpolate, X, 3, None, "nearest", True)
    refuses(ValueError, (op, "'antialias'"), F.interpolate, X, 3, None, "nearest", None, None, True)
    refuses(NotImplementedError, (op, "'mode'", "linear"), F.interpolate, X, 3, None, "linear")
    refuses(NotImplementedError, (op, "'mode'", "sinc"), F.interpolate, X, 3, None, "sinc")
    refuses(NotImplementedError, (op, "'input'", "int64"), F.interpolate, X.long(), 3)
    refuses(RuntimeError, (op, "'input'"), F.interpolate, X[:, :0], 3)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((X,), {}),
        ((X, 3, 2.0), {}),
        ((X, 2.5), {}),
        ((X, (3, 2.0)), {}),
        ((X, 0), {}),
        ((X, -1), {}),
        ((X, (3,)), {}),
        ((X,), {"scale_factor": (2.0,)}),
        ((X,), {"scale_factor": 0.1}),
        ((X, 3), {"align_corners": True}),
        ((X, 3), {"recompute_scale_factor": True}),
        ((X, 3), {"mode": "area", "align_corners": False}),
        ((X, 3), {"antialias": True}),
        ((X, 3), {"mode": "lanczos"}),
        ((X, 3), {"mode": "trilinear"}),
        ((X[0], 3), {"mode": "bilinear"}),
        ((X[0, 0], 3), {}),
        ((X.long(), 3), {}),
        ((X.to(torch.uint8), 3), {"mode": "area"}),
        ((X[0].to(torch.uint8), 3), {"mode": "linear"}),
        ((X[:, :0], 3), {}),
        ((X[:, :, :0], 3), {"mode": "area"}),
    ],
)
def test_refuses_as_torch(args, kwargs):
    same_refusal(F.interpolate, torch.nn.functional.interpolate, *args, **kwargs)
