"""Mixup and CutMix: training on mixtures of two examples of a batch, and of their labels.

    mixup    x'[n] = λ x[n] + (1 - λ) x[n-1]                 t'[n] = λ t[n] + (1 - λ) t[n-1]
    cutmix   x'[n] = x[n-1] inside a random box, x[n] outside, λ the share outside; t' as above

    x: [N, C, H, W] (mixup: [N, *]), t: class indices [N] or probabilities [N, K], x[-1] the last example
    λ ~ Beta(α, α), one for the batch; the box has the sides H √(1 - λ), W √(1 - λ) and a uniform centre, and is cut at
    the border, after which λ becomes 1 - area / (H W)

Sources: Zhang et al. 2018, https://arxiv.org/abs/1710.09412; Yun et al. 2019, https://arxiv.org/abs/1905.04899;
torchvision.transforms.v2.MixUp and CutMix, which pair examples alike. Put together from torch's ops; differentiable in
x and t; random numbers come from torch's generator of the device, and nothing is read back to the host.
"""

from __future__ import annotations

import torch

from ..core import check
from ..core.explain import composite


def _share(op: str, input: torch.Tensor, alpha: float, generator: torch.Generator | None) -> torch.Tensor:
    """λ, a scalar tensor in float32."""
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        check.fail(TypeError, op, "alpha", type(alpha).__name__, "a number")
    if not alpha > 0:
        check.fail(ValueError, op, "alpha", alpha, "a number > 0")
    return torch._sample_dirichlet(torch.full((2,), float(alpha), device=input.device), generator)[0]


def _labels(op: str, input: torch.Tensor, target: torch.Tensor, num_classes: int | None) -> torch.Tensor:
    """Probabilities [N, K]."""
    if input.dim() == 0:
        check.fail(ValueError, op, "input", "0 dimensions", "[N, *]")
    if not isinstance(target, torch.Tensor):
        check.fail(TypeError, op, "target", type(target).__name__, "a tensor")
    if target.dim() not in (1, 2) or target.shape[0] != input.shape[0]:
        want = f"[{input.shape[0]}] class indices or [{input.shape[0]}, K] probabilities"
        check.fail(ValueError, op, "target", f"shape {list(target.shape)}", want)
    if target.dim() == 2:
        check.floating(op, "target", target)
        return target
    if target.is_floating_point():
        check.fail(ValueError, op, "target", target.dtype, "an integer dtype for class indices")
    if num_classes is None:
        check.fail(ValueError, op, "num_classes", None, "a number: class indices do not tell it")
    if isinstance(num_classes, bool) or not isinstance(num_classes, int):
        check.fail(TypeError, op, "num_classes", repr(num_classes), "an int")
    if num_classes < 1:
        check.fail(ValueError, op, "num_classes", num_classes, "an int >= 1")
    try:
        return torch.nn.functional.one_hot(target.long(), num_classes).to(input.dtype)
    except RuntimeError as error:
        if "Class values" not in str(error):
            raise
        check.outside(RuntimeError, op, "target", target, num_classes)


def _mixed(t: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    return torch.lerp(t.roll(1, 0), t, share.to(t.dtype))


def mixup(
    input: torch.Tensor,
    target: torch.Tensor,
    alpha: float = 1.0,
    num_classes: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixes each example and its label with the one before it, all in the same proportion.

    Args:
        input: Tensor[N, *], floating point.
        target: Tensor[N] of class indices, or Tensor[N, K] of probabilities.
        alpha: parameter of the Beta distribution of the proportion, > 0; small ones mix little.
        num_classes: K, where ``target`` holds class indices.
        generator: where random numbers come from; torch's own of the device if None.

    Returns:
        (inputs, Tensor[N, *]; targets, Tensor[N, K]), for a cross-entropy with probabilities.

    Raises:
        ValueError: alpha <= 0, targets of another shape, class indices without ``num_classes``, ``num_classes`` < 1.
        RuntimeError: a class index outside [0, K), on the CPU.
    """
    check.floating("mixup", "input", input)
    labels = _labels("mixup", input, target, num_classes)
    share = _share("mixup", input, alpha, generator)
    return _mixed(input, share), _mixed(labels, share)


def cutmix(
    input: torch.Tensor,
    target: torch.Tensor,
    alpha: float = 1.0,
    num_classes: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Replaces one box in every image by that of the image before it, and mixes the labels by area.

    Args:
        input: Tensor[N, *, H, W], floating point.
        target, alpha, num_classes, generator: as of ``mixup``.

    Returns:
        (inputs, Tensor[N, *, H, W]; targets, Tensor[N, K]).

    Raises:
        ValueError: as ``mixup``, and for an input of fewer than three dimensions.
    """
    op = "cutmix"
    check.floating(op, "input", input)
    if input.dim() < 3:
        check.fail(ValueError, op, "input", f"{input.dim()} dimensions", "[N, *, H, W]")
    labels = _labels(op, input, target, num_classes)
    share = _share(op, input, alpha, generator)
    half = 0.5 * torch.sqrt(1 - share)
    inside: list[torch.Tensor] = []
    for size in input.shape[-2:]:
        centre = torch.randint(size, (), device=input.device, generator=generator)
        reach = (half * size).long()
        at = torch.arange(size, device=input.device)
        inside.append((at >= centre - reach) & (at < centre + reach))
    box = inside[0][:, None] & inside[1]
    share = 1 - box.sum() / (box.numel() or 1)
    return torch.where(box, input.roll(1, 0), input), _mixed(labels, share)


composite("mixup", "cutmix")
