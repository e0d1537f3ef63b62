"""The autograd recipe, on an op with two differentiable outputs, a statistic, and an integer input.

    r[m,n] = s * exp(x[m,n]) * w[n]     t[k] = sum_n sin(x[i[k],n])     size[m] = sum_n |x[m,n]|

The gradient reads the output r and the statistic is of no use to it. The implementations are plain torch.
"""

import gc

import pytest
import torch
from torch.autograd import forward_ad

from pyops import functional as F
from pyops import testing
from pyops.core import backend as backends
from pyops.core import library, tracing
from pyops.core.autograd import Formula, differentiable
from pyops.core.samples import all_checked
from pyops.testing import Maker, Sample, check_op


def _forward(x, w, index, s):
    r = s * x.exp() * (1 if w is None else w)
    return r, x.sin().sum(-1)[index], x.abs().sum(-1)


def _backward(dr, dt, x, w, index, r, s, need_dx, need_dw):
    dx, dw = x.new_zeros(x.shape if need_dx else 0), x.new_zeros(x.shape[1] if need_dw else 0)
    if need_dx and dr is not None:
        dx = dx + dr * r
    if need_dx and dt is not None:
        dx = dx + x.cos() * dt.new_zeros(x.shape[0]).index_add(0, index, dt)[:, None]
    if need_dw and dr is not None:
        dw = (dr * s * x.exp()).sum(0)
    return dx, dw


def _declare(name):
    """The ops in pyops' own namespace; not entered among the declared ones, which every backend must implement."""
    fake = lambda x, w, index, s: (torch.empty_like(x), x.new_empty(index.shape[0]), x.new_empty(x.shape[0]))
    fwd = library.declare(
        f"{name}_fwd(Tensor x, Tensor? w, Tensor index, float s) -> (Tensor, Tensor, Tensor)", fake, None
    )
    bwd = library.declare(
        f"{name}_bwd(Tensor? dr, Tensor? dt, Tensor x, Tensor? w, Tensor index, Tensor r, float s, bool need_dx,"
        " bool need_dw) -> (Tensor, Tensor)",
        lambda dr, dt, x, w, index, r, s, need_dx, need_dw: (
            x.new_empty(x.shape if need_dx else 0),
            x.new_empty(x.shape[1] if need_dw else 0),
        ),
        None,
    )
    for op, function in ((fwd, _forward), (bwd, _backward)):
        library.fragment("pyops").impl(op.name, function, "CPU")
        del library._ops[op.name]
    return fwd, bwd


def _arguments(dy, inputs, kept, constants, needs):
    (dr, dt), (x, w, index), (r,), (s,) = dy, inputs, kept, constants
    return dr, dt, x, w, index, r, s, needs[0], needs[1]


seconds = []


def _second(namespace, dy, inputs, constants, needs, cotangents):
    """By hand: the gradient of  <ddx, dr s e^x w + cos(x) dt'> + <ddw, sum_m dr s e^x>  in dr, dt, x, w."""
    (dr, dt), (x, w, index), (s,) = dy, inputs, constants
    seconds.append(needs)
    ddx, ddw = (torch.zeros_like(t) if c is None else c for c, t in zip(cotangents, (x, x[0])))
    scale = x.new_ones(x.shape[1]) if w is None else w
    full = x.new_zeros(x.shape) if dr is None else dr
    rows = x.new_zeros(x.shape[0]) if dt is None else x.new_zeros(x.shape[0]).index_add(0, index, dt)
    e = s * x.exp()
    ddr = e * (ddx * scale + ddw)
    ddt = (ddx * x.cos()).sum(-1)[index]
    gx = full * e * (ddx * scale + ddw) - ddx * x.sin() * rows[:, None]
    gw = (ddx * full * e).sum(0)
    return (ddr, ddt), (gx, None if w is None else gw)


def _build(name, **changed):
    """The formula on ops of its own name."""
    given = {"inputs": 3, "gradients": 2, "outputs": 2, "keep": (0,), "reference": _forward}
    return differentiable(Formula(*_declare(name), **{"backward_arguments": _arguments, **given, **changed}))


_composite = _build("waves")
_stated = _build("waves_second", second=_second)


def waves(x, w, index, s=0.5):
    return _composite("pyops", x, w, index, s)[:2]


def waves_second(x, w, index, s=0.5):
    return _stated("pyops", x, w, index, s)[:2]


def reference(x, w, index, s=0.5):
    return _forward(x, w, index, s)[:2]


