"""Attention in bfloat16 on the CPU, where its products are taken in pairs (csrc/cpu/product_bf16.h) if the CPU can."""

import math
from pathlib import Path

import pytest
import torch

from pyops import functional as F
from pyops.core import backend as backends
from pyops.core import library
from pyops.ops import attention

# reason: (batch, heads of query and of key, queries, keys, head sizes of key and of value, options)
CASES = {
    "whole blocks": (1, 2, 2, 96, 128, 64, 64, {}),
    "odd head sizes": (1, 2, 2, 70, 66, 33, 17, {}),
    "head sizes of one": (1, 2, 2, 13, 65, 1, 1, {}),
    "an odd number of keys, several blocks": (2, 2, 1, 100, 131, 40, 72, {"is_causal": True}),
    "three columns of a tile, three panels": (1, 1, 1, 19, 40, 150, 176, {}),
    "window": (1, 2, 2, 110, 200, 24, 24, {"causal": "bottom_right", "window": (33, 5)}),
    "lengths, and what lies beyond is no number": (4, 2, 2, 40, 131, 23, 31, {"key_lengths": (0, 1, 64, 131)}),
    "scores with extras": (1, 4, 2, 70, 90, 32, 48, {"softcap": 2.0, "alibi_slopes": (0.1, 0.2, 0.3, 0.4)}),
    "one query": (2, 2, 2, 1, 1100, 65, 67, {}),
    "a few queries that share keys": (1, 4, 2, 2, 700, 128, 40, {"causal": "bottom_right", "window": (600, 0)}),
    "a few queries, lengths": (3, 3, 1, 1, 600, 34, 18, {"key_lengths": (0, 513, 600)}),
    "a negative scale": (1, 1, 1, 30, 70, 16, 16, {"scale": -0.3}),
}


def drawn(batch, heads, key_heads, queries, keys, width, value_width):
    g = torch.Generator().manual_seed(0)
    shapes = (heads, queries, width), (key_heads, keys, width), (key_heads, keys, value_width)
    return [torch.randn(batch, *s, generator=g).bfloat16() for s in shapes]


def attend(*arguments, **options):
    with backends.backend("cpu"):
        return F.scaled_dot_product_attention(*arguments, **options, enable_gqa=True, return_lse=True)


def has_pair_products():
    listing = Path("/proc/cpuinfo")
    return library.cpu_capability() == "avx512" and listing.exists() and "avx512_bf16" in listing.read_text()


@pytest.mark.parametrize("case", CASES)
def test_forward(case):
    """Within twice the error of the formula in float32 rounded once, and half an epsilon for rounded weights."""
    *sizes, options = CASES[case]
    options = {k: torch.tensor(v) if k in ("key_lengths", "alibi_slopes") else v for k, v in options.items()}
    q, k, v = drawn(*sizes)
    exact = [t.double() for t in (q, k, v)]
    if "key_lengths" in options:
        for b, n in enumerate(options["key_lengths"]):
            k[b, :, n:], v[b, :, n:] = math.nan, math.inf
    o, lse = attend(q, k, v, **options)
    expected, expected_lse = attention._oracle(*exact, **options, enable_gqa=True, return_lse=True)
    rounded = (expected.bfloat16().double() - expected).abs().max()
    eps = torch.finfo(torch.bfloat16).eps
    assert (o.double() - expected).abs().max() <= 2 * rounded + eps / 2 * max(1.0, expected.abs().max())
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)  # its sum is of unrounded weights


