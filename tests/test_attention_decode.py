"""Attention of few queries against many keys, which are split: csrc/cuda/attention_decode.cuh, kernels/attention.py."""

import importlib
import math

import pytest
import torch

from pyops import functional as F
from pyops.core import backend as backends
from pyops.core import library
from pyops.ops import attention

# reason: (batch, heads of query and of key, queries, keys, head sizes of key and of value, options)
CASES = {
    "one query": (1, 1, 1, 1, 300, 64, 64, {}),
    "the last part has fewer keys": (1, 1, 1, 2, 257, 32, 48, {}),
    "heads that share keys": (2, 8, 2, 3, 200, 64, 64, {"causal": "bottom_right"}),
    "more rows than a block has": (1, 12, 1, 16, 150, 128, 128, {"causal": "bottom_right"}),
    "head sizes no vector fits": (1, 3, 1, 2, 140, 23, 37, {}),
    "256 columns": (1, 1, 1, 2, 150, 256, 200, {}),
    "causal, most keys unseen": (1, 2, 2, 5, 260, 16, 16, {"is_causal": True}),
    "queries that see nothing": (1, 2, 1, 16, 9, 16, 16, {"causal": "bottom_right"}),
    "window": (1, 2, 1, 4, 300, 32, 32, {"causal": "bottom_right", "window": (70, 0)}),
    "parts without keys that count": (3, 2, 1, 2, 300, 32, 32, {"key_lengths": (0, 5, 299)}),
    "scores with extras": (
        1,
        4,
        2,
        3,
        200,
        32,
        32,
        {"softcap": 2.0, "alibi_slopes": (0.1, 0.2, 0.3, 0.4), "scale": 0.5},
    ),
    "a negative scale": (1, 1, 1, 3, 200, 32, 32, {"scale": -0.3}),
}
DTYPES = (torch.bfloat16, torch.float32)  # a kernel each
RACE = ("the last part has fewer keys", "heads that share keys", "parts without keys that count", "scores with extras")


def drawn(batch, heads, key_heads, queries, keys, width, value_width, dtype):
    g = torch.Generator().manual_seed(0)
    shapes = (heads, queries, width), (key_heads, keys, width), (key_heads, keys, value_width)
    return [torch.randn(batch, *s, generator=g).to(dtype) for s in shapes]


