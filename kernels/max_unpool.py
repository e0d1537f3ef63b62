"""max_unpool · Triton
  y[p, index[p,i,c], c] = x[p,i,c], 0 elsewhere; where indices meet the last one stays · dx[p,i,c] = dy[p, index, c]
layout   x, index, dx: [P, I, C], y, dy: [P, S, C]; channels first has C = 1 and P = N * channels
mapping  a program takes BLOCK elements: of x, to find the last i that writes to each place; of y, to fetch it
memory   index read once, x gathered once, y written once, 4 bytes of scratch per element of y written and read
numerics copies; an index outside [0, S) writes nothing and reads 0
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._toolbox import Specimen, cdiv

BLOCK = 512


@triton.jit
def find_last_kernel(index, last, total, IN, S, C, BLOCK: tl.constexpr):
    """last[p, s, c] = 1 + the largest i that writes there: the order of programs does not show."""
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = tl.load(index + k, mask=k < total, other=-1)
    tl.atomic_max(
        last + (k // (IN * C) * S + at) * C + k % C, (k // C % IN + 1).to(tl.int32), mask=(at >= 0) & (at < S)
    )


@triton.jit
def max_unpool_kernel(x, last, y, total, IN, S, C, BLOCK: tl.constexpr):
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    i = tl.load(last + k, mask=k < total, other=0).to(tl.int64)
    v = tl.load(x + (k // (S * C) * IN + i - 1) * C + k % C, mask=i > 0, other=0.0)
    tl.store(y + k, v, mask=k < total)


@triton.jit
def max_unpool_bwd_kernel(dy, index, dx, total, IN, S, C, BLOCK: tl.constexpr):
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = tl.load(index + k, mask=k < total, other=-1)
    v = tl.load(dy + (k // (IN * C) * S + at) * C + k % C, mask=(at >= 0) & (at < S), other=0.0)
    tl.store(dx + k, v, mask=k < total)


def max_unpool_fwd(x: torch.Tensor, index: torch.Tensor, size: int) -> torch.Tensor:
    p, i, c = x.shape
    y = x.new_empty(p, size, c)
    last = torch.zeros(p, size, c, dtype=torch.int32, device=x.device)
    if x.numel() and y.numel():
        find_last_kernel[(cdiv(x.numel(), BLOCK),)](index, last, x.numel(), i, size, c, BLOCK=BLOCK)
    if y.numel():
        max_unpool_kernel[(cdiv(y.numel(), BLOCK),)](x, last, y, y.numel(), i, size, c, BLOCK=BLOCK)
    return y


def max_unpool_bwd(dy: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    _, size, c = dy.shape
    dx = dy.new_empty(index.shape)
    if dx.numel():
        max_unpool_bwd_kernel[(cdiv(dx.numel(), BLOCK),)](
            dy, index, dx, dx.numel(), index.shape[1], size, c, BLOCK=BLOCK
        )
    return dx


def specimens() -> list[Specimen]:
    """What tests/triton_compile.py compiles, by type of x."""
    sizes = dict.fromkeys(("total", "IN", "S", "C"), "i32")
    constants = {"BLOCK": BLOCK}
    found = [Specimen(find_last_kernel, {"index": "*i64", "last": "*i32"} | sizes, constants, 4)]
    for t in ("fp32", "bf16", "fp64"):
        forward = {"x": f"*{t}", "last": "*i32", "y": f"*{t}"} | sizes
        backward = {"dy": f"*{t}", "index": "*i64", "dx": f"*{t}"} | sizes
        found.append(Specimen(max_unpool_kernel, forward, constants, 4))
        found.append(Specimen(max_unpool_bwd_kernel, backward, constants, 4))
    return found
