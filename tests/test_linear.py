import pytest
import torch

from pyops import functional as F
from pyops import nn, testing, use
from pyops.core import activations, product
from pyops.core import backend as backends

from .harness import agrees, modules_agree, passes, refuses, same_refusal

torch_F = torch.nn.functional


@pytest.mark.parametrize("check", testing.checks())
@pytest.mark.parametrize("op", ["linear", "bias_act"])
def test_checks(backend, op, check):
    passes(op, backend, check)


@pytest.mark.parametrize("check", testing.checks())
@pytest.mark.parametrize("op", ["linear_act", "bilinear"])
def test_checks_on_the_cpu(op, check):
    passes(op, "cpu", check)


@pytest.mark.parametrize("op", ["linear_act", "bilinear"])
def test_accuracy(backend, op):
    passes(op, backend, "accuracy")


@pytest.mark.race
@pytest.mark.parametrize("op", ["linear", "linear_act", "bias_act"])
def test_race(backend, op):
    passes(op, backend, "accuracy")


@pytest.mark.parametrize("name", sorted(activations.FUSED))
def test_every_activation_of_linear_act(name):
    x, w, b = torch.randn(5, 3), torch.randn(4, 3), torch.randn(4)
    agrees(
        lambda x, w, b: F.linear_act(x, w, b, name),
        lambda x, w, b: activations.truth(name)(torch_F.linear(x, w, b)),
        *(x, w, b),
    )


@pytest.mark.parametrize("name", sorted(set(activations.FUSED) - {"gelu_tanh", "identity"}))
def test_fused_activations_have_the_parameters_of_torch(name):
    function = torch.tanh if name == "tanh" else torch.sigmoid if name == "sigmoid" else getattr(torch_F, name)
    x = torch.linspace(-8, 8, 97, dtype=torch.float64)
    torch.testing.assert_close(activations.truth(name)(x), function(x))


def test_without_gradients_the_product_is_overwritten():
    x, w, b = torch.randn(64, 3), torch.randn(5, 3), torch.randn(5)
    with torch.no_grad():
        torch.testing.assert_close(F.linear_act(x, w, b, "silu"), torch_F.silu(torch_F.linear(x, w, b)))
        assert F.linear_act(x, w, None, "relu").min() == 0
    assert F.linear_act(x, w.requires_grad_(), b).requires_grad


