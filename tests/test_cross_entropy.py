import itertools

import pytest
import torch

from pyops import backend as forced
from pyops import functional as F
from pyops import nn, testing, use

from .harness import modules_agree, passes, peak_bytes, refuses, same_refusal

torch_F = torch.nn.functional
X, T = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 4, 2, 2, 1, 3])
Q = torch.randn(6, 5, generator=torch.Generator().manual_seed(1)).softmax(1)
W = torch.tensor([0.5, 1.0, 2.0, 0.25, 1.5])


@pytest.mark.parametrize("check", testing.checks())
@pytest.mark.parametrize("op", ["cross_entropy", "nll_loss"])
def test_checks(backend, op, check):
    if check not in ("accuracy", "gradcheck") and (backend != "cpu" or (op == "nll_loss" and check != "opcheck")):
        pytest.skip("transforms and higher derivatives are the same Python on every backend, and for both ops")
    passes(op, backend, check)


@pytest.mark.race
@pytest.mark.parametrize("op", ["cross_entropy", "nll_loss"])
def test_race(backend, op):
    passes(op, backend, "accuracy")


def same(function, reference, x, *args, backend, **how):
    results = []
    for f in (function, reference):
        v = x.clone().requires_grad_()
        with forced(backend if f is function else None):
            y = f(v, *args, **how)
            (dx,) = torch.autograd.grad(y.sum() * 3, v)
        results += [(y, dx)]
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_every_argument(backend, reduction):
    for weight, ignore, smoothing in itertools.product((None, W), (-100, 2), (0.0, 0.3)):
        how = {"weight": weight, "ignore_index": ignore, "label_smoothing": smoothing, "reduction": reduction}
        same(F.cross_entropy, torch_F.cross_entropy, X, T, backend=backend, **how)
    for weight, smoothing in itertools.product((None, W), (0.0, 1.0)):
        how = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
        same(F.cross_entropy, torch_F.cross_entropy, X, Q, backend=backend, **how)
    for weight, ignore in itertools.product((None, W), (-100, 2)):
        how = {"weight": weight, "ignore_index": ignore, "reduction": reduction}
        same(F.nll_loss, torch_F.nll_loss, X.log_softmax(1), T, backend=backend, **how)


@pytest.mark.parametrize("channels_last", [False, True])
def test_images(backend, channels_last):
    x, t = torch.randn(2, 5, 4, 6), torch.randint(0, 5, (2, 4, 6))
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    for how in ({}, {"reduction": "none", "label_smoothing": 0.1, "weight": W, "ignore_index": 1}):
        same(F.cross_entropy, torch_F.cross_entropy, x, t, backend=backend, **how)
        same(F.cross_entropy, torch_F.cross_entropy, x, x.softmax(1), backend=backend, reduction="none")
    v = x.clone().requires_grad_()
    assert torch.autograd.grad(F.cross_entropy(v, t), v)[0].stride() == x.stride()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_probabilities_of_no_classes(reduction):
    for shape in ((7, 0), (0, 7), (2, 0, 3)):
        x = torch.zeros(shape)
        torch.testing.assert_close(
            F.cross_entropy(x, x, reduction=reduction),
            torch_F.cross_entropy(x, x, reduction=reduction),
            equal_nan=True,
        )


TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("other", TYPES)
def test_types_of_input_weight_and_target_meet_as_in_torch(dtype, other):
    for target, weight in ((Q.to(other), None), (Q.to(dtype), W.to(other))):
        x = X.to(dtype).requires_grad_()
        y, expected = (f(x, target, weight) for f in (F.cross_entropy, torch_F.cross_entropy))
        assert y.dtype == expected.dtype
        torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)
        assert torch.autograd.grad(y, x)[0].dtype == dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name in ("cross_entropy", "nll_loss"):
        if other in (dtype, wide):
            assert getattr(F, name)(X.to(dtype), T, W.to(other)).dtype == dtype
        else:
            same_refusal(getattr(F, name), getattr(torch_F, name), X.to(dtype), T, W.to(other))
            refuses(RuntimeError, (f"{name}: ", "'weight'", str(other)), getattr(F, name), X.to(dtype), T, W.to(other))
    with torch.autocast("cpu", torch.bfloat16):
        for f in (F.cross_entropy, torch_F.cross_entropy, F.nll_loss, torch_F.nll_loss):
            if torch.float64 not in (dtype, other):
                assert f(X.to(dtype), T, W.to(other)).dtype == torch.float32


