import itertools
import warnings

import pytest
import torch

from pyops import backend as forced
from pyops import functional as F
from pyops import nn, testing, use

from .harness import passes, refuses, same_refusal

torch_F = torch.nn.functional
G = torch.Generator().manual_seed(0)
X, T = torch.randn(5, 7, generator=G), torch.randn(5, 7, generator=G)
P, Q = X.sigmoid(), T.sigmoid()
W = torch.rand(5, 7, generator=G) + 0.5
OPS = (
    "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits",
    "kl_div",
)  # fmt: skip
INPUTS = {"binary_cross_entropy": (P, Q), "binary_cross_entropy_with_logits": (X, Q), "kl_div": (X, Q)}


@pytest.mark.parametrize("check", testing.checks())
def test_checks(backend, check):
    if backend != "cpu" and check not in ("accuracy", "gradcheck", "opcheck"):
        pytest.skip("transforms and higher derivatives are the same Python on every backend")
    passes("binary_cross_entropy_with_logits", backend, check)


@pytest.mark.parametrize("op", OPS)
def test_the_others(backend, op):
    passes(op, backend, "accuracy")
    if backend == "cpu":
        passes(op, backend, "autocast")
        passes(op, backend, "gradgradcheck")


@pytest.mark.race
def test_race(backend):
    passes("binary_cross_entropy_with_logits", backend, "accuracy")
    passes("smooth_l1_loss", backend, "accuracy")


def same(op, x, t, backend, **how):
    results = []
    for f in (getattr(F, op), getattr(torch_F, op)):
        leaves = x.clone().requires_grad_(), t.clone().requires_grad_()
        with forced(backend if f.__module__.startswith("pyops") else None), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            y = f(*leaves, **how)
            results.append((y, *torch.autograd.grad(y.sum() * 3, leaves)))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum", "batchmean"])
def test_every_argument(backend, op, reduction):
    x, t = INPUTS.get(op, (X, T))
    if reduction == "batchmean" and op != "kl_div":
        pytest.skip("only kl_div knows it")
    more = [{}]
    more += [{"weight": W}] if op in ("mse_loss", "l1_loss", "huber_loss") else []
    more += [{"weight": W[0]}, {"weight": W}] if op.startswith("binary") else []
    more += [{"pos_weight": W[0]}, {"pos_weight": W[:, :1], "weight": W}] if op.endswith("logits") else []
    more += [{"beta": 0.3}, {"beta": 0.0}] if op == "smooth_l1_loss" else []
    more += [{"delta": 0.3}] if op == "huber_loss" else []
    more += [{"log_target": True}] if op == "kl_div" else []
    for how in more:
        same(op, x, t, backend, reduction=reduction, **how)


@pytest.mark.parametrize("op", OPS)
def test_kinks_infinities_and_nan_as_torch(backend, op):
    inf, nan = float("inf"), float("nan")
    if op in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"):
        pairs = itertools.product((0.0, 1.0, -1.0, inf, nan), (0.0, 1.0, -inf))
    elif op == "binary_cross_entropy":
        pairs = itertools.product((0.999, 1e-30, 0.25, 1e-7), (0.0, 1.0, 0.5))
    elif op == "kl_div":
        pairs = itertools.product((0.0, -1.0, -200.0, nan), (1.0, 0.5, nan))  # torch's gradient is NaN where t is 0
    else:
        pairs = itertools.product((0.0, 100.0, -100.0, 1e4, -1e4, nan), (0.0, 1.0, 0.5))
    x, t = torch.tensor(list(pairs)).unbind(1)
    same(op, x, t, backend, reduction="none")


def test_probabilities_of_zero_and_one(backend):
    x, t = (v.requires_grad_() for v in torch.tensor(list(itertools.product((0.0, 1.0), (0.0, 1.0, 0.5)))).unbind(1))
    with forced(backend):
        y = F.binary_cross_entropy(x, t, reduction="none")
        dx, dt = torch.autograd.grad(y.sum(), (x, t))
    assert y.tolist() == [0, 100, 50, 100, 0, 50]
    theirs = torch_F.binary_cross_entropy(x, t, reduction="none")
    torch.testing.assert_close(dx, torch.autograd.grad(theirs.sum(), x)[0])
    assert dt.tolist() == [100] * 3 + [-100] * 3  # torch's is infinite: it forgets the bound of the logarithm


def test_kl_div_of_an_impossible_class(backend):
    x, t = torch.tensor([-1.0, -float("inf"), -2.0]), torch.tensor([0.0, 0.5, 0.5])
    with forced(backend):
        y = F.kl_div(x, t, reduction="none")
    torch.testing.assert_close(y, torch_F.kl_div(x, t, reduction="none"))