def test_gradients_of_the_bias_alone_and_without_it():
    x, w, b = torch.randn(7, 3), torch.randn(5, 3), torch.randn(5, requires_grad=True)
    dy = torch.randn(7, 5)
    (db,) = torch.autograd.grad(F.linear(x, w, b), b, dy)
    torch.testing.assert_close(db, dy.sum(0))
    w.requires_grad_()
    (dw,) = torch.autograd.grad(F.linear(x, w, b.detach()), w, dy)
    torch.testing.assert_close(dw, dy.mT @ x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_the_bias_is_summed_in_float32_or_better(backend, dtype):
    rows = 3000 if backend == "cpu" else 200
    dy = (torch.randn(rows, 3, generator=torch.Generator().manual_seed(0)) + 1).to(dtype)
    bias = torch.zeros(3, dtype=dtype, requires_grad=True)
    with backends.backend(backend):
        y = F.linear(torch.zeros(rows, 2, dtype=dtype), torch.zeros(3, 2, dtype=dtype), bias)
        (db,) = torch.autograd.grad(y, bias, dy)
    exact = dy.double().sum(0)
    assert ((db.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs()).all()


def test_an_infinite_or_missing_number_passes_as_in_torch():
    x = torch.tensor([[1.0, float("inf")], [float("nan"), 0.0]])
    w, b = torch.ones(3, 2), torch.zeros(3)
    torch.testing.assert_close(F.linear(x, w, b), torch_F.linear(x, w, b), equal_nan=True)
    torch.testing.assert_close(F.linear_act(x, w, b), torch.relu(torch_F.linear(x, w, b)), equal_nan=True)


@pytest.mark.parametrize(
    "shape, weight, bias",
    [
        ((3,), (4, 3), (4,)), ((2, 5, 3), (4, 3), (4,)), ((2, 3), (4, 3), ()), ((2, 3), (4, 3), (1,)),
        ((2, 3), (3,), None), ((3,), (3,), None), ((2, 2, 3), (3,), None), ((2, 0), (4, 0), (4,)),
        ((0, 3), (4, 3), (4,)), ((2, 0, 3), (4, 3), None), ((2, 3), (0, 3), (0,)),
    ],
)  # fmt: skip
def test_shapes_as_torch(backend, shape, weight, bias):
    x, w, b = torch.randn(shape), torch.randn(weight), None if bias is None else torch.randn(bias)
    with backends.backend(backend):
        y = F.linear(x, w, b)
    torch.testing.assert_close(y, torch_F.linear(x, w, b))


def test_strided_and_transposed_arguments():
    x, w = torch.randn(3, 4, 10)[..., ::2], torch.randn(5, 6).mT
    agrees(F.linear, torch_F.linear, x, w, torch.randn(12)[::2])
    agrees(F.linear, torch_F.linear, torch.randn(3, 1).expand(3, 5), torch.randn(4, 5), torch.randn(1).expand(4))


@pytest.fixture
def own_products(monkeypatch):
    """Products of any size are the room conv's, on every CPU."""
    monkeypatch.setattr(product, "beats_torch", lambda: True)
    monkeypatch.setattr(product, "_ROWS", 1)
    monkeypatch.setattr(product, "_PRODUCTS", 1)


def _ops_of(function, *arguments):
    """Names of the pyops ops that a call and its gradient run."""
    with torch.profiler.profile() as profile:
        agrees(function, torch_F.linear, *arguments)
    return {event.key.removeprefix("pyops::") for event in profile.key_averages() if event.key.startswith("pyops::")}


@pytest.mark.parametrize("shape", [(300, 65), (2, 150, 65), (17, 1), (1, 70)])
@pytest.mark.parametrize("outputs", [1, 33, 130])
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_as_a_convolution(own_products, shape, outputs, bias):
    b = (torch.randn(outputs),) if bias else ()
    ran = _ops_of(F.linear, torch.randn(shape), torch.randn(outputs, shape[-1]), *b)
    assert {"conv_fwd", "conv_dgrad", "conv_wgrad"} <= ran


def test_the_product_as_a_convolution_of_strided_matrices(own_products):
    assert "conv_fwd" in _ops_of(
        F.linear, torch.randn(3, 10, 4).mT, torch.randn(10, 12).mT[:, ::1], torch.randn(24)[::2]
    )


def test_the_product_as_a_convolution_in_transforms(own_products):
    x, w, b = torch.randn(9, 5), torch.randn(4, 5), torch.randn(4)
    batch = torch.randn(3, 9, 5)
    torch.testing.assert_close(torch.vmap(F.linear, (0, None, None))(batch, w, b), torch_F.linear(batch, w, b))
    primals, tangents = (x, w, b), (torch.randn(9, 5), torch.randn(4, 5), torch.randn(4))
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(p, t) for p, t in zip(primals, tangents)]
        found = torch.autograd.forward_ad.unpack_dual(F.linear(*duals)).tangent
    expected = torch_F.linear(tangents[0], w) + torch_F.linear(x, tangents[1]) + tangents[2]
    torch.testing.assert_close(found, expected)
    inputs = [t.clone().requires_grad_() for t in primals]
    seconds = []
    for function in (F.linear, torch_F.linear):
        grads = torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in grads), inputs))
    for ours, theirs in zip(*seconds):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(x, w, b).dtype == torch.bfloat16


def test_what_does_not_fit_is_refused_as_before(own_products):
    refuses(RuntimeError, ("linear", "'weight'", "[4, 3]", "5 columns"), F.linear, torch.randn(2, 5), W)
    with pytest.raises(RuntimeError):
        F.dropconnect_linear(torch.randn(2, 5), W)


