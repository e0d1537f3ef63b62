"""attention: scaled dot-product attention, forward and backward.

Floors. CPU, one core at 115 GFLOP/s: 1×8×1024×64 takes 18.7 ms forward, 46.7 ms more backward, half of both with a
causal mask. GPU at 790 TFLOP/s in bf16: 4×32×4096×128 takes 1.39 ms forward, 3.48 ms backward. Predictions, of which
none is measured yet: wgmma kernels (Hopper, no masks but causal, window, lengths) forward 550 TFLOP/s, 2.0 ms, for the
exponentials hide behind products but for the first and the last tile; backward 7 products for the 5 that count at 500,
350 of those that count, 7.9 ms. mma.sync kernels, which reach half of the matrix unit there: 350 and 200.
"""

from functools import partial
from typing import Any

import torch

from .case import Case, Function, Provider, Unavailable, with_both_directions
from .peers import imported, standard_providers

STEM = "attention"
OPS = ("scaled_dot_product_attention",)
OP = OPS[0]
MATRIX = True


def attention(shape: tuple[int, ...], causal: bool, kv_heads: int | None = None, **fields: Any) -> Case:
    """q [B, H, L, D]; key and value with kv_heads heads."""
    args: dict[str, Any] = {"causal": causal}
    if kv_heads is not None:
        args["kv_heads"] = kv_heads
    return Case(OP, shape, args=args, **fields)


def decoding(shape: tuple[int, ...], keys: int, kv_heads: int, **fields: Any) -> Case:
    """Few queries against a cache of `keys` keys."""
    return Case(OP, shape, args={"causal": False, "kv_heads": kv_heads, "keys": keys}, **fields)


def cases(device: str) -> list[Case]:
    if device == "cpu":
        found = [attention((1, 8, 1024, 64), causal, quick=True) for causal in (False, True)]
        found += [attention((2, 8, 512, 128), False), attention((4, 12, 128, 32), False)]
        kinds = [(width, causal) for width in (64, 128) for causal in (False, True)]
        found += [attention((1, 8, 1024, width), causal, dtype=torch.bfloat16) for width, causal in kinds]
        few = [
            decoding(shape, keys, 8, dtype=dtype)
            for shape, keys in (((1, 32, 1, 128), 4096), ((4, 8, 1, 64), 8192))
            for dtype in (torch.float32, torch.bfloat16)
        ]
        return [*with_both_directions(found), *few]
    half = {"dtype": torch.bfloat16, "device": device}
    found = [attention((4, 32, 4096, 128), causal, quick=True, **half) for causal in (False, True)]
    found += [attention((16, 16, 2048, 64), causal, **half) for causal in (False, True)]
    found += [attention((1, 64, length, 128), True, 8, **half) for length in (2048, 8192, 16384)]
    found += [attention((4, 16, 1024, 64), False, device=device)]
    few = [decoding((B, 64, 1, 128), keys, 8, **half) for B, keys in ((1, 131072), (16, 8192))]
    few.append(decoding((1, 64, 1, 128), 131072, 8, device=device))
    return [*with_both_directions(found), *few]


def tiny(device: str) -> list[Case]:
    shapes = [(1, 2, 9, 8), (1, 2, 70, 72)]
    found = [attention(shape, True, device=device, backward=True) for shape in shapes]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return [*found, decoding((1, 4, 2, 16), 150, 2, device=device, dtype=dtype)]


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    B, H, L, D = case.shape
    kv = (B, case.args.get("kv_heads", H), case.args.get("keys", L), D)
    return {"key": kv, "value": kv}


def bytes(case: Case) -> int:
    """Forward q, k, v → o; backward q, k, v, o, do → dq, dk, dv."""
    B, H, L, D = case.shape
    q, kv = B * H * L * D, B * case.args.get("kv_heads", H) * case.args.get("keys", L) * D
    return (2 * q + 2 * kv + case.backward * (4 * q + 4 * kv)) * case.dtype.itemsize


def flops(case: Case) -> int:
    """Two products forward, five backward (the scores once more); half of it under a causal mask."""
    B, H, L, D = case.shape
    return B * H * L * case.args.get("keys", L) * D * 2 * (2 + 5 * case.backward) // (2 if case.args["causal"] else 1)


def bind(functional: Any, case: Case) -> Function:
    causal, grouped = case.args["causal"], "kv_heads" in case.args
    attend = functional.scaled_dot_product_attention
    return lambda t: attend(t["x"], t["key"], t["value"], is_causal=causal, enable_gqa=grouped)


def torch_backend(case: Case, name: str) -> Function:
    backend = getattr(torch.nn.attention.SDPBackend, name)

    def attend(t: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.nn.attention.sdpa_kernel(backend):
            return bind(torch.nn.functional, case)(t)

    probe = [torch.randn(1, h, 16, case.shape[3], dtype=case.dtype, device=case.device) for h in (1, 1, 1)]
    try:
        attend({"x": probe[0], "key": probe[1], "value": probe[2]})
    except RuntimeError as error:
        raise Unavailable(f"{name}: {error}") from error
    return attend


def flex_attention(case: Case) -> Function:
    flex = torch.compile(imported("torch.nn.attention.flex_attention", "flex_attention"), dynamic=False)
    blocks = imported("torch.nn.attention.flex_attention", "create_block_mask")
    length = case.shape[2]
    mask = None
    if case.args["causal"]:
        mask = blocks(lambda b, h, i, j: i >= j, None, None, length, length, device=case.device)
    grouped = "kv_heads" in case.args
    return lambda t: flex(t["x"], t["key"], t["value"], block_mask=mask, enable_gqa=grouped)


def providers(case: Case) -> dict[str, Provider]:
    found = standard_providers(bind, case)
    found.pop("torch channels_last")
    if case.device == "cuda":
        for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
            found[f"torch {name.split('_')[0].lower()}"] = Provider(partial(torch_backend, case, name))
        found["flex_attention"] = Provider(lambda: flex_attention(case))
    return found
