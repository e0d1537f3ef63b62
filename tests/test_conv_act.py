import pytest
import torch

from pyops import functional as F
from pyops import testing
from pyops.core import activations, convolution, explain, library
from pyops.core import backend as backends

from .harness import emulated_device, passes, refuses

X, W = torch.ones(2, 4, 5, 6), torch.ones(6, 2, 3, 3)


@pytest.mark.parametrize("check", testing.checks())
def test_checks(check):
    passes("conv2d_act", "cpu", check)


@pytest.mark.parametrize("check", ["accuracy", "layout", "determinism", "opcheck", "gradcheck"])
def test_other_backends(backend, check):
    if backend == "emulator" or (backend == "triton" and check in ("accuracy", "layout")):
        passes("conv2d_act", backend, check)


@pytest.mark.race
def test_race(backend):
    if backend == "emulator":
        passes("conv2d_act", backend, "accuracy")
        _on_warpgroups()


def _case(shape, weight, channels_last, dtype=torch.float32, **geometry):
    g = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(size, generator=g, dtype=torch.float64).to(dtype) for size in (shape, weight, weight[:1]))
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    y = torch.nn.functional.conv2d(x.double(), w.double(), b.double(), **geometry)
    return x, w, b, torch.randn(y.shape, generator=g, dtype=torch.float64).to(dtype), y