def test_compiled_product(own_products):
    x, w, b = torch.randn(33, 16), torch.randn(8, 16), torch.randn(8)
    compiled = torch.compile(F.linear, backend="aot_eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(x, w, b), torch_F.linear(x, w, b))


def test_who_multiplies(monkeypatch):
    def notes(rows):
        return product.explanation(((rows, 256), (1024, 256)), torch.float32, "cpu")[0]

    monkeypatch.setattr(product, "beats_torch", lambda: False)
    assert "torch's" in notes(4096)
    monkeypatch.setattr(product, "beats_torch", lambda: True)
    assert "convolution" in notes(4096) and "torch's: 64 rows" in notes(64)
    x, w = torch.randn(4096, 256), torch.randn(1024, 256)
    assert product.is_ours("pyops", x, w, None) and not product.is_ours("pyops", x[:64], w, None)
    assert not product.is_ours("pyops_emulator", x, w, None) and not product.is_ours("pyops", x.half(), w.half(), None)


def test_bias_act_keeps_channels_last(backend):
    x = torch.randn(2, 5, 3, 4).to(memory_format=torch.channels_last).requires_grad_()
    with backends.backend(backend):
        y = F.bias_act(x, torch.randn(5), "silu")
        (dx,) = torch.autograd.grad(y.sum(), x)
    assert y.stride() == dx.stride() == x.stride()


def test_bilinear_contracts_the_longer_input_first():
    for i, j in ((7, 2), (2, 7)):
        shapes = ((3, 4, i), (3, 4, j), (5, i, j), (5,))
        agrees(F.bilinear, torch_F.bilinear, *(torch.randn(s, dtype=torch.float64) for s in shapes))


def test_modules(backend):
    modules_agree(nn.Linear(6, 4), torch.nn.Linear(6, 4), torch.randn(2, 3, 6), backend)
    modules_agree(nn.Linear(6, 4, bias=False), torch.nn.Linear(6, 4, bias=False), torch.randn(5, 6), backend)
    ours, theirs = nn.Bilinear(3, 4, 5), torch.nn.Bilinear(3, 4, 5)
    assert repr(ours) == repr(theirs)
    ours.load_state_dict(theirs.state_dict())
    inputs = torch.randn(2, 3), torch.randn(2, 4)
    torch.testing.assert_close(ours(*inputs), theirs(*inputs))


def test_an_unmodified_model_is_routed():
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    x = torch.randn(3, 4)
    with use() as report:
        y = model(x)
        torch_F.bilinear(x, x, torch.randn(2, 4, 4))
        both = torch_F.linear(x, torch.randn(3, 4), torch.randn(3, 3))
    torch.testing.assert_close(y, model(x))
    assert both.shape == (3, 3)
    assert report.entries["linear"].backends == {"cpu": 2} and report.entries["linear"].kept
    assert report.entries["bilinear"].backends == {"cpu": 1}


X, W = torch.randn(2, 3), torch.randn(4, 3)


def test_bad_input():
    refuses(RuntimeError, ("linear", "'weight'", "[4, 3]", "5 columns"), F.linear, torch.randn(2, 5), W)
    refuses(RuntimeError, ("linear", "'weight'", "[2, 4, 3]"), F.linear, X, torch.randn(2, 4, 3))
    refuses(RuntimeError, ("linear", "'bias'", "[3]", "[4]"), F.linear, X, W, torch.randn(3))
    refuses(RuntimeError, ("linear", "'weight'", "float64"), F.linear, X, W.double())
    refuses(NotImplementedError, ("linear", "'input'", "int64"), F.linear, X.long(), W)
    refuses(TypeError, ("linear", "'weight'", "list"), F.linear, X, [1.0])
    refuses(RuntimeError, ("linear", "'input'", "a scalar"), F.linear, torch.tensor(1.0), W)
    refuses(ValueError, ("linear_act", "'activation'", "'swish'"), F.linear_act, X, W, None, "swish")
    refuses(ValueError, ("bias_act", "'activation'", "None"), F.bias_act, X, torch.randn(3), None)
    refuses(IndexError, ("bias_act", "'dim'", "2"), F.bias_act, X, torch.randn(3), "relu", 2)
    refuses(RuntimeError, ("bias_act", "'bias'", "[4]", "[3]"), F.bias_act, X, torch.randn(4))
    refuses(RuntimeError, ("bilinear", "'weight'", "[4, 3, 3]", "3, 2"), F.bilinear, X, X[:, :2], torch.randn(4, 3, 3))
    refuses(RuntimeError, ("bilinear", "'input2'", "[1, 3]"), F.bilinear, X, X[:1], torch.randn(4, 3, 3))
    refuses(RuntimeError, ("bilinear", "'bias'", "[3]"), F.bilinear, X, X, torch.randn(4, 3, 3), torch.randn(3))


@pytest.mark.parametrize(
    "name, args",
    [
        ("linear", (torch.randn(2, 5), W)),
        ("linear", (X, torch.randn(2, 4, 3))),
        ("linear", (X, W, torch.randn(3))),
        ("linear", (X, W.double())),
        ("linear", (X, [1.0])),
        ("bilinear", (X, X, torch.randn(4, 3, 2))),
        ("bilinear", (X, X[:1], torch.randn(4, 3, 3))),
        ("bilinear", (X, X, torch.randn(4, 3, 3), torch.randn(3))),
    ],
)
def test_refuses_as_torch(name, args):
    same_refusal(getattr(F, name), getattr(torch_F, name), *args)
