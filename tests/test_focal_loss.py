import pytest
import torch

from pyops import backend as forced
from pyops import testing, vision

from .harness import passes, refuses

X = torch.tensor([0.0, 2.0, -3.0])
T = torch.tensor([1.0, 0.0, 0.0])


@pytest.mark.parametrize("check", testing.checks())
def test_checks(backend, check):
    if backend != "cpu" and check not in ("accuracy", "opcheck"):
        pytest.skip("derivatives of higher order, transforms and layouts are the same Python on every backend")
    passes("sigmoid_focal_loss", backend, check)


@pytest.mark.race
def test_race(backend):
    if backend == "emulator":
        passes("sigmoid_focal_loss", backend, "accuracy")


def test_by_hand(backend):
    with forced(backend):
        # p_t = 1/2: 0.25 * 0.25 * log 2
        y = vision.sigmoid_focal_loss(X, T)
    p = torch.sigmoid(X[1:])
    expected = 0.75 * p**2 * -torch.log(1 - p)
    torch.testing.assert_close(y, torch.cat((torch.tensor([0.0625 * 0.6931472]), expected)))


def test_gamma_zero_is_cross_entropy(backend):
    with forced(backend):
        y = vision.sigmoid_focal_loss(X, T, -1, 0, "sum")
    torch.testing.assert_close(y, torch.nn.functional.binary_cross_entropy_with_logits(X, T, reduction="sum"))


def test_hard_targets_and_infinite_logits_as_in_torch(backend):
    x = torch.tensor([100.0, -100.0, 0.0, float("nan")], requires_grad=True)
    t = torch.tensor([1.0, 1.0, 0.0, 1.0])
    with forced(backend):
        y = vision.sigmoid_focal_loss(x, t)
        (dx,) = torch.autograd.grad(y[:3].sum(), x)
    assert y[0] == 0 and abs(y[1] - 25) < 1e-4 and y[3].isnan()
    torch.testing.assert_close(dx[:3], torch.tensor([0.0, -0.25, 0.75 * (0.125 + 2 * 0.5 * 0.25 * 0.6931472)]))


def test_bad_input():
    loss = vision.sigmoid_focal_loss
    refuses(ValueError, ("sigmoid_focal_loss", "'alpha'", "2"), loss, X, T, 2)
    refuses(ValueError, ("sigmoid_focal_loss", "'gamma'"), loss, X, T, 0.25, -1)
    refuses(ValueError, ("sigmoid_focal_loss", "'reduction'"), loss, X, T, reduction="median")
    refuses(RuntimeError, ("sigmoid_focal_loss", "'targets'", "[2]"), loss, X, T[:2])
    refuses(NotImplementedError, ("sigmoid_focal_loss", "'inputs'", "int64"), loss, X.long(), T)
