"""What each op is checked on: a room states its samples, ``pyops.testing`` and the test-suite run them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


class Maker:
    """Makes the tensors of one sample: the same numbers in every dtype and on every device, from one seed."""

    def __init__(self, dtype: torch.dtype, device: str = "cpu", requires_grad: bool = False, seed: int = 0) -> None:
        self.dtype = dtype
        self.device = device
        self.requires_grad = requires_grad
        self.inputs: list[torch.Tensor] = []
        self._generator = torch.Generator().manual_seed(seed)

    def _normal(self, shape: Sequence[int]) -> torch.Tensor:
        # rounded to bfloat16 so that every dtype holds exactly these numbers
        return torch.randn(tuple(shape), generator=self._generator, dtype=torch.float64).bfloat16().double()

    def input(self, shape: Sequence[int], shift: float = 0.0, channels_last: bool = False) -> torch.Tensor:
        """A differentiable input, standard normal around ``shift``."""
        x = self._normal(shape) + shift
        if channels_last:
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        x = x.to(self.dtype).to(self.device)
        x = x.requires_grad_() if self.requires_grad else x
        self.inputs.append(x)
        return x

    def boxes(self, count: int, spread: float = 1.0) -> torch.Tensor:
        """Differentiable boxes ``[count, 4]`` as (x1, y1, x2, y2): corners around 0, sides of 1/2 and more."""
        x = self._normal((count, 4))
        x[:, 2:] = x[:, :2] * spread + x[:, 2:].abs() + 0.5
        x[:, :2] *= spread
        x = x.bfloat16().to(self.dtype).to(self.device)
        x = x.requires_grad_() if self.requires_grad else x
        self.inputs.append(x)
        return x

    def constant(self, shape: Sequence[int], positive: bool = False) -> torch.Tensor:
        """A tensor without gradient, standard normal or, for variances, at least 1/2."""
        x = self._normal(shape)
        return (x.abs() + 0.5 if positive else x).to(self.dtype).to(self.device)


@dataclass(frozen=True)
class Sample:
    """One case: its reason as a name, and how to make its arguments.

    ``derivatives`` marks the small cases on which numerical derivatives of first and second order are taken.
    """

    name: str
    make: Callable[[Maker], tuple[tuple[Any, ...], dict[str, Any]]]
    derivatives: bool = False


@dataclass(frozen=True)
class Checked:
    """An op with its torch reference and samples."""

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    samples: tuple[Sample, ...]


_checked: dict[str, Checked] = {}


def checked(name: str, function: Callable[..., Any], reference: Callable[..., Any], *samples: Sample) -> None:
    """Enters an op into the list of what ``python -m pyops check`` and the tests run."""
    _checked[name] = Checked(name, function, reference, samples)


def all_checked() -> dict[str, Checked]:
    """Every op with samples, by name."""
    return dict(_checked)
