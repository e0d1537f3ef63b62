"""pixel_shuffle · Triton
  shuffled[n, c, h r + i, w r + j] = spread[n, c r² + i r + j, h, w]; either way round, which are each other's gradient
layout   spread: [N, C r², H, W], shuffled: [N, C, H r, W r]; channels_last: [N, H, W, C r²] and [N, H r, W r, C]
mapping  a program takes BLOCK elements of y, in its order
memory   read once, written once
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._toolbox import Specimen, cdiv

BLOCK = 512


@triton.jit
def pixel_shuffle_kernel(
    x, y, TOTAL, C, H, W, R, INVERSE: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """C, H, W: of y."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if LAST:
        c, w, h = e % C, e // C % W, e // C // W % H
    else:
        w, h, c = e % W, e // W % H, e // W // H % C
    n = e // C // H // W
    if INVERSE:
        from_c, from_h, from_w = c // (R * R), h * R + c % (R * R) // R, w * R + c % R
        channels, height, width = C // (R * R), H * R, W * R
    else:
        from_c, from_h, from_w = c * R * R + h % R * R + w % R, h // R, w // R
        channels, height, width = C * R * R, H // R, W // R
    if LAST:
        at = ((n * height + from_h) * width + from_w) * channels + from_c
    else:
        at = ((n * channels + from_c) * height + from_h) * width + from_w
    tl.store(y + e, tl.load(x + at, mask=e < TOTAL), mask=e < TOTAL)


def pixel_shuffle_fwd(x: torch.Tensor, factor: int, inverse: bool, channels_last: bool) -> torch.Tensor:
    n, c, h, w = (x.shape[i] for i in ((0, 3, 1, 2) if channels_last else (0, 1, 2, 3)))
    q = factor * factor
    c, h, w = (c * q, h // factor, w // factor) if inverse else (c // q, h * factor, w * factor)
    y = x.new_empty((n, h, w, c) if channels_last else (n, c, h, w))
    if y.numel():
        pixel_shuffle_kernel[(cdiv(y.numel(), BLOCK),)](
            x, y, y.numel(), c, h, w, factor, INVERSE=inverse, LAST=channels_last, BLOCK=BLOCK
        )
    return y


def specimens() -> list[Specimen]:
    """What tests/triton_compile.py compiles, by type of x."""
    sizes = dict.fromkeys(("TOTAL", "C", "H", "W", "R"), "i32")
    return [
        Specimen(
            pixel_shuffle_kernel,
            {"x": f"*{t}", "y": f"*{t}", **sizes},
            {"INVERSE": inverse, "LAST": last, "BLOCK": BLOCK},
            4,
        )
        for t in ("fp32", "bf16", "fp16", "fp64")
        for inverse, last in ((False, False), (True, True))
    ]
