"""Stochastic depth: a residual branch is dropped at random while training.

    y = x * b / (1 - p),   b = 0 with probability p, else 1; one b per example ("row") or for all ("batch")

Source: Huang et al. 2016, https://arxiv.org/abs/1603.09382; torchvision.ops.stochastic_depth.
"""

from __future__ import annotations

import torch

from ..core import check
from ..core.explain import composite
from ..core.masking import check_probability


def stochastic_depth(input: torch.Tensor, p: float, mode: str, training: bool = True) -> torch.Tensor:
    """Zeroes examples, or the whole batch, with probability p; drops in for torchvision.ops.stochastic_depth.

    Args:
        input: Tensor[N, *].
        p: probability of dropping, in [0, 1].
        mode: ``"row"``: each example alone; ``"batch"``: all together.
        training: False returns the input.

    Returns:
        Tensor[N, *]; what stays is divided by 1 - p. Random numbers come from torch's generator, as torchvision's do.

    Raises:
        ValueError: p outside [0, 1], an unknown mode.
        IndexError: a scalar input, which has no examples, with ``"row"``.
    """
    if not isinstance(input, torch.Tensor):
        check.fail(TypeError, "stochastic_depth", "input", type(input).__name__, "a tensor")
    check_probability("stochastic_depth", "p", p)
    if mode not in ("batch", "row"):
        check.fail(ValueError, "stochastic_depth", "mode", repr(mode), "'batch' or 'row'")
    if not training or p == 0.0:
        return input
    if mode == "row" and input.dim() == 0:
        check.fail(IndexError, "stochastic_depth", "input", "0 dimensions", "[N, *]")
    size = [input.shape[0] if mode == "row" else 1] + [1] * (input.dim() - 1)
    keep = torch.empty(size, dtype=input.dtype, device=input.device).bernoulli_(1 - p)
    return input * (keep / (1 - p) if p < 1 else keep)


class StochasticDepth(torch.nn.Module):
    """``stochastic_depth`` as a module; see torchvision.ops.StochasticDepth."""

    def __init__(self, p: float, mode: str) -> None:
        super().__init__()
        self.p = p
        self.mode = mode

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return stochastic_depth(input, self.p, self.mode, self.training)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(p={self.p}, mode={self.mode})"


composite("stochastic_depth")
