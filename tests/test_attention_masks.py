"""Masks of attention: numbers beyond what a product holds, memory, broadcasting."""

import math

import pytest
import torch

from pyops import functional as F
from pyops.core import backend as backends
from pyops.ops import attention

from .harness import peak_bytes

sdpa = F.scaled_dot_product_attention

# Queries, keys, heads of query: a block, few queries against keys in parts of unequal size.
SHAPES = ((40, 40, 1), (1, 200, 2))
LARGE = {
    "the least float": lambda shape: torch.full(shape, torch.finfo(torch.float32).min),
    "one key above the others": lambda shape: torch.full(shape, -3e38).index_fill(1, torch.tensor([3]), -2.7e38),
    "positive": lambda shape: torch.full(shape, 2.5e38),
    "hidden but for the least float": lambda shape: torch.full(shape, -math.inf).index_fill(
        1, torch.tensor([1, 5]), torch.finfo(torch.float32).min
    ),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mask", LARGE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_masks_near_the_largest_float(backend, dtype, mask, shape):
    """Scores are what float32 (float64) leaves of score + mask, as in torch: their softmax is exact."""
    queries, keys, heads = shape
    q, k, v = (torch.randn(1, heads, n, 16).to(dtype) for n in (queries, keys, keys))
    wide = torch.promote_types(dtype, torch.float32)
    bias = LARGE[mask]((queries, keys)).to(wide)
    if dtype == torch.float64:
        bias = bias / torch.finfo(torch.float32).max * torch.finfo(dtype).max
    expected = ((q.to(wide) @ k.mT.to(wide) / 4 + bias).softmax(-1) @ v.to(wide)).double()
    with backends.backend(backend):
        o = sdpa(q, k, v, bias)
    torch.testing.assert_close(o.double(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 0.7])
def test_any_scale(backend, scale):
    q, k, v = (torch.randn(1, 1, n, 16).bfloat16() for n in (20, 70, 70))
    expected = (scale * q.double() @ k.double().mT).softmax(-1) @ v.double()
    with backends.backend(backend):
        torch.testing.assert_close(sdpa(q, k, v, scale=scale).double(), expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("shape", [(2, 1, 1, 5, 7), (2, 3, 1, 5, 7), (1, 3, 1, 5, 7), (2, 1, 4, 5, 7), (2, 1, 1, 1, 7)])
def test_masks_of_two_batch_dimensions(shape):
    q, k = torch.randn(2, 3, 4, 5, 8), torch.randn(2, 3, 2, 7, 8)
    mask = torch.randn(shape)
    for kind in (mask, mask > -1):
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, k, kind, enable_gqa=True)
        torch.testing.assert_close(sdpa(q, k, k, kind, enable_gqa=True), expected)
    slopes = torch.rand(4)
    ours = sdpa(q, k, k, mask, enable_gqa=True, alibi_slopes=slopes)
    torch.testing.assert_close(ours, attention._oracle(q, k, k, mask, enable_gqa=True, alibi_slopes=slopes))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_is_not_expanded_over_examples(dtype):
    """[2, 1, 1, L, L] for a batch of (2, 8)."""
    q = torch.randn(2, 8, 1, 1024, 8)
    mask = torch.ones(2, 1, 1, 1024, 1024, dtype=dtype)
    sdpa(q, q, q, mask)
    assert peak_bytes(lambda: sdpa(q, q, q, mask)) < 8 * mask.nbytes / 2


def _tiles(queries, keys, dtype):
    """A mask whose tiles hide everything, change nothing, or some of both, and rows that see nothing."""
    seen = torch.ones(queries, keys).tril(40).bool()
    seen[: queries // 3, 64:128] = False
    seen[queries // 2] = False
    return seen if dtype == torch.bool else torch.zeros(queries, keys).masked_fill(~seen, -math.inf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [2, 230])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_tiles_that_a_mask_hides_or_leaves(backend, kind, queries, dtype):
    q, k = torch.randn(2, 1, queries, 16).to(dtype), torch.randn(2, 1, 210, 16).to(dtype)
    mask = _tiles(queries, 210, kind)
    results = []
    for function in (sdpa, attention._oracle):
        inputs = [t.clone().requires_grad_() for t in (q, k, k)]
        with backends.backend(backend):
            o, lse = function(*inputs, mask, return_lse=True)
            gradients = torch.autograd.grad(o.sin().sum() + lse.nan_to_num(neginf=0).sum(), inputs)
        results.append((o, lse, *gradients))
    rtol, atol = (1e-4, 2e-5) if dtype == torch.float32 else (0.03, 0.03)
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
@pytest.mark.parametrize("queries", [1, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_that_a_mask_hides_are_not_multiplied(backend, dtype, kind, queries):
    """Numbers that are none leave no trace in a hidden tile, of 128 keys at most, nor in gradients."""
    q, k = torch.randn(1, 2, queries, 16).to(dtype), torch.randn(1, 2, 384, 16).to(dtype)
    k[:, :, 128:256] = math.nan
    mask = torch.ones(queries, 384, dtype=torch.bool)
    mask[:, 128:256] = False
    mask[:, 320:] = False
    mask = mask if kind == torch.bool else torch.zeros(queries, 384).masked_fill(~mask, -math.inf)
    with backends.backend(backend):
        inputs = [t.clone().requires_grad_() for t in (q, k, k)]
        o = sdpa(*inputs, mask)
        gradients = torch.autograd.grad(o.sum(), inputs)
    assert all(bool(t.isfinite().all()) for t in (o, *gradients))
    assert all(bool((t[:, :, 128:256] == 0).all()) for t in gradients[1:])


@pytest.mark.race
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [2, 100])
def test_race_of_tiles(backend, queries, dtype):
    test_tiles_that_a_mask_hides_or_leaves(backend, torch.bool, queries, dtype)
