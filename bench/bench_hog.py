"""hog: a photo's gradients, votes and norms; no framework has it, so the same formula in plain torch is measured."""

from typing import Any

import torch

from pyops import functional
from pyops.ops import hog as room

from .case import Case, Function, Provider, with_both_directions
from .peers import standard_providers

STEM = "hog"
OPS = ("hog",)
ORIENTATIONS, CELL, BLOCK = 9, 8, 3
MARGIN = 1e-6  # relative: some ten roundings of float32
_NUDGE = 1e-3


def _values(h: int, w: int) -> int:
    return (h // CELL - BLOCK + 1) * (w // CELL - BLOCK + 1) * BLOCK**2 * ORIENTATIONS


def case_of(shape: tuple[int, ...], **more: Any) -> Case:
    n, _, h, w = shape
    return Case("hog", shape, output=(n, _values(h, w)), **more)


def cases(device: str) -> list[Case]:
    batch = 1 if device == "cpu" else 64
    found = [
        case_of((batch, 3, 512, 512), device=device, quick=True),
        case_of((16 * batch, 1, 128, 64), device=device),
    ]
    return with_both_directions(found)


def tiny(device: str) -> list[Case]:
    return [case_of((1, 2, 24, 33), device=device, backward=True)]


def undecided_pixels(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pixels whose vote a rounding could give to another bin or channel; every pixel's channel and its gradient."""
    x = x.double()
    gx, gy = room._differences(x, 3), room._differences(x, 2)
    squares = gx * gx + gy * gy
    top, channels = squares.topk(min(2, x.shape[1]), 1)
    chosen = channels[:, :1]
    gx, gy = gx.gather(1, chosen), gy.gather(1, chosen)
    close = top[:, :1] - top[:, 1:] < MARGIN * top[:, :1]
    where = close.any(1, keepdim=True)
    length = top[:, :1].sqrt()
    for o in range(ORIENTATIONS):
        angle = torch.tensor(torch.pi * o / ORIENTATIONS, dtype=torch.float64)
        where |= ((gy * angle.cos() - gx * angle.sin()).abs() < MARGIN * length) & (gy != 0)
    return where, chosen, torch.cat((gx, gy), 1)


def undecided_values(x: torch.Tensor) -> torch.Tensor:
    """``[N, rows, columns]``: cells with a value that a rounding could bring to the other side of L2-Hys's clip."""
    limit = room._LIMIT
    y = room._reference(x.double(), ORIENTATIONS, (CELL, CELL), (BLOCK, BLOCK), room.NORMS.index("L2"), False)[0]
    found = ((y - limit).abs() < 10 * MARGIN * limit).any(5)
    cells = found.new_zeros(x.shape[0], x.shape[2] // CELL, x.shape[3] // CELL)
    n, top, left, down, right = found.nonzero().unbind(1)
    cells[n, top + down, left + right] = True
    return cells


def apart(case: Case, x: torch.Tensor) -> torch.Tensor:
    """A vote jumps between bins and channels, and the gradient at the clip: a right kernel may round to either side.

    Such a pixel's gradient is turned and stretched a little by its neighbours on the right and below, such a cell is
    stretched, until there are none.
    """
    x = x.clone()
    height, width = x.shape[2:]
    while True:
        where, chosen, g = undecided_pixels(x)
        n, _, h, w = where.nonzero().unbind(1)
        c = chosen[n, 0, h, w]
        gx, gy = g[n, 0, h, w], g[n, 1, h, w]
        for dx, dy, change in ((1, 0, gx - gy), (0, 1, gy + gx)):
            inside = (h + dy < height) & (w + dx < width)
            at = n[inside], c[inside], (h + dy)[inside], (w + dx)[inside]
            x.index_put_(at, (_NUDGE * change[inside]).to(x.dtype), accumulate=True)
        cells = undecided_values(x)
        stretch = 1 + _NUDGE * cells.repeat_interleave(CELL, 1).repeat_interleave(CELL, 2).to(x.dtype)
        x[:, :, : stretch.shape[1], : stretch.shape[2]] *= stretch.unsqueeze(1)
        if not (where.any() or cells.any()):
            return x


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    return {}


def bytes(case: Case) -> int:
    """Forward x → y; backward x, dy → dx."""
    n, _, h, w = case.shape
    values = n * _values(h, w)
    return (case.numel * (3 if case.backward else 1) + values * (2 if case.backward else 1)) * case.dtype.itemsize


def flops(case: Case) -> int:
    """Differences, a length and eight boundaries a pixel, a sum and a quotient a value."""
    return case.numel * 30 * (3 if case.backward else 1)


def bind(namespace: Any, case: Case) -> Function:
    if namespace is functional:
        return lambda t: functional.hog(t["x"], channel_axis=1)
    return lambda t: room._reference(t["x"], ORIENTATIONS, (CELL, CELL), (BLOCK, BLOCK), 3, False)[0].flatten(1)


def providers(case: Case) -> dict[str, Provider]:
    found = standard_providers(bind, case)
    found.pop("torch channels_last")
    return found
