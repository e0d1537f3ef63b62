"""What every Triton room shares: launch sizes, accumulate types, and the sum of partial gradients.

A reduction over many rows is split over programs. Each program writes one row of partial results, and a second kernel
adds the rows in a fixed order: no float atomics, so results are bitwise repeatable.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import _interpreter  # noqa: F401  mends tl.dot and rounding where there is no GPU

# Types of x and of its sums with which specimens are compiled.
SPECIMEN_TYPES = (("fp32", "fp32"), ("bf16", "fp32"), ("fp16", "fp32"), ("fp64", "fp64"))


class Specimen(NamedTuple):
    """One kernel with the arguments it is compiled with offline: types, pointers' alignment and constants."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    hot: bool = True
    divisible: tuple[str, ...] = ()  # sizes that 16 divides in real use, beside those tests/triton_compile.py knows


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@lru_cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(x: torch.Tensor) -> int:
    """Number of SMs behind `x`; a small number under the interpreter, so that it runs the split paths as well."""
    return _multiprocessors(x.get_device()) if x.is_cuda else 4


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """Smallest power of two that is at least `n`."""
    return 1 << max(n - 1, 0).bit_length()


def tile_width(n: int, cap: int) -> int:
    """Largest power of two up to `cap` which leaves at most an eighth of its blocks idle on `n` columns."""
    width = min(power_of_two(n), cap)
    while width > 64 and cdiv(n, width) * width * 8 > n * 9:
        width //= 2
    return width


def warps(tile: int, per_thread: int = 16) -> int:
    """Warps for a tile of `tile` elements, `per_thread` of them in each thread."""
    return min(max(power_of_two(tile) // (32 * per_thread), 1), 16)


def rows_per_program(m: int, block_n: int, sms: int, tile: int) -> int:
    """Rows that fill a tile, fewer when there would not be a program for each SM."""
    return max(min(tile // block_n, power_of_two(cdiv(m, sms))), 1)


@triton.jit
def root(v):
    """Rounded as IEEE in fp32."""
    if v.dtype == tl.float64:
        r = tl.sqrt(v)
    else:
        r = tl.sqrt_rn(v)
    return r


@triton.jit
def rsqrt(v):
    """1 / sqrt(v), rounded as IEEE in fp32, where the hardware's approximation would cost the last bits."""
    if v.dtype == tl.float64:
        r = tl.rsqrt(v)
    else:
        r = tl.div_rn(1.0, tl.sqrt_rn(v))
    return r


@triton.jit(do_not_specialize=["rows"])
def sum_partials_kernel(part, a, b, rows, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """a[n] = sum_m part[0, m, n] and, when b is given, b[n] = sum_m part[1, m, n]."""
    acc_t: tl.constexpr = part.dtype.element_ty
    col = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    plane = rows.to(tl.int64) * N
    sum_a = tl.zeros((BLOCK_M, BLOCK_N), acc_t)
    sum_b = tl.zeros((BLOCK_M, BLOCK_N), acc_t)
    for k in range(0, rows, BLOCK_M):
        row = k + tl.arange(0, BLOCK_M).to(tl.int64)
        valid = (row < rows)[:, None] & (col < N)[None, :]
        at = part + row[:, None] * N + col[None, :]
        sum_a += tl.load(at, mask=valid, other=0.0)
        if b is not None:
            sum_b += tl.load(at + plane, mask=valid, other=0.0)
    tl.store(a + col, tl.sum(sum_a, 0).to(a.dtype.element_ty), mask=col < N)
    if b is not None:
        tl.store(b + col, tl.sum(sum_b, 0).to(b.dtype.element_ty), mask=col < N)


def sum_partials(part: torch.Tensor, a: torch.Tensor, b: torch.Tensor | None) -> None:
    """Adds the rows of part [1 or 2, rows, N] into a [N] and b [N]."""
    _, rows, n = part.shape
    block_m = 16 if rows <= 64 else 128
    if n:
        sum_partials_kernel[(cdiv(n, 32),)](part, a, b, rows, n, BLOCK_M=block_m, BLOCK_N=32, num_warps=block_m // 16)
