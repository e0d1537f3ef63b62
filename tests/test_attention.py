import math

import pytest
import torch

import pyops
from pyops import functional as F
from pyops import nn, testing
from pyops.core import attention_arguments as arguments
from pyops.core import backend as backends
from pyops.core import library
from pyops.core.explain import explain
from pyops.ops import attention

from .harness import passes, peak_bytes, refuses, same_refusal

NAME = "scaled_dot_product_attention"
sdpa, theirs = F.scaled_dot_product_attention, torch.nn.functional.scaled_dot_product_attention
Q = torch.ones(2, 4, 6, 8)


@pytest.mark.parametrize("check", testing.checks())
def test_checks(backend, check):
    passes(NAME, backend, check)


@pytest.mark.race
def test_race(backend):
    passes(NAME, backend, "accuracy")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", ["none", "boolean", "additive"])
def test_reference_is_that_of_torch(causal, mask):
    q, k, v = (torch.randn(2, 3, n, d, dtype=torch.float64, requires_grad=True) for n, d in ((5, 4), (7, 4), (7, 6)))
    bias = None if mask == "none" else torch.randn(3, 5, 7, dtype=torch.float64)
    bias = bias > -1 if mask == "boolean" else bias
    if bias is not None and mask == "boolean":
        bias[..., 0] = True
    if causal and bias is not None:
        hidden = torch.ones(5, 7).tril() == 0
        both = bias & ~hidden if mask == "boolean" else bias.masked_fill(hidden, -math.inf)
        expected = theirs(q, k, v, both)
    else:
        expected = theirs(q, k, v, bias, is_causal=causal)
    ours = attention._oracle(q, k, v, bias, causal="top_left" if causal else None)
    torch.testing.assert_close(ours, expected)
    w = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad(o, (q, k, v), w) for o in (ours, expected))):
        torch.testing.assert_close(a, b)


