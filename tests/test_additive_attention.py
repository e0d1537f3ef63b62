import pytest
import torch

from pyops import functional as F
from pyops import nn
from pyops.core import backend as backends
from pyops.ops.additive_attention import _truth

from .harness import passes, peak_bytes, refuses
from .recurrent_harness import OF_THE_RECIPE, equal


@pytest.mark.parametrize("check", OF_THE_RECIPE)
def test_checks(check):
    passes("additive_attention", "cpu", check)


def test_kernels(backend):
    passes("additive_attention", backend, "accuracy")


@pytest.mark.race
def test_race(backend):
    passes("additive_attention", backend, "accuracy")


def inputs(length=4, keys=5, requires_grad=True):
    shapes = ((2, length, 3), (2, keys, 4), (2, keys, 6), (8, 3), (8, 4), (8,), (8,))
    return [torch.randn(s, requires_grad=requires_grad) for s in shapes]


def test_rows_that_see_nothing_are_zero_and_so_is_their_gradient(backend):
    t = inputs()
    mask = torch.ones(2, 4, 5, dtype=torch.bool)
    mask[0, 1] = mask[1] = False
    with backends.backend(backend):
        y = F.additive_attention(*t, mask)
        grads = torch.autograd.grad(y.sin().sum() + y.sum(), t)
    assert torch.equal(y[0, 1], torch.zeros(6)) and torch.equal(y[1], torch.zeros(4, 6))
    assert all(bool(g.isfinite().all()) for g in grads)
    for g in grads[:3]:
        assert torch.equal(g[1], torch.zeros_like(g[1]))
    assert torch.equal(grads[0][0, 1], torch.zeros(3))
    assert float(grads[0][0, 0].abs().sum()) > 0


@pytest.mark.parametrize("shape", [(4, 5), (1, 5), (5,), (2, 1, 5), (1, 4, 5), (2, 4, 5)])
def test_masks_broadcast(shape):
    t = inputs()
    for mask in (torch.randn(shape), torch.rand(shape) > 0.3):
        equal(F.additive_attention(*t, mask), _truth(*t, mask))


def test_nan_goes_where_torch_sends_it(backend):
    t = inputs(requires_grad=False)
    t[1][0, 2, 1] = torch.nan
    with backends.backend(backend):
        y = F.additive_attention(*t)
    assert bool(y[0].isnan().all()) and bool(y[1].isfinite().all())


def test_module(backend):
    module = nn.AdditiveAttention(3, 4, 8)
    assert set(module.state_dict()) == {"query_proj.weight", "key_proj.weight", "v", "bias"}
    assert set(nn.AdditiveAttention(3, 4, 8, bias=False).state_dict()) == {"query_proj.weight", "key_proj.weight", "v"}
    query, key, value = inputs()[:3]
    weights = module.query_proj.weight, module.key_proj.weight, module.v, module.bias
    with backends.backend(backend):
        equal(module(query, key, value), _truth(query, key, value, *weights))
        equal(module(query[0], key[0], value[0]), module(query, key, value)[0])


def test_masks_in_float32(backend):
    """Their digits stay, and the least float is not infinite in bfloat16."""
    t = [x.detach().bfloat16() for x in inputs()]
    mask = torch.randn(4, 5)
    mask[1] = torch.finfo(torch.float32).min
    expected = _truth(*(x.double() for x in t), mask.double())
    with backends.backend(backend):
        y = F.additive_attention(*t, mask)
    # in float32 the least float leaves nothing of a score
    expected[:, 1] = t[2].double().mean(1)
    torch.testing.assert_close(y.double(), expected, rtol=0.02, atol=0.02)


def test_memory_is_that_of_the_scores():
    """L x S numbers in the gradient, nothing of the L x S x D under the tanh, in either direction."""
    length, hidden = 1024, 64
    q, value = torch.randn(1, length, 8), torch.randn(1, length, 8)
    w_q, w_k, v = (torch.randn(s, requires_grad=True) for s in ((hidden, 8), (hidden, 8), (hidden,)))
    run = lambda: F.additive_attention(q, q, value, w_q, w_k, v)
    run()
    scores = 4 * length * length
    assert peak_bytes(run) < scores
    y = run()
    assert (
        peak_bytes(lambda: torch.autograd.grad(y.sum(), (w_q, w_k, v), retain_graph=True))
        < 5 * scores
        < scores * hidden / 10
    )


def test_nothing_of_l_s_d_is_kept():
    """What autograd keeps is far below L x S x D numbers."""
    length, keys, hidden = 96, 96, 64
    q, k, value = torch.randn(1, length, 8), torch.randn(1, keys, 8), torch.randn(1, keys, 8)
    w_q, w_k, v = (torch.randn(s, requires_grad=True) for s in ((hidden, 8), (hidden, 8), (hidden,)))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        F.additive_attention(q, k, value, w_q, w_k, v)
    assert sum(kept) < length * keys * hidden / 10


def test_autocast_runs_low():
    t = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        y = F.additive_attention(*t, torch.randn(4, 5))
    assert y.dtype == torch.bfloat16
    torch.autograd.grad(y.sum(), t)


Q, K, V, WQ, WK, ROW = (torch.ones(s) for s in ((2, 4, 3), (2, 5, 4), (2, 5, 6), (8, 3), (8, 4), (8,)))
REFUSED = [
    ((Q, K[:1], V, WQ, WK, ROW), RuntimeError, ("'key'", "[1, 5, 4]")),
    ((Q, K, V[:, :4], WQ, WK, ROW), RuntimeError, ("'value'", "4 rows", "5")),
    ((Q, K, V, WK, WK, ROW), RuntimeError, ("'w_q'", "[8, 4]", "[8, 3]")),
    ((Q, K, V, WQ, WQ, ROW), RuntimeError, ("'w_k'", "[8, 3]", "[8, 4]")),
    ((Q, K, V, WQ, WK, ROW, torch.ones(7)), RuntimeError, ("'bias'", "[7]", "[8]")),
    ((Q, K, V, WQ, WK, torch.ones(8, 1)), RuntimeError, ("'v'", "[8, 1]")),
    ((Q, K.double(), V, WQ, WK, ROW), RuntimeError, ("'key'", "float64", "float32")),
    ((Q.long(), K, V, WQ, WK, ROW), NotImplementedError, ("'query'", "int64")),
    ((Q, K, V, WQ, WK, None), TypeError, ("'v'", "NoneType")),
    ((Q, K, V, WQ, WK, ROW, None, torch.ones(3, 5)), RuntimeError, ("'attn_mask'", "[3, 5]", "[2, 4, 5]")),
    ((Q, K, V, WQ, WK, ROW, None, torch.ones(4, 5).long()), RuntimeError, ("'attn_mask'", "int64")),
    ((Q, K, V, WQ, WK, ROW, None, torch.ones(4, 5, requires_grad=True)), RuntimeError, ("'attn_mask'", "gradient")),
]


@pytest.mark.parametrize("args, kind, words", REFUSED)
def test_refuses(args, kind, words):
    refuses(kind, ("additive_attention", *words), F.additive_attention, *args)


def test_module_refuses():
    refuses(ValueError, ("AdditiveAttention", "'hidden_size'", "0"), nn.AdditiveAttention, 3, 4, 0)
