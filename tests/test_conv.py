import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from pyops import backend as forced
from pyops import functional as F
from pyops import nn, testing
from pyops.core import backend as backends
from pyops.core import bias_act, convolve, explain, library

from .harness import modules_agree, passes, refuses, same_refusal

OPS = [f"{name}{n}d" for name in ("conv", "conv_transpose") for n in (1, 2, 3)]
X, W = torch.ones(2, 4, 5, 6), torch.ones(6, 2, 3, 3)


@pytest.mark.parametrize("check", testing.checks())
@pytest.mark.parametrize("op", ["conv2d", "conv_transpose2d"])
def test_checks(backend, op, check):
    passes(op, backend, check)


@pytest.mark.parametrize("op", [op for op in OPS if "2" not in op])
def test_other_dimensions(backend, op):
    passes(op, backend, "accuracy")


@pytest.mark.parametrize("check", ["layout", "opcheck", "gradcheck", "gradgradcheck", "jacobians", "transforms"])
def test_three_dimensions(check):
    passes("conv3d", "cpu", check)


@pytest.mark.race
@pytest.mark.parametrize("op", ["conv2d", "conv_transpose2d", "conv3d"])
def test_race(backend, op):
    if backend == "emulator":
        passes(op, backend, "accuracy")


@pytest.mark.parametrize("algorithm", ["tf32", "3xtf32"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_tensor_core_products_of_float32(algorithm, channels_last):
    """TF32 keeps 10 bits of each factor; three products keep some 21."""
    x, w = torch.randn(2, 16, 7, 6), torch.randn(9, 16, 3, 3)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    exact = [x.double().requires_grad_(), w.double().requires_grad_()]
    ours = [x.clone().requires_grad_(), w.clone().requires_grad_()]
    y = torch.nn.functional.conv2d(*exact, padding=1)
    dy = torch.randn(y.shape)
    with backends.backend("emulator"), F.conv_algorithm(algorithm):
        z = F.conv2d(*ours, padding=1)
        grads = torch.autograd.grad(z, ours, dy)
    bits = 10 if algorithm == "tf32" else 21
    for a, b, terms in zip((z, *grads), (y, *torch.autograd.grad(y, exact, dy.double())), (144, 81, 84)):
        error = (a.double() - b).abs().max().item()
        assert error < 8 * math.sqrt(terms) * 2 ** -(bits + 1), error
        assert algorithm != "tf32" or error > 1e-5  # it did run


@pytest.mark.parametrize("channels_last", [False, True])
def test_long_sums_lose_no_more_than_those_of_torch(channels_last):
    """4608 products in one running float32 sum would be some six times less exact."""
    x, w = torch.randn(1, 512, 7, 7), torch.randn(64, 512, 3, 3)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    exact = torch.nn.functional.conv2d(x.double(), w.double(), padding=1)
    with F.conv_algorithm("gemm"):
        error, theirs = ((f.conv2d(x, w, padding=1) - exact).abs().max() for f in (F, torch.nn.functional))
    assert error <= 2 * theirs + torch.finfo(torch.float32).eps * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_many_tiles_on_the_cpu(dtype, channels_last, stride):
    """Several blocks of pixels, of channels and of the reduction, none of them whole."""
    x, w = torch.randn(3, 67, 23, 21).to(dtype), torch.randn(45, 67, 3, 3).to(dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    results = []
    for f, wide in ((F, dtype), (torch.nn.functional, torch.float64)):
        inputs = [x.to(wide).detach().requires_grad_(), w.to(wide).detach().requires_grad_()]
        y = f.conv2d(*inputs, stride=stride, padding=1)
        torch.manual_seed(1)
        dy = torch.randn(y.shape).bfloat16().to(wide)
        results.append((y, *torch.autograd.grad(y, inputs, dy)))
    for a, b in zip(*results):
        tolerance = 3e-5 if dtype == torch.float32 else 1e-2
        assert (a.double() - b).abs().max() < tolerance * b.abs().max()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("op", "weight", "groups"),
    [("conv2d", (1, 2, 3, 3), 1), ("conv_transpose2d", (2, 1, 3, 3), 1), ("conv2d", (2, 1, 3, 3), 2)],
)
def test_the_gradient_of_the_bias_has_the_same_bits_on_any_number_of_threads(op, weight, groups, channels_last):
    x, w = torch.randn(1, 2, 300, 300), torch.randn(weight)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    k = weight[0] if op == "conv2d" else 1
    sums, threads = [], torch.get_num_threads()
    dy = torch.randn(torch.nn.functional.__dict__[op](x, w, padding=1, groups=groups).shape)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            b = torch.zeros(k, requires_grad=True)
            y = getattr(F, op)(x, w, b, padding=1, groups=groups)
            sums.append(torch.autograd.grad(y, b, dy)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(sums[0], sums[1]) and torch.equal(sums[0], sums[2])
    torch.testing.assert_close(sums[0].double(), dy.double().sum((0, 2, 3)), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [(3, 5, 7), (2, 3, 1), (70, 130, 1), (2, 3, 1024), (1, 1, 5001), (9, 2, 2056), (0, 3, 4), (2, 3, 0), (2, 0, 3)],
)
def test_sums_over_positions(backend, shape, dtype):
    x = torch.randn(shape).to(dtype)
    with backends.backend(backend):
        ours = bias_act.channel_sum(backends.namespace_for("conv2d", x), x)
    assert ours.dtype == dtype
    exact = x.double().sum((0, 2))
    rtol, atol = (1e-6, 1e-4) if dtype == torch.float32 else (2**-8, 1e-4)
    torch.testing.assert_close(ours.double(), exact, rtol=rtol, atol=atol)


@pytest.mark.race
def test_race_of_sums(backend):
    if backend == "emulator":
        for shape in ((3, 5, 7), (2, 3, 1), (1, 1, 5001), (3, 2, 2056)):
            x = torch.randn(shape)
            ours = bias_act.channel_sum("pyops_emulator", x)
            torch.testing.assert_close(ours, x.sum((0, 2)), rtol=1e-5, atol=1e-4)


def test_derivatives_of_sums_over_positions():
    x, function = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True), partial(bias_act.channel_sum, "pyops")
    assert torch.autograd.gradcheck(function, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: function(x) ** 2, x)
    batch = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(function, 2)(batch), batch.sum((0, 3)).t())
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), x)[0], torch.ones_like(x))


