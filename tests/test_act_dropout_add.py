import pytest
import torch

from pyops import functional as F
from pyops import testing
from pyops.core import backend as backends

from .harness import passes, refuses

torch_F = torch.nn.functional


@pytest.mark.parametrize("check", testing.checks())
def test_checks(backend, check):
    passes("act_dropout_add", backend, check)


@pytest.mark.race
def test_race(backend):
    passes("act_dropout_add", backend, "accuracy")


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_mask_is_that_of_dropout(memory_format):
    x, r = torch.randn(4, 10, 3, 11).to(memory_format=memory_format), torch.randn(4, 10, 3, 11)
    torch.manual_seed(5)
    expected = F.dropout(torch_F.silu(x), 0.4) + r
    torch.manual_seed(5)
    torch.testing.assert_close(F.act_dropout_add(x, r, 0.4, "silu"), expected)


def test_without_dropout_it_is_a_sum(backend):
    x, r = torch.randn(5, 7), torch.randn(5, 7)
    with backends.backend(backend):
        for how in ({"training": False}, {"p": 0.0}):
            torch.testing.assert_close(F.act_dropout_add(x, r, activation="relu", **how), torch.relu(x) + r)
        torch.testing.assert_close(F.act_dropout_add(x, r, 1.0), r)


def test_the_gradient_of_the_residual_is_no_copy():
    x, r = torch.randn(64, requires_grad=True), torch.randn(64, requires_grad=True)
    dy = torch.randn(64)
    dx, dr = torch.autograd.grad(F.act_dropout_add(x, r, 0.5), (x, r), dy)
    assert dr.data_ptr() == dy.data_ptr() and torch.equal(dr, dy)
    assert ((dx == 0).float().mean() - 0.5).abs() < 0.3


def test_only_x_and_the_random_state_are_kept():
    x, r = torch.randn(1000, requires_grad=True), torch.randn(1000)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        F.act_dropout_add(x, r)
    owners = {t.untyped_storage().data_ptr() for t in kept if t.numel() > 2}
    assert owners <= {x.untyped_storage().data_ptr(), r.untyped_storage().data_ptr()}


def test_vmap_shares_or_draws_masks():
    x, r = torch.ones(3, 400), torch.zeros(3, 400)
    call = lambda a, b: F.act_dropout_add(a, b, 0.5, "identity")
    same = torch.vmap(call, randomness="same")(x, r)
    assert torch.equal(same[0], same[1]) and set(same.unique().tolist()) == {0.0, 2.0}
    different = torch.vmap(call, randomness="different")(x, r)
    assert not torch.equal(different[0], different[1])


def test_bad_input():
    x = torch.randn(2, 3)
    refuses(RuntimeError, ("act_dropout_add", "'residual'", "[3]"), F.act_dropout_add, x, torch.randn(3))
    refuses(RuntimeError, ("act_dropout_add", "'residual'", "float64"), F.act_dropout_add, x, x.double())
    refuses(TypeError, ("act_dropout_add", "'residual'", "int"), F.act_dropout_add, x, 1)
    refuses(ValueError, ("act_dropout_add", "'p'", "1.5"), F.act_dropout_add, x, x, 1.5)
    refuses(TypeError, ("act_dropout_add", "'p'", "str"), F.act_dropout_add, x, x, "0.5")
    refuses(ValueError, ("act_dropout_add", "'activation'", "'swish'"), F.act_dropout_add, x, x, 0.5, "swish")
    refuses(NotImplementedError, ("act_dropout_add", "'input'", "int64"), F.act_dropout_add, x.long(), x)
