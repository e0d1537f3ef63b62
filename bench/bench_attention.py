"""attention: scaled dot-product attention, forward and backward.

Floors. CPU, one core at 115 GFLOP/s: 1×8×1024×64 takes 18.7 ms forward, 46.7 ms more backward, half of both with a
causal mask. GPU at 790 TFLOP/s in bf16: 4×32×4096×128 and 4×16×4096×256
take 1.39 ms forward, 3.48 ms backward. Predictions, of which none is measured yet:

- wgmma kernels (Hopper), D to 128: forward 550 TFLOP/s, 2.0 ms, for the exponentials hide behind products but for the
  first and the last tile; backward 7 products for the 5 that count at 500, 350 of those that count, 7.9 ms.
- D of 256: forward the same 2.0 ms: a product of scores, 64 × 80 × 16 a step, takes 40 cycles and reads shared memory
  for 36. Backward 8 products for the 5, as dk and dv have a kernel each, 4 of them in steps of 64 × 48 × 16, which read
  for 28 of 24 cycles: 8.7 for 5 at 480, 275 of those that count, 10 ms. D to 192: as with 256, 8 for 5, at 500.
- With a mask, ALiBi, a soft cap or dropout products hide only behind the scores of the other warpgroup. At D = 128 the
  forward products of a score take 1/8 cycle; its softmax takes 8 instructions of 128 a cycle and 1/16 for the
  exponential, 0.1 to 0.13 in all; ALiBi 2 more, a tile that a mask hides in part 10, a soft cap 10 and 2/16, dropout
  28. The time is half of products and scores together, and at least 1/8: the rate of the first line with ALiBi, and
  0.85, 0.65 and 0.6 of it. Looking at a boolean mask of 4096 × 4096 beforehand takes 16 MB, 5 µs; tiles that it hides
  take nothing.
- mma.sync kernels, which take head sizes not in eights there: half of the matrix unit, 350 and 200.
"""

import importlib.util
import os
import sys
from functools import cache, partial
from typing import Any

import torch

from pyops.core import blocking

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
    found += [attention((4, 16, 4096, 256), causal, **half) for causal in (False, True)]
    found += [attention((4, 32, 4096, 128), True, dtype=torch.float16, device=device)]
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


def algorithm(case: Case, provider: str) -> str:
    """The kernels of the forward pass and, where the case has one, of the backward pass."""
    backend = {"pyops": "cpu"}.get(provider, provider.removeprefix("pyops "))
    passes = blocking.attention_algorithms([case.shape, *shapes(case).values()], case.dtype, backend)
    return ", ".join(passes[: 2 if case.backward else 1])


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


def triton_tutorial(case: Case) -> Function:
    """Triton's tutorial on fused attention, from the file that PYOPS_TRITON_TUTORIAL names; Triton's package lacks it.

    It takes equal lengths and heads, one head size, and, in many versions, float16 alone whatever it is given.
    """
    attend = tutorial_attention(os.environ.get("PYOPS_TRITON_TUTORIAL", ""))
    B, H, L, D = case.shape
    if "kv_heads" in case.args or case.args.get("keys", L) != L or (case.backward and L % 128):
        raise Unavailable("triton tutorial: as many keys and key heads as queries, in 128s for a gradient")
    causal, scale = case.args["causal"], D**-0.5
    function = lambda t: attend(t["x"], t["key"], t["value"], causal, scale)
    few = torch.Generator(case.device).manual_seed(0)
    q, k, v = (torch.randn(1, 1, 256, D, generator=few, device=case.device).to(case.dtype) for _ in range(3))
    try:
        o = function({"x": q, "key": k, "value": v})
    except Exception as error:  # shapes and dtypes differ between versions, and so do their refusals
        raise Unavailable(f"triton tutorial: {type(error).__name__}: {error}") from error
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    if o.dtype != case.dtype or not torch.allclose(o.float(), expected.float(), atol=0.03):
        raise Unavailable(f"triton tutorial: wrong in {case.dtype}")
    return function


@cache
def tutorial_attention(path: str) -> Any:
    """`attention` of the tutorial, which measures nothing when it is imported."""
    if not path:
        raise Unavailable("triton tutorial: PYOPS_TRITON_TUTORIAL does not name its 06-fused-attention.py")
    try:
        spec = importlib.util.spec_from_file_location("triton_tutorial_attention", path)
        if spec is None or spec.loader is None:
            raise ImportError("no Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where Triton looks for the globals of its kernels
        spec.loader.exec_module(module)
        return module.attention
    except Exception as error:  # somebody else's file may fail in any way
        raise Unavailable(f"triton tutorial: {path}: {type(error).__name__}: {error}") from error


def providers(case: Case) -> dict[str, Provider]:
    found = standard_providers(bind, case)
    found.pop("torch channels_last")
    if case.device == "cuda":
        for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
            found[f"torch {name.split('_')[0].lower()}"] = Provider(partial(torch_backend, case, name))
        found["flex_attention"] = Provider(lambda: flex_attention(case))
        found["triton tutorial"] = Provider(lambda: triton_tutorial(case))
    return found
