"""batch_norm · Triton
  y = (x - mean[c]) * rstd[c] * w[c] + b[c],  statistics over N and S, biased variance
  training:   dx = rstd * (w * dy - mean(w * dy) - xhat * mean(w * dy * xhat))
  inference:  dx = rstd * w * dy
  dw[c] = sum dy * xhat,  db[c] = sum dy
layout   x, y, dy, dx: [N, C, *], or [N, *, C] with channels last, S positions · the rest: [C]
mapping  many programs per channel: partial moments of (sample, channel, strip), combined, then applied: _channels.py
memory   forward 2 reads and 1 write, backward 4 reads and 1 write; the second read starts in L2
numerics shifted sums in fp32 (fp64 for fp64) per thread, combined by Chan's formula
"""

from __future__ import annotations

import torch

from . import _channels


def shape_of(x: torch.Tensor, channels_last: bool) -> tuple[int, int, int, bool]:
    """(N, C, S, channels_last): samples of channels-last data follow one another, and so does data without space."""
    n, c, s = _channels.sizes(x, channels_last)
    if channels_last:
        return 1, c, n * s, True
    return (1, c, n, True) if s == 1 else (n, c, s, False)


def batch_norm_fwd(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, channels_last: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    n, c, s, last = shape_of(x, channels_last)
    mean, rstd, var = _channels.statistics(x, n, c, s, c, False, eps, last)
    y = _channels.normalize(x, weight, bias, mean, rstd, n, c, s, c, False, last)
    return y, mean, rstd, var


def batch_norm_infer(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    eps: float,
    channels_last: bool,
) -> torch.Tensor:
    n, c, s, last = shape_of(x, channels_last)
    rstd = (var + eps).rsqrt()
    return _channels.normalize(x, weight, bias, mean, rstd, n, c, s, c, False, last)


def batch_norm_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    training: bool,
    channels_last: bool,
    need_dx: bool,
    need_dw: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n, c, s, last = shape_of(x, channels_last)
    return _channels.backward(dy, x, weight, mean, rstd, n, c, s, c, False, not training, last, need_dx, need_dw)


specimens = _channels.specimens
