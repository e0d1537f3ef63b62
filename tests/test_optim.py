import copy
import math
import pickle

import pytest
import torch

from pyops import functional as F
from pyops import nn, optim, testing
from pyops.core import backend as backends
from pyops.core import library

from .harness import digits, refuses, same_refusal

RULES = {
    "sgd": ("SGD", {"lr": 0.1}),
    "sgd momentum": ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    "sgd nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
    "adagrad": ("Adagrad", {"lr": 0.1}),
    "adagrad decay": ("Adagrad", {"lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.2, "eps": 0.01}),
    "rmsprop": ("RMSprop", {"lr": 0.1, "eps": 0.01}),
    "rmsprop centered": ("RMSprop", {"centered": True, "momentum": 0.9, "weight_decay": 0.1, "alpha": 0.8}),
    "adam": ("Adam", {"lr": 0.1}),
    "adam amsgrad": ("Adam", {"betas": (0.8, 0.9), "amsgrad": True, "weight_decay": 0.1, "maximize": True}),
    "adam decoupled": ("Adam", {"decoupled_weight_decay": True, "weight_decay": 0.1, "eps": 0.01}),
    "adamw": ("AdamW", {"lr": 0.1, "weight_decay": 0.3}),
    "adamw fused": ("AdamW", {"amsgrad": True, "fused": True}),
}
# no element, one, a tail, a whole vector and a tail, channels last, more than a chunk of Triton's
SHAPES = [(0, 4), (), (3,), (17, 3), (2, 3, 4, 4), (4200,)]
CLASSES = ("SGD", "Adagrad", "RMSprop", "Adam", "AdamW")


def parameters(dtype=torch.float64, shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    made = [p.contiguous(memory_format=torch.channels_last) if p.dim() == 4 else p for p in made]
    return [p.requires_grad_() for p in made]


def set_gradients(params, step, without=None):
    for k, p in enumerate(params):
        p.grad = None if k == without else torch.sin(p.detach() * (step + 1) + 0.3 * k)


def train(module, rule, params, steps=4, **more):
    name, arguments = RULES[rule] if isinstance(rule, str) else rule
    optimizer = getattr(module, name)(params, **{**arguments, **more})
    for step in range(steps):
        set_gradients(params, step, without=2 if step == 0 else None)  # one parameter starts a step later
        optimizer.step()
    return optimizer


def same(ours, theirs, tolerance):
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def states_agree(ours, theirs, tolerance):
    a, b = ours.state_dict()["state"], theirs.state_dict()["state"]
    assert {k: sorted(v) for k, v in a.items()} == {k: sorted(v) for k, v in b.items()}
    for k in a:
        for name in a[k]:
            assert a[k][name].dtype == b[k][name].dtype and a[k][name].shape == b[k][name].shape
            torch.testing.assert_close(a[k][name], b[k][name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rule", RULES)
def test_follows_torch(backend, rule):
    ours, theirs = parameters(), parameters()
    with backends.backend(backend):
        a = train(optim, rule, ours)
    b = train(torch.optim, rule, theirs)
    same(ours, theirs, 1e-12)
    states_agree(a, b, 1e-12)


@pytest.mark.race
@pytest.mark.parametrize("rule", ["sgd nesterov", "rmsprop centered", "adamw fused"])
def test_race(backend, rule):
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    with backends.backend(backend):
        train(optim, rule, ours, steps=2)
        norm = optim.clip_grad_norm_(ours, 0.1)
    train(torch.optim, rule, theirs, steps=2)
    same(ours, theirs, 1e-5)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, 0.1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounds_once_a_step(backend, dtype, name):
    """Arithmetic in float32, parameters and states rounded when they are stored and not before."""
    ours, exact = parameters(dtype), [p.detach().double().requires_grad_() for p in parameters(dtype)]
    with backends.backend(backend):
        a, b = getattr(optim, name)(ours, lr=0.05), getattr(torch.optim, name)(exact, lr=0.05)
        for step in range(2):
            set_gradients(ours, step)
            for p, q in zip(ours, exact):
                q.grad = p.grad.double()
            a.step(), b.step()
            for p, q in zip(ours, exact):
                pairs = [(p, q), *((a.state[p][n], b.state[q][n]) for n in a.state[p] if n != "step")]
                for rounded, reference in pairs:
                    assert rounded.dtype == dtype
                    with torch.no_grad():
                        eps = torch.finfo(dtype).eps
                        torch.testing.assert_close(rounded.double(), reference, rtol=eps, atol=8 * eps**2 + 1e-7)
                        reference.copy_(rounded.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_master_weights(backend, dtype):
    """The master follows the float32 optimizer exactly as far as float32 goes; the parameter is its rounding."""
    halves = parameters(dtype)
    wide = [p.detach().float().requires_grad_() for p in halves]
    with backends.backend(backend):
        ours = optim.AdamW(halves, lr=1e-4, amsgrad=True, master_weights=True)
        for step in range(3):
            set_gradients(halves, step)
            for p, w in zip(halves, wide):
                w.grad = p.grad.float()
            if step == 0:
                theirs = torch.optim.AdamW(wide, lr=1e-4, amsgrad=True)
            ours.step(), theirs.step()
    for p, w in zip(halves, wide):
        state = ours.state[p]
        torch.testing.assert_close(state["master"], w.detach(), rtol=1e-6, atol=1e-7)
        # Triton's interpreter cuts where the hardware rounds
        eps = torch.finfo(dtype).eps if backend == "triton" else 0
        torch.testing.assert_close(p.detach(), state["master"].to(dtype), rtol=eps, atol=0)
        assert state["exp_avg"].dtype == torch.float32
    # masters and states survive a file and torch's way of loading, which rounds states to the parameter's dtype
    again = optim.AdamW([p.detach().clone().requires_grad_() for p in halves], master_weights=True)
    again.load_state_dict(pickle.loads(pickle.dumps(ours.state_dict())))
    for p, q in zip(halves, again.param_groups[0]["params"]):
        for name, value in ours.state[p].items():
            assert value.dtype == again.state[q][name].dtype and torch.equal(value, again.state[q][name])


def test_a_checkpoint_without_masters_gets_them():
    ours, theirs = parameters(torch.bfloat16), parameters(torch.bfloat16)
    before = train(torch.optim, "adam", theirs)
    optimizer = optim.Adam(ours, master_weights=True)
    optimizer.load_state_dict(before.state_dict())
    for group in optimizer.param_groups:
        assert group["master_weights"]
    set_gradients(ours, 0)
    optimizer.step()
    assert {optimizer.state[p]["exp_avg"].dtype for p in ours} == {torch.float32}
    assert all(torch.equal(optimizer.state[p]["master"].bfloat16(), p) for p in ours)


@pytest.mark.parametrize("rule", RULES)
def test_states_go_both_ways(rule):
    """Train on one side, load on the other, train on: the same as never having changed sides."""
    name, arguments = RULES[rule]
    for first, second in ((torch.optim, optim), (optim, torch.optim)):
        moved, stayed = parameters(), parameters()
        before, reference = train(first, rule, moved), train(torch.optim, rule, stayed)
        after = getattr(second, name)(moved, **arguments)
        after.load_state_dict(copy.deepcopy(before.state_dict()))
        for step in range(3):
            set_gradients(moved, step), set_gradients(stayed, step)
            after.step(), reference.step()
        same(moved, stayed, 1e-12)
        states_agree(after, reference, 1e-12)


def test_copies_keep_every_option():
    params = parameters()
    ours = optim.Adam(params, lr=0.1, max_norm=0.5, master_weights=True)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert other.param_groups[0]["max_norm"] == 0.5 and other.param_groups[0]["master_weights"]
        assert other._step_supports_amp_scaling
    assert isinstance(ours, torch.optim.Adam)
    torch.optim.lr_scheduler.StepLR(ours, 1, 0.1)
    set_gradients(params, 0)
    ours.step()


def test_groups_and_closure():
    def run(module):
        params = parameters()
        groups = [{"params": params[:3], "lr": 0.3}, {"params": params[3:], "weight_decay": 0.2, "betas": (0.5, 0.6)}]
        optimizer = module.AdamW(groups, lr=0.1)

        def closure():
            optimizer.zero_grad()
            loss = sum((p**2).sum() for p in params)
            loss.backward()
            return loss

        losses = [optimizer.step(closure) for _ in range(3)]
        return params, [loss.item() for loss in losses]

    (ours, a), (theirs, b) = run(optim), run(torch.optim)
    same(ours, theirs, 1e-12)
    assert a == pytest.approx(b, rel=1e-12)


def test_mixed_dtypes_and_hooks():
    seen = []
    params = [*parameters(torch.float32), *parameters(torch.float64)]
    others = [*parameters(torch.float32), *parameters(torch.float64)]
    ours, theirs = optim.Adam(params), torch.optim.Adam(others, foreach=False)
    ours.register_step_pre_hook(lambda *_: seen.append("before"))
    ours.register_step_post_hook(lambda *_: seen.append("after"))
    set_gradients(params, 0), set_gradients(others, 0)
    ours.step(), theirs.step()
    assert seen == ["before", "after"]
    same(params, others, 1e-6)


def test_parameters_with_gaps_and_other_strides(backend):
    base = torch.randn(4, 6, dtype=torch.float64)
    make = lambda: [base.clone()[:, ::2].requires_grad_(), base.clone().t().requires_grad_()]
    ours, theirs = make(), make()
    with backends.backend(backend):
        a, b = optim.Adam(ours, lr=0.1), torch.optim.Adam(theirs, lr=0.1)
        for step in range(2):
            for p in (*ours, *theirs):
                p.grad = torch.cos(p.detach() * (step + 1)).contiguous()
            a.step(), b.step()
    same(ours, theirs, 1e-12)


@pytest.mark.parametrize("name", CLASSES)
def test_complex_parameters(name):
    make = lambda: [
        torch.randn(5, 3, dtype=torch.complex128, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ]
    ours, theirs = make(), make()
    train(optim, (name, {"lr": 0.1}), ours), train(torch.optim, (name, {"lr": 0.1}), theirs)
    same(ours, theirs, 1e-12)


@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_sparse_gradients_are_left_to_torch(name):
    def run(module):
        embedding = torch.nn.Embedding(10, 3, sparse=True)
        with torch.no_grad():
            embedding.weight.copy_(torch.arange(30.0).view(10, 3))
        optimizer = getattr(module, name)(embedding.parameters(), lr=0.1)
        embedding(torch.tensor([1, 4, 1])).sum().backward()
        optimizer.step()
        return embedding.weight

    assert torch.equal(run(optim), run(torch.optim))


def test_differentiable_is_left_to_torch():
    p = torch.ones(3, dtype=torch.float64, requires_grad=True)
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    q = p.clone()
    optimizer = optim.SGD([q], lr=lr, differentiable=True)
    q.grad = 2 * p
    optimizer.step()
    (d,) = torch.autograd.grad(q.sum(), lr)
    assert d.item() == pytest.approx(-6)


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
@pytest.mark.parametrize("name", ["SGD", "Adagrad", "AdamW"])
def test_scale_and_verdict_as_torch_fused(backend, name, found_inf):
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    fused = {"fused": True}
    with backends.backend(backend):
        a = getattr(optim, name)(ours, lr=0.1, **fused)
        b = getattr(torch.optim, name)(theirs, lr=0.1, **fused)
        for optimizer, params in ((a, ours), (b, theirs)):
            set_gradients(params, 0)
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(found_inf)
            optimizer.step()
    same(ours, theirs, 1e-6)
    states_agree(a, b, 1e-6)
    if not found_inf:  # a step left out leaves the gradients as they came; torch agrees on that in SGD and Adam only
        same([p.grad for p in ours], [p.grad for p in theirs], 1e-6)


def test_grad_scaler():
    """Through torch's GradScaler: an overflow leaves the step out and halves the scale."""

    def run(module, **more):
        params = parameters(torch.float32)
        optimizer = module.Adam(params, lr=0.1, **more)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        for step in range(4):
            set_gradients(params, step)
            scaler.scale(torch.ones(()))  # makes the scale
            with torch.no_grad():
                for p in params:
                    p.grad *= scaler.get_scale()
                if step == 1:
                    params[3].grad[0] = math.inf
            scaler.step(optimizer)
            scaler.update()
        return params, scaler.get_scale(), [optimizer.state[p]["step"].item() for p in params]

    (ours, a, counts), (theirs, b, expected) = run(optim), run(torch.optim, fused=True)
    assert a == b and counts == expected
    same(ours, theirs, 1e-5)


def test_capturable(backend):
    """Steps and learning rate on the device: the same trajectory, and a new rate needs no new launch."""
    ours, theirs = parameters(), parameters()
    with backends.backend(backend):
        rate = torch.tensor(0.1)
        a, b = optim.Adam(ours, lr=rate, capturable=True), torch.optim.Adam(theirs, lr=0.1)
        for step in range(3):
            set_gradients(ours, step), set_gradients(theirs, step)
            a.step(), b.step()
            rate.fill_(0.05)
            b.param_groups[0]["lr"] = 0.05
    same(ours, theirs, 1e-7)
    assert a.state[ours[3]]["step"].item() == 3


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
@pytest.mark.parametrize("rule", ["sgd momentum", "adam"])
def test_clipping_while_reading(backend, rule, max_norm):
    ours, theirs = parameters(), parameters()
    name, arguments = RULES[rule]
    with backends.backend(backend):
        a = getattr(optim, name)(ours, **arguments, max_norm=max_norm)
        b = getattr(torch.optim, name)(theirs, **arguments)
        for step in range(3):
            set_gradients(ours, step), set_gradients(theirs, step)
            kept = [p.grad.clone() for p in ours]
            torch.nn.utils.clip_grad_norm_(theirs, max_norm)
            a.step(), b.step()
            assert all(torch.equal(p.grad, g) for p, g in zip(ours, kept))
    same(ours, theirs, 1e-12)


@pytest.mark.parametrize("order", [1.0, 2.0, math.inf, 3.0, 0.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_clip_grad_norm(backend, dtype, order):
    ours, theirs = parameters(dtype), parameters(dtype)
    set_gradients(ours, 0), set_gradients(theirs, 0)
    with backends.backend(backend):
        norm = optim.clip_grad_norm_(ours, 0.7, order)
        again = optim.get_total_norm([p.grad for p in ours], order)
    expected = torch.nn.utils.clip_grad_norm_([p for p in theirs if p.numel()], 0.7, order)
    tolerance = 1e-9 if dtype == torch.float64 else 2e-2
    torch.testing.assert_close(norm, expected, rtol=tolerance, atol=0)
    same([p.grad for p in ours], [p.grad for p in theirs], tolerance)
    assert again.dtype == dtype


def test_norm_of_order_0_counts_tensors():
    """As torch, whose total is the norm of the norms, also of a single tensor."""
    for tensors in ([torch.ones(3)], [torch.ones(3), torch.zeros(2), torch.ones(1)]):
        assert optim.get_total_norm(tensors, 0.0) == torch.nn.utils.get_total_norm(tensors, 0.0)


def test_clip_grad_norm_of_nothing_nan_and_infinity(backend):
    assert optim.clip_grad_norm_([torch.ones(2, requires_grad=True)], 1.0).item() == 0
    with pytest.warns(UserWarning, match="empty generator"):
        optim.clip_grad_norm_((p for p in ()), 1.0)
    for bad in (math.nan, math.inf):
        for order in (1.0, 2.0, math.inf):
            p = torch.ones(3, requires_grad=True)
            p.grad = torch.tensor([1.0, bad, 2.0])
            with backends.backend(backend):
                refuses(RuntimeError, ("clip_grad_norm_",), optim.clip_grad_norm_, [p], 1.0, order, True)
                norm = optim.clip_grad_norm_([p], 1.0, order)
            expected = torch.tensor([1.0, bad, 2.0])
            q = torch.ones(3, requires_grad=True)
            q.grad = expected
            assert torch.equal(norm.isnan(), torch.nn.utils.clip_grad_norm_([q], 1.0, order).isnan())
            torch.testing.assert_close(p.grad, q.grad, equal_nan=True)


def test_short_gradients_are_not_touched():
    p = torch.ones(3, requires_grad=True)
    p.grad = torch.full((3,), 0.1)
    before = p.grad.clone()
    optim.clip_grad_norm_(p, 10.0)
    assert torch.equal(p.grad, before)


def test_clip_grad_value(backend):
    ours = parameters(torch.float32)
    set_gradients(ours, 0)
    ours[3].grad[0, 0] = math.nan
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    for p, q in zip(ours, theirs):
        q.grad = p.grad.clone()
    with backends.backend(backend):
        optim.clip_grad_value_(ours, 0.25)
    torch.nn.utils.clip_grad_value_(theirs, 0.25)
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_ema(backend, dtype, wide):
    values = [p.detach() for p in parameters(dtype)]
    averages = [
        p.detach().to(torch.float32 if wide and dtype == torch.bfloat16 else dtype) for p in parameters(dtype, seed=1)
    ]
    expected = [a.double() * 0.9 + v.double() * (1 - 0.9) for a, v in zip(averages, values)]
    with backends.backend(backend):
        optim.ema_(averages, values, 0.9)
    for a, e in zip(averages, expected):
        torch.testing.assert_close(a.double(), e, rtol=2 * torch.finfo(a.dtype).eps, atol=torch.finfo(a.dtype).eps)


def test_averaged_model():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).double()
    make = lambda f: torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=f, use_buffers=True)
    ours = make(optim.get_ema_multi_avg_fn(0.8))
    theirs = make(torch.optim.swa_utils.get_ema_multi_avg_fn(0.8))
    for _ in range(3):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1.0)
        model(torch.randn(8, 3, dtype=torch.float64))
        ours.update_parameters(model), theirs.update_parameters(model)
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", CLASSES)
def test_softmax_classifier_on_digits(name):
    """Real digits, full batches, 30 steps of layer, loss and optimizer: each gives the parameters that torch's give."""
    x, y = digits()
    layers = [m.Linear(64, 10).double() for m in (nn, torch.nn)]
    layers[1].load_state_dict(layers[0].state_dict())
    rate = {"lr": 0.5} if name == "SGD" else {"lr": 0.05}
    rate |= {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}
    optimizers = [getattr(m, name)(layer.parameters(), **rate) for m, layer in zip((optim, torch.optim), layers)]
    for _ in range(30):
        for optimizer, layer, functional in zip(optimizers, layers, (F, torch.nn.functional)):
            optimizer.zero_grad()
            functional.cross_entropy(layer(x), y).backward()
            optimizer.step()
        same(layers[0].parameters(), layers[1].parameters(), 1e-9)
    assert (layers[0](x).argmax(1) == y).double().mean() > 0.9


@pytest.mark.parametrize("name", CLASSES)
def test_linear_svm_on_digits(name):
    x, y = (t[:500] for t in digits())
    layers = [m.Linear(64, 10).double() for m in (nn, torch.nn)]
    layers[1].load_state_dict(layers[0].state_dict())
    optimizers = [
        getattr(m, name)(layer.parameters(), lr=0.02, weight_decay=1e-3)
        for m, layer in zip((optim, torch.optim), layers)
    ]
    for _ in range(20):
        for optimizer, layer, functional in zip(optimizers, layers, (F, torch.nn.functional)):
            optimizer.zero_grad()
            functional.multi_margin_loss(layer(x), y).backward()
            optimizer.step()
        same(layers[0].parameters(), layers[1].parameters(), 1e-9)


def test_a_changed_parameter_is_noticed_by_autograd():
    p = torch.ones(3, requires_grad=True)
    loss = (p**2).sum()
    p.grad = torch.ones(3)
    optim.SGD([p], lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_compiled_step():
    testing.fresh_compiler()
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    a, b = optim.Adam(ours, lr=0.1), torch.optim.Adam(theirs, lr=0.1)
    step = torch.compile(a.step, backend="aot_eager")
    for k in range(3):
        set_gradients(ours, k), set_gradients(theirs, k)
        step(), b.step()
    same(ours, theirs, 1e-5)


def test_ops_tell_the_truth(backend):
    """Schema (what is changed, what is not) and fakes."""
    with backends.backend(backend):
        namespace = backends.namespace_for("adam_step", torch.ones(1))
        p, g, m, v, step = ([torch.rand(s) for s in ((3, 2), (5,))] for _ in range(5))
        steps = [torch.ones(()) for _ in step]
        scaling = (0.1, None, torch.tensor(2.0), torch.tensor(0.0), torch.tensor(3.0, dtype=torch.float64), 1.0, False)
        calls = {
            "adam_step": (p, g, m, v, [], [], steps, True, *scaling, 0.9, 0.99, 1e-8, 0.1, False, True),
            "sgd_step": (p, g, m, [], *scaling, 0.9, 0.1, 0.1, False, False),
            "multi_norm": (p, 2.0),
            "multi_scale": (p, torch.tensor(9.0, dtype=torch.float64), 1.0),
            "multi_clamp": (p, 0.5),
            "multi_lerp": (p, g, 0.5),
        }
        for name, args in calls.items():
            op = library.declared()[name].overloads[namespace]
            torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def test_bitwise_repeatable():
    def run():
        params = parameters(torch.float32, shapes=[(70000,), (33,)])
        train(optim, "adam", params, max_norm=0.1)
        return params

    threads = torch.get_num_threads()
    try:
        first = run()
        for count in (1, 2):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(first, run()))
    finally:
        torch.set_num_threads(threads)


def test_more_tensors_than_a_launch_takes():
    shapes = [(3,)] * 200
    ours, theirs = parameters(torch.float32, shapes), parameters(torch.float32, shapes)
    with backends.backend("emulator"):
        train(optim, "adamw fused", ours, steps=2)
        norm = optim.clip_grad_norm_(ours, 1.0)
    train(torch.optim, "adamw fused", theirs, steps=2)
    same(ours, theirs, 1e-5)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, 1.0))


def test_bad_input():
    p = torch.ones(3, requires_grad=True)
    refuses(ValueError, ("SGD", "'max_norm'", "-1"), optim.SGD, [p], max_norm=-1.0)
    refuses(ValueError, ("ema_", "'decay'", "2"), optim.ema_, [p.detach()], [p.detach()], 2)
    refuses(ValueError, ("ema_", "'values'"), optim.ema_, [p.detach()], [], 0.5)
    refuses(RuntimeError, ("ema_", "[4]", "[3]"), optim.ema_, [p.detach()], [torch.ones(4)], 0.5)
    refuses(RuntimeError, ("ema_", "float64"), optim.ema_, [p.detach().double()], [p.detach()], 0.5)
    sparse = torch.nn.Embedding(4, 2, sparse=True)
    sparse(torch.tensor([1])).sum().backward()
    optimizer = optim.SGD(sparse.parameters(), lr=0.1, max_norm=1.0)
    refuses(RuntimeError, ("SGD", "a sparse gradient"), optimizer.step)
    refuses(RuntimeError, ("clip_grad_norm_", "sparse"), optim.clip_grad_norm_, sparse.parameters(), 1.0)
    for name, bad in (("SGD", {"lr": -1}), ("Adam", {"betas": (1.0, 0.9)}), ("RMSprop", {"alpha": -1})):
        same_refusal(getattr(optim, name), getattr(torch.optim, name), [p], **bad)
    same_refusal(optim.SGD, torch.optim.SGD, [p], nesterov=True)


def test_kernels_check_their_lists():
    op = library.declared()["multi_lerp"].overloads["pyops"]
    for averages, values in (
        ([torch.ones(3)], [torch.ones(4)]),
        ([torch.ones(3)], []),
        ([torch.ones(4, 4)[:, ::2]], [torch.ones(4, 2)]),
        ([torch.ones(3).expand(2, 3)], [torch.ones(3).expand(2, 3)]),
        ([torch.ones(2, 3)], [torch.ones(3, 2).t()]),
        ([torch.ones(3)], [torch.ones(3).double()]),
    ):
        with pytest.raises(RuntimeError, match="multi_lerp"):
            op(averages, values, 0.5)
