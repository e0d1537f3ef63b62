"""Dropout masks in Triton: Philox4x32-10 in the arithmetic of csrc/common/philox.h, so that all backends agree."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def words(state, group):
    """The four words of each group (int64), from the (seed, offset) pair at `state`."""
    seed, offset = tl.load(state), tl.load(state + 1)
    low, high = (group & 0xFFFFFFFF).to(tl.uint32), ((group >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = low * 0
    c2 = zero + (offset & 0xFFFFFFFF).to(tl.uint32)
    c3 = zero + ((offset >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(seed, low, high, c2, c3)


@triton.jit
def bits(state, group, SHAPE: tl.constexpr):
    """Bits of the elements of whole groups: `group` [..., n / 4] becomes SHAPE [..., n], a group's words in a row."""
    w0, w1, w2, w3 = words(state, group)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), SHAPE)


@triton.jit
def is_kept(random_bits, threshold):
    """Whether dropout keeps an element; threshold = round(p * 2^31)."""
    return (random_bits >> 1).to(tl.int64) >= threshold


@triton.jit
def bits_kernel(state, first_group, out, GROUPS: tl.constexpr):
    """Bits of the elements of GROUPS groups from `first_group` (int64, in memory) on, as int64."""
    group = tl.load(first_group) + tl.arange(0, GROUPS)
    tl.store(out + tl.arange(0, 4 * GROUPS), bits(state, group, (4 * GROUPS,)).to(tl.int64))
