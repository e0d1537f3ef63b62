"""Attention reads masks, keys and values where they are: any strides, the dtype of the query, shared by examples."""

import math

import pytest
import torch

from pyops import functional as F
from pyops.core import attention_arguments as arguments
from pyops.core import backend as backends
from pyops.core import library
from pyops.ops import attention

from .harness import peak_bytes

sdpa = F.scaled_dot_product_attention
NAME = "scaled_dot_product_attention"

# Layouts of a mask [2, 3, L, S] or what broadcasts to it, from a function that draws one of a shape.
LAYOUTS = {
    "keys before queries": lambda draw, L, S: draw(2, 3, S, L).mT,
    "heads last": lambda draw, L, S: draw(2, L, S, 3).permute(0, 3, 1, 2),
    "examples last": lambda draw, L, S: draw(L, S, 2)[:, None].permute(3, 1, 0, 2),
    "part of a larger mask": lambda draw, L, S: draw(4, 3, L + 5, S + 7)[1:3, :, 3 : L + 3, 6 : S + 6],
    "every second": lambda draw, L, S: draw(2, 6, L, 2 * S)[:, ::2, :, 1::2],
    "padding of keys": lambda draw, L, S: draw(2, S + 9)[:, None, None, 4 : S + 4],
    "one row of columns": lambda draw, L, S: draw(L, 3)[:, 1:2],
    "a repeated row": lambda draw, L, S: draw(2, 1, 1, S).expand(2, 3, L, S),
}
DTYPES = ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16))
PAIRS = (*DTYPES, (torch.float32, torch.bool), (torch.bfloat16, torch.bool), (torch.bfloat16, torch.float32))


def drawn(kind):
    """Masks in which tiles hide everything, change nothing, and neither."""

    def draw(*shape):
        numbers = torch.randn(shape)
        hidden = numbers > 0.8
        hidden[..., : shape[-1] // 3] = True
        if kind == torch.bool:
            return ~hidden
        return numbers.masked_fill(hidden, -math.inf).to(kind)

    return draw


def agree(backend, q, k, v, mask, exact_mask, dtype, **options):
    """Output, log-sum-exp and gradients against plain torch in float64, which is given another form of the mask."""
    results = []
    for function, wide, m in ((sdpa, False, mask), (attention._oracle, True, exact_mask)):
        inputs = [(t.double() if wide else t).detach().requires_grad_() for t in (q, k, v)]
        with backends.backend(backend):
            o, lse = function(*inputs, m, **options, return_lse=True)
        gradients = torch.autograd.grad(o.double().sin().sum() + lse.double().nan_to_num(neginf=0).sum(), inputs)
        results.append((o, lse, *gradients))
    atol = 2e-5 if dtype == torch.float32 else 0.06 if dtype == torch.bfloat16 else 0.01
    for a, b in zip(*results):
        torch.testing.assert_close(a.double(), b, rtol=atol, atol=atol)


def as_numbers(mask):
    return mask.contiguous() if mask.dtype == torch.bool else mask.double().contiguous()


@pytest.mark.parametrize("queries, keys", [(70, 90), (2, 150)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype, kind", PAIRS)
def test_masks_of_any_layout(backend, dtype, kind, layout, queries, keys):
    if backend == "triton" and (kind, dtype) not in ((torch.bool, torch.float32), (torch.bfloat16, torch.bfloat16)):
        pytest.skip("slow on the interpreter, and the same loads")
    q, k, v = (torch.randn(2, 3, n, 16).to(dtype) for n in (queries, keys, keys))
    mask = LAYOUTS[layout](drawn(kind), queries, keys)
    agree(backend, q, k, v, mask, as_numbers(mask), dtype)


@pytest.mark.race
@pytest.mark.parametrize("layout", ["keys before queries", "every second"])
@pytest.mark.parametrize("dtype, kind", [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bool)])
def test_race(backend, dtype, kind, layout):
    for queries in (40, 2):
        q, k, v = (torch.randn(2, 3, n, 16).to(dtype) for n in (queries, 70, 70))
        mask = LAYOUTS[layout](drawn(kind), queries, 70)
        agree(backend, q, k, v, mask, as_numbers(mask), dtype)


@pytest.mark.parametrize("options", ["none", "slopes and lengths"])
@pytest.mark.parametrize("shape", [(2, 1, 3, 5, 7), (1, 2, 3, 5, 7), (2, 1, 1, 5, 7), (1, 2, 1, 1, 7), (2, 2, 1, 5, 7)])
def test_masks_that_some_batch_dimensions_share(backend, shape, options):
    q, k, v = torch.randn(2, 2, 3, 5, 8), torch.randn(2, 2, 3, 7, 8), torch.randn(2, 2, 3, 7, 4)
    given = {}
    if options != "none":
        given = {"alibi_slopes": torch.rand(3), "key_lengths": torch.tensor([[7, 4], [0, 6]])}
    for kind in (torch.float32, torch.bool):
        mask = drawn(kind)(*shape)
        exact = as_numbers(mask).expand(2, 2, 3, 5, 7).contiguous()
        agree(backend, q, k, v, mask, exact, torch.float32, **given)


def test_masks_of_three_batch_dimensions():
    q, k = torch.randn(2, 3, 2, 2, 5, 8), torch.randn(2, 3, 2, 2, 7, 8)
    mask = torch.randn(2, 1, 2, 1, 5, 7)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, k, mask)
    torch.testing.assert_close(sdpa(q, k, k, mask), expected)
    torch.testing.assert_close(sdpa(q, k, k, mask.movedim(-1, 0).contiguous().movedim(0, -1)), expected)


# What is copied is at least half of the larger tensor here.
MEMORY = {
    "a mask in bfloat16": (torch.bfloat16, lambda: torch.zeros(2, 4, 1024, 1024, dtype=torch.bfloat16)),
    "a mask in float16": (torch.float16, lambda: torch.zeros(2, 4, 1024, 1024, dtype=torch.float16)),
    "transposed": (torch.float32, lambda: torch.zeros(2, 4, 1024, 1024).mT),
    "part of a larger mask": (torch.float32, lambda: torch.zeros(2, 4, 1024, 1056)[..., 16:1040]),
    "transposed, boolean": (torch.float32, lambda: torch.ones(2, 4, 1024, 1024, dtype=torch.bool).mT),
}


@pytest.mark.parametrize("case", MEMORY)
def test_a_mask_is_not_copied(case):
    dtype, make = MEMORY[case]
    mask = make()
    q = torch.randn(2, 4, 1024, 8).to(dtype).requires_grad_()
    run = lambda: sdpa(q, q, q, mask)
    o = run()
    back = lambda: torch.autograd.grad(o.float().sum(), q, retain_graph=True)
    back()
    assert peak_bytes(run) < mask.numel() * mask.itemsize / 2
    assert peak_bytes(back) < mask.numel() * mask.itemsize / 2


@pytest.mark.parametrize("options", [False, True], ids=["mask alone", "beside slopes"])
@pytest.mark.parametrize("shape", [(2, 1, 2, 1024, 1024), (1, 2, 2, 1024, 1024), (4, 1, 1, 1024, 1024)], ids=str)
def test_a_mask_is_not_copied_for_those_that_share_it(shape, options):
    q = torch.randn(*(4 if n == 1 else n for n in shape[:2]), 2, 1024, 4)
    mask = torch.zeros(shape)
    run = lambda: sdpa(q, q, q, mask, alibi_slopes=torch.zeros(2) if options else None)
    run()
    assert peak_bytes(run) < mask.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [1, 96])