def test_one_example_without_a_batch(backend):
    same(F.cross_entropy, torch_F.cross_entropy, X[0], T[0], backend=backend)
    same(F.cross_entropy, torch_F.cross_entropy, X[0], Q[0], backend=backend, reduction="none")
    same(F.nll_loss, torch_F.nll_loss, X[0], T[1].byte(), backend=backend)
    for reduction in ("none", "mean"):
        # the label may have one dimension; torch's gradient then fails, so its truth is that of a label without one
        one = lambda x, t, **how: F.cross_entropy(x, t[None], **how)
        same(one, torch_F.cross_entropy, X[0], T[0], backend=backend, reduction=reduction)
        assert F.nll_loss(X[0], T[:1], reduction=reduction).shape == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 17, 63, 130, 1023, 1025, 2100])
def test_the_largest_logit_anywhere_in_a_row(backend, width, dtype):
    """Its place is in a vector, in the rest, in a later block; it may be a NaN, or stand behind a block of -inf."""
    x = torch.full((6, width), -3.0, dtype=dtype)
    x[1, -1], x[2, width // 2], x[3, 0], x[4, -1] = 60.0, 60.0, float("nan"), float("nan")
    x[5, : width - 1] = -torch.inf
    x.requires_grad_()
    t = torch.tensor([0, 0, width // 2, 0, 0, width - 1])
    truth = x.detach().double().requires_grad_()
    with forced(backend):
        loss = F.cross_entropy(x, t, reduction="none")
        (dx,) = torch.autograd.grad(loss.sum(), x)
    want = torch_F.cross_entropy(truth, t, reduction="none")
    torch.testing.assert_close(loss, want.to(dtype), equal_nan=True)
    torch.testing.assert_close(dx, torch.autograd.grad(want.sum(), truth)[0].to(dtype), equal_nan=True)


def test_infinities_and_nan_as_torch(backend):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[0.0, -inf, 1.0], [-inf, -inf, -inf], [inf, 0, 1], [nan, 0, 1], [1e30, -1e30, 1e30]])
    for t in (torch.tensor([0, 1, 0, 2, 2]), torch.tensor([1, 0, 2, 0, 1])):
        same(F.cross_entropy, torch_F.cross_entropy, x, t, backend=backend, reduction="none")
        columns = x.T[None].contiguous()
        same(F.cross_entropy, torch_F.cross_entropy, columns, t[None], backend=backend, reduction="none")


def test_ignored_rows_give_no_gradient_whatever_they_hold(backend):
    x = torch.full((2, 3), float("nan"))
    x[0] = torch.tensor([1.0, 2, 3])
    for v, t in ((x, torch.tensor([0, -100])), (x.T[None].contiguous(), torch.tensor([[0, -100]]))):
        v = v.clone().requires_grad_()
        with forced(backend):
            loss = F.cross_entropy(v, t)
            (dx,) = torch.autograd.grad(loss, v)
        assert loss.isfinite() and dx.isfinite().all()


def test_large_logits_keep_their_digits(backend):
    same(F.cross_entropy, torch_F.cross_entropy, torch.randn(4, 33) + 20000.0, T[:4], backend=backend)


def test_all_ignored_and_empty():
    assert F.cross_entropy(X, torch.full((6,), -100)).isnan()
    assert F.cross_entropy(X[:0], T[:0]).isnan() and F.cross_entropy(X[:0], T[:0], reduction="sum") == 0
    assert F.cross_entropy(X[:0], T[:0], reduction="none").shape == (0,)
    assert F.cross_entropy(X[:0], Q[:0]).isnan() and F.cross_entropy(X[:0], Q[:0], reduction="sum") == 0


def test_z_loss(backend):
    with forced(backend):
        plain = F.cross_entropy(X, T, reduction="none")
        held = F.cross_entropy(X, T, reduction="none", z_loss=0.5)
    torch.testing.assert_close(held - plain, 0.5 * X.logsumexp(1) ** 2)


def test_two_numbers_a_row_are_kept():
    x, kept = torch.randn(8, 1000, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        F.cross_entropy(x, torch.zeros(8, dtype=torch.long))
    assert sum(t.numel() for t in kept if t.data_ptr() != x.data_ptr()) < 100


def test_labels_outside():
    for bad in (5, -1, 2**40):
        labels = torch.full((6,), -100)
        labels[4] = bad
        said = ("'target'", f"got {bad} out of bounds", "[0, 5)", "-100")
        refuses(IndexError, ("cross_entropy: ", *said), F.cross_entropy, X, labels)
        refuses(IndexError, ("nll_loss: ", *said), F.nll_loss, X, labels)
        refuses(
            IndexError, ("linear_cross_entropy: ", *said), F.linear_cross_entropy, X, torch.ones(5, X.shape[1]), labels
        )
        hidden = torch.func.vmap(lambda t: F.nll_loss(X, t))
        refuses(IndexError, ("nll_loss: ", "'target'", "out of bounds"), hidden, labels.expand(2, 6))
        same_refusal(F.nll_loss, torch_F.nll_loss, X, torch.full((6,), bad))
    for name in ("emulator", "triton"):
        try:
            force = forced(name)
        except RuntimeError:
            continue
        with force:
            x = X.clone().requires_grad_()
            loss = F.cross_entropy(x, torch.tensor([0, 5, -1, 2**40, 1, 1]), reduction="none")
            (dx,) = torch.autograd.grad(loss.sum(), x)
        assert loss.isnan().tolist() == [False, True, True, True, False, False]
        assert dx[0].isfinite().all() and dx[1:4].isnan().all()


def test_linear_cross_entropy(backend):
    g = torch.Generator().manual_seed(2)
    x, w, b = (torch.randn(s, generator=g) for s in ((2, 6, 4), (5, 4), (5,)))
    t = torch.randint(0, 5, (2, 6), generator=g)
    t[0, 1] = -100
    for chunk, reduction, weight in itertools.product((1, 5, None), ("none", "mean", "sum"), (None, W)):
        how = {"reduction": reduction, "label_smoothing": 0.1}
        results = []
        for ours in (True, False):
            leaves = [v.clone().requires_grad_() for v in (x, w, b)]
            if ours:
                with forced(backend):
                    y = F.linear_cross_entropy(leaves[0], leaves[1], t, leaves[2], weight, chunk=chunk, **how)
            else:
                logits = torch_F.linear(*leaves).flatten(0, 1)
                y = torch_F.cross_entropy(logits, t.flatten(), weight, **how)
                y = y.reshape(t.shape) if reduction == "none" else y
            results.append([y, *torch.autograd.grad(y.sum(), leaves)])
        for a, e in zip(*results):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def test_a_label_out_of_range_spoils_no_later_gradient():
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    with pytest.raises(IndexError) as kept:
        F.linear_cross_entropy(x, w, torch.tensor([0, 7, 1]))
    (dx,) = torch.autograd.grad((x * x).sum(), x)
    assert torch.equal(dx, 2 * x) and kept.value is not None


def test_linear_cross_entropy_never_holds_all_logits():
    x, w = torch.randn(64, 8, requires_grad=True), torch.randn(512, 8, requires_grad=True)
    seen = []

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    with Largest():
        F.linear_cross_entropy(x, w, torch.zeros(64, dtype=torch.long), chunk=4).backward()
    assert max(seen) <= 512 * 8 and x.grad is not None and w.grad.shape == w.shape


def test_linear_cross_entropy_differentiates_twice():
    x, w = torch.randn(3, 2, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    t = torch.tensor([0, 3, 1])
    call = lambda a, b: F.linear_cross_entropy(a, b, t, chunk=2)
    inputs = (x.requires_grad_(), w.requires_grad_())
    assert torch.autograd.gradcheck(call, inputs) and torch.autograd.gradgradcheck(call, inputs)
    grads = torch.func.grad(call, argnums=(0, 1))(x.detach(), w.detach())
    for a, b in zip(grads, torch.autograd.grad(call(*inputs), inputs)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("how", [{}, {"weight": W, "label_smoothing": 0.1, "ignore_index": 2}, {"reduction": "sum"}])
def test_modules(how):
    ours, theirs = nn.CrossEntropyLoss(**how), torch.nn.CrossEntropyLoss(**how)
    modules_agree(_Fixed(ours), _Fixed(theirs), X, "cpu")
    how = {k: v for k, v in how.items() if k != "label_smoothing"}
    modules_agree(_Fixed(nn.NLLLoss(**how)), _Fixed(torch.nn.NLLLoss(**how)), X, "cpu")


class _Fixed(torch.nn.Module):
    """A loss with its labels."""

    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def forward(self, x):
        return self.loss(x, T)


def test_is_routed():
    with use() as report:
        torch_F.cross_entropy(X, T), torch.nn.CrossEntropyLoss()(X, Q), torch.nn.NLLLoss()(X, T)
    assert report.entries["cross_entropy"].backends == {"cpu": 2}
    assert report.entries["nll_loss"].backends == {"cpu": 1} and not report.unrouted()


@pytest.mark.parametrize(
    ("x", "t", "how"),
    [
        (X, T.int(), {}),
        (X, T.float(), {}),
        (X, Q.long(), {}),
        (X, T[:5], {}),
        (X[0], T[:2], {}),
        (X, T, {"weight": W[:4]}),
        (X, T, {"reduction": "average"}),
        (X, T, {"label_smoothing": 1.5}),
        (X, Q, {"ignore_index": 3}),
        (X, torch.zeros(6, 2, dtype=torch.long), {}),
        (X, T, {"weight": W.clone().requires_grad_()}),
    ],
)
def test_refuses_as_torch(x, t, how):
    x = x.clone().requires_grad_()
    same_refusal(F.cross_entropy, torch_F.cross_entropy, x, t, **how)


def test_messages():
    refuses(RuntimeError, ("cross_entropy", "'target'", "int32"), F.cross_entropy, X, T.int())
    refuses(NotImplementedError, ("nll_loss", "'input'", "int64"), F.nll_loss, X.long(), T)
    refuses(ValueError, ("linear_cross_entropy", "'chunk'", "0"), F.linear_cross_entropy, X, X, T, chunk=0)
    refuses(RuntimeError, ("linear_cross_entropy", "'weight'"), F.linear_cross_entropy, X, X.T, T)


def test_memory_is_the_gradient_alone():
    """torch holds three times the logits here: log-probabilities, and two gradients of them."""
    x = torch.randn(1024, 16000, requires_grad=True)
    labels = torch.arange(1024)
    size = x.numel() * 4
    assert peak_bytes(lambda: F.cross_entropy(x.detach(), labels)) < size // 4
    assert peak_bytes(lambda: torch.autograd.grad(F.cross_entropy(x, labels), x)) < 1.25 * size


def test_memory_of_the_fused_layer_is_that_of_a_chunk():
    """A chunk of logits is 32 MiB, all of them are 250; backward has few of them and of their gradients at a time."""
    x, weight = torch.randn(4096, 64, requires_grad=True), torch.randn(16000, 64, requires_grad=True)
    labels = torch.arange(4096)
    run = lambda: F.linear_cross_entropy(x, weight, labels)
    torch.autograd.grad(F.linear_cross_entropy(x[:2], weight[:3], labels[:2]), (x, weight))
    with torch.no_grad():
        assert peak_bytes(run) < 48 << 20
    assert peak_bytes(lambda: torch.autograd.grad(run(), (x, weight))) < 160 << 20