def test_strides_dtypes_and_broadcasting(backend):
    x = torch.randn(3, 4, 5)[..., ::2].permute(2, 0, 1)
    t = torch.randn(3, 4).double()
    with pytest.warns(UserWarning, match="broadcast"), forced(backend):
        y = F.mse_loss(x, t)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = torch_F.mse_loss(x, t)
    assert y.dtype == expected.dtype == torch.float64
    torch.testing.assert_close(y, expected)


def test_long_half_precision_means_are_exact():
    x = torch.ones(100_000, dtype=torch.float16)
    assert F.mse_loss(x, torch.zeros_like(x), reduction="mean") == 1  # the sum does not fit float16
    assert F.l1_loss(x, torch.zeros_like(x), reduction="sum").isinf()


def test_no_tensor_of_losses_for_a_mean():
    x, sizes = torch.randn(50_000), []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.data_ptr() != x.data_ptr():
                sizes.append(out.numel())
            return out

    with Sizes():
        F.mse_loss(x, x)
    assert max(sizes) < 100


def test_empty_as_torch():
    x = torch.zeros(0, 3)
    for op in OPS:
        how = {"reduction": "batchmean"} if op == "kl_div" else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = getattr(torch_F, op)(x, x, **how)
        torch.testing.assert_close(getattr(F, op)(x, x, **how), expected, equal_nan=True)
        assert getattr(F, op)(x, x, reduction="none").shape == (0, 3)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_channels_last_stays(op, reduction):
    shape = (2, 3, 4, 5)
    draw = lambda: torch.rand(shape, generator=G) * 0.8 + 0.1
    x, t = draw().contiguous(memory_format=torch.channels_last).requires_grad_(), draw()
    y = getattr(F, op)(x, t, reduction=reduction)
    torch.testing.assert_close(y, getattr(torch_F, op)(x, t, reduction=reduction))
    assert torch.autograd.grad(y.sum(), x)[0].stride() == x.stride()
    assert reduction == "sum" or y.stride() == x.stride()


