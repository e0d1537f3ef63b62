"""Attention on the warpgroup tensor cores of sm_90a (csrc/cuda/attention_*hopper.cu), on the emulator."""

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
    "136 columns": (1, 1, 1, 70, 90, 136, 136, {}),
    "160 columns, causal": (1, 1, 1, 140, 140, 160, 160, {"is_causal": True}),
    "192 columns, window, grouped heads": (1, 2, 1, 40, 200, 192, 192, {"window": (30, 10)}),
    "256 columns": (1, 2, 2, 150, 260, 256, 256, {}),
    "256 columns, keys that do not count": (2, 2, 1, 20, 170, 256, 256, {"key_lengths": (90, 169)}),
    "wide keys, narrow values": (1, 1, 1, 70, 130, 192, 128, {"is_causal": True}),
    "narrow keys, wide values": (1, 2, 1, 70, 130, 8, 256, {}),
    "keys of one line, values of two": (1, 1, 1, 70, 130, 64, 72, {}),
    "a mask of tiles": (2, 2, 2, 200, 300, 64, 64, {"mask": ("boolean", (1, 1, 200, 300))}),
    "a mask of tiles, 8 columns, causal": (
        1, 1, 1, 200, 200, 8, 8, {"mask": ("boolean", (200, 200)), "causal": "top_left"},
    ),
    "a mask of each head, grouped": (1, 4, 2, 70, 150, 40, 40, {"mask": ("boolean", (4, 70, 150))}),
    "a mask of each example, 128 columns": (2, 2, 2, 140, 200, 128, 128, {"mask": ("boolean", (2, 1, 140, 200))}),
    "a mask of keys": (2, 2, 1, 70, 300, 72, 72, {"mask": ("boolean", (2, 1, 1, 300))}),
    "a mask of queries": (1, 1, 1, 200, 130, 64, 64, {"mask": ("boolean", (200, 1))}),
    "a mask, 256 columns": (1, 2, 1, 130, 170, 256, 192, {"mask": ("boolean", (2, 130, 170))}),
    "a mask of all": (1, 1, 1, 70, 130, 64, 64, {"mask": ("none", (70, 130))}),
    "a mask of nothing, and lengths": (2, 1, 1, 70, 140, 64, 64, {"mask": ("all", (70, 140)), "key_lengths": (0, 77)}),
    "numbers": (1, 2, 2, 140, 260, 64, 64, {"mask": ("numbers", (140, 260))}),
    "numbers of each head, 128 columns": (1, 2, 1, 70, 200, 128, 128, {"mask": ("numbers", (2, 70, 200))}),
    "numbers and window, 136 columns": (
        1, 1, 1, 70, 130, 136, 136, {"mask": ("numbers", (70, 130)), "window": (40, 20)},
    ),
    "tiles of -inf, 0 and numbers": (1, 2, 2, 200, 300, 64, 64, {"mask": ("tiles of numbers", (200, 300))}),
    "slopes": (1, 2, 1, 140, 260, 64, 64, {"slopes": (2,)}),
    "slopes of each example, from the end": (2, 2, 2, 40, 200, 128, 128, {"slopes": (2, 2), "causal": "bottom_right"}),
    "slopes, 256 columns": (1, 1, 1, 70, 90, 256, 256, {"slopes": (1,)}),
    "a cap": (1, 1, 1, 140, 260, 64, 64, {"softcap": 2.0}),
    "a cap, 128 columns, causal": (1, 1, 1, 140, 140, 128, 128, {"softcap": 1.5, "is_causal": True}),
    "a cap, 160 columns": (1, 1, 1, 70, 100, 160, 160, {"softcap": 3.0}),
    "dropout": (2, 2, 1, 140, 262, 64, 64, {"dropout_p": 0.3}),
    "dropout, 128 columns, causal": (1, 2, 2, 140, 143, 128, 128, {"dropout_p": 0.5, "is_causal": True}),
    "dropout, 256 columns": (1, 2, 1, 70, 97, 256, 256, {"dropout_p": 0.3}),
    "dropout of all": (1, 1, 1, 70, 90, 64, 64, {"dropout_p": 1.0}),
    "a negative scale": (1, 1, 1, 70, 150, 64, 64, {"scale": -0.2}),
    "no scale, 256 columns": (1, 1, 1, 20, 90, 256, 256, {"scale": 0.0}),
    "everything": (
        2, 4, 2, 140, 230, 128, 64,
        {"mask": ("tiles of numbers", (2, 4, 140, 230)), "slopes": (4,), "softcap": 2.0, "dropout_p": 0.2,
         "key_lengths": (200, 230), "causal": "bottom_right", "window": (150, 3)},
    ),
    "everything, 256 columns": (
        2, 2, 1, 70, 130, 256, 256,
        {"mask": ("boolean", (2, 70, 130)), "slopes": (2, 2), "softcap": 2.0, "dropout_p": 0.2,
         "key_lengths": (99, 130)},
    ),
}  # fmt: skip
RACE = (  # each width, ring and extra once
    "fewer than a tile", "causal from the end, grouped heads", "window", "keys that do not count, 128 columns",
    "136 columns", "256 columns, keys that do not count", "narrow keys, wide values", "a mask of each head, grouped",
    "a mask, 256 columns", "a mask of all", "numbers and window, 136 columns", "a cap, 160 columns",
    "dropout, 256 columns", "everything",
)  # fmt: skip


