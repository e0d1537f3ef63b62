"""color_histogram, soft, which has a gradient: no framework has it, so the same formula in plain torch is measured.

The plain form holds a weight for each pixel and bin; it gets few bins.
"""

from typing import Any

import torch

from pyops import functional
from pyops.ops import histogram as room

from .case import Case, Function, Provider, with_both_directions
from .peers import standard_providers

STEM = "histogram"
OPS = ("color_histogram",)
_RANGE = (-3.017, 3.023)


def case_of(shape: tuple[int, ...], bins: int, **more: Any) -> Case:
    return Case("color_histogram", shape, args={"bins": bins}, output=(*shape[:2], bins), **more)


def cases(device: str) -> list[Case]:
    batch = 1 if device == "cpu" else 64
    return with_both_directions([case_of((batch, 3, 512, 512), 16, device=device, quick=True)])


def tiny(device: str) -> list[Case]:
    return [case_of((1, 2, 5, 7), 4, device=device, backward=True)]


def apart(case: Case, x: torch.Tensor) -> torch.Tensor:
    """Shares have kinks at the centres of bins, and end with the range: every half bin."""
    width = (_RANGE[1] - _RANGE[0]) / case.args["bins"]
    halves = (x.double() - _RANGE[0]) / (width / 2)
    from_kink = halves - halves.round()
    moved = x + from_kink.sign().where(from_kink != 0, 1.0) * 1e-3 * width
    return torch.where(from_kink.abs() < 1e-3, moved.to(x.dtype), x)


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    return {}


def bytes(case: Case) -> int:
    """Forward x; backward x → dx; the histograms are small."""
    return case.numel * case.dtype.itemsize * (3 if case.backward else 1)


def flops(case: Case) -> int:
    """A position and two shares a pixel."""
    return case.numel * 6 * (2 if case.backward else 1)


def bind(namespace: Any, case: Case) -> Function:
    bins = case.args["bins"]
    if namespace is functional:
        return lambda t: functional.color_histogram(t["x"], bins, _RANGE, soft=True)

    def plain(t: Any) -> Any:
        return room._reference(t["x"].flatten(2), room._edges(bins, *_RANGE, t["x"]), True, False)[0]

    return plain


def providers(case: Case) -> dict[str, Provider]:
    found = standard_providers(bind, case)
    found.pop("torch channels_last")
    return found
