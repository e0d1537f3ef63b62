"""Arguments of attention that are refused, cast, or left to torch."""

import pytest
import torch

import pyops
from pyops import functional as F
from pyops import nn
from pyops.core.intercept import Unsupported

from .harness import refuses, same_refusal

NAME, VARLEN = "scaled_dot_product_attention", "attention_varlen"
sdpa, theirs = F.scaled_dot_product_attention, torch.nn.functional.scaled_dot_product_attention
Q = torch.randn(2, 4, 6, 8)
PACKED, CU = torch.randn(6, 2, 8), torch.tensor([0, 2, 6])


@pytest.mark.parametrize("name", ["max_seqlen_q", "max_seqlen_k"])
def test_a_longest_sequence_that_is_too_short(name):
    call = lambda n: F.attention_varlen(PACKED, PACKED, PACKED, CU, **{name: n})
    refuses(RuntimeError, (VARLEN, f"'{name}'", "3"), call, 3)
    refuses(RuntimeError, (VARLEN, f"'{name}'", "-2"), call, -2)
    refuses(TypeError, (VARLEN, f"'{name}'", "float"), call, 4.0)
    for enough in (4, 9):
        torch.testing.assert_close(call(enough), F.attention_varlen(PACKED, PACKED, PACKED, CU))


