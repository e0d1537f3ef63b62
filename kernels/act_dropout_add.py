"""act_dropout_add · Triton
  y[i] = f(x[i]) * scale + r[i] where element i of the random stream is kept, f(x[i]) * 0 + r[i] elsewhere
  dx[i] = dy[i] * f'(x[i]) * scale where it is kept, * 0 elsewhere;  f by number, as in csrc/common/activation.h
layout   [N] flat · random: (seed, offset)
mapping  a program takes BLOCK elements; a draw serves four
memory   every input read once, every output written once; the mask is drawn anew, never stored
numerics in fp32 (fp64 for fp64)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._activation import gradient, value
from ._random import bits, is_kept
from ._toolbox import Specimen, cdiv

BLOCK = 1024


@triton.jit
def act_dropout_add_kernel(
    x, residual, dy, random, y, N, THRESHOLD: tl.constexpr, SCALE: tl.constexpr, KIND: tl.constexpr, PA: tl.constexpr,
    PB: tl.constexpr, PC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y or, where dy is given, dx."""
    acc_t: tl.constexpr = tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    group = tl.program_id(0).to(tl.int64) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    kept = is_kept(bits(random, group, (BLOCK,)), THRESHOLD)
    v = tl.load(x + i, mask=i < N, other=0.0).to(acc_t)
    if dy is None:
        f = value(v, KIND, PA, PB, PC)
        out = tl.where(kept, f * SCALE, f * 0.0) + tl.load(residual + i, mask=i < N, other=0.0).to(acc_t)
    else:
        g = tl.load(dy + i, mask=i < N, other=0.0).to(acc_t)
        out = gradient(tl.where(kept, g * SCALE, g * 0.0), v, KIND, PA, PB, PC)
    tl.store(y + i, out.to(y.dtype.element_ty), mask=i < N)


def _run(x, residual, dy, random, threshold, scale, kind, a, b, c):
    y = torch.empty_like(x)
    if n := x.numel():
        constants = {"THRESHOLD": threshold, "SCALE": scale, "KIND": kind, "PA": a, "PB": b, "PC": c}
        act_dropout_add_kernel[(cdiv(n, BLOCK),)](x, residual, dy, random, y, n, **constants, BLOCK=BLOCK)
    return y


def act_dropout_add_fwd(
    x: torch.Tensor, residual: torch.Tensor, random: torch.Tensor, threshold: int, scale: float,
    kind: int, a: float, b: float, c: float,
) -> torch.Tensor:  # fmt: skip
    return _run(x, residual, None, random, threshold, scale, kind, a, b, c)


def act_dropout_add_bwd(
    dy: torch.Tensor, x: torch.Tensor, random: torch.Tensor, threshold: int, scale: float,
    kind: int, a: float, b: float, c: float,
) -> torch.Tensor:  # fmt: skip
    return _run(x, None, dy, random, threshold, scale, kind, a, b, c)


def specimens() -> list[Specimen]:
    """What tests/triton_compile.py compiles, by type of x."""
    found = []
    constants = {"THRESHOLD": 1 << 30, "SCALE": 2.0, "KIND": 3, "PA": 0.0, "PB": 0.0, "PC": 0.0, "BLOCK": BLOCK}
    for t in ("fp32", "bf16", "fp64"):
        types = dict.fromkeys(("x", "residual", "dy", "y"), f"*{t}") | {"random": "*i64", "N": "i32"}
        types = {name: types[name] for name in ("x", "residual", "dy", "random", "y", "N")}
        found.append(Specimen(act_dropout_add_kernel, types, constants | {"dy": None}, 4))
        found.append(Specimen(act_dropout_add_kernel, types, constants | {"residual": None}, 4))
    return found