def _sample(weighted=True):
    def make(t: Maker):
        return (t.input((3, 4)), t.input((4,)) if weighted else None, torch.tensor([2, 0, 0, 1])), {"s": 0.7}

    return make


SAMPLES = [
    Sample("weight", _sample(), derivatives=True),
    Sample("no weight", _sample(weighted=False), derivatives=True),
]


def inputs(dtype=torch.float64):
    _, _, maker = (*SAMPLES[0].make(maker := Maker(dtype, requires_grad=True)), maker)
    return (*maker.inputs, torch.tensor([2, 0, 0, 1]))


@pytest.mark.parametrize("function", [waves, waves_second])
@pytest.mark.parametrize("check", testing.checks())
def test_two_outputs_pass_every_check(function, check):
    (result,) = check_op(function, reference, SAMPLES, only=[check])
    assert result.ok, result.detail


@pytest.mark.parametrize("wrong", testing.DTYPES)
def test_on_a_slow_backend_every_dtype_has_its_turn(wrong):
    samples = [testing.Sample(f"sample {i}", lambda t: ((t.input((3,)),), {})) for i in range(len(testing.DTYPES) - 1)]
    doubled = lambda x: x * 2 if x.dtype == wrong else x * 1
    (result,) = check_op(doubled, lambda x: x * 1, samples, only=["accuracy"], slow=True)
    assert not result.ok and str(wrong) in result.detail


def _given(value, derivative):
    """An elementwise function with the derivative that it is given."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            ctx.save_for_forward(x)
            return value(x)

        @staticmethod
        def backward(ctx, dy):
            return dy * derivative(*ctx.saved_tensors)

        @staticmethod
        def jvp(ctx, t):
            return t * derivative(*ctx.saved_tensors)

    return Function.apply


def _almost(function):
    """One entry of sixty is too large by one in a hundred."""

    def wrong(x):
        scale = torch.ones_like(x)
        scale[0, 7] = 1.01
        return function(x) * scale

    return wrong


SIXTY = [Sample("sixty", lambda t: ((t.input((2, 30)),), {}), derivatives=True)]


@pytest.mark.parametrize("check", ["gradcheck", "jacobians"])
def test_one_wrong_derivative_is_found(check):
    (result,) = check_op(_given(torch.sin, _almost(torch.cos)), torch.sin, SIXTY, only=[check])
    assert not result.ok and "GradcheckError" in result.detail


@pytest.mark.parametrize("check", ["gradgradcheck", "jacobians"])
def test_one_wrong_second_derivative_is_found(check):
    slope = lambda x: -x.sin()
    right, wrong = (_given(torch.sin, _given(torch.cos, f)) for f in (slope, _almost(slope)))
    assert check_op(right, torch.sin, SIXTY, only=[check])[0].ok
    assert check_op(wrong, torch.sin, SIXTY, only=["gradcheck"])[0].ok
    (result,) = check_op(wrong, torch.sin, SIXTY, only=[check])
    assert not result.ok and "GradcheckError" in result.detail


@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("function", [waves, waves_second])
def test_derivatives_with_outputs_unused(function, used):
    x, w, index = inputs()
    some = lambda x, w: tuple(function(x, w, index)[i] for i in used)
    torch.autograd.gradcheck(some, (x, w), check_forward_ad=True, check_batched_grad=True)
    torch.autograd.gradgradcheck(some, (x, w), check_fwd_over_rev=True)


@pytest.mark.parametrize("used", [0, 1])
def test_compiled_with_one_output_unused(used):
    x, w, index = inputs(torch.float32)

    def loss(x, w, function=waves):
        return function(x, w, index)[used].square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours = torch.autograd.grad(compiled(x, w), (x, w), allow_unused=True)
    theirs = torch.autograd.grad(loss(x, w, reference), (x, w), allow_unused=True)
    for v, *grads in zip((x, w), ours, theirs):
        # the compiler may or may not notice that an input takes no part
        torch.testing.assert_close(*(torch.zeros_like(v) if g is None else g for g in grads))


@pytest.mark.parametrize("transform", ["grad", "vmap", "vmap of grad", "grad of grad", "jvp of grad"])
def test_compiled_transforms_equal_eager(transform):
    x, w, index = (t.detach() for t in inputs())
    grad = torch.func.grad(lambda v: sum(y.sin().sum() for y in waves(v, w, index)))
    functions = {
        "grad": grad,
        "vmap": torch.func.vmap(lambda v: waves(v, w, index)[0]),
        "vmap of grad": torch.func.vmap(grad),
        "grad of grad": torch.func.grad(lambda v: grad(v).cos().sum()),
        "jvp of grad": lambda v: torch.func.jvp(grad, (v,), (v.cos(),))[1],
    }
    v = torch.stack([x, x.sin()]) if transform.startswith("vmap") else x
    whole = transform != "jvp of grad"
    compiled = torch.compile(lambda v: functions[transform](v), fullgraph=whole, backend="aot_eager")
    torch.testing.assert_close(compiled(v), functions[transform](v))


def test_a_constant_of_tracing_is_marked_as_torch_marks_it():
    def ours(): ...
    def theirs(): ...

    assert vars(tracing.constant(ours)) == vars(torch.compiler.assume_constant_result(theirs)) != {}


@pytest.mark.slow
def test_a_compilation_that_fails_leaves_autograd_on():
    """Forward mode over Triton's interpreter does not compile; what the attempt leaves must not switch autograd off."""
    if (reason := library.why_not("triton")) is not None:
        pytest.skip(reason)
    room = all_checked()["rms_norm"]
    sample = next(sample for sample in room.samples if sample.derivatives)
    with backends.backend("triton"):
        assert not testing._compiled_transforms(testing._Case(room, "cpu", (torch.float32,), True), sample)
    gc.collect()
    x = torch.randn(2, 8, requires_grad=True)
    assert torch.nn.functional.rms_norm(x, (8,)).requires_grad and F.rms_norm(x, (8,)).requires_grad


