"""Random numbers for dropout: a (seed, offset) pair from torch's generator, expanded by Philox4x32-10.

    words w[0..3] of group g = philox(key = seed, counter = (g, offset));  element i takes word i % 4 of group i / 4

A random number is a function of (seed, offset, index): a backward pass draws the mask of its forward pass again, and
all backends draw the same one. csrc/common/philox.h and kernels/_random.py hold the same arithmetic for kernels; this
module holds it in torch, for references.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

_LOW = 0xFFFFFFFF


def draw(device: torch.device, generator: torch.Generator | None = None) -> torch.Tensor:
    """A fresh (seed, offset) pair, int64 [2] on ``device``, from ``generator`` or torch's generator of the device.

    It obeys torch.manual_seed and fork_rng, is captured by torch.compile and CUDA graphs like any random op of torch,
    and under vmap follows its ``randomness`` argument. Nothing is read back to the host.
    """
    return torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=device, generator=generator)


def drop_threshold(p: float) -> int:
    """What ``is_kept`` of the kernels compares the upper 31 bits with."""
    return round(p * 2**31)


def words(state: torch.Tensor, group: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The four 32-bit words of each group, as int64 tensors of the shape of ``group``.

    Args:
        state: int64 [2], seed and offset.
        group: int64, any shape.
    """
    key0, key1 = state[0] & _LOW, (state[0] >> 32) & _LOW
    c0, c1 = group & _LOW, (group >> 32) & _LOW
    c2, c3 = state[1] & _LOW, (state[1] >> 32) & _LOW
    for _ in range(10):
        # int64 wraps: the low 64 bits of the product are right, and the shift's sign bits are masked off
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & _LOW) ^ c1 ^ key0, p1 & _LOW, ((p0 >> 32) & _LOW) ^ c3 ^ key1, p0 & _LOW
        key0, key1 = (key0 + 0x9E3779B9) & _LOW, (key1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


def bits(state: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """32 random bits for each element of a row-major tensor, int64 in [0, 2**32)."""
    count = math.prod(shape)
    group = torch.arange((count + 3) // 4, device=state.device)
    return torch.stack(words(state, group), -1).reshape(-1)[:count].reshape(tuple(shape))


def keep(state: torch.Tensor, shape: Sequence[int], p: float) -> torch.Tensor:
    """Which elements of a row-major tensor dropout of probability ``p`` keeps, bool."""
    return (bits(state, shape) >> 1) >= drop_threshold(p)