def test_keys_that_examples_share_are_not_copied(dtype, queries):
    q = torch.randn(64, 4, queries, 64).to(dtype)
    k, v = (torch.randn(4, 1024, 64).to(dtype) for _ in range(2))
    run = lambda: sdpa(q, k, v)
    run()
    assert peak_bytes(run) < 32 * (k.nbytes + v.nbytes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries, lengths", [(3, None), (70, None), (70, (90, 0, 37))])
@pytest.mark.parametrize("shared", ["both", "keys", "values"])
def test_keys_that_examples_share(backend, shared, queries, lengths, dtype):
    if backend == "triton" and (queries, lengths) == (70, None):
        pytest.skip("slow on the interpreter, and the same loads")
    one, many = (2, 90, 16), (3, 2, 90, 16)
    q = torch.randn(3, 4, queries, 16).to(dtype)
    k = torch.randn(one if shared != "values" else many).to(dtype)
    v = torch.randn(one if shared != "keys" else many).to(dtype)
    options = {"enable_gqa": True} | ({} if lengths is None else {"key_lengths": torch.tensor(lengths)})
    agree(backend, q, k, v, None, None, dtype, **options)


def test_keys_that_examples_share_by_their_strides():
    """Each copy that an expanded tensor shows has a gradient of its own."""
    q, k = torch.randn(3, 2, 20, 8), torch.randn(1, 2, 30, 8).expand(3, 2, 30, 8).detach()
    assert arguments.folded(k, torch.Size((3,)), 2).stride(0) == 0
    results = []
    for function, keys in ((sdpa, k), (torch.nn.functional.scaled_dot_product_attention, k.contiguous())):
        keys = keys.requires_grad_()
        o = function(q, keys, keys)
        results.append((o, *torch.autograd.grad(o.sin().sum(), keys)))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


def test_packings_of_shared_keys_end_where_an_example_does():
    """Lengths of the examples differ: what lies beyond one example's keys is no number, and leaves no trace."""
    for dtype in (torch.float32, torch.bfloat16):
        q, k = torch.randn(2, 1, 20, 8).to(dtype), torch.randn(1, 30, 8).to(dtype)
        k[:, 7:] = math.nan
        o = sdpa(q, k, k, key_lengths=torch.tensor([7, 5]))
        assert bool(o.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_mask_has_its_gradient_in_its_dtype(dtype):
    q, k = torch.randn(2, 2, 3, 4).to(dtype), torch.randn(2, 2, 5, 4).to(dtype)
    for shape in ((5, 3), (2, 1, 5, 3)):
        bias = torch.randn(shape).to(dtype).requires_grad_()
        (ours,) = torch.autograd.grad(sdpa(q, k, k, bias.mT).float().sin().sum(), bias)
        exact = bias.detach().double().requires_grad_()
        wide_q, wide_k = q.double(), k.double()
        o = torch.nn.functional.scaled_dot_product_attention(wide_q, wide_k, wide_k, exact.mT)
        (expected,) = torch.autograd.grad(o.sin().sum(), exact)
        assert ours.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 0.03
        torch.testing.assert_close(ours.double(), expected, rtol=tolerance, atol=tolerance)


def test_gradient_of_a_mask_that_some_batch_dimensions_share():
    q, k = torch.randn(2, 3, 2, 4, 8), torch.randn(2, 3, 2, 5, 8)
    results = []
    bias = torch.randn(2, 1, 2, 4, 5, requires_grad=True)
    for function in (sdpa, torch.nn.functional.scaled_dot_product_attention):
        results.append(torch.autograd.grad(function(q, k, k, bias).sin().sum(), bias)[0])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("examples", [1, 2])
@pytest.mark.parametrize("of_keys, of_mask", [(0, None), (None, 0), (None, None), (1, 1)])
def test_vmap(examples, of_keys, of_mask):
    calls = 3
    batched = lambda shape, dim: torch.randn(shape if dim is None else (*shape[:dim], calls, *shape[dim:]))
    q = batched((examples, 2, 5, 8), 0)
    k = batched((examples, 2, 7, 8), of_keys)
    for masks in {1, examples}:
        mask = batched((masks, 1, 5, 7), of_mask)
        ours = torch.vmap(lambda q, k, m: sdpa(q, k, k, m), in_dims=(0, of_keys, of_mask))(q, k, mask)
        theirs = torch.nn.functional.scaled_dot_product_attention
        for n in range(calls):
            key, m = (t if d is None else t.select(d, n) for t, d in ((k, of_keys), (mask, of_mask)))
            torch.testing.assert_close(ours[n], theirs(q[n], key, key, m))


def test_vmap_of_a_mask_that_some_batch_dimensions_share():
    q, mask = torch.randn(3, 2, 2, 1, 5, 8), torch.randn(3, 2, 1, 1, 5, 5)
    ours = torch.vmap(lambda q, m: sdpa(q, q, q, m))(q, mask)
    torch.testing.assert_close(ours, torch.nn.functional.scaled_dot_product_attention(q, q, q, mask))


def test_compiled():
    q, k = torch.randn(2, 2, 2, 5, 8), torch.randn(2, 7, 8)
    mask = torch.randn(2, 1, 2, 7, 5).mT
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, k, mask)
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, mask: sdpa(q, k, k, mask), fullgraph=True)
    torch.testing.assert_close(compiled(q, k, mask), expected)


def test_the_op_reads_nothing_that_is_not_there(backend):
    """A number of a mask that there is none of becomes that of the last; keys with gaps are refused."""
    q = torch.randn(2, 1, 5, 8)
    mask = torch.randn(2, 1, 5, 5)
    constants = (1.0, 0.0, -1, -1, False, 0.0, 5, 5)
    op = attention._fwd.overloads[library.NAMESPACE_OF[backend]]
    if backend != "triton":  # whose arguments its own launcher makes
        o, _ = op(q, q, q, mask, torch.tensor([-3, 9]), None, None, None, None, None, *constants)
        torch.testing.assert_close(o, sdpa(q, q, q, mask, scale=1.0))
        with pytest.raises(RuntimeError, match="k must be contiguous but for the batch"):
            gaps = q.mT.contiguous().mT[:1].expand(2, 1, 5, 8)
            op(q, gaps, q, None, None, None, None, None, None, None, *constants)
        with pytest.raises(RuntimeError, match="mask is not broadcastable in dimension 0"):
            op(q, q, q, mask.repeat(2, 1, 1, 1), None, None, None, None, None, None, *constants)