def test_a_longest_sequence_that_is_too_short_stops_a_compiled_program():
    run = torch.compile(
        lambda t, cu, n: F.attention_varlen(t, t, t, cu, None, n, n), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(run(PACKED, CU, 4), F.attention_varlen(PACKED, PACKED, PACKED, CU))
    with pytest.raises(RuntimeError, match="max_seqlen_q"):
        run(PACKED, CU, 3)


def test_autocast_casts_before_dtypes_are_compared():
    low = Q.bfloat16()
    mask = torch.randn(6, 6)
    expected = sdpa(low, low, low, mask.half().bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        for arguments in ((Q, low, Q), (low, Q, Q.half()), (Q.half(), Q.half(), Q.half())):
            assert theirs(*arguments).dtype == sdpa(*arguments).dtype == torch.bfloat16
        torch.testing.assert_close(sdpa(Q, low, Q), theirs(Q, low, Q), rtol=0.02, atol=0.02)
        assert torch.equal(sdpa(Q, low, Q, mask.half()), expected)
        o = F.attention_varlen(PACKED, PACKED.bfloat16(), PACKED, CU)
        assert o.dtype == torch.bfloat16
        same_refusal(sdpa, theirs, Q, Q.double(), Q)
        same_refusal(sdpa, theirs, Q.long(), Q, Q)


LEFT_TO_TORCH = {
    "is_causal and a mask": ((Q, Q, Q, torch.ones(6, 6).bool()), {"is_causal": True}),
    "key and value with different heads": ((Q, Q[:, :2], Q), {"enable_gqa": True}),
    "value with fewer keys": ((Q, torch.randn(2, 4, 7, 8), Q), {}),
    "no columns of query": ((Q[..., :0], Q[..., :0], Q), {}),
    "no columns of value": ((Q, Q, Q[..., :0]), {}),
}


@pytest.mark.parametrize("case", LEFT_TO_TORCH)
def test_left_to_torch(case):
    arguments, options = LEFT_TO_TORCH[case]
    refuses(Unsupported, (NAME,), sdpa, *arguments, **options)
    call = lambda: theirs(*arguments, **options)
    with pyops.use() as report:
        o = call()
    torch.testing.assert_close(o, call(), equal_nan=True)
    assert report.entries[NAME].kept and not report.entries[NAME].backends


@pytest.mark.parametrize(
    "arguments, options",
    [
        ((Q.cfloat(),) * 3, {}),
        ((Q, Q, Q, torch.tensor(True)), {}),
        ((Q, Q, Q, torch.tensor(1.0)), {}),
        ((Q[0, 0],) * 3, {"enable_gqa": True}),
        ((Q, Q, Q), {"scale": "x"}),
        ((Q, Q[:, :3], Q[:, :3]), {"enable_gqa": True}),
    ],
    ids=["complex", "boolean mask without dimensions", "mask without dimensions", "grouped matrices", "scale", "heads"],
)
def test_refuses_as_torch(arguments, options):
    same_refusal(sdpa, theirs, *arguments, **options)


def test_bad_options():
    refuses(TypeError, (NAME, "'scale'", "'x'"), sdpa, Q, Q, Q, scale="x")
    for window in ((1, 2, 3), 2.5, (1.0, 2), "ab"):
        refuses(ValueError, (NAME, "'window'"), sdpa, Q, Q, Q, window=window)
    refuses(NotImplementedError, (NAME, "'query'", "complex64"), sdpa, Q.cfloat(), Q.cfloat(), Q.cfloat())


# MultiheadAttention

X = torch.randn(5, 3, 8)  # [L, N, embed_dim]
KEYS = torch.zeros(3, 5, dtype=torch.bool)
REFUSED = {
    "one dimension": ((X[0, 0],) * 3, {}),
    "four dimensions": ((X[None],) * 3, {}),
    "mixed ranks": ((X, X[:, 0], X[:, 0]), {}),
    "embed_dim": ((X[..., :7],) * 3, {}),
    "embed_dim of key": ((X, X[..., :7], X[..., :7]), {}),
    "key and value": ((X, X, torch.randn(6, 3, 8)), {}),
    "batch": ((X, X[:, :2], X[:, :2]), {}),
    "padding of another length": ((X,) * 3, {"key_padding_mask": KEYS[:, :4]}),
    "padding of integers": ((X,) * 3, {"key_padding_mask": KEYS.long()}),
    "padding without batch": ((X,) * 3, {"key_padding_mask": KEYS[0]}),
    "padding without batch, batch of one": ((X[:, :1],) * 3, {"key_padding_mask": KEYS[0]}),
    "padding with batch, input without": ((X[:, 0],) * 3, {"key_padding_mask": KEYS[:1]}),
    "padding in float64": ((X,) * 3, {"key_padding_mask": KEYS.double()}),
    "mask of another shape": ((X,) * 3, {"attn_mask": torch.zeros(5, 4)}),
    "mask of another number of heads": ((X,) * 3, {"attn_mask": torch.zeros(3, 5, 5)}),
    "the same without batch": ((X[:, 0],) * 3, {"attn_mask": torch.zeros(3, 5, 5)}),
    "mask of four dimensions": ((X,) * 3, {"attn_mask": torch.zeros(1, 1, 5, 5)}),
    "mask of integers": ((X,) * 3, {"attn_mask": torch.zeros(5, 5).long()}),
    "mask in float64": ((X,) * 3, {"attn_mask": torch.zeros(5, 5).double()}),
    "mask in float16": ((X,) * 3, {"attn_mask": torch.zeros(5, 5).half()}),
    "hint without mask": ((X,) * 3, {"is_causal": True}),
}


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_multihead_attention_refuses_as_torch(case, weights):
    ours, module = nn.MultiheadAttention(8, 2), torch.nn.MultiheadAttention(8, 2)
    arguments, options = REFUSED[case]
    with pytest.raises(Exception) as expected:
        module(*arguments, need_weights=weights, **options)
    with pytest.raises(Exception) as caught:
        ours(*arguments, need_weights=weights, **options)
    assert caught.type is expected.type
    assert "MultiheadAttention: argument '" in str(caught.value)


def test_multihead_attention_names_the_shape_that_was_given():
    refuses(
        AssertionError, ("'value'", "[6, 3, 8]", "[5, 3, 8]"), nn.MultiheadAttention(8, 2), X, X, torch.zeros(6, 3, 8)
    )


@pytest.mark.parametrize("padding", [False, True])
def test_the_causal_hint_is_taken_as_torch_takes_it(padding):
    """A mask that is not the causal one is read with a key_padding_mask, not without."""
    ours, module = nn.MultiheadAttention(8, 2), torch.nn.MultiheadAttention(8, 2)
    ours.load_state_dict(module.state_dict())
    options = {"attn_mask": torch.randn(5, 5), "is_causal": True, "need_weights": False}
    options |= {"key_padding_mask": KEYS.float().index_fill(1, torch.tensor([4]), -1.0)} if padding else {}
    torch.testing.assert_close(ours(X, X, X, **options)[0], module(X, X, X, **options)[0])


def test_masks_in_float32_and_autocast():
    ours, module = nn.MultiheadAttention(8, 2), torch.nn.MultiheadAttention(8, 2)
    ours.load_state_dict(module.state_dict())
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        mask = torch.randn(5, 5).to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            a, b = (m(X, X, X, attn_mask=mask, need_weights=False)[0] for m in (ours, module))
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)
