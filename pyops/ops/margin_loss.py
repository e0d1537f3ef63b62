"""The hinge of several classes: every class within a margin of the label's costs what it lacks.

    loss[m] = w_t / N Σ_{n≠t} max(0, d - x_t + x_n)^p        t = target[m], d the margin, p = 1 or 2

    x: [M, N], scores; target, loss: [M]

Source: torch.nn.functional.multi_margin_loss; Crammer, Singer 2001,
https://jmlr.org/papers/v2/crammer01a.html (who take the largest term, not the sum); Weston, Watkins 1999. The gradient
is derived in docs/math/losses.md.
"""

from __future__ import annotations

from typing import Any

import torch

from ..core import autocast, backend, check, library
from ..core.autograd import Formula, differentiable
from ..core.intercept import route
from ..core.samples import Maker, Sample, checked

_kernels = library.triton_kernels("margin_loss")
_torch = torch.nn.functional

_fwd = library.declare(
    "margin_loss_fwd(Tensor x, Tensor target, Tensor? weight, int p, float margin) -> Tensor",
    lambda x, *_: x.new_empty(x.shape[0], dtype=check.accumulate_dtype(x.dtype)),
    _kernels,
)
_bwd = library.declare(
    "margin_loss_bwd(Tensor g, Tensor x, Tensor target, Tensor? weight, int p, float margin) -> Tensor",
    lambda g, x, *_: torch.empty_like(x),
    _kernels,
)


def _reference(x, target, weight, p, margin):
    wide = x.to(check.accumulate_dtype(x.dtype))
    label = target.unsqueeze(1)
    z = (margin - wide.gather(1, label) + wide).clamp(min=0)
    z = torch.where(torch.arange(x.shape[1], device=x.device) == label, 0.0, z if p == 1 else z * z)
    loss = z.sum(1) / x.shape[1]
    return (loss if weight is None else loss * weight[target],)


def _fold(forward, batch, dims, inputs, constants):
    """A batch is more rows, where all share the weights."""
    if dims[2] is not None:
        return None
    x, target = (t.expand(batch, *t.shape) if d is None else t.movedim(d, 0) for t, d in zip(inputs[:2], dims))
    return forward(x.flatten(0, 1), target.flatten(0, 1), inputs[2], *constants).view(batch, -1), 0


_apply = differentiable(
    Formula(_fwd, _bwd, 3, 1, lambda g, inputs, kept, constants, needs: (g, *inputs, *constants), _reference, _fold)
)


def multi_margin_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """The multi-class hinge of a support vector machine; drops in for torch.nn.functional.multi_margin_loss.

    Args:
        input: Tensor[N, C] or [C], scores in float32, float64, bfloat16 or float16.
        target: int64 labels in [0, C), Tensor[N] or [].
        p: power of the hinge, 1 or 2.
        margin: by how much the label's score has to lead.
        weight: Tensor[C] that multiplies the losses by their labels, or None.
        size_average, reduce: torch's legacy spelling of ``reduction``.
        reduction: ``"none"``, ``"mean"`` (over the rows) or ``"sum"``.

    Returns:
        A scalar, or with ``"none"`` a Tensor[N].

    Raises:
        ValueError: another p, a weight that requires a gradient, an unknown reduction.
        RuntimeError: shapes that do not fit; a label outside [0, C), on the CPU. On a GPU its loss is NaN.

    Computed in float32 (float64 for float64), reductions too. Bitwise deterministic. The gradient is 0 where a class
    lies exactly on the margin; a NaN score costs nothing, as in torch. Gradients of every order, forward mode, vmap and
    torch.compile.
    """
    op = "multi_margin_loss"
    check.floating(op, "input", input)
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    if reduction not in ("none", "mean", "sum"):
        check.fail(ValueError, op, "reduction", repr(reduction), "'none', 'mean' or 'sum'")
    if p not in (1, 2):
        check.fail(ValueError, op, "p", p, "1 or 2")
    if not isinstance(target, torch.Tensor):
        check.fail(TypeError, op, "target", type(target).__name__, "a tensor")
    x: Any = autocast.cast(op, input)[0]
    if x.dim() not in (1, 2) or x.shape[-1] == 0:
        check.fail(RuntimeError, op, "input", f"shape {list(x.shape)}", "[N, C] or [C] with C > 0")
    labels, rows = target.reshape(-1), x.contiguous().reshape(-1, x.shape[-1])
    if target.dtype != torch.int64:
        check.fail(RuntimeError, op, "target", target.dtype, "torch.int64")
    if target.dim() > 1 or labels.shape[0] != rows.shape[0]:
        check.fail(RuntimeError, op, "target", f"shape {list(target.shape)}", f"{rows.shape[0]} labels")
    if weight is not None:
        if weight.requires_grad and torch.is_grad_enabled():
            check.fail(ValueError, op, "weight", "a tensor that requires a gradient", "one that does not")
        if weight.shape != x.shape[-1:]:
            kind = RuntimeError if weight.dim() == 1 else ValueError
            check.fail(kind, op, "weight", f"shape {list(weight.shape)}", f"shape {[x.shape[-1]]}")
        weight = weight.to(check.accumulate_dtype(x.dtype)).contiguous()
    try:
        loss = _apply(backend.namespace_for(op, x), rows, labels.contiguous(), weight, int(p), float(margin))
    except RuntimeError as error:
        if "out of bounds" not in str(error):
            raise
        check.outside(RuntimeError, op, "target", labels, x.shape[-1])
    if reduction == "none":
        return loss.to(x.dtype).reshape(target.shape)
    return (loss.mean() if reduction == "mean" else loss.sum()).to(x.dtype)


class MultiMarginLoss(torch.nn.MultiMarginLoss):
    """torch.nn.MultiMarginLoss whose forward is pyops.functional.multi_margin_loss."""

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return multi_margin_loss(input, target, self.p, self.margin, self.weight, reduction=self.reduction)


route((_torch.multi_margin_loss,), "multi_margin_loss", multi_margin_loss)


def _sample(shape, weighted=False, **how):
    def make(t: Maker):
        x = t.input(shape)
        labels = (torch.arange(shape[0]) * 5 + 2) % shape[1]
        more = {"weight": t.constant((shape[1],), positive=True).to(x.dtype)} if weighted else {}
        return (x, labels.to(t.device)), {**more, **how}

    return make


def _truth(input, target, p=1, margin=1.0, weight=None, reduction="mean"):
    """torch's own has no second derivative."""
    wide = None if weight is None else weight.to(check.accumulate_dtype(input.dtype))
    loss = _reference(input, target, wide, p, margin)[0]
    return (loss if reduction == "none" else getattr(loss, reduction)()).to(input.dtype)


checked(
    "multi_margin_loss",
    multi_margin_loss,
    _truth,
    Sample("rows, tail of a vector load", _sample((5, 7)), derivatives=True),
    Sample("squared, weighted", _sample((3, 5), True, p=2, margin=0.7), derivatives=True),
    Sample("none reduced", _sample((4, 19), reduction="none", margin=2.3)),
    Sample("long rows", _sample((2, 4100), reduction="sum", p=2)),
    Sample("no rows", _sample((0, 7), reduction="sum")),
)
