"""Attention on the warpgroup tensor cores of sm_90a (csrc/cuda/attention_hopper.cu), on the emulator."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from pyops import functional as F
from pyops.core import backend as backends
from pyops.core import library
from pyops.ops import attention

from .harness import emulated_device

# reason: (batch, heads of query and of key, queries, keys, head sizes of key and of value, options)
CASES = {
    "one query, one key": (1, 1, 1, 1, 1, 16, 16, {}),
    "one tile of each": (1, 1, 1, 128, 128, 64, 64, {}),
    "fewer than a tile": (2, 1, 1, 40, 50, 32, 32, {}),
    "several tiles": (1, 2, 2, 200, 300, 64, 64, {}),
    "several tiles, 128 columns": (1, 1, 1, 140, 400, 128, 128, {}),
    "few queries, many keys": (1, 1, 1, 5, 420, 80, 80, {}),
    "many queries, few keys": (1, 1, 1, 300, 3, 128, 72, {}),
    "a scale": (1, 1, 1, 70, 150, 48, 40, {"scale": 0.7}),
    "causal": (1, 1, 1, 200, 200, 128, 128, {"is_causal": True}),
    "causal, more queries than keys": (1, 2, 1, 200, 140, 64, 64, {"is_causal": True}),
    "causal from the end, grouped heads": (2, 4, 2, 70, 330, 96, 96, {"causal": "bottom_right"}),
    "queries that see nothing": (1, 2, 1, 330, 140, 64, 64, {"causal": "bottom_right"}),
    "window": (1, 1, 1, 150, 300, 128, 128, {"window": (40, 20)}),
    "keys that do not count": (3, 2, 1, 70, 300, 64, 64, {"key_lengths": (0, 130, 300)}),
    "keys that do not count, 128 columns": (3, 1, 1, 20, 260, 128, 128, {"key_lengths": (7, 130, 259)}),
}
RACE = ("fewer than a tile", "causal from the end, grouped heads", "window", "keys that do not count, 128 columns")


@contextmanager
def products(expected: bool) -> Iterator[None]:
    """The block multiplies by wgmma, or it does not."""
    library.configure_emulator(statistics="reset")
    yield
    assert (library.emulator_statistic("wgmma") > 0) == expected


def results(function, q, k, v, options):
    """Output, log-sum-exp and the gradients of both."""
    o, lse = function(q, k, v, **options, enable_gqa=True, return_lse=True)
    seen = lse.isfinite()
    g = torch.Generator().manual_seed(1)
    do, dlse = torch.randn(o.shape, generator=g), torch.randn(lse.shape, generator=g)
    loss = (o * do.to(torch.bfloat16).to(o.dtype)).sum() + (lse * dlse)[seen].sum()
    return o, torch.where(seen, lse, -100.0), *torch.autograd.grad(loss, (q, k, v))


def passes(case, dtype, capability=90):
    batch, heads, key_heads, queries, keys, width, value_width, options = CASES[case]
    options = dict(options)
    g = torch.Generator().manual_seed(0)
    shapes = (heads, queries, width), (key_heads, keys, width), (key_heads, keys, value_width)
    q, k, v = (torch.randn(batch, *s, generator=g).to(dtype).requires_grad_() for s in shapes)
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    if "key_lengths" in options:
        options["key_lengths"] = torch.tensor(options["key_lengths"])
        with torch.no_grad():  # nobody looks at what does not count
            for b, n in enumerate(options["key_lengths"]):
                k[b, :, n:], v[b, :, n:] = math.nan, math.inf
    with backends.backend("emulator"), emulated_device("emulator", capability), products(capability == 90):
        ours = results(F.scaled_dot_product_attention, q, k, v, options)
    for a, b in zip(ours, results(attention._oracle, *exact, options)):
        allowed = 4 * torch.finfo(dtype).eps * max(1.0, b.abs().max().item())
        torch.testing.assert_close(a.detach().double(), b.detach(), rtol=0, atol=allowed)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_forward_and_gradients(case, dtype):
    passes(case, dtype)


@pytest.mark.parametrize("case", CASES)
def test_an_older_device(case):
    passes(case, torch.bfloat16, capability=80)


@pytest.mark.race
@pytest.mark.parametrize("case", RACE)
def test_race(backend, case):
    if backend == "emulator":
        passes(case, torch.bfloat16)


@pytest.mark.parametrize("causal", [None, "bottom_right"])
def test_packed_sequences_see_nothing_of_their_neighbours(causal):
    lengths_q, lengths_k = (3, 0, 70), (150, 4, 90)
    shapes = zip((lengths_q, lengths_k, lengths_k), (4, 2, 2))
    q, k, v = (torch.randn(sum(n), h, 64).to(torch.bfloat16).requires_grad_() for n, h in shapes)
    with torch.no_grad():
        k[150:154], v[150:154] = math.nan, math.inf  # of the sequence without queries
    cu = [torch.tensor((0, *n)).cumsum(0) for n in (lengths_q, lengths_k)]
    with backends.backend("emulator"), products(True):
        o = F.attention_varlen(q, k, v, *cu, causal=causal)
        grads = torch.autograd.grad(o.float().sin().sum(), (q, k, v))
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    parts = [
        attention._oracle(*(t.transpose(0, 1)[None] for t in sequence), enable_gqa=True, causal=causal)
        for sequence in zip(exact[0].split(lengths_q), exact[1].split(lengths_k), exact[2].split(lengths_k))
    ]
    expected = torch.cat([part[0].transpose(0, 1) for part in parts])
    wanted = torch.autograd.grad(expected.sin().sum(), exact)
    for a, b in zip((o, *grads), (expected, *wanted)):
        torch.testing.assert_close(a.detach().double(), b.detach(), rtol=0.02, atol=0.03)


def test_is_deterministic():
    q, k, v = (torch.randn(1, 2, 150, 64).to(torch.bfloat16).requires_grad_() for _ in range(3))
    runs = []
    for schedule in ("forward", "deep-reverse"):
        library.configure_emulator(schedule=schedule)
        try:
            with backends.backend("emulator"):
                runs.append(results(F.scaled_dot_product_attention, q, k, v, {"is_causal": True}))
        finally:
            library.configure_emulator(schedule="forward")
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 2.0},
        {"alibi_slopes": torch.ones(2)},
        {"dropout_p": 0.5},
        {"attn_mask": torch.zeros(9, 9)},
        {"scale": -1.0},
        {"width": 12},
        {"width": 136},
        {"value_width": 72},
    ],
    ids=str,
)
def test_leaves_the_rest_to_mma(options):
    options = dict(options)
    width = options.pop("width", 64)
    q, v = torch.randn(1, 2, 9, width), torch.randn(1, 2, 9, options.pop("value_width", width))
    q, v = q.to(torch.bfloat16), v.to(torch.bfloat16)
    with backends.backend("emulator"), products(False):
        F.scaled_dot_product_attention(q, q, v, **options)