def test_log_sum_exp_is_that_of_torch():
    q, k = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4)
    _, lse = sdpa(q, k, k, scale=0.3, return_lse=True)
    torch.testing.assert_close(lse, torch.logsumexp(0.3 * q @ k.mT, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_is_the_mask_of_the_reference(backend, dtype):
    q, k, v = (torch.randn(2, 2, n, 8, dtype=dtype, requires_grad=True) for n in (18, 21, 21))
    results = []
    for function in (sdpa, attention._oracle):
        with backends.backend(backend):
            torch.manual_seed(3)
            o = function(q, k, v, dropout_p=0.4)
            results.append((o, *torch.autograd.grad(o, (q, k, v), torch.ones_like(o))))
    for a, b in zip(*results):
        torch.testing.assert_close(
            a, b, rtol=1e-5 if dtype == torch.float32 else 0.05, atol=1e-5 if dtype == torch.float32 else 0.05
        )


def test_dropout_keeps_the_mean_and_obeys_the_seed():
    q, v = torch.zeros(1, 1, 64, 4), torch.ones(1, 1, 256, 1)
    k = torch.zeros(1, 1, 256, 4)
    torch.manual_seed(1)
    first = sdpa(q, k, v, dropout_p=0.25)
    assert abs(first.mean() - 1) < 0.02
    assert not torch.equal(first, sdpa(q, k, v, dropout_p=0.25))
    torch.manual_seed(1)
    assert torch.equal(first, sdpa(q, k, v, dropout_p=0.25))
    assert sdpa(q, k, v, dropout_p=1.0).abs().max() == 0


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"causal": "bottom_right", "window": (3, 0)}], ids=str)
def test_varlen_is_one_call_per_sequence(backend, options):
    lengths_q, lengths_k = (3, 0, 9), (5, 4, 7)
    q, k, v = (
        torch.randn(sum(n), h, 8, requires_grad=True) for n, h in zip((lengths_q, lengths_k, lengths_k), (4, 2, 2))
    )
    cu = [torch.tensor((0, *n)).cumsum(0) for n in (lengths_q, lengths_k)]
    with backends.backend(backend):
        o, lse = F.attention_varlen(q, k, v, *cu, **options, return_lse=True)
        grads = torch.autograd.grad((o.sin().sum() + lse.nan_to_num(neginf=0).sum()), (q, k, v))
    parts = [
        attention._oracle(*(t.transpose(0, 1)[None] for t in sequence), enable_gqa=True, **options, return_lse=True)
        for sequence in zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k))
    ]
    expected = torch.cat([o[0].transpose(0, 1) for o, _ in parts])
    expected_lse = torch.cat([lse[0] for _, lse in parts], -1)
    torch.testing.assert_close(o, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(expected.sin().sum() + expected_lse.nan_to_num(neginf=0).sum(), (q, k, v))
    for a, b in zip(grads, wanted):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_varlen_second_gradient():
    cu = torch.tensor([0, 2, 5])
    tensors = [torch.randn(5, 1, 1, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    function = lambda *t: F.attention_varlen(*t, cu, is_causal=True)
    torch.autograd.gradcheck(function, tensors, check_forward_ad=True)
    torch.autograd.gradgradcheck(function, tensors)


def test_mask_gets_its_gradient():
    q, k = torch.randn(1, 2, 3, 4, dtype=torch.float64), torch.randn(1, 2, 5, 4, dtype=torch.float64)
    bias = torch.randn(2, 1, 5, dtype=torch.float64, requires_grad=True)
    (ours,) = torch.autograd.grad(sdpa(q, k, k, bias).sin().sum(), bias)
    (expected,) = torch.autograd.grad(theirs(q, k, k, bias).sin().sum(), bias)
    torch.testing.assert_close(ours, expected)


def test_a_mask_that_repeats_itself_gets_the_gradient_of_each_element():
    q, k = torch.randn(1, 2, 3, 4, dtype=torch.float64), torch.randn(1, 2, 5, 4, dtype=torch.float64)
    bias = torch.randn(1, 5, dtype=torch.float64).expand(3, 5).detach().requires_grad_()
    (ours,) = torch.autograd.grad(sdpa(q, k, k, bias).sin().sum(), bias)
    (expected,) = torch.autograd.grad(theirs(q, k, k, bias).sin().sum(), bias)
    torch.testing.assert_close(ours, expected)


def test_expanded_mask_is_not_copied():
    expanded = torch.ones(2, 1, 1, 6, dtype=torch.bool).expand(2, 4, 6, 6)
    assert arguments.checked_mask(NAME, expanded, Q, (2,), 4, 6, 6).shape == (2, 1, 1, 6)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("options", [{}, {"window": (64, 64)}, {"is_causal": True, "dropout_p": 0.1}], ids=str)
def test_memory_grows_with_length_alone(options, threads):
    """The scores alone would take 64 MiB; inputs, their packed copies, results and sums of gradients take O(L + S)."""
    torch.set_num_threads(threads)
    try:
        q = torch.randn(1, 1, 4096, 8, requires_grad=True)
        run = lambda: sdpa(q, q, q, **options)
        torch.autograd.grad(run().sum(), q)
        assert peak_bytes(run) < 16 << 20
        o = run()
        assert peak_bytes(lambda: torch.autograd.grad(o.sum(), q, retain_graph=True)) < 16 << 20
    finally:
        torch.set_num_threads(2)


def test_bad_input():
    refuses(RuntimeError, (NAME, "'key'", "head size 4"), sdpa, Q, Q[..., :4], Q)
    refuses(RuntimeError, (NAME, "'value'", "5 keys"), sdpa, Q, Q, Q[:, :, :5])
    refuses(RuntimeError, (NAME, "'key'", "3"), sdpa, Q, Q[:, :3], Q[:, :3])
    refuses(RuntimeError, (NAME, "'key'", "3"), sdpa, Q, Q[:, :3], Q[:, :3], enable_gqa=True)
    refuses(RuntimeError, (NAME, "'attn_mask'", "[3, 6]"), sdpa, Q, Q, Q, torch.ones(3, 6))
    refuses(RuntimeError, (NAME, "'attn_mask'", "int64"), sdpa, Q, Q, Q, torch.ones(6, 6).long())
    refuses(RuntimeError, (NAME, "'dropout_p'", "1.5"), sdpa, Q, Q, Q, dropout_p=1.5)
    refuses(RuntimeError, (NAME, "'query'", "int64"), sdpa, Q.long(), Q.long(), Q.long())
    refuses(RuntimeError, (NAME, "'key'", "float64"), sdpa, Q, Q.double(), Q)
    refuses(RuntimeError, (NAME, "'key_lengths'", "[3]"), sdpa, Q, Q, Q, key_lengths=torch.tensor([1, 2, 3]))
    refuses(RuntimeError, (NAME, "'alibi_slopes'", "[3]"), sdpa, Q, Q, Q, alibi_slopes=torch.ones(3))
    refuses(ValueError, (NAME, "'causal'", "'middle'"), sdpa, Q, Q, Q, causal="middle")
    refuses(ValueError, (NAME, "'window'", "-3"), sdpa, Q, Q, Q, window=(-3, 0))
    refuses(ValueError, (NAME, "'softcap'", "-1"), sdpa, Q, Q, Q, softcap=-1.0)
    packed, name = torch.ones(6, 2, 4), "attention_varlen"
    for offsets in ([0, 4, 3, 6], [0, 7], [1, 6]):
        cu = torch.tensor(offsets)
        refuses(RuntimeError, (name, "'cu_seqlens_q'"), F.attention_varlen, packed, packed, packed, cu)
    refuses(RuntimeError, (name, "'query'", "4"), F.attention_varlen, Q, Q, Q, torch.tensor([0, 6]))


@pytest.mark.parametrize(
    "arguments",
    [
        (Q, Q[..., :4], Q),
        (Q, Q[:, :2], Q[:, :2]),
        (Q, Q, Q, torch.ones(3, 3)),
        (Q, Q.double(), Q),
        (Q.long(),) * 3,
        (1, Q, Q),
    ],
    ids=["head size", "heads", "mask", "dtype", "integer", "no tensor"],
)
def test_refuses_as_torch(arguments):
    same_refusal(sdpa, theirs, *arguments)


def test_sees_only_what_the_options_allow():
    """Weights of a uniform attention, read off with one-hot values."""
    q, k, v = torch.zeros(4, 2), torch.zeros(6, 2), torch.eye(6)
    seen = lambda **o: (sdpa(q, k, v, **o) > 0).int().tolist()
    assert seen(is_causal=True)[1] == [1, 1, 0, 0, 0, 0]
    assert seen(causal="bottom_right")[1] == [1, 1, 1, 1, 0, 0]
    assert seen(causal="bottom_right", window=(1, 0))[1] == [0, 0, 1, 1, 0, 0]
    assert seen(window=(1, 2))[2] == [0, 1, 1, 1, 1, 0]
    assert seen(window=1)[0] == [1, 1, 0, 0, 0, 0]
    weights = sdpa(q[None], k[None], v[None], alibi_slopes=torch.tensor([math.log(2.0)]))[0, 2]
    torch.testing.assert_close(weights[0] / weights[2], torch.tensor(0.25))


MODULES = {
    "plain": {},
    "batch first": {"batch_first": True},
    "own sizes": {"kdim": 6, "vdim": 10, "bias": False},
    "added keys": {"add_bias_kv": True, "add_zero_attn": True},
}
CALLS = {
    "weights": {},
    "weights of each head": {"average_attn_weights": False, "mask": "boolean"},
    "padding": {"need_weights": False, "padding": "boolean"},
    "both masks": {"need_weights": False, "padding": "additive", "mask": "boolean"},
    "mask of each head": {"need_weights": False, "mask": "additive"},
    "causal hint": {"need_weights": False, "mask": "causal", "is_causal": True, "padding": "boolean"},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("options", MODULES)
def test_multihead_attention_is_that_of_torch(options, call):
    options, call = MODULES[options], dict(CALLS[call])
    ours, theirs = (m.MultiheadAttention(8, 2, dtype=torch.float64, **options) for m in (nn, torch.nn))
    assert repr(ours) == repr(theirs)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p))
    ours.load_state_dict(theirs.state_dict())
    inputs = [torch.randn(3, n, d, dtype=torch.float64) for n, d in zip((4, 4, 4), (8, ours.kdim, ours.vdim))]
    inputs = [x if ours.batch_first else x.transpose(0, 1) for x in inputs]
    masks = {
        "boolean": torch.tensor([[0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]]).bool(),
        "additive": torch.randn(6, 4, 4, dtype=torch.float64),
        "causal": torch.ones(4, 4).tril() == 0,
    }
    if kind := call.pop("mask", None):
        call["attn_mask"] = masks[kind]
    if kind := call.pop("padding", None):
        call["key_padding_mask"] = (
            torch.tensor([[0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 1]]).bool()
            if kind == "boolean"
            else masks["additive"][:3, 0]
        )
    (y, shares), (expected, expected_shares) = ours(*inputs, **call), theirs(*inputs, **call)
    torch.testing.assert_close(y, expected)
    if expected_shares is None:
        assert shares is None
    else:
        torch.testing.assert_close(shares, expected_shares)


def test_multihead_attention_without_batch():
    ours, theirs = nn.MultiheadAttention(8, 2), torch.nn.MultiheadAttention(8, 2)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 8)
    for a, b in zip(ours(x, x, x), theirs(x, x, x)):
        torch.testing.assert_close(a, b)


def test_use_routes_a_transformer_layer():
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    expected = layer(x)
    with pyops.use() as report:
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert NAME in str(report)


def test_explains_its_kernel():
    notes = lambda dtype, where, *shapes: " | ".join(explain(NAME, shapes, dtype, wanted=where).notes)
    long, few, cache = (2, 8, 512, 64), (2, 8, 1, 64), (2, 2, 512, 64)
    assert "blocks of queries" in notes(torch.float32, "cpu", long, long, long)
    assert "few queries" in notes(torch.float32, "cpu", few, cache, cache)
    assert notes(torch.float32, "emulator", long, long, long) == "CUDA cores"
    assert "parts" in notes(torch.float32, "emulator", few, cache, cache)
    assert "warpgroup" in notes(torch.bfloat16, "emulator", long, long, long)
    assert "warpgroup" in notes(torch.bfloat16, "emulator", (2, 8, 512, 192), (2, 8, 512, 192), (2, 8, 512, 256))
    odd = (2, 8, 512, 65)
    assert notes(torch.bfloat16, "emulator", odd, odd, odd) == "tensor cores (mma)"
    assert "give the shapes" in notes(torch.float32, "cpu", long)


@pytest.mark.skipif(library.triton_kernels("attention") is None, reason="Triton is not installed")
def test_explains_its_kernel_in_triton():
    notes = lambda dtype, *shapes: explain(NAME, shapes, dtype, wanted="triton").notes
    long, few, cache, wide = (2, 8, 512, 64), (2, 8, 1, 64), (2, 2, 512, 64), (2, 8, 512, 128)
    forward, backward = notes(torch.bfloat16, long, long)
    assert "64 queries a program through tiles of 64 keys, 8 warps, as bfloat16 and 64 columns" in forward
    assert "backward: 64 queries a program through tiles of 64 keys" in backward
    forward, backward = notes(torch.bfloat16, wide, wide)
    assert "tiles of 32 keys" in forward and "tiles of 16 keys" in backward
    parts, backward = notes(torch.float32, few, cache)
    assert "16 rows of the 4 heads that share keys" in parts and "tiles of 32" in parts and "backward" in backward
    parts, forward, _ = notes(torch.float32, few, long)
    assert "where that is more than one" in parts and "32 queries a program" in forward
