"""dropout · Triton
  y[m,s,c] = x[m,s,c] * scale + shift where element m·C + c of the random stream is kept, x[m,s,c] * 0 + fill elsewhere
layout   x, y: [M, S, C] · random: (seed, offset)
mapping  a program takes BLOCK elements; S = 1: a draw serves four; else each element has the draw of its channel
memory   x read once, y written once; the mask is drawn anew, never stored
numerics in fp32 (fp64 for fp64); NaN and infinity in a dropped element give NaN, as in torch
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._random import bits, is_kept, words
from ._toolbox import Specimen, cdiv

BLOCK = 1024


@triton.jit
def dropout_kernel(
    x, random, y, N, THRESHOLD: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr, FILL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    acc_t: tl.constexpr = tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    group = tl.program_id(0).to(tl.int64) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    kept = is_kept(bits(random, group, (BLOCK,)), THRESHOLD)
    v = tl.load(x + i, mask=i < N, other=0.0).to(acc_t)
    tl.store(y + i, tl.where(kept, v * SCALE + SHIFT, v * 0.0 + FILL).to(y.dtype.element_ty), mask=i < N)


@triton.jit
def feature_dropout_kernel(
    x, random, y, N, S, C, THRESHOLD: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr, FILL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    acc_t: tl.constexpr = tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    number = i // (S * C) * C + i % C
    w0, w1, w2, w3 = words(random, number // 4)
    word = tl.where(number % 4 == 0, w0, tl.where(number % 4 == 1, w1, tl.where(number % 4 == 2, w2, w3)))
    v = tl.load(x + i, mask=i < N, other=0.0).to(acc_t)
    kept = is_kept(word, THRESHOLD)
    tl.store(y + i, tl.where(kept, v * SCALE + SHIFT, v * 0.0 + FILL).to(y.dtype.element_ty), mask=i < N)


def dropout(
    x: torch.Tensor, random: torch.Tensor, threshold: int, scale: float, shift: float, fill: float
) -> torch.Tensor:
    _, s, c = x.shape
    y = torch.empty_like(x)
    if n := x.numel():
        grid, constants = (cdiv(n, BLOCK),), {"THRESHOLD": threshold, "SCALE": scale, "SHIFT": shift, "FILL": fill}
        if s == 1:
            dropout_kernel[grid](x, random, y, n, **constants, BLOCK=BLOCK)
        else:
            feature_dropout_kernel[grid](x, random, y, n, s, c, **constants, BLOCK=BLOCK)
    return y


def specimens() -> list[Specimen]:
    """What tests/triton_compile.py compiles, by type of x."""
    found = []
    constants = {"THRESHOLD": 1 << 30, "SCALE": 2.0, "SHIFT": 0.5, "FILL": -0.5, "BLOCK": BLOCK}
    for t in ("fp32", "bf16", "fp64"):
        pointers = {"x": f"*{t}", "random": "*i64", "y": f"*{t}"}
        found.append(Specimen(dropout_kernel, pointers | {"N": "i32"}, constants, 4))
        found.append(Specimen(feature_dropout_kernel, pointers | dict.fromkeys("NSC", "i32"), constants, 4))
    return found