@pytest.mark.parametrize("case", CASES)
def test_gradients(case):
    """As testing.py has it: within twice the error of the formula in bfloat16, and an epsilon."""
    *sizes, options = CASES[case]
    options = {k: torch.tensor(v) if k in ("key_lengths", "alibi_slopes") else v for k, v in options.items()}
    inputs = drawn(*sizes)
    exact = [t.double().requires_grad_() for t in inputs]
    theirs = [t.clone().requires_grad_() for t in inputs]
    if "key_lengths" in options:
        for b, n in enumerate(options["key_lengths"]):
            inputs[1][b, :, n:], inputs[2][b, :, n:] = math.nan, math.inf
    ours = [t.requires_grad_() for t in inputs]
    o, lse = attend(*ours, **options)
    dy, dlse = torch.randn_like(o), torch.randn_like(lse)
    results = [torch.autograd.grad((o, lse.nan_to_num(neginf=0.0)), ours, (dy, dlse))]
    for tensors in (theirs, exact):
        o, lse = attention._oracle(*tensors, **options, enable_gqa=True, return_lse=True)
        cotangents = dy.to(o.dtype), dlse.to(lse.dtype)
        results.append(torch.autograd.grad((o, lse.nan_to_num(neginf=0.0)), tensors, cotangents))
    for ours, theirs, exact in zip(*results):
        reference_error = (theirs.double() - exact).abs().max()
        allowed = 2 * reference_error + torch.finfo(torch.bfloat16).eps * max(1.0, exact.abs().max())
        assert (ours.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_masks(kind, queries):
    q, k, v = drawn(2, 2, 2, queries, 131, 21, 32)
    g = torch.Generator().manual_seed(1)
    mask = torch.rand(2, 1, queries, 131, generator=g) > 0.5
    mask[0, 0, 0] = False  # a query that sees nothing
    mask = mask if kind == "boolean" else torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
    o, lse = attend(q, k, v, mask)
    exact = attention._oracle(
        *(t.double() for t in (q, k, v)), mask if kind == "boolean" else mask.double(), return_lse=True
    )
    assert o[0, :, 0].abs().max() == 0 and (lse[0, :, 0] == -math.inf).all()
    torch.testing.assert_close(o.double(), exact[0], rtol=0, atol=0.01)
    torch.testing.assert_close(lse.double(), exact[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("queries", [2, 50])
def test_values_that_are_no_numbers_reach_the_output(queries, dtype):
    """A NaN of a value its column, a NaN of a query its row, one of a key all rows."""
    for key in (0, 129, 130):  # the last has no partner
        q, k, v = (t.to(dtype) for t in drawn(1, 1, 1, queries, 131, 16, 16))
        v[0, 0, key, 3] = math.nan
        o, _ = attend(q, k, v)
        assert o[..., 3].isnan().all() and o[..., :3].isfinite().all() and o[..., 4:].isfinite().all()
        q[0, 0, 1] = math.nan
        o, lse = attend(q, k, v)
        assert o[0, 0, 1].isnan().all() and lse[0, 0, 1].isnan()
        assert o[0, 0, 0, :3].isfinite().all() and lse[0, 0, 0].isfinite()
        k[0, 0, key, 5] = math.nan
        o, lse = attend(q, k, v)
        assert o.isnan().all() and lse.isnan().all()
    hidden = torch.full((queries, 131), -math.inf)
    hidden[:, 7] = math.nan  # the only score that counts is no number
    o, lse = attend(*(t.to(dtype) for t in drawn(1, 1, 1, queries, 131, 16, 16)), hidden)
    assert o.isnan().all() and lse.isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("queries", [1, 40])
def test_scores_of_any_size(queries, dtype):
    """Scores of 1e30: the largest one's weight is 1, all others' 0."""
    q, k, v = (t.to(dtype) for t in drawn(1, 2, 2, queries, 131, 16, 16))
    q, k = q * 1e15, k * 1e15
    o, _ = attend(q, k, v, scale=0.37)
    chosen = (q.double() @ k.double().mT).argmax(-1)
    torch.testing.assert_close(o, v.gather(2, chosen[..., None].expand(-1, -1, -1, 16)), rtol=0, atol=0)


@pytest.mark.parametrize("queries", [1, 200])
def test_bits_do_not_depend_on_the_threads(queries):
    tensors = [t.requires_grad_() for t in drawn(2, 3, 3, queries, 1300, 65, 33)]
    runs = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            o, lse = attend(*tensors)
            runs.append((o, lse, *torch.autograd.grad(o, tensors, torch.ones_like(o))))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_gradients_of_a_weight_that_was_rounded():
    """One query, one key of weight 1: dv is dy, dq and dk are 0, whatever is rounded."""
    q, k, v = (t.requires_grad_() for t in drawn(1, 1, 1, 7, 1, 15, 9))
    dy = torch.randn(1, 1, 7, 9).bfloat16()
    dq, dk, dv = torch.autograd.grad(attend(q, k, v)[0], (q, k, v), dy)
    torch.testing.assert_close(dv, dy.sum(2, keepdim=True, dtype=torch.float32).bfloat16(), rtol=0.01, atol=0.01)
    assert dq.abs().max() < 1e-5 and dk.abs().max() < 1e-5


@pytest.mark.parametrize("queries", [1, 300])
def test_weights_are_rounded_where_the_cpu_multiplies_pairs(queries):
    """Two keys, of weights 1 and p: the output is p / (1 + p), with the p above rounded or not."""
    score = torch.linspace(-4, 0, 300)[:queries] if queries > 1 else torch.tensor([-1.7])
    q = score.bfloat16()[None, None, :, None]
    k, v = torch.tensor([0.0, 1.0]).bfloat16()[None, None, :, None], torch.tensor([0.0, 1.0]).bfloat16()
    if queries == 1:  # each head a call's one query
        q, heads = torch.linspace(-4, 0, 300).bfloat16()[None, :, None, None], 300
        k = k.expand(1, heads, 2, 1)
    v = v[None, None, :, None].expand_as(k)
    o, _ = attend(q, k, v, scale=1.0)
    p = q.double().flatten().exp()
    rounded, exact = (((x / (1 + p)).bfloat16() != o.flatten()).sum() for x in (p.bfloat16().double(), p))
    assert (rounded < 3 < exact) if has_pair_products() else (exact < 3 < rounded)


def test_weights_of_the_gradient_are_rounded_where_the_cpu_multiplies_pairs():
    """A head for each of 300 weights w = p / (1 + p) of the second key, whose value's gradient is 1.5 w."""
    q = torch.linspace(-4, 0, 300).bfloat16()[None, :, None, None]
    k = torch.tensor([0.0, 1.0]).bfloat16()[None, None, :, None].expand(1, 300, 2, 1)
    v = torch.zeros(1, 300, 2, 1).bfloat16().requires_grad_()
    (dv,) = torch.autograd.grad(attend(q, k, v, scale=1.0)[0], v, torch.full((1, 300, 1, 1), 1.5).bfloat16())
    weight = q.double().flatten().sigmoid()
    rounded, exact = (((1.5 * w).bfloat16() != dv[0, :, 1, 0]).sum() for w in (weight.bfloat16().double(), weight))
    assert (rounded < 3 < exact) if has_pair_products() else (exact < 3 < rounded)