# Every place where the CPU finishes a sum: panels of pixels, of channels, transformed tiles, and the two of depthwise.
KERNELS = [
    ("gemm", (2, 70, 15, 17), (16, 70, 1, 1), {}),
    ("gemm", (3, 37, 7, 7), (45, 37, 3, 3), {"padding": 1}),
    ("gemm", (2, 24, 31, 33), (30, 12, 3, 3), {"padding": 1, "groups": 2}),
    ("winograd2", (2, 64, 19, 23), (40, 64, 3, 3), {"padding": 1}),
    ("winograd4", (1, 37, 7, 7), (45, 37, 3, 3), {"padding": (1, 0)}),
    ("", (2, 12, 9, 37), (24, 1, 3, 3), {"padding": 1, "groups": 12}),
    ("", (1, 1100, 5, 5), (1100, 1, 3, 3), {"padding": 1, "groups": 1100}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("algorithm", "shape", "weight", "geometry"), KERNELS)
def test_every_algorithm_of_the_cpu_finishes_its_sums(algorithm, shape, weight, geometry, channels_last, dtype):
    x, w, b, r, y = _case(shape, weight, channels_last, dtype, **geometry)
    with F.conv_algorithm(algorithm):
        for activation in ("relu", "gelu"):
            want = activations.truth(activation)(y + r.double())
            for bias in (b, b.clone().requires_grad_()):  # in one pass, and with the sum kept
                got = F.conv2d_act(x, w, bias, r, activation, **geometry).detach()
                assert got.stride() == (r.to(memory_format=torch.channels_last) if channels_last else r).stride()
                tolerance = 2e-5 if dtype == torch.float32 else 1e-2
                assert (got.double() - want).abs().max() < tolerance * want.abs().max()


@pytest.mark.parametrize("activation", sorted(activations.FUSED))
def test_every_activation(backend, activation):
    x, w, b, r, y = _case((1, 3, 5, 4), (4, 3, 3, 3), False, torch.float32, padding=1)
    with backends.backend(backend):
        got = F.conv2d_act(x, w, b, r, activation, padding=1)
    torch.testing.assert_close(got.double(), activations.truth(activation)(y + r.double()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, (2, 1), "same", "valid"])
def test_padding_modes_are_those_of_the_module(padding, mode, groups):
    module = torch.nn.Conv2d(4, 8, (3, 2), padding=padding, padding_mode=mode, groups=groups)
    got = F.conv2d_act(X, module.weight, module.bias, None, "silu", 1, padding, 1, groups, mode)
    torch.testing.assert_close(got, torch.nn.functional.silu(module(X)), rtol=1e-5, atol=1e-5)


def test_without_derivatives_one_op_writes_the_result():
    """No second pass over y: the profiler sees the fused op alone."""
    x, w, b, r, _ = _case((1, 4, 6, 6), (4, 4, 3, 3), False, padding=1)
    for weight, stem in ((w, "conv"), (w[:, :1].contiguous(), "depthwise_conv")):
        groups = x.shape[1] // weight.shape[1]
        with torch.profiler.profile() as profile:
            F.conv2d_act(x, weight, b, r, padding=1, groups=groups)
        ours = [e.name for e in profile.events() if e.name.startswith(("pyops::", "aten::"))]
        assert [name for name in ours if "view" not in name and "reshape" not in name and "empty" not in name] == [
            f"pyops::{stem}_act_fwd"
        ], ours


def test_compiled_without_derivatives_is_one_op():
    x, w, b, r, y = _case((1, 4, 6, 6), (4, 4, 3, 3), False, padding=1)
    graphs = []

    def keep(graph, inputs):
        graphs.append(str(graph.graph))
        return graph

    w.requires_grad_()
    compiled = torch.compile(lambda *t: F.conv2d_act(*t, padding=1), fullgraph=True, backend=keep)
    with torch.no_grad():
        got = compiled(x, w, b, r)
    assert "conv_act_fwd" in graphs[0] and "bias_act" not in graphs[0]
    torch.testing.assert_close(got.double(), torch.relu(y + r.double()), rtol=1e-5, atol=1e-5)


def test_the_raw_op_refuses_what_it_has_no_derivative_of():
    x, w, b, r, _ = _case((1, 4, 6, 6), (4, 4, 3, 3), False, padding=1)
    x.requires_grad_()
    family = convolution.family_for(4, w.shape, 1)
    geometry = ([1, 1, 1], [0, 1, 1], [1, 1, 1], 1, False, "gemm")
    y = torch.ops.pyops.conv_act_fwd(x[:, :, None], w[:, :, None], b, r[:, :, None], *geometry, 0, 0.0, 0.0, 0.0)
    with pytest.raises(RuntimeError, match="conv2d_act"):
        y.sum().backward()
    y = family.plus("pyops", x[:, :, None], w[:, :, None], b, r[:, :, None], *geometry)
    y.sum().backward()
    assert x.grad is not None


def test_on_a_gpu_planes_with_many_channels_pass_through_channels_last():
    x, w, b, r, y = _case((1, 32, 5, 6), (32, 32, 3, 3), False, torch.float64, padding=1)
    with emulated_device("emulator"), backends.backend("emulator"):
        got = F.conv2d_act(x, w, b, r, padding=1)
    assert got.is_contiguous()
    torch.testing.assert_close(got, torch.relu(y + r))


def _on_warpgroups():
    x, w, b, r, y = _case((2, 72, 7, 9), (80, 72, 3, 3), True, torch.bfloat16, stride=2, padding=1)
    library.configure_emulator(statistics="reset")
    with emulated_device("emulator"), backends.backend("emulator"):
        got = F.conv2d_act(x, w, b, r, "silu", stride=2, padding=1)
    assert library.emulator_statistic("wgmma") > 0
    want = torch.nn.functional.silu(y + r.double())
    assert (got.double() - want).abs().max() < 1e-2 * want.abs().max()


def test_the_kernel_for_hopper_finishes_its_sums():
    _on_warpgroups()


def test_explain_names_the_algorithm_and_the_end():
    text = str(explain.explain("conv2d_act", [(8, 64, 56, 56), (64, 64, 3, 3)]))
    assert "algorithm winograd4" in text and "residual" in text


def test_bad_input():
    op = "conv2d_act"
    call = lambda *args, **kwargs: F.conv2d_act(X, W, *args, groups=2, **kwargs)
    refuses(ValueError, (op, "'activation'", "swish"), call, activation="swish")
    refuses(ValueError, (op, "'padding_mode'", "mirror"), call, padding_mode="mirror")
    refuses(TypeError, (op, "'residual'", "float"), call, None, 1.0)
    refuses(RuntimeError, (op, "'residual'", "[2, 6, 5, 6]", "[2, 6, 3, 4]"), call, None, torch.ones(2, 6, 5, 6))
    refuses(RuntimeError, (op, "'residual'", "float64"), call, None, torch.ones(2, 6, 3, 4).double())
    refuses(RuntimeError, (op, "'input'", "4 channels"), F.conv2d_act, X, W)
    refuses(RuntimeError, (op, "'bias'", "[5]"), call, torch.ones(5))