class Counted:
    """A Triton kernel that counts its launches."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid):
        self.launches += 1
        return self.kernel[grid]


def split(backend, q, k, v, *arguments, **options):
    """The output and the log-sum-exp of one call, and that a second kernel merged its parts."""
    call = lambda: F.scaled_dot_product_attention(q, k, v, *arguments, **options, enable_gqa=True, return_lse=True)
    with backends.backend(backend):
        if backend == "emulator":
            library.configure_emulator(statistics="reset")
            results = call()
            assert library.emulator_statistic("launches") == (1 if q.dtype == torch.float64 else 2)
        elif backend == "triton":
            kernels = importlib.import_module("pyops.kernels.attention")
            merge = Counted(kernels.attention_merge_kernel)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(kernels, "attention_merge_kernel", merge)
                results = call()
            assert merge.launches == 1
        else:
            results = call()
    return results


def close(ours, exact, dtype):
    for a, b in zip(ours, exact):
        b = torch.where(b.isfinite(), b, -100.0)
        a = torch.where(a.isfinite(), a, -100.0) if a.dim() == 3 else a
        # halves round what they store; float32 and float64 exponents, whose scores may be 10 and more
        allowed = (4 if dtype.itemsize == 2 else 32) * torch.finfo(dtype).eps * max(1.0, b.abs().max().item())
        torch.testing.assert_close(a.double(), b, rtol=0, atol=allowed)


def passes(backend, case, dtype):
    *sizes, options = CASES[case]
    options = dict(options)
    q, k, v = drawn(*sizes, dtype)
    exact = [t.double() for t in (q, k, v)]
    if "alibi_slopes" in options:
        options["alibi_slopes"] = torch.tensor(options["alibi_slopes"])
    if "key_lengths" in options:
        options["key_lengths"] = torch.tensor(options["key_lengths"])
        for b, n in enumerate(options["key_lengths"]):  # nobody looks at what does not count
            k[b, :, n:], v[b, :, n:] = math.nan, math.inf
    expected = attention._oracle(*exact, **options, enable_gqa=True, return_lse=True)
    close(split(backend, q, k, v, **options), expected, dtype)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_forward(backend, case, dtype):
    passes(backend, case, dtype)


def test_forward_in_float64(backend):
    """Which CUDA leaves to the kernel of any length."""
    passes(backend, "scores with extras", torch.float64)


@pytest.mark.race
@pytest.mark.parametrize("case", RACE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_race(backend, case, dtype):
    if backend == "emulator":
        passes(backend, case, dtype)


@pytest.mark.parametrize("kind", ["boolean", "additive"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_masks(backend, kind, dtype):
    q, k, v = drawn(2, 4, 2, 3, 150, 32, 32, dtype)
    g = torch.Generator().manual_seed(1)
    mask = torch.rand(2, 1, 3, 150, generator=g) > 0.5
    mask[0, 0, 1] = False  # a query that sees nothing
    mask[1, 0, 2, 70:] = False  # and one that sees nothing of the last part
    mask = mask if kind == "boolean" else torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
    exact = attention._oracle(
        q.double(),
        k.double(),
        v.double(),
        mask if kind == "boolean" else mask.double(),
        enable_gqa=True,
        return_lse=True,
    )
    close(split(backend, q, k, v, mask if kind == "boolean" else mask.to(q.dtype)), exact, q.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_drops_what_one_part_drops(backend, dtype):
    q, k, v = drawn(1, 4, 2, 2, 200, 32, 32, dtype)
    with backends.backend(backend):
        torch.manual_seed(3)
        o = F.scaled_dot_product_attention(q, k, v, dropout_p=0.4, enable_gqa=True)
        torch.manual_seed(3)
        expected = attention._oracle(q.double(), k.double(), v.double(), dropout_p=0.4, enable_gqa=True)
    allowed = 0.02 if dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(o.double(), expected, rtol=allowed, atol=allowed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_no_numbers_reach_the_output(backend, dtype):
    q, k, v = drawn(1, 1, 1, 2, 200, 16, 16, dtype)
    v[0, 0, 190, 3] = math.nan
    o, _ = split(backend, q, k, v)
    assert o[..., 3].isnan().all() and o[..., :3].isfinite().all() and o[..., 4:].isfinite().all()
    q[0, 0, 1] = math.nan
    o, lse = split(backend, q, k, v)
    assert o[0, 0, 1].isnan().all() and o[0, 0, 0, :3].isfinite().all() and lse[0, 0, 0].isfinite()


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_sequences(backend, dtype):
    lengths_q, lengths_k = (3, 0, 1), (150, 4, 0)
    q, k, v = (torch.randn(sum(n), h, 32).to(dtype) for n, h in zip((lengths_q, lengths_k, lengths_k), (4, 2, 2)))
    cu = [torch.tensor((0, *n)).cumsum(0) for n in (lengths_q, lengths_k)]
    with backends.backend(backend):
        o = F.attention_varlen(q, k, v, *cu, causal="bottom_right")
    parts = [
        attention._oracle(*(t.double().transpose(0, 1)[None] for t in sequence), enable_gqa=True, causal="bottom_right")
        for sequence in zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k))
    ]
    expected = torch.cat([part[0].transpose(0, 1) for part in parts])
    allowed = 0.02 if dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(o.double(), expected, rtol=allowed, atol=allowed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_use_the_merged_log_sum_exp(backend, dtype):
    q, k, v = (t.requires_grad_() for t in drawn(1, 4, 2, 3, 150, 32, 32, dtype))
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    with backends.backend(backend):
        o = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        grads = torch.autograd.grad(o.float().sin().sum(), (q, k, v))
    wanted = torch.autograd.grad(attention._oracle(*exact, enable_gqa=True).sin().sum(), exact)
    allowed = 0.02 if dtype == torch.bfloat16 else 2e-5
    for a, b in zip(grads, wanted):
        torch.testing.assert_close(a.double(), b, rtol=allowed, atol=allowed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_the_schedule(dtype):
    tensors = drawn(2, 4, 2, 3, 200, 32, 32, dtype)
    runs = []
    for schedule in ("forward", "deep-reverse"):
        library.configure_emulator(schedule=schedule)
        try:
            runs.append(split("emulator", *tensors))
        finally:
            library.configure_emulator(schedule="forward")
    assert all(torch.equal(a, b) for a, b in zip(*runs))
