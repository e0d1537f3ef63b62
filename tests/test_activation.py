import math

import pytest
import torch

from pyops import functional as F
from pyops import nn, testing, use
from pyops.core import backend as backends
from pyops.core.activations import FUNCTIONS

from .harness import modules_agree, passes, refuses, same_refusal

X = torch.randn(2, 4, 6)
torch_F = torch.nn.functional
POINTWISE = [
    "relu",
    "relu6",
    "hardtanh",
    "leaky_relu",
    "threshold",
    "elu",
    "selu",
    "celu",
    "gelu",
    "gelu_tanh",
    "silu",
    "mish",
    "sigmoid",
    "hardsigmoid",
    "hardswish",
    "softplus",
    "softsign",
    "tanh",
    "logsigmoid",
    "hardshrink",
    "softshrink",
    "tanhshrink",
    "rrelu",
]


@pytest.mark.parametrize("check", testing.checks())
def test_checks(backend, check):
    passes("gelu", backend, check)


@pytest.mark.parametrize("check", testing.checks())
def test_prelu_on_the_cpu(check):
    passes("prelu", "cpu", check)


@pytest.mark.parametrize("check", ["layout", "gradcheck", "gradgradcheck", "jacobians", "transforms", "opcheck"])
def test_glu_on_the_cpu(check):
    passes("glu", "cpu", check)


# One kernel serves them all, so what does not depend on the formula is checked above.
@pytest.mark.parametrize("op", [*POINTWISE, "prelu", "glu"])
def test_accuracy(backend, op):
    passes(op, backend, "accuracy")


@pytest.mark.parametrize("op", POINTWISE)
def test_derivatives(op):
    passes(op, "cpu", "gradcheck")
    passes(op, "cpu", "gradgradcheck")


@pytest.mark.thorough
@pytest.mark.parametrize("op", POINTWISE)
def test_jacobians(op):
    passes(op, "cpu", "jacobians")


@pytest.mark.race
@pytest.mark.parametrize("op", ["relu", "gelu", "prelu", "glu"])
def test_race(backend, op):
    passes(op, backend, "accuracy")


def functions_of_torch():
    def same(name, *arguments, **kwargs):
        return pytest.param(getattr(F, name), getattr(torch_F, name), arguments, kwargs, id=name)

    return [
        *(same(n) for n in ("relu", "relu6", "leaky_relu", "elu", "selu", "celu", "silu", "mish", "sigmoid")),
        *(same(n) for n in ("hardsigmoid", "hardswish", "hardtanh", "softplus", "softsign", "tanh", "logsigmoid")),
        *(same(n) for n in ("hardshrink", "softshrink", "tanhshrink", "rrelu")),
        same("threshold", 0.5, 2.0),
        same("gelu", approximate="tanh"),
    ]


@pytest.mark.parametrize("ours, theirs, arguments, kwargs", functions_of_torch())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kinks_and_nan_as_torch(backend, ours, theirs, arguments, kwargs, dtype):
    points = [-math.inf, -1e4, -88.0, -3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0, 6.0, 20.0, 88.0, 1e4, math.inf, math.nan]
    values = []
    for function in (ours, theirs):
        x = torch.tensor(points, dtype=dtype, requires_grad=True)
        with backends.backend(backend):
            y = function(x, *arguments, **kwargs)
            (dx,) = torch.autograd.grad(y, x, torch.full_like(y, 2.0))
        values.append((y.detach(), dx))
    for ours_t, theirs_t in zip(*values):
        finite = torch.isfinite(torch.tensor(points))
        torch.testing.assert_close(ours_t[finite], theirs_t[finite])
    # torch's own gradients at NaN and values at infinity differ between its scalar and vector code.
    assert values[0][0][-1].isnan() == values[1][0][-1].isnan()