def test_the_compiled_graph_holds_the_op():
    """And not the reference, which compiles as well and answers the same, slowly."""
    testing.fresh_compiler()
    graphs = []
    compiled = torch.compile(F.rms_norm, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    compiled(torch.ones(2, 3, requires_grad=True), (3,))
    assert [node for graph in graphs for node in graph.graph.nodes if "rms_norm_fwd" in str(node.target)]


def test_the_stated_second_gradient_is_the_one_that_runs():
    x, w, index = inputs()
    seconds.clear()
    (g,) = torch.autograd.grad(waves_second(x, w, index)[0].sum(), x, create_graph=True)
    g.sum().backward()
    assert seconds == [(True, True, False)]
    # third order: through what the room states
    torch.autograd.gradgradcheck(
        lambda x: torch.autograd.grad(waves_second(x, w, index)[0].sum(), x, create_graph=True)[0], x
    )


def test_statistics_carry_no_gradient():
    x, w, index = inputs()
    for results in (_composite("pyops", x, w, index, 0.5), torch.ops.pyops.waves_fwd(x, w, index, 0.5)):
        assert [r.requires_grad for r in results] == [True, True, False]


def test_nothing_is_asked_of_an_output_that_nobody_uses(monkeypatch):
    x, w, index = inputs()
    given = []
    spy = lambda dy, *rest: given.append([t is not None for t in dy]) or _arguments(dy, *rest)
    apply = _build("waves_spied", backward_arguments=spy)
    apply("pyops", x, w, index, 0.5)[1].sum().backward()
    assert given == [[False, True]]
    assert w.grad is not None and not w.grad.any()


def test_forward_mode_over_reverse_without_a_graph():
    """Tangents reach a gradient that is taken without create_graph."""
    x, w, index = inputs()

    def tangent(function):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            (g,) = torch.autograd.grad(function(dual, w, index)[0].sum(), dual)
            return forward_ad.unpack_dual(g).tangent

    torch.testing.assert_close(tangent(waves), tangent(reference))


def test_raw_ops_have_gradients_of_first_order_and_refuse_the_second():
    x, w, index = inputs()
    r, t, _ = torch.ops.pyops.waves_fwd(x, w, index, 0.5)
    ours = torch.autograd.grad(r.sum() + t.sum(), (x, w), create_graph=True)
    theirs = torch.autograd.grad(sum(y.sum() for y in reference(x, w, index)), (x, w))
    torch.testing.assert_close(ours, theirs)
    with pytest.raises(RuntimeError, match="raw backward op"):
        ours[0].sum().backward()


def test_no_gradient_no_graph():
    x, w, index = inputs()
    assert not any(y.requires_grad for y in waves(x.detach(), w.detach(), index))
    with torch.no_grad():
        assert not any(y.requires_grad for y in waves(x, w, index))


def test_double_backward_through_one_input_only():
    x, w, index = inputs()
    for other in (w.detach(), None):
        torch.autograd.gradgradcheck(lambda x, other=other: waves(x, other, index), (x,))


def test_a_tensor_among_the_constants_is_refused():
    with pytest.raises(TypeError, match="'index'"):
        _build("waves_refused", inputs=2)