def test_batchmean_divides_by_the_batch_of_the_input():
    for x in (torch.tensor(-0.5), torch.randn(1, 4), torch.randn(4)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            t = torch.rand(3, 4) + 0.1
            ours, theirs = (f.kl_div(x, t, reduction="batchmean") for f in (F, torch_F))
        torch.testing.assert_close(ours, theirs)


def test_infinite_logits_as_torch(backend):
    inf = float("inf")
    points = [inf, -inf, inf, -inf, inf, -inf, float("nan"), 1e30, -1e30]
    found = []
    for function in (F.binary_cross_entropy_with_logits, torch_F.binary_cross_entropy_with_logits):
        x = torch.tensor(points, requires_grad=True)
        t = torch.tensor([0.0, 0, 1, 1, 0.5, 0.5, 0, 0, 1], requires_grad=True)
        with forced(backend):
            y = function(x, t, reduction="none")
            found.append((y.detach(), *torch.autograd.grad(y.sum(), (x, t))))
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("op", OPS)
def test_of_no_elements_as_torch(backend, op):
    for reduction in ("mean", "sum", *(("batchmean",) if op == "kl_div" else ())):
        same(op, torch.zeros(0, 7), torch.zeros(0, 7), backend, reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reduced_in_one_node(backend, reduction):
    x, t = X.clone().requires_grad_(), T.clone().requires_grad_()
    with forced(backend):
        y = F.mse_loss(x, t, reduction=reduction)
    assert y.shape == () and {f.name() for f, _ in y.grad_fn.next_functions if f} == {"torch::autograd::AccumulateGrad"}


def test_reductions_are_rounded_once(backend):
    x, t = (torch.randn(3, 4099, generator=G).bfloat16() for _ in range(2))
    wide = x.double(), t.double()
    with forced(backend):
        for reduction in ("mean", "sum"):
            y = F.mse_loss(x, t, reduction=reduction)
            assert y.dtype == torch.bfloat16 and y == torch_F.mse_loss(*wide, reduction=reduction).bfloat16()


def test_sums_do_not_depend_on_threads():
    x, t = torch.randn(2, 300_000, generator=G)
    before, found = torch.get_num_threads(), set()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.add(F.mse_loss(x, t).item())
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


def test_spans_grow_with_the_input_on_triton(monkeypatch):
    kernels = pytest.importorskip("pyops.kernels.elementwise_loss")
    monkeypatch.setattr(kernels, "MOST_SPANS", 2)
    x, t = torch.randn(2, 3 * 4099, generator=G)
    with forced("triton"):
        torch.testing.assert_close(F.mse_loss(x, t), torch_F.mse_loss(x, t))


def test_compiled_for_every_size():
    compiled = torch.compile(F.mse_loss, backend="aot_eager", dynamic=True, fullgraph=True)
    for n in (5, 7, 4100):
        x, t = torch.randn(2, n, generator=G)
        found = []
        for f in (compiled, F.mse_loss):
            leaf = x.clone().requires_grad_()
            y = f(leaf, t)
            found.append((y, *torch.autograd.grad(y, leaf)))
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("how", [{}, {"reduction": "none"}, {"reduction": "sum"}, {"weight": W[0]}])
def test_only_numbers_that_are_no_probabilities_are_refused(backend, how):
    for number in (-1e-30, 1 + 1e-6, -float("inf"), float("inf"), float("nan")):
        for target in (0.0, 1.0):
            x, t = P.clone(), Q.clone()
            x[4, 6], t[4, 6] = number, target
            with forced(backend):
                refuses(RuntimeError, ("binary_cross_entropy", "'input'"), F.binary_cross_entropy, x, t, **how)
    with forced(backend):
        assert F.binary_cross_entropy(P, Q * float("nan"), **how).isnan().all()


def test_scalars():
    x, t = torch.tensor(0.3), torch.tensor(0.6)
    for op in OPS:
        for reduction in ("none", "sum"):
            ours, theirs = (getattr(f, op)(x, t, reduction=reduction) for f in (F, torch_F))
            torch.testing.assert_close(ours, theirs)


MODULES = [
    ("MSELoss", {}), ("L1Loss", {"reduction": "sum"}), ("SmoothL1Loss", {"beta": 0.5}), ("HuberLoss", {"delta": 0.5}),
    ("BCELoss", {"weight": W[0]}), ("BCEWithLogitsLoss", {"weight": W[0], "pos_weight": W[1]}),
    ("KLDivLoss", {"reduction": "batchmean", "log_target": True}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "how"), MODULES)
def test_module(name, how):
    ours, theirs = getattr(nn, name)(**how), getattr(torch.nn, name)(**how)
    assert repr(ours) == repr(theirs) and list(ours.state_dict()) == list(theirs.state_dict())
    torch.testing.assert_close(ours(P, Q), theirs(P, Q))


def test_is_routed():
    with use() as report:
        for op in OPS:
            getattr(torch_F, op)(*INPUTS.get(op, (X, T)), reduction="sum")
        torch.nn.MSELoss()(X, T), torch.nn.BCEWithLogitsLoss()(X, Q)
    assert not report.unrouted() and set(report.entries) == set(OPS)
    assert not any(e.kept for e in report.entries.values()) and report.entries["mse_loss"].calls == 2


@pytest.mark.parametrize(
    ("op", "args", "how"),
    [
        ("mse_loss", (X, T[:, :3]), {}),
        ("mse_loss", (X, T), {"reduction": "average"}),
        ("mse_loss", (X, T), {"weight": W[0]}),
        ("smooth_l1_loss", (X, T), {"beta": -1.0}),
        ("huber_loss", (X, T), {"delta": 0.0}),
        ("binary_cross_entropy", (X, Q), {}),
        ("binary_cross_entropy", (P, Q[:3]), {}),
        ("binary_cross_entropy", (torch.full((2,), float("nan")), torch.zeros(2)), {}),
        ("binary_cross_entropy_with_logits", (X, Q[:3]), {}),
        ("binary_cross_entropy_with_logits", (X, Q), {"pos_weight": W[:, :3]}),
        ("kl_div", (X, Q[:3]), {"reduction": "sum"}),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_refuses_as_torch(op, args, how):
    same_refusal(getattr(F, op), getattr(torch_F, op), *args, **how)


def test_messages():
    refuses(NotImplementedError, ("mse_loss", "'input'", "int64"), F.mse_loss, X.long(), T)
    refuses(RuntimeError, ("binary_cross_entropy", "'input'", "[0, 1]"), F.binary_cross_entropy, X, Q)
    refuses(ValueError, ("kl_div", "'reduction'", "batchmean"), F.kl_div, X, Q, reduction="all")
    weight = W.clone().requires_grad_()
    refuses(RuntimeError, ("'pos_weight'",), F.binary_cross_entropy_with_logits, X, Q, pos_weight=weight)
