import itertools

import pytest
import torch

from pyops import backend as forced
from pyops import functional as F
from pyops import nn, testing, use

from .harness import passes, refuses, same_refusal

torch_F = torch.nn.functional
G = torch.Generator().manual_seed(0)
X, T = torch.randn(6, 5, generator=G), torch.tensor([0, 4, 2, 2, 1, 3])
W = torch.tensor([0.5, 1.0, 2.0, 0.25, 1.5])


@pytest.mark.parametrize("check", testing.checks())
def test_checks(backend, check):
    if backend != "cpu" and check not in ("accuracy", "gradcheck", "opcheck"):
        pytest.skip("transforms and higher derivatives are the same Python on every backend")
    passes("multi_margin_loss", backend, check)


@pytest.mark.race
def test_race(backend):
    passes("multi_margin_loss", backend, "accuracy")


def same(x, t, backend, **how):
    results = []
    for f in (F.multi_margin_loss, torch_F.multi_margin_loss):
        v = x.clone().requires_grad_()
        with forced(backend if f is F.multi_margin_loss else None):
            y = f(v, t, **how)
            results.append((y, torch.autograd.grad(y.sum() * 3, v)[0]))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_every_argument(backend, reduction):
    for p, margin, weight in itertools.product((1, 2), (1.0, 0.1), (None, W)):
        same(X, T, backend, p=p, margin=margin, weight=weight, reduction=reduction)
    same(X[0], T[:1], backend, reduction=reduction)
    same(X[0], T[1], backend, reduction=reduction)


def test_margins_and_nan_as_torch(backend):
    x = torch.tensor([[0.0, -1.0, 1.0], [float("nan"), 0, 0], [0, float("inf"), 0], [2, 1, 1]])
    same(x, torch.tensor([0, 1, 0, 0]), backend, reduction="none")


def test_labels_outside():
    for bad in (5, -1):
        same_refusal(F.multi_margin_loss, torch_F.multi_margin_loss, X, torch.full((6,), bad))
    said = ("multi_margin_loss: ", "'target'", f"got {2**40} out of bounds")
    refuses(RuntimeError, said, F.multi_margin_loss, X, torch.tensor([0, 1, 2**40, 0, 0, 0]))
    for name in ("emulator", "triton"):
        try:
            force = forced(name)
        except RuntimeError:
            continue
        with force:
            x = X.clone().requires_grad_()
            loss = F.multi_margin_loss(x, torch.tensor([0, 5, -1, 2**40, 1, 1]), reduction="none")
            (dx,) = torch.autograd.grad(loss.sum(), x)
        assert loss.isnan().tolist() == [False, True, True, True, False, False]
        assert dx[0].isfinite().all() and dx[1:4].isnan().all()


def test_module_and_route():
    ours, theirs = nn.MultiMarginLoss(2, 0.5, W), torch.nn.MultiMarginLoss(2, 0.5, W)
    assert repr(ours) == repr(theirs) and list(ours.state_dict()) == list(theirs.state_dict())
    torch.testing.assert_close(ours(X, T), theirs(X, T))
    with use() as report:
        theirs(X, T)
    assert report.entries["multi_margin_loss"].backends == {"cpu": 1}


def test_empty():
    assert F.multi_margin_loss(X[:0], T[:0], reduction="none").shape == (0,)


@pytest.mark.parametrize(
    ("t", "how"),
    [
        (T[:5], {}),
        (T, {"p": 3}),
        (T, {"weight": W[:3]}),
        (T, {"weight": W[None]}),
        (T, {"reduction": "all"}),
        (T.reshape(2, 3), {}),
    ],
)
def test_refuses_as_torch(t, how):
    same_refusal(F.multi_margin_loss, torch_F.multi_margin_loss, X, t, **how)


def test_messages():
    refuses(ValueError, ("multi_margin_loss", "'p'", "3"), F.multi_margin_loss, X, T, 3)
    refuses(RuntimeError, ("'target'", "int32"), F.multi_margin_loss, X, T.int())
    refuses(NotImplementedError, ("'input'", "int64"), F.multi_margin_loss, X.long(), T)