@pytest.mark.parametrize("ours, theirs, arguments, kwargs", functions_of_torch())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradients_at_nan_as_torch_vectors(backend, ours, theirs, arguments, kwargs, dtype):
    """As torch on the CPU where a vector is full of them: its scalar tails and its GPU let some of them through."""
    values = []
    for function in (ours, theirs):
        x = torch.full((64,), math.nan, dtype=dtype, requires_grad=True)
        with backends.backend(backend):
            y = function(x, *arguments, **kwargs)
        (dx,) = torch.autograd.grad(y, x, torch.full_like(y, 2.0))
        assert y.isnan().all()
        values.append(dx)
    torch.testing.assert_close(*values, equal_nan=True)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_truth_has_the_gradient_of_the_kernel_at_nan(name):
    """What second gradients and fused rooms are made of."""
    number, truth = FUNCTIONS[name]
    x = torch.full((64,), math.nan, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(truth(x, 0.5, 1.5, 0.7), x, torch.full_like(x, 2.0))
    kernel = torch.ops.pyops.activation_bwd(torch.full_like(x, 2.0), x.detach(), number, 0.5, 1.5, 0.7)
    torch.testing.assert_close(dx, kernel, equal_nan=True)


@pytest.mark.parametrize("x", [math.inf, -math.inf])
def test_softsign_is_flat_at_infinity(backend, x):
    """torch computes 1 - |y| with y = inf / inf and has NaN."""
    x = torch.full((64,), x, requires_grad=True)
    with backends.backend(backend):
        (dx,) = torch.autograd.grad(F.softsign(x).sum(), x)
    assert (dx == 0).all()


def test_an_infinite_cotangent_stays_out_of_the_flat_side():
    x = torch.tensor([-1.0, 1.0], requires_grad=True)
    for f in (F.relu, F.relu6, lambda v: F.hardtanh(v, -0.5, 2.0), F.hardshrink):
        (dx,) = torch.autograd.grad(f(x), x, torch.tensor([math.inf, 1.0]))
        assert not dx.isnan().any()


@pytest.mark.parametrize(
    "name, low, high, ulps",
    [
        ("tanh", -12, 12, 4),
        ("elu", -30, -1e-3, 3),
        ("logsigmoid", -80, 20, 6),
        ("sigmoid", -80, 30, 4),
        ("gelu", 0, 6, 5),
    ],
)
def test_the_polynomials_are_accurate_to_the_last_places(name, low, high, ulps):
    x = torch.linspace(low, high, 50021, dtype=torch.float64).float()
    truth = getattr(torch_F, name)(x.double())
    error = (getattr(F, name)(x).double() - truth).abs() / (truth.abs() * torch.finfo(torch.float32).eps + 1e-45)
    assert error.max() <= ulps
    double = getattr(F, name)(x.double())
    torch.testing.assert_close(double, truth, rtol=ulps * torch.finfo(torch.float64).eps, atol=0)


def test_strides_are_kept_as_torch_keeps_them():
    dense = [
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(2, 3, 4, 2, 5).to(memory_format=torch.channels_last_3d),
        torch.randn(4, 5).t(),
        torch.randn(2, 3, 4).permute(1, 2, 0),
    ]
    for x in dense:
        assert F.relu(x).stride() == torch.relu(x).stride() == x.stride()
        torch.testing.assert_close(F.silu(x), torch_F.silu(x))
    for x in (torch.randn(2, 4, 6, 8).to(memory_format=torch.channels_last), torch.randn(6, 4).t()):
        for dim in range(x.dim()):
            y, expected = F.glu(x, dim), torch_F.glu(x, dim)
            assert y.stride() == expected.stride()
            torch.testing.assert_close(y, expected)
    x, slopes = torch.randn(3, 4), torch.rand(1).expand(4)
    torch.testing.assert_close(F.prelu(x, slopes), torch.prelu(x, slopes))
    gaps = torch.randn(4, 10)[:, ::2]
    torch.testing.assert_close(F.silu(gaps), torch_F.silu(gaps))
    expanded = torch.randn(3, 1).expand(3, 4)
    torch.testing.assert_close(F.silu(expanded), torch_F.silu(expanded))


def test_in_place(backend):
    with backends.backend(backend):
        x = torch.randn(3, 5)
        expected = torch.relu(x)
        assert F.relu(x, inplace=True) is x
        torch.testing.assert_close(x, expected)
        view = torch.randn(4, 6)
        expected = torch_F.elu(view.clone()[:, ::2])
        F.elu(view[:, ::2], inplace=True)
        torch.testing.assert_close(view[:, ::2], expected)
    leaf = torch.randn(3, requires_grad=True)
    same_refusal(lambda t: F.relu(t, inplace=True), lambda t: torch_F.relu(t, inplace=True), leaf)
    for module in (F, torch_F):
        y = leaf * 2
        module.silu(y, inplace=True)
        (grad,) = torch.autograd.grad(y.sum(), leaf)
        if module is F:
            ours = grad
    torch.testing.assert_close(ours, grad)
    batch = torch.randn(3, 4)
    torch.testing.assert_close(torch.func.vmap(lambda v: F.relu(v.clone(), inplace=True))(batch), torch.relu(batch))


def test_rrelu_draws_slopes(backend):
    with backends.backend(backend):
        x = torch.randn(4000, requires_grad=True)
        y = F.rrelu(x, 0.2, 0.6, training=True)
        slope = (y / x)[x < 0].detach()
        assert slope.min() >= 0.2 and slope.max() <= 0.6 and abs(slope.mean() - 0.4) < 0.02
        torch.testing.assert_close(y[x > 0], x[x > 0])
        (dx,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(dx[x < 0], slope)
        torch.manual_seed(3)
        a = F.rrelu(x, training=True)
        torch.manual_seed(3)
        assert torch.equal(a, F.rrelu(x, training=True))


@pytest.mark.parametrize("shape, channels_last", [((3, 4), False), ((2, 4, 5), False), ((2, 4, 3, 3), True)])
def test_prelu_has_one_slope_per_channel(backend, shape, channels_last):
    x = torch.randn(shape)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    weight = torch.rand(4)
    with backends.backend(backend):
        y = F.prelu(x, weight)
    assert y.stride() == x.stride()
    torch.testing.assert_close(y, torch.prelu(x, weight))


MODULES = [
    "ReLU() ReLU6() Hardtanh(-0.5,0.7) LeakyReLU(0.2) Threshold(0.1,-2.0) ELU(0.5) SELU() CELU(2.0) GELU() SiLU()",
    "GELU('tanh') Mish() Sigmoid() Hardsigmoid() Hardswish() Softplus(2.0,3.0) Softsign() Tanh() LogSigmoid()",
    "Hardshrink(0.3) Softshrink(0.3) Tanhshrink() GLU(1) PReLU() PReLU(4) ReLU(inplace=True)",
]


@pytest.mark.parametrize("text", " ".join(MODULES).split())
def test_module(text):
    make = lambda m: eval(f"m.{text}", {"m": m})
    x = torch.randn(2, 4, 6)
    if "inplace" in text:
        torch.testing.assert_close(make(nn)(x.clone()), make(torch.nn)(x.clone()))
        return
    modules_agree(make(nn), make(torch.nn), x, "cpu")


def test_an_unmodified_model_is_routed():
    model = torch.nn.Sequential(torch.nn.ReLU(inplace=True), torch.nn.GELU(), torch.nn.PReLU(), torch.nn.SiLU())
    x = torch.randn(3, 4)
    with torch.no_grad():
        expected = model(x.clone())
        with use() as report:
            y = model(x.clone()).sigmoid().tanh_()
    torch.testing.assert_close(y, expected.sigmoid().tanh_())
    assert all(report.entries[op].backends for op in ("relu", "gelu", "prelu", "silu", "sigmoid", "tanh"))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
@pytest.mark.parametrize("name", ["tanh", "sigmoid", "relu", "relu6", "hardtanh", "softsign", "elu", "gelu"])
def test_other_types_are_left_to_torch(name, dtype):
    """Under ``use`` integers give what they give without it, be it an error."""
    function = getattr(torch if name in ("tanh", "sigmoid") else torch_F, name)
    x = torch.tensor([0, 1, 5]).to(dtype)

    def answer():
        try:
            return function(x)
        except (RuntimeError, NotImplementedError) as error:
            return type(error), str(error)

    expected = answer()
    with use() as report:
        found = answer()
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected)
        assert sum(report.entries[name].kept.values()) == 1 and not report.entries[name].backends
    else:
        assert found == expected


def test_bad_input():
    refuses(NotImplementedError, ("relu", "'input'", "int64"), F.relu, X.long())
    refuses(TypeError, ("relu", "'input'", "list"), F.relu, [1.0])
    refuses(ValueError, ("hardtanh", "'min_val'", "2"), F.hardtanh, X, 2, 1)
    refuses(TypeError, ("elu", "'alpha'", "str"), F.elu, X, "1")
    refuses(RuntimeError, ("celu", "'alpha'", "0"), F.celu, X, 0)
    refuses(RuntimeError, ("gelu", "'approximate'", "'erf'"), F.gelu, X, "erf")
    refuses(RuntimeError, ("softshrink", "'lambd'", "-1"), F.softshrink, X, -1.0)
    refuses(RuntimeError, ("glu", "'input'", "5"), F.glu, torch.ones(5))
    refuses(IndexError, ("glu", "'dim'", "3"), F.glu, X, 3)
    refuses(RuntimeError, ("prelu", "'weight'", "[3]"), F.prelu, X, torch.ones(3))
    refuses(RuntimeError, ("prelu", "'weight'", "float64"), F.prelu, X, torch.ones(4, dtype=torch.float64))
    refuses(RuntimeError, ("rrelu", "'lower'", "2"), F.rrelu, X, 2.0, 1.0)


@pytest.mark.parametrize(
    "name, args",
    [
        ("hardtanh", (X, 2, 1)),
        ("elu", (X, "1")),
        ("celu", (X, 0)),
        ("gelu", ([1.0],)),
        ("softshrink", (X, -1.0)),
        ("glu", (torch.ones(5),)),
        ("glu", (X, 3)),
        ("glu", (torch.ones(()),)),
        ("prelu", (X, torch.ones(3))),
    ],
)
def test_refuses_as_torch(name, args):
    same_refusal(getattr(F, name), getattr(torch_F, name), *args)