class Grids:
    """In the place of a Triton kernel: notes the grids."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def __getitem__(self, grid):
        self.seen.append(grid)
        return lambda *_, **__: None


def test_groups_and_rows_stand_on_the_one_axis_of_a_grid_that_counts_beyond_65535(monkeypatch):
    kernels, sums = pytest.importorskip("pyops.kernels.conv"), pytest.importorskip("pyops.kernels.linear")
    grids = Grids()
    for module, name in ((kernels, "conv_kernel"), (kernels, "conv_wgrad_kernel"), (sums, "bias_act_sum_kernel")):
        monkeypatch.setattr(module, name, grids)
    monkeypatch.setattr(sums, "sum_partials", lambda *_: None)
    groups, one = 70_000, [1, 1, 1]
    x, w = torch.zeros(1, 2 * groups, 1, 1, 2), torch.zeros(2 * groups, 2, 1, 1, 1)
    kernels.conv_fwd(x, w, None, one, [0, 0, 0], one, groups, False, "")
    kernels.conv_dgrad(x, w, None, [1, 1, 2], one, [0, 0, 0], one, groups, False, "")
    kernels.conv_wgrad(x, x, one, one, [0, 0, 0], one, groups, False, "")
    sums.channel_sum(torch.zeros(1, 70_000, 2))
    sums.channel_sum(torch.zeros(64 * 70_000, 1, 1))
    assert len(grids.seen) == 5 and all(grid[0] >= groups for grid in grids.seen)
    assert all(count <= 65535 for grid in grids.seen for count in grid[1:])


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_modules(n, padding_mode):
    make = lambda m: getattr(m, f"Conv{n}d")(4, 6, 3, padding=1, groups=2, padding_mode=padding_mode)
    modules_agree(make(nn), make(torch.nn), torch.randn(2, 4, *(5, 4, 6)[:n]), "cpu")


@pytest.mark.parametrize("n", [1, 2, 3])
def test_transposed_modules_and_output_size(n):
    make = lambda m: getattr(m, f"ConvTranspose{n}d")(4, 6, 3, stride=2, padding=1)
    x = torch.randn(2, 4, *(5, 4, 3)[:n])
    ours, theirs = make(nn), make(torch.nn)
    modules_agree(ours, theirs, x, "cpu")
    for extra in (0, 1):
        size = [2 * s - 1 + extra for s in x.shape[2:]]
        torch.testing.assert_close(ours(x, output_size=size), theirs(x, output_size=size), rtol=1e-5, atol=1e-5)


def test_output_padding_beyond_the_stride_has_a_gradient():
    """The forward of the output then has more positions than the input, which the gradient leaves out."""
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    f = lambda x, w: F.conv_transpose2d(x, w, stride=1, dilation=2, output_padding=1)
    torch.testing.assert_close(f(x, w), torch.nn.functional.conv_transpose2d(x, w, dilation=2, output_padding=1))
    torch.autograd.gradcheck(f, (x, w))
    torch.autograd.gradgradcheck(f, (x, w))


@pytest.mark.parametrize("transposed", [False, True])
def test_planes_with_many_channels_pass_through_channels_last_on_cuda(backend, transposed):
    if backend not in ("cuda", "emulator"):
        pytest.skip("of CUDA alone")
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((1, 32, 5, 6), (32, 32, 3, 3), (32,))]
    name = "conv_transpose2d" if transposed else "conv2d"
    results = []
    for functional in (F, torch.nn.functional):
        with backends.backend(backend):
            y = getattr(functional, name)(*inputs, padding=1)
        assert y.is_contiguous()
        results.append((y, *torch.autograd.grad(y.sin().sum(), inputs)))
    torch.testing.assert_close(*results)


def test_bad_input():
    conv, transposed = F.conv2d, F.conv_transpose2d
    refuses(RuntimeError, ("conv2d", "'input'", "4 channels", "2"), conv, X, W)
    refuses(RuntimeError, ("conv2d", "'stride'", "0"), conv, X, W, stride=0, groups=2)
    refuses(RuntimeError, ("conv2d", "'stride'", "-1"), conv, X, W, stride=(1, -1), groups=2)
    refuses(RuntimeError, ("conv2d", "'dilation'", "0"), conv, X, W, dilation=0, groups=2)
    refuses(RuntimeError, ("conv2d", "'padding'", "-1"), conv, X, W, padding=-1, groups=2)
    refuses(RuntimeError, ("conv2d", "'padding'", "same"), conv, X, W, padding="same", stride=2, groups=2)
    refuses(RuntimeError, ("conv2d", "'padding'", "full"), conv, X, W, padding="full", groups=2)
    refuses(RuntimeError, ("conv2d", "'groups'", "0"), conv, X, W, groups=0)
    refuses(RuntimeError, ("conv2d", "'groups'", "4"), conv, X, torch.ones(6, 1, 3, 3), groups=4)
    refuses(RuntimeError, ("conv2d", "'bias'", "[5]", "[6]"), conv, X, W, torch.ones(5), groups=2)
    refuses(RuntimeError, ("conv2d", "'weight'", "3 dimensions"), conv, X, W[0])
    refuses(RuntimeError, ("conv2d", "'weight'", "[9, 9]"), conv, X, torch.ones(6, 4, 9, 9))
    refuses(RuntimeError, ("conv2d", "'weight'", "float64"), conv, X, W.double(), groups=2)
    refuses(RuntimeError, ("conv2d", "'input'", "2 dimensions"), conv, X[0, 0], W)
    refuses(NotImplementedError, ("conv2d", "'input'", "int64"), conv, X.long(), W)
    w = torch.ones(4, 2, 3, 3)
    refuses(RuntimeError, ("conv_transpose2d", "'output_padding'", "2"), transposed, X, w, stride=2, output_padding=2)
    refuses(RuntimeError, ("conv_transpose2d", "'padding'", "9"), transposed, X, w, padding=9)
    refuses(RuntimeError, ("conv_transpose2d", "'input'", "4 channels", "6"), transposed, X, W)
    with pytest.raises(ValueError, match="conv_algorithm"):
        F.conv_algorithm("fft")


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"stride": 0}, {"dilation": -1}, {"padding": -1}, {"groups": 3}, {"groups": 0}, {"stride": (1, 1, 1)},
     {"padding": "same", "stride": 2}, {"bias": torch.ones(5), "groups": 2}, {"padding": "full"}],
)  # fmt: skip
def test_refuses_as_torch(kwargs):
    same_refusal(F.conv2d, torch.nn.functional.conv2d, X, W, **kwargs)


@pytest.mark.parametrize("value", [None, "1", 1.5, True, (1, 1.5), (1, None), [1, "1"], torch.ones(1)])
@pytest.mark.parametrize("argument", ["stride", "padding", "dilation", "groups", "bias", "weight"])
def test_arguments_of_the_wrong_kind(argument, value):
    valid = {"weight": torch.ones(3, 4, 3, 3), "bias": None} | {argument: value}
    if (argument == "bias" and (value is None or isinstance(value, torch.Tensor))) or (argument, value) == (
        "padding",
        "1",
    ):
        return
    weight = argument == "weight" and isinstance(value, torch.Tensor)
    refuses(RuntimeError if weight else TypeError, ("conv2d", f"'{argument}'"), F.conv2d, X, **valid)
    same_refusal(F.conv2d, torch.nn.functional.conv2d, X, **valid)
    if argument not in ("weight", "bias"):
        how = {"weight": torch.ones(4, 3, 3, 3), argument: value}
        same_refusal(F.conv_transpose2d, torch.nn.functional.conv_transpose2d, X, **how)


def test_integers_of_other_libraries_are_integers():
    for value in (np.int64(1), (np.int64(1), 1), torch.tensor(1), torch.Size([1, 1])):
        assert F.conv2d(X, W, stride=value, groups=2).shape == (2, 6, 3, 4)
    assert F.conv2d(X, W, groups=np.int64(2)).shape == (2, 6, 3, 4)


@pytest.mark.parametrize("taps", [(0, 3), (3, 0), (0, 0)])
def test_no_example_and_no_taps(taps):
    for n in (0, 2):
        x, w = torch.ones(n, 2, 5, 5), torch.ones(3, 2, *taps)
        same_refusal(F.conv2d, torch.nn.functional.conv2d, x, w)
        same_refusal(F.conv_transpose2d, torch.nn.functional.conv_transpose2d, x, w.transpose(0, 1))


def test_more_than_2_31_elements_have_the_right_shape():
    x, w = torch.empty(8, 64, 4096, 2048, device="meta"), torch.empty(64, 64, 3, 3, device="meta")
    assert F.conv2d(x, w, padding=1).shape == x.shape
    assert F.conv_transpose2d(x, w, stride=2).shape == (8, 64, 8193, 4097)


# input sides, taps, keywords; the last: an input without positions as well, whose filter does not fit that of no output
NO_POSITIONS = {
    "all sides": ((1, 1, 1), (2, 2, 2), {"padding": 1}),
    "one side": ((1, 3, 2), (2, 2, 3), {"padding": (1, 0, 1)}),
    "strides and spaces": ((2, 2, 3), (1, 2, 2), {"padding": (2, 1, 1), "stride": (3, 2, 1), "dilation": (1, 1, 2)}),
    "output padding": ((1, 2, 2), (1, 2, 2), {"padding": 1, "output_padding": (1, 0, 0), "dilation": 2}),
    "no input": ((0, 2, 1), (3, 2, 2), {"padding": (2, 0, 0), "dilation": (2, 1, 1)}),
}


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("name", NO_POSITIONS)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_transposed_to_no_positions(backend, n, name, groups):
    """Empty in every dtype, where torch is in float32 alone and refuses others; gradients of every order are 0."""
    size, taps, how = NO_POSITIONS[name]
    how = {k: v if isinstance(v, int) else v[:n] for k, v in how.items()} | {"groups": groups}
    call = lambda functional, *inputs: getattr(functional, f"conv_transpose{n}d")(*inputs, **how)
    shapes = (2, 4, *size[:n]), (4, 4 // groups, *taps[:n]), (4,)
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    with backends.backend(backend):
        y = call(F, *inputs)
        first = torch.autograd.grad(y.sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum((g + 1).square().sum() for g in first), inputs[:2], allow_unused=True)
    assert y.shape[:2] == (2, 4) and y.numel() == 0
    assert all(g.shape == t.shape and not g.any() for g, t in zip(first, inputs))
    assert all(g is None or not g.any() for g in second)
    if all(size[:n]) and not {"dilation", "stride"} & set(how):
        assert y.shape == call(torch.nn.functional, *(t.detach().float() for t in inputs)).shape
    assert call(F, *(t.detach().to("meta") for t in inputs)).shape == y.shape


def test_transposed_to_no_positions_compiles():
    x, w = torch.randn(2, 4, 1, 3, requires_grad=True), torch.randn(4, 4, 2, 2, requires_grad=True)
    f = lambda x, w: F.conv_transpose2d(x, w, padding=(1, 0))
    for compiled in (torch.compile(f, backend="aot_eager", fullgraph=True, dynamic=d) for d in (False, True)):
        y = compiled(x, w)
        assert y.shape == (2, 4, 0, 4)
        assert not any(g.any() for g in torch.autograd.grad(y.sum(), (x, w)))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_sizes_below_zero_are_refused_as_by_torch(n):
    x, w = torch.randn(2, 4, *(3, 1, 1)[:n]), torch.randn(4, 4, *(2, 2, 2)[:n])
    for name, how in (("conv_transpose", {"padding": 3}), ("conv", {"dilation": 9})):
        same_refusal(getattr(F, f"{name}{n}d"), getattr(torch.nn.functional, f"{name}{n}d"), x, w, **how)
    same_refusal(
        getattr(F, f"conv{n}d"),
        getattr(torch.nn.functional, f"conv{n}d"),
        x,
        w[..., :1].expand_as(w)[:, :, :1].repeat(1, 1, 4, *[1] * (n - 1)),
    )


def test_explain_names_room_and_algorithm():
    text = str(explain.explain("conv2d", [(1, 8, 9, 9), (8, 8, 3, 3)]))
    assert "room conv " in text and "gemm" in text


def explained(op, *shapes, **geometry):
    dtype, wanted = geometry.pop("dtype", torch.float32), geometry.pop("backend", "cpu")
    return str(explain.explain(op, shapes, dtype, wanted=wanted, geometry=geometry))


def test_explain_names_the_choice_on_the_cpu():
    """Many large images pay for the transforms, few channels and small images do not."""
    notes = lambda x, w: explained("conv2d", x, w, padding=1)
    assert "forward: algorithm winograd4 (model)" in notes((8, 64, 56, 56), (64, 64, 3, 3))
    assert "cost beside gemm's 1: winograd2 0." in notes((8, 64, 56, 56), (64, 64, 3, 3))
    few = notes((1, 3, 56, 56), (64, 3, 3, 3))
    assert "algorithm gemm (model): fewer than 16 channels" in few and "gradient in the input: algorithm gemm" in few
    assert "algorithm gemm (Winograd's serves 3x3" in notes((8, 64, 56, 56), (64, 64, 5, 5))
    assert notes((8, 64, 56, 56), (64, 64, 3, 3)).count("workspace at most") == 3


def test_explain_says_why_winograd_does_not_run():
    dense, depthwise = ((1, 64, 56, 56), (64, 64, 3, 3)), ((1, 64, 56, 56), (64, 1, 3, 3))
    assert "forward: algorithm gemm (Winograd's serves 3x3" in explained("conv2d", *dense, stride=2)
    with F.conv_algorithm("winograd4"):
        assert "algorithm winograd4 (asked for)" in explained("conv2d", *dense)
        assert "direct" in explained("conv2d", *depthwise) and "winograd" not in explained("conv2d", *depthwise)
        for dtype in (torch.bfloat16, torch.float64):
            text = explained("conv2d", *dense, dtype=dtype)
            assert (
                "algorithm gemm (winograd4 was asked for, which serves no" in text and "algorithm winograd4" not in text
            )
        assert "winograd4 was asked for, which serves 3x3" in explained("conv2d", (1, 8, 9, 9), (8, 8, 5, 5))
    with F.conv_algorithm("wgmma"):
        assert "algorithm gemm (wgmma was asked for, which is a GPU's)" in explained("conv2d", *dense)
    torch.use_deterministic_algorithms(True)
    try:
        assert "algorithm gemm (torch.use_deterministic_algorithms" in explained("conv2d", *dense)
    finally:
        torch.use_deterministic_algorithms(False)
    before = torch.backends.mkldnn.conv.fp32_precision
    torch.backends.mkldnn.conv.fp32_precision = "ieee"
    try:
        assert "algorithm gemm (torch.backends.mkldnn.conv.fp32_precision" in explained("conv2d", *dense)
    finally:
        torch.backends.mkldnn.conv.fp32_precision = before


def test_explain_of_a_gpu():
    dense = (8, 64, 56, 56), (64, 64, 3, 3)
    half = {"dtype": torch.bfloat16, "backend": "emulator"}
    assert "forward: algorithm wgmma" in explained("conv2d", *dense, **half, channels_last=True)
    planes = explained("conv2d", *dense, **half)
    assert "forward: algorithm wgmma" in planes and "pass through channels last" in planes
    assert "algorithm gemm (wgmma needs channels last" in explained("conv2d", (8, 12, 9, 9), (64, 12, 3, 3), **half)
    assert "algorithm grouped" in explained("conv2d", (8, 64, 9, 9), (64, 4, 3, 3), **half)
    assert "forward: algorithm few channels" in explained("conv2d", (8, 3, 9, 9), (64, 3, 3, 3), **half)
    assert "algorithm ieee (float32 in full" in explained("conv2d", *dense, backend="triton")
    for backend in ("emulator", "cuda", "triton"):
        assert explained("conv2d", *dense, backend=backend).count("workspace at most") == 3


@pytest.mark.parametrize("op", [*OPS, "conv2d_act", "depthwise_conv", "unfold", "fold"])
def test_explain_names_sources_that_exist(op):
    dims = int(next(filter(str.isdigit, op), "2"))
    image, filters = (2, 4, *[9] * dims), (4, 1 if op == "depthwise_conv" else 4, *[3] * dims)
    shapes = {"unfold": [(2, 4, 9, 9)], "fold": [(2, 36, 49)]}.get(op, [image, filters])
    for name in ("cpu", "emulator", "triton"):
        found = explain.explain(op, shapes, wanted=name)
        assert Path(__file__).parents[1].joinpath(found.source).is_file(), found.source
        assert found.notes and "workspace" in str(found)
    depthwise = explain.explain("conv2d", [(2, 4, 9, 9), (4, 1, 3, 3)], wanted="cpu")
    assert depthwise.source == "csrc/cpu/depthwise_conv.cpp"


def test_explain_refuses_what_the_call_refuses():
    for shapes, how in (
        (((1, 8, 9, 9), (8, 3, 3, 3)), {}), (((1, 8, 9, 9), (8, 8, 3, 3)), {"stride": 0}),
        (((1, 8, 9, 9), (8, 8, 11, 3)), {}), (((1, 8, 9, 9), (8, 8, 3)), {}), (((8, 9), (8, 8, 3, 3)), {}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="conv2d: argument '"):
            explained("conv2d", *shapes, **how)
    with pytest.raises(ValueError, match="layer_norm: got stride"):
        explained("layer_norm", (4, 8), stride=2)


@pytest.mark.parametrize("algorithm", ["winograd2", "winograd4"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("shape", "filters", "padding", "groups"),
    [
        ((2, 64, 19, 23), (40, 64, 3, 3), (1, 1), 1),  # panels of tiles that end in the middle of a row
        ((3, 37, 7, 7), (45, 37, 3, 3), (1, 0), 1),  # images smaller than a panel, channels that fill no vector
        ((1, 6, 3, 3), (4, 3, 3, 3), (0, 0), 2),  # one output
        ((1, 6, 9, 200), (9, 2, 3, 3), (2, 5), 3),  # a row of several panels, padding wider than the filter reaches
        ((1, 700, 8, 8), (500, 700, 3, 3), (1, 1), 1),  # several portions of transformed weights
    ],
)
def test_winograd(shape, filters, padding, groups, channels_last, algorithm):
    """Forward and gradient in the input within the error that docs/math/convolution.md states."""
    g = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(*size, generator=g) for size in (shape, filters, filters[:1]))
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    exact = x.double().requires_grad_(), w.double(), b.double()
    ours = x.requires_grad_(), w, b
    y = torch.nn.functional.conv2d(*exact, padding=padding, groups=groups)
    dy = torch.randn(y.shape, generator=g)
    with F.conv_algorithm(algorithm):
        z = F.conv2d(*ours, padding=padding, groups=groups)
        dx = torch.autograd.grad(z, x, dy)[0]
    limit = 4e-6 if algorithm == "winograd2" else 2e-5
    for got, want, channels in ((z, y, filters[1]), (dx, torch.autograd.grad(y, exact[0], dy.double())[0], filters[0])):
        error = (got.double() - want).abs().max().item()
        assert error < limit * math.sqrt(9 * channels)
    with F.conv_algorithm("gemm"):
        plain = F.conv2d(*ours, padding=padding, groups=groups)
    assert not torch.equal(plain, z)  # it did run


def test_winograd_is_the_default_unless_something_stricter_is_asked_for():
    x, w = torch.randn(2, 32, 40, 40), torch.randn(32, 32, 3, 3)
    run = lambda: F.conv2d(x, w, padding=1)
    with F.conv_algorithm("gemm"):
        plain = run()
    assert not torch.equal(run(), plain)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(run(), plain)
    finally:
        torch.use_deterministic_algorithms(False)
    before = torch.backends.mkldnn.conv.fp32_precision
    torch.backends.mkldnn.conv.fp32_precision = "ieee"
    try:
        assert torch.equal(run(), plain)
    finally:
        torch.backends.mkldnn.conv.fp32_precision = before


def test_a_gradient_is_as_strict_as_is_asked_when_it_runs():
    x, w = torch.randn(2, 32, 40, 40, requires_grad=True), torch.randn(32, 32, 3, 3)
    dy = torch.randn(2, 32, 40, 40)
    with F.conv_algorithm("gemm"):
        plain = torch.autograd.grad(F.conv2d(x, w, padding=1), x, dy)[0]
    y = F.conv2d(x, w, padding=1)
    assert not torch.equal(torch.autograd.grad(y, x, dy, retain_graph=True)[0], plain)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(torch.autograd.grad(y, x, dy)[0], plain)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("channels_last", [False, True])
def test_winograd_gives_the_same_bits_on_any_number_of_threads(channels_last):
    x, w = torch.randn(3, 40, 30, 31), torch.randn(50, 40, 3, 3)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with F.conv_algorithm("winograd4"):
                results.append(F.conv2d(x, w, padding=1))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("shape", "filters", "how"),
    [
        ((1, 48, 40, 70), (20, 48, 3, 3), {"padding": 1}),  # rows in several blocks
        ((2, 24, 61, 53), (30, 24, 5, 3), {"padding": (2, 0), "stride": 2, "dilation": (1, 2)}),  # phases
        ((1, 40, 9001), (9, 40, 5), {"padding": 3, "stride": 3, "dilation": 2}),  # one row in several blocks
        ((1, 6, 9, 20, 33), (8, 6, 2, 3, 3), {"padding": (1, 1, 0), "stride": (2, 1, 1)}),
        ((2, 70, 45, 47), (16, 70, 1, 1), {}),  # the image is its own copy, with a rest of a panel
        ((2, 70, 45, 47), (90, 70, 1, 1), {}),  # so many filters that a packed copy pays
        ((2, 12, 30, 31), (18, 4, 3, 3), {"groups": 3, "padding": 2, "dilation": 2}),
    ],
)
def test_shifted_rows_on_the_cpu(shape, filters, how):
    """Planes too large for one block, strides, spaces between taps: forward and both gradients."""
    rank = len(filters) - 2
    g = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=g, dtype=torch.float64).requires_grad_()
    inputs = draw(*shape), draw(*filters), draw(filters[0])
    results = []
    for functional in (F, torch.nn.functional):
        y = getattr(functional, f"conv{rank}d")(*inputs, **how)
        results.append((y, *torch.autograd.grad(y.sin().sum(), inputs)))
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)


def test_sizes_that_came_before_are_checked_as_at_first():
    """A second call takes what the first found of its sizes; what only equals them is looked at again, and all else."""
    x, w, b = torch.randn(2, 4, 6, 6), torch.randn(4, 4, 3, 3), torch.randn(4)
    first = F.conv2d(x, w, b, 1, 1)
    assert torch.equal(F.conv2d(x, w, b, 1, 1), first) and torch.equal(F.conv2d(x, w, b, (1, 1), (1, 1)), first)
    assert torch.equal(F.conv2d(x, w, b, [1, 1], (1, 1)), first)
    alone = F.conv2d(x[0], w, b, 1, 1)
    assert torch.equal(F.conv2d(x[0], w, b, 1, 1), alone) and alone.shape == first.shape[1:]
    for stride in (1.0, (1.0, 1.0), (1, 1.0), 0, (1, 0)):
        for _ in range(2):
            with pytest.raises((TypeError, RuntimeError), match="'stride'"):
                F.conv2d(x, w, b, stride, 1)
    refuses(RuntimeError, ("conv2d", "'weight'", "float64"), F.conv2d, x, w.double(), b, 1, 1)
    refuses(RuntimeError, ("conv2d", "'bias'", "float64"), F.conv2d, x, w, b.double(), 1, 1)
    refuses(NotImplementedError, ("conv2d", "'input'", "int64"), F.conv2d, x.long(), w.long(), b.long(), 1, 1)
    refuses(RuntimeError, ("conv2d", "'groups'"), F.conv2d, x, w, b, 1, 1, 1, 0)
    last = F.conv2d(x.to(memory_format=torch.channels_last), w, b, 1, 1)
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, first)
    for strided in (x.mT, x.expand(2, 4, 6, 6)[:, :, ::1], x[:, :, :, ::2].repeat_interleave(2, 3)):
        torch.testing.assert_close(F.conv2d(strided, w, b, 1, 1), torch.nn.functional.conv2d(strided, w, b, 1, 1))
    with torch.autocast("cpu", torch.bfloat16):
        assert F.conv2d(x, w, b, 1, 1).dtype == torch.bfloat16
    with F.conv_algorithm("gemm"):
        other = F.conv2d(x, w, b, 1, 1)
    torch.testing.assert_close(other, first)
    two = torch.func.vmap(lambda one: F.conv2d(one, w, b, 1, 1))(torch.stack((x, x)))
    torch.testing.assert_close(two, torch.stack((first, first)))
    leaf = w.clone().requires_grad_()
    F.conv2d(x, leaf, b, 1, 1).sum().backward()
    torch.nn.functional.conv2d(x, theirs := w.clone().requires_grad_(), b, 1, 1).sum().backward()
    torch.testing.assert_close(leaf.grad, theirs.grad)
    with forced("cpu"):
        assert torch.equal(F.conv2d(x, w, b, 1, 1), first)
    if library.load_emulator() is None:
        with forced("emulator"):
            torch.testing.assert_close(F.conv2d(x, w, b, 1, 1), first)


def test_plans_are_few(monkeypatch):
    monkeypatch.setattr(convolve, "_MOST_PLANS", 2)
    monkeypatch.setattr(convolve, "_plans", {})
    w = torch.randn(1, 1, 3, 3)
    for side in range(3, 9):
        x = torch.randn(1, 1, side, side)
        for _ in range(2):
            torch.testing.assert_close(F.conv2d(x, w), torch.nn.functional.conv2d(x, w))
        assert 0 < len(convolve._plans) <= 2