def mask_of(kind, shape):
    """Tiles that are hidden, left alone, or some of both, and a query that sees nothing; `numbers` have none."""
    g = torch.Generator().manual_seed(2)
    if kind in ("all", "none"):
        return torch.full(shape, kind == "all")
    queries, keys = shape[-2:]
    if kind == "numbers":
        return torch.randn(shape, generator=g)
    seen = torch.ones(shape, dtype=torch.bool)
    seen[..., : queries // 2, keys // 2 :] = False
    seen[..., queries // 2 :, : keys // 4] = (
        torch.rand((*shape[:-2], queries - queries // 2, keys // 4), generator=g) > 0.4
    )
    seen[..., queries // 3, :] = False if queries > 1 else seen[..., 0, :]
    if len(shape) > 2:
        seen[0, ..., 0, :] = False if queries > 1 else seen[0, ..., 0, :]
        seen[-1, ..., 64:128] = False  # of the last head or example
    if kind == "boolean":
        return seen
    numbers = torch.where(torch.rand(shape, generator=g) > 0.5, torch.randn(shape, generator=g), 0.0)
    numbers[..., : queries // 2, : keys // 2] = 0.0
    return numbers.masked_fill(~seen, -math.inf)


@contextmanager
def products(expected: bool) -> Iterator[None]:
    """The block multiplies by wgmma, or it does not."""
    library.configure_emulator(statistics="reset")
    yield
    assert (library.emulator_statistic("wgmma") > 0) == expected


def results(function, q, k, v, options):
    """Output, log-sum-exp and the gradients of both."""
    torch.manual_seed(3)  # of dropout
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
    multiplies = capability == 90 and options.get("mask", ("",))[0] != "none"
    if "mask" in options:
        options["attn_mask"] = mask_of(*options.pop("mask"))
    if "slopes" in options:
        options["alibi_slopes"] = torch.rand(options.pop("slopes"), generator=g) * 0.1
    if "key_lengths" in options:
        options["key_lengths"] = torch.tensor(options["key_lengths"])
        with torch.no_grad():  # nobody looks at what does not count
            for b, n in enumerate(options["key_lengths"]):
                k[b, :, n:], v[b, :, n:] = math.nan, math.inf
    with backends.backend("emulator"), emulated_device("emulator", capability), products(multiplies):
        ours = results(F.scaled_dot_product_attention, q, k, v, options)
    assert all(bool(t.isfinite().all()) for t in ours)
    for a, b in zip(ours, results(attention._oracle, *exact, options)):
        allowed = 4 * torch.finfo(dtype).eps * max(1.0, b.abs().max().item())
        torch.testing.assert_close(a.detach().double(), b.detach(), rtol=0, atol=allowed)


@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients(case):
    passes(case, torch.bfloat16)


@pytest.mark.parametrize("case", RACE)
def test_float16(case):
    passes(case, torch.float16)


@pytest.mark.parametrize("case", RACE)
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


@pytest.mark.parametrize("options", [{"width": 12}, {"value_width": 20}], ids=str)
def test_leaves_the_rest_to_mma(options):
    options = dict(options)
    width = options.pop("width", 64)
    q, v = torch.randn(1, 2, 20, width), torch.randn(1, 2, 20, options.pop("value_width", width))
    q, v = q.to(torch.bfloat16), v.to(torch.bfloat16)
    with backends.backend("emulator"), products(False):
        F.scaled_dot_product_attention(q, q, v, **options)


def multiplied(width, mask):
    """Warpgroup products of one forward and one backward pass over 256 queries and 384 keys."""
    q, k = (torch.randn(1, 2, n, width).to(torch.bfloat16).requires_grad_() for n in (256, 384))
    library.configure_emulator(statistics="reset")
    with backends.backend("emulator"):
        # Slopes of 0: the kernels that take extras, with the same tiles, with or without a mask.
        F.scaled_dot_product_attention(q, k, k, mask, alibi_slopes=torch.zeros(2)).sum().backward()
    return library.emulator_statistic("wgmma")


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
@pytest.mark.parametrize("width", [64, 128, 192, 256])
def test_tiles_that_a_mask_hides_are_not_multiplied(width, kind):
    """Keys from 192 on are hidden: whole tiles of every kernel's size that lie there are left out."""
    mask = torch.ones(256, 384, dtype=torch.bool)
    mask[:, 192:] = False
    as_kind = lambda m: m if kind == torch.bool else torch.zeros(m.shape).masked_fill(~m, -math.inf)
    everything, some = (multiplied(width, as_kind(m)) for m in (torch.ones_like(mask), mask))
    assert everything == multiplied(width, None)
    # Forward tiles have 128, 96 or 64 keys, of which 192 or 256 are visited; those of dq 128 to 48; keys own 128.
    assert 0.5 <= some / everything <= 0.7
    assert multiplied(width, as_kind(torch.zeros_like(mask))) == 0


def agrees_with_the_oracle(q, k, v, **options):
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    with backends.backend("emulator"), products(True):
        ours = results(F.scaled_dot_product_attention, q, k, v, options)
    if options.get("attn_mask") is not None and options["attn_mask"].dtype == q.dtype:
        options["attn_mask"] = options["attn_mask"].double()
    for a, b in zip(ours, results(attention._oracle, *exact, options)):
        allowed = 4 * torch.finfo(q.dtype).eps * max(1.0, b.abs().max().item())
        torch.testing.assert_close(a.detach().double(), b.detach(), rtol=0, atol=allowed)


@pytest.mark.parametrize("width", [64, 192])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_mask_of_numbers_in_the_dtype_of_the_query_and_with_strides_of_its_own(dtype, width):
    q, k, v = (torch.randn(2, 2, n, width).to(dtype).requires_grad_() for n in (70, 150, 150))
    numbers = mask_of("tiles of numbers", (2, 1, 70, 150)).to(dtype)
    agrees_with_the_oracle(q, k, v, attn_mask=numbers.mT.contiguous().mT)
    agrees_with_the_oracle(q, k, v, attn_mask=numbers.repeat_interleave(2, -1)[..., ::2].isfinite())


@pytest.mark.parametrize("shared", ["keys", "values", "both"])
def test_keys_that_examples_share(shared):
    q, k, v = (torch.randn(b, 2, n, 64).to(torch.bfloat16).requires_grad_() for b, n in ((3, 70), (3, 150), (3, 150)))
    with torch.no_grad():
        k = k[:1].expand(3, -1, -1, -1) if shared != "values" else k
        v = v[:1].expand(3, -1, -1, -1) if shared != "keys" else v
    agrees_with_the_oracle(q, k.requires_grad_(), v.requires_grad_(), is_causal=True)


def test_masks_that_examples_share():
    """Two batch dimensions, of which a mask has the outer or the inner one."""
    q, k, v = (torch.randn(2, 3, 1, n, 64).to(torch.bfloat16).requires_grad_() for n in (70, 150, 150))
    for shape in ((2, 1, 1, 70, 150), (1, 3, 1, 70, 150)):
        agrees_with_the_oracle(q, k, v, attn_mask=mask_of("boolean", shape), alibi_slopes=torch.tensor([0.05]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [64, 256])
def test_masks_near_the_largest_float(width, dtype):
    """What the least float hides has weight 0 beside the rest, and equal weights where there is nothing else."""
    least = torch.finfo(torch.float32).min
    q, k = (torch.randn(1, 1, n, width).to(dtype) for n in (40, 200))
    mask = torch.zeros(40, 200)
    mask[:, 100:], mask[7] = least, least
    expected = ((q.float() @ k.float().mT) / math.sqrt(width) + mask).softmax(-1) @ k.float()
    with backends.backend("emulator"), products(True):
        o = F.scaled_dot_product_attention(q, k, k, mask)
    torch.testing.assert_close(o.float(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps)
