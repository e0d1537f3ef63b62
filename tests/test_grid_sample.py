import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyops import functional as F
from pyops import testing, use
from pyops.core import backend as backends

from .harness import laid_out, layouts, passes, properties, refuses, same_refusal

X, G = torch.arange(24.0).reshape(1, 2, 3, 4), torch.zeros(1, 2, 2, 2)
MODES, PADDINGS = ("bilinear", "nearest", "bicubic"), ("zeros", "border", "reflection")


@pytest.mark.parametrize("check", testing.checks())
def test_checks(backend, check):
    if backend != "cpu" and check not in ("accuracy", "opcheck", "determinism"):
        pytest.skip("derivatives of higher order, transforms and layouts are the same Python on every backend")
    passes("grid_sample", backend, check)


@pytest.mark.parametrize("check", testing.checks())
def test_affine_grid(check):
    passes("affine_grid", "cpu", check)


def test_affine_grid_can_be_viewed():
    """Contiguous whatever the strides of theta, as torch's."""
    theta = torch.randn(3, 2, 3).mT.contiguous().mT
    assert not theta.is_contiguous()
    ours = F.affine_grid(theta, [3, 1, 4, 5], align_corners=False)
    assert ours.is_contiguous()
    torch.testing.assert_close(ours, torch.nn.functional.affine_grid(theta, [3, 1, 4, 5], align_corners=False))


@pytest.mark.race
def test_race(backend):
    if backend == "emulator":
        passes("grid_sample", backend, "accuracy")


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_and_padding(backend, mode, padding, align_corners):
    """Values and both gradients, of points in, at and far outside the image, in two and three dimensions."""
    generator = torch.Generator().manual_seed(0)
    for dims in (2, 3) if mode != "bicubic" else (2,):
        x = torch.randn(2, 3, *(3, 4, 5)[-dims:], generator=generator, dtype=torch.float64)
        grid = torch.rand(2, *(2, 3, 4)[-dims:], dims, generator=generator, dtype=torch.float64) * 7 - 3.5
        results = []
        with backends.backend(backend):
            for functional in (F, torch.nn.functional):
                a, b = x.clone().requires_grad_(), grid.clone().requires_grad_()
                y = functional.grid_sample(a, b, mode, padding, align_corners)
                along = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
                results.append((y, *torch.autograd.grad(y, (a, b), along)))
        for ours, theirs in zip(*results):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@properties
@given(
    shape=st.tuples(*[st.integers(1, 5)] * 4), out=st.tuples(*[st.integers(1, 9)] * 2), layout=layouts,
    mode=st.sampled_from(MODES), padding=st.sampled_from(PADDINGS), align_corners=st.booleans(),
)  # fmt: skip
def test_any_shape_and_layout(shape, out, layout, mode, padding, align_corners):
    t = testing.Maker(torch.float64)
    x, grid = laid_out(t, shape, layout), torch.rand(shape[0], *out, 2, dtype=torch.float64) * 2.2 - 1.1
    ours, theirs = (f.grid_sample(x, grid, mode, padding, align_corners) for f in (F, torch.nn.functional))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_points_nowhere(backend, mode, padding, bad):
    """NaN and what no image holds give what torch gives, and the gradient reads and writes nothing outside."""
    grid = torch.zeros(1, 1, 20, 2)
    grid[0, 0, 3, 0] = grid[0, 0, 7, 1] = bad
    x = torch.randn(1, 2, 3, 4)
    with backends.backend(backend):
        ours = F.grid_sample(x, grid, mode, padding, False)
        theirs = torch.nn.functional.grid_sample(x.cpu(), grid.cpu(), mode, padding, False)
        if not (bad == 1e30 and padding == "reflection"):  # where it is reflected to is chance there
            torch.testing.assert_close(ours, theirs, equal_nan=True)
        a, b = x.clone().requires_grad_(), grid.clone().requires_grad_()
        dx, _ = torch.autograd.grad(F.grid_sample(a, b, mode, padding, False).nan_to_num().sum(), (a, b))
        assert dx.shape == x.shape


def test_many_points_on_one_element(backend):
    """The whole grid reads one corner; the list of that element is long."""
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64)
    grid = torch.full((1, 20, 30, 2), 5.0, dtype=torch.float64)
    with backends.backend(backend):
        a = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(F.grid_sample(a, grid, padding_mode="border", align_corners=True).sum(), a)
    assert dx[0, 0, 2, 2] == 600 and dx.sum() == 1200


def test_gradient_is_the_same_for_every_number_of_threads():
    x, grid = torch.randn(2, 5, 16, 16, requires_grad=True), torch.rand(2, 40, 40, 2) * 2 - 1
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for image in (x, x.contiguous(memory_format=torch.channels_last)):
                found.append(torch.autograd.grad(F.grid_sample(image, grid, align_corners=False).sum(), x)[0])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[i], found[i % 2]) for i in range(len(found)))


def test_a_spatial_transformer_is_routed():
    x, theta = torch.randn(2, 3, 8, 9), torch.tensor([[[1.0, 0.2, 0.1], [-0.2, 0.9, 0.0]]]).repeat(2, 1, 1)
    model = lambda: torch.nn.functional.grid_sample(
        x, torch.nn.functional.affine_grid(theta, [2, 3, 5, 6], align_corners=False), align_corners=False
    )
    with use() as report:
        y = model()
    torch.testing.assert_close(y, model())
    assert sum(report.entries["grid_sample"].backends.values()) == 1
    assert not report.entries["affine_grid"].kept


def test_says_what_align_corners_is():
    with pytest.warns(UserWarning, match="align_corners"):
        F.grid_sample(X, G)
    with pytest.warns(UserWarning, match="align_corners"):
        F.affine_grid(torch.eye(2, 3)[None], (1, 1, 2, 2))


def test_bad_input():
    refuses(ValueError, ("grid_sample", "'mode'", "foo"), F.grid_sample, X, G, "foo", "zeros", False)
    refuses(ValueError, ("grid_sample", "'padding_mode'"), F.grid_sample, X, G, "nearest", "foo", False)
    refuses(RuntimeError, ("grid_sample", "'grid'", "float64"), F.grid_sample, X, G.double(), align_corners=False)
    refuses(RuntimeError, ("grid_sample", "'input'"), F.grid_sample, X[:, :, :0], G, align_corners=False)
    refuses(ValueError, ("affine_grid", "'theta'"), F.affine_grid, torch.eye(3)[None], (1, 1, 2, 2), False)
    refuses(RuntimeError, ("affine_grid", "'theta'"), F.affine_grid, torch.eye(2, 3)[None], (2, 1, 2, 2), False)


@pytest.mark.parametrize(
    "args",
    [
        (X, G, "foo"), (X, G, "nearest", "foo"), (X, G.double()), (X, G[:0]), (X[0], G), (X, G[..., :1]),
        (X[:, :, :0], G), (X.long(), G.long()), (X[None], torch.zeros(1, 1, 1, 1, 3), "bicubic"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_refuses_as_torch(args):
    same_refusal(F.grid_sample, torch.nn.functional.grid_sample, *args)


@pytest.mark.parametrize(
    "args",
    [
        (torch.eye(3)[None], (1, 1, 2, 2)), (torch.eye(2, 3)[None].long(), (1, 1, 2, 2)),
        (torch.eye(2, 3)[None], (1, 1, 2)), (torch.eye(2, 3)[None], (1, 1, 0, 2)),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_affine_grid_refuses_as_torch(args):
    same_refusal(F.affine_grid, torch.nn.functional.affine_grid, *args)
