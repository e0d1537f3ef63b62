"""Cross-entropy of classes: from logits or from their log-probabilities, against labels or probabilities.

    labels         loss = -(1 - ε) w_t log p_t - (ε / N) Σ_n w_n log p_n + z lse²        log p = x - lse(x)
    probabilities  loss = -Σ_n w_n t'_n log p_n,  t' = (1 - ε) t + ε / N
    nll            loss = -w_t x_t,  x = log p already

    x: [M, N, S], N classes; t: labels [M, S] or probabilities [M, N, S]; loss: [M, S]
    mean: Σ loss / Σ w_t over the labels that count; for probabilities Σ loss / (M S)

Sources: torch.nn.functional.cross_entropy; Szegedy et al. 2016 (label smoothing ε), https://arxiv.org/abs/1512.00567;
Chowdhery et al. 2022 (z-loss), https://arxiv.org/abs/2204.02311. The gradients are derived in docs/math/losses.md.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ..core import autocast, backend, check, library, product
from ..core.autograd import Formula, Tensors, differentiable
from ..core.intercept import route
from ..core.samples import Maker, Sample, checked

_kernels = library.triton_kernels("cross_entropy")
_torch = torch.nn.functional
# Of the logits that linear_cross_entropy holds at a time; from here on glibc gives memory back that is freed
CHUNK_BYTES = 32 << 20


def _statistics(x: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    shape = x.shape[0], x.shape[2]
    return tuple(x.new_empty(shape, dtype=check.accumulate_dtype(x.dtype)) for _ in range(count))


_fwd = library.declare(
    "cross_entropy_fwd(Tensor x, Tensor target, Tensor? weight, int ignore, float smoothing, float z, bool logits)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    lambda x, *_: _statistics(x, 4),
    _kernels,
)
_bwd = library.declare(
    "cross_entropy_bwd(Tensor g, Tensor x, Tensor target, Tensor? weight, Tensor top, Tensor total, int ignore, "
    "float smoothing, float z, bool logits) -> Tensor",
    lambda g, x, *_: torch.empty_like(x),
    _kernels,
)
_soft_fwd = library.declare(
    "soft_cross_entropy_fwd(Tensor x, Tensor q, Tensor? weight, float smoothing) -> (Tensor, Tensor, Tensor)",
    lambda x, *_: _statistics(x, 3),
    _kernels,
)
_soft_bwd = library.declare(
    "soft_cross_entropy_bwd(Tensor g, Tensor x, Tensor q, Tensor? weight, Tensor top, Tensor total, float smoothing, "
    "bool need_dq) -> (Tensor, Tensor)",
    lambda g, x, q, weight, top, total, smoothing, need_dq: (
        torch.empty_like(x),
        x.new_empty(x.shape[0] if need_dq else 0, *x.shape[1:]),
    ),
    _kernels,
)


def _log_p(x: torch.Tensor, logits: bool) -> Tensors:
    """log p, max and Σ exp(x - max), in the dtype of sums."""
    wide = x.to(check.accumulate_dtype(x.dtype))
    if not logits:
        zero = torch.zeros_like(wide[:, 0])
        return wide, zero, zero + 1
    top = wide.detach().amax(1)
    return wide.log_softmax(1), top, (wide.detach() - top.unsqueeze(1)).exp().sum(1)


def _reference(x, target, weight, ignore, smoothing, z, logits):
    log_p, top, total = _log_p(x, logits)
    counts = target != ignore
    label = torch.where(counts, target, 0)
    w = log_p.new_ones(x.shape[1]) if weight is None else weight
    of_label = torch.where(counts, w[label], 0.0)
    loss = -(1 - smoothing) * of_label * log_p.gather(1, label.unsqueeze(1)).squeeze(1)
    if smoothing:
        loss = loss - smoothing / x.shape[1] * (log_p * w[:, None]).sum(1)
    if z:
        loss = loss + z * x.to(log_p.dtype).logsumexp(1) ** 2
    return torch.where(counts, loss, 0.0), of_label.detach(), top, total


def _soft_reference(x, q, weight, smoothing):
    log_p, top, total = _log_p(x, True)
    t = (1 - smoothing) * q.to(log_p.dtype) + smoothing / x.shape[1]
    return -((t if weight is None else t * weight[:, None]) * log_p).sum(1), top, total


def _fold(forward, batch, dims, inputs, constants):
    """A batch is more rows, where all share the weights."""
    if dims[2] is not None:
        return None
    x, target = (t.expand(batch, *t.shape) if d is None else t.movedim(d, 0) for t, d in zip(inputs[:2], dims))
    outputs = forward(x.flatten(0, 1), target.flatten(0, 1), inputs[2], *constants)
    return tuple(t.unflatten(0, (batch, -1)) for t in outputs), (0,) * len(outputs)


_apply = differentiable(
    Formula(
        _fwd, _bwd, 3, 1,
        lambda g, inputs, kept, constants, needs: (g, *inputs, *kept[-2:], *constants),
        _reference,
        _fold,
        keep=(2, 3),
    )
)  # fmt: skip
_apply_soft = differentiable(
    Formula(
        _soft_fwd, _soft_bwd, 3, 2,
        lambda g, inputs, kept, constants, needs: (g, *inputs, *kept, *constants, needs[1]),
        _soft_reference,
        _fold,
    )
)  # fmt: skip


# Arguments


def _reduction(op: str, reduction: Any, size_average: Any, reduce: Any) -> str:
    """The reduction, from torch's legacy arguments where they are given."""
    if size_average is not None or reduce is not None:
        return str(torch.nn._reduction.legacy_get_string(size_average, reduce))
    if reduction not in ("none", "mean", "sum"):
        check.fail(ValueError, op, "reduction", repr(reduction), "'none', 'mean' or 'sum'")
    return str(reduction)


def _as_rows(x: torch.Tensor, class_dim: int) -> tuple[torch.Tensor, bool]:
    """x as [M, N, S], and whether its classes lie last in memory (channels last), so that S = 1."""
    if class_dim == 0:
        return x.contiguous().view(1, -1, 1), False
    if x.dim() > 2 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous():
        return x.movedim(1, -1).reshape(math.prod(x.shape) // (x.shape[1] or 1), x.shape[1], 1), True
    return x.contiguous().reshape(x.shape[0], x.shape[1], math.prod(x.shape[2:])), False


def _checked_weight(op: str, x: torch.Tensor, weight: Any, classes: int) -> torch.Tensor | None:
    if weight is None:
        return None
    if not isinstance(weight, torch.Tensor):
        check.fail(TypeError, op, "weight", type(weight).__name__, "a tensor or None")
    if weight.shape != (classes,) or weight.device != x.device:
        got = f"shape {list(weight.shape)} on {weight.device}"
        check.fail(RuntimeError, op, "weight", got, f"shape [{classes}] on {x.device}, a number for each class")
    if torch.is_grad_enabled() and weight.requires_grad:
        check.fail(RuntimeError, op, "weight", "a tensor that requires a gradient", "one that does not: it has none")
    return weight.to(check.accumulate_dtype(x.dtype)).contiguous()


def _checked_labels(op: str, x: torch.Tensor, target: torch.Tensor, batch: bool) -> torch.Tensor:
    want = (x.shape[0], *x.shape[2:]) if batch else ()
    if target.dtype not in (torch.int64, torch.uint8):
        check.fail(RuntimeError, op, "target", target.dtype, "torch.int64 or torch.uint8")
    if not batch and tuple(target.shape) == (1,):
        target = target.reshape(())
    if tuple(target.shape) != want:
        size_differs = target.dim() > 0 and target.shape[0] != x.shape[0] if batch else target.dim() == 1
        kind = ValueError if size_differs else RuntimeError
        check.fail(kind, op, "target", f"shape {list(target.shape)}", f"shape {list(want)}, a label for each row")
    return target.long()


def _labelled(
    op: str, x: torch.Tensor, target: torch.Tensor, weight: Any, ignore_index: int, reduction: str,
    smoothing: float, z_loss: float, logits: bool,
) -> torch.Tensor:  # fmt: skip
    """Losses of labels, or from labels and log-probabilities (``logits`` false), reduced."""
    batch = x.dim() > 1
    classes = x.shape[1 if batch else 0]
    labels = _checked_labels(op, x, target, batch)
    if isinstance(weight, torch.Tensor) and weight.dtype not in (x.dtype, check.accumulate_dtype(x.dtype)):
        wide = check.accumulate_dtype(x.dtype)
        check.fail(RuntimeError, op, "weight", weight.dtype, f"{x.dtype} or {wide} for an input of {x.dtype}")
    w = _checked_weight(op, x, weight, classes)
    rows, last = _as_rows(x, 1 if batch else 0)
    shape, labels = labels.shape, labels.contiguous().reshape(rows.shape[0], rows.shape[2])
    arguments = int(ignore_index), smoothing, z_loss, logits
    try:
        loss, divisor, *_ = _apply(backend.namespace_for(op, x), rows, labels, w, *arguments)
    except RuntimeError as error:
        if "out of bounds" not in str(error):
            raise
        check.outside(IndexError, op, "target", labels, classes, int(ignore_index))
    if reduction == "none":
        return loss.to(x.dtype).reshape(shape)
    total = loss.sum() if reduction == "sum" else loss.sum() / divisor.sum()
    return total if total.dtype == x.dtype else total.to(x.dtype)


def _number(op: str, argument: str, value: Any, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        check.fail(TypeError, op, argument, type(value).__name__, "a number")
    if not 0 <= value <= high:
        check.fail(
            RuntimeError, op, argument, value, f"a number in [0, {high}]" if high < math.inf else "a number >= 0"
        )
    return float(value)


# The functions


def cross_entropy(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> torch.Tensor:
    """Cross-entropy of logits against labels or probabilities; drops in for torch.nn.functional.cross_entropy.

    Args:
        input: Tensor[C], [N, C] or [N, C, *], logits in float32, float64, bfloat16 or float16.
        target: labels in [0, C), int64 or uint8, Tensor[] or [1], [N] or [N, *]; or probabilities of the input's shape.
        weight: Tensor[C], how much a class counts; None: 1 each. For labels of the input's dtype, or float32 for half
            precision.
        size_average, reduce: torch's legacy spelling of ``reduction``.
        ignore_index: the label that counts nothing.
        reduction: ``"none"``, ``"mean"`` (over the weights of the labels that count) or ``"sum"``.
        label_smoothing: ε in [0, 1]: the share of each label that is spread evenly over the classes.
        z_loss: factor of ``lse²``, which holds logits near 0; for labels only. Not in torch.

    Returns:
        A scalar, or with ``"none"`` a Tensor of the labels' shape, in the dtype of the input; of probabilities in that
        to which input, target and weight promote.

    Raises:
        IndexError: a label outside [0, C), on the CPU; on a GPU its loss is NaN, and nothing is read.
        ValueError: batch sizes that differ, an unknown reduction.
        RuntimeError: other shapes or dtypes that do not fit.

    Computed in float32 (float64 for float64), reductions too; two numbers for each row are kept for the backward pass,
    whatever the number of classes. Bitwise deterministic. Gradients of every order, in the logits and in probabilities;
    forward mode, vmap and torch.compile.
    """
    op = "cross_entropy"
    check.floating(op, "input", input)
    if not isinstance(target, torch.Tensor):
        check.fail(TypeError, op, "target", type(target).__name__, "a tensor")
    reduction = _reduction(op, reduction, size_average, reduce)
    smoothing, z = _number(op, "label_smoothing", label_smoothing, 1.0), _number(op, "z_loss", z_loss, math.inf)
    if input.dim() < 1:
        check.fail(RuntimeError, op, "input", "0 dimensions", "[C], [N, C] or [N, C, *]")
    x: Any
    x, weight = autocast.cast(op, input, weight)
    if target.shape != input.shape:
        return _labelled(op, x, target, weight, ignore_index, reduction, smoothing, z, True)
    if not target.is_floating_point():
        check.fail(RuntimeError, op, "target", target.dtype, "a floating dtype for probabilities of the input's shape")
    if ignore_index >= 0:
        check.fail(RuntimeError, op, "ignore_index", ignore_index, "none with probabilities")
    if z:
        check.fail(RuntimeError, op, "z_loss", z_loss, "0 with probabilities")
    classes = x.shape[1 if x.dim() > 1 else 0]
    if isinstance(weight, torch.Tensor):  # the types of all three meet in the result, as in torch
        x = x.to(torch.promote_types(x.dtype, weight.dtype))
    x = x.to(torch.promote_types(x.dtype, target.dtype))
    w = _checked_weight(op, x, weight, classes)
    rows, last = _as_rows(x, 1 if x.dim() > 1 else 0)
    q = target.to(x.dtype)
    q = q.movedim(1, -1).contiguous().reshape(rows.shape) if last else q.contiguous().reshape(rows.shape)
    loss = _apply_soft(backend.namespace_for(op, x), rows, q, w, smoothing)[0]
    if reduction == "none":
        shape = (x.shape[0], *x.shape[2:]) if x.dim() > 1 else ()
        return loss.to(x.dtype).reshape(shape)
    total = loss.sum()
    # torch's mean of no elements, or no classes, is NaN
    return (total if reduction == "sum" else total / (loss.numel() * min(classes, 1) or math.nan)).to(x.dtype)


def nll_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """``-weight[t] * x[t]``, x log-probabilities; drops in for torch.nn.functional.nll_loss.

    Args:
        input: Tensor[C], [N, C] or [N, C, *], log-probabilities.
        target, weight, size_average, ignore_index, reduce, reduction: as of ``cross_entropy``, labels only.

    Returns:
        A scalar, or with ``"none"`` a Tensor of the labels' shape.

    Raises:
        As ``cross_entropy``.
    """
    op = "nll_loss"
    check.floating(op, "input", input)
    if not isinstance(target, torch.Tensor):
        check.fail(TypeError, op, "target", type(target).__name__, "a tensor")
    if input.dim() < 1:
        check.fail(ValueError, op, "input", "0 dimensions", "[C], [N, C] or [N, C, *]")
    x: Any
    x, weight = autocast.cast(op, input, weight)
    reduction = _reduction(op, reduction, size_average, reduce)
    return _labelled(op, x, target, weight, ignore_index, reduction, 0.0, 0.0, False)


def linear_cross_entropy(
    input: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    class_weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk: int | None = None,
) -> torch.Tensor:
    """``cross_entropy(linear(input, weight, bias), target)``, never holding the logits of more than some rows.

    The rows are taken in chunks. The forward pass drops a chunk's logits as soon as its losses are known, the backward
    pass computes them again: memory is that of one chunk, time that of one more product.

    Args:
        input: Tensor[*, D].
        weight: Tensor[C, D], the classifier (the unembedding of a language model).
        target: int64 labels, Tensor[*].
        bias: Tensor[C] or None.
        class_weight, ignore_index, reduction, label_smoothing, z_loss: ``weight`` and so on of ``cross_entropy``.
        chunk: rows at a time; None: as many as have 32 MiB of logits.

    Returns:
        A scalar, or with ``"none"`` a Tensor of the target's shape, in the dtype of the products.

    Raises:
        RuntimeError: shapes that do not fit.
        ValueError: ``chunk`` < 1, an unknown reduction.
    """
    op = "linear_cross_entropy"
    check.floating(op, "input", input)
    check.floating(op, "weight", weight)
    if weight.dim() != 2 or input.dim() < 1 or input.shape[-1] != weight.shape[1]:
        got = f"shapes {list(input.shape)} and {list(weight.shape)}"
        check.fail(RuntimeError, op, "weight", got, "input [*, D] and weight [C, D]")
    if target.shape != input.shape[:-1]:
        check.fail(RuntimeError, op, "target", f"shape {list(target.shape)}", f"shape {list(input.shape[:-1])}")
    reduction = _reduction(op, reduction, None, None)
    smoothing, z = _number(op, "label_smoothing", label_smoothing, 1.0), _number(op, "z_loss", z_loss, math.inf)
    if chunk is not None and chunk < 1:
        check.fail(ValueError, op, "chunk", chunk, "at least 1 row")
    (class_weight,) = autocast.cast(op, input, class_weight)[1:]
    rows, labels = input.reshape(-1, input.shape[-1]), target.reshape(-1)
    step = chunk or CHUNK_BYTES // max(weight.shape[0] * weight.element_size(), 1) + 1

    def losses(x: torch.Tensor, t: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
        logits: Any = autocast.cast(op, product.linear(x, w, b))[0]
        return _labelled(op, logits, t, class_weight, ignore_index, "none", smoothing, z, True)

    failures: list[Exception] = []
    recomputing = False

    def losses_or_failure(*part: Any) -> torch.Tensor:
        try:
            return losses(*part)
        except Exception as error:
            if recomputing:  # checkpoint's own signal to stop, whose traceback holds the logits
                raise
            failures.append(error)
            return part[0]

    recomputes = torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active()
    parts = []
    for first in range(0, max(rows.shape[0], 1), step):
        part = rows[first : first + step], labels[first : first + step], weight, bias
        if recomputes:
            # torch before 2.13: an error from within leaves the hooks of checkpoint on every graph built afterwards
            parts.append(checkpoint(losses_or_failure, *part, use_reentrant=False))
            if failures:
                raise failures[0]
        else:
            parts.append(losses(*part))
    recomputing = True
    loss = torch.cat(parts)
    if reduction == "none":
        return loss.reshape(target.shape)
    total = loss.sum(dtype=check.accumulate_dtype(loss.dtype))
    if reduction == "sum":
        return total.to(loss.dtype)
    counts = labels != ignore_index
    if class_weight is None:
        divisor = counts.sum()
    else:
        divisor = torch.where(counts, class_weight.to(total.dtype)[torch.where(counts, labels, 0)], 0).sum()
    return (total / divisor).to(loss.dtype)


# The modules


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss whose forward is pyops.functional.cross_entropy."""

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return cross_entropy(
            input, target, self.weight, ignore_index=self.ignore_index, reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )  # fmt: skip


class NLLLoss(torch.nn.NLLLoss):
    """torch.nn.NLLLoss whose forward is pyops.functional.nll_loss."""

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nll_loss(input, target, self.weight, ignore_index=self.ignore_index, reduction=self.reduction)


for _function in (cross_entropy, nll_loss):
    route((getattr(_torch, _function.__name__),), _function.__name__, _function)


# Samples


def _labels(t: Maker, shape, classes, ignored=None):
    labels = (torch.arange(math.prod(shape)) * 7 + 3).reshape(shape) % classes
    if ignored is not None:
        labels[labels == 1] = ignored
    return labels.to(t.device)


def _sample(shape, channels_last=False, weighted=False, ignored=None, shift=0.0, **how):
    def make(t: Maker):
        x = t.input(shape, shift=shift, channels_last=channels_last)
        labels = _labels(t, (shape[0], *shape[2:]), shape[1], ignored)
        more = {"weight": t.constant((shape[1],), positive=True).to(x.dtype)} if weighted else {}
        more |= {"ignore_index": ignored} if ignored is not None else {}
        return (x, labels), {**more, **how}

    return make


def _soft_sample(shape, channels_last=False, weighted=False, **how):
    def make(t: Maker):
        x, q = t.input(shape, channels_last=channels_last), t.input(shape, channels_last=channels_last)
        with torch.no_grad():
            q.copy_((q.double().softmax(1) * 64).round() / 64)
        more = {"weight": t.constant((shape[1],), positive=True)} if weighted else {}
        return (x, q), {**more, **how}

    return make


def _truth(input, target, z_loss=0.0, **how):
    loss = _torch.cross_entropy(input, target, **how)
    if not z_loss:
        return loss
    counts = target != how.get("ignore_index", -100)
    wide = input.to(check.accumulate_dtype(input.dtype))
    extra = torch.where(counts, wide.logsumexp(1) ** 2, 0.0)
    return (loss + z_loss * extra.sum() / (counts.sum() if how.get("reduction") != "sum" else 1)).to(loss.dtype)


checked(
    "cross_entropy",
    cross_entropy,
    _truth,
    Sample("rows, tail of a vector load", _sample((5, 7), ignored=2), derivatives=True),
    Sample("everything", _sample((4, 5), weighted=True, ignored=-1, label_smoothing=0.2), derivatives=True),
    Sample("probabilities", _soft_sample((3, 5), weighted=True, label_smoothing=0.1), derivatives=True),
    Sample("z-loss", _sample((6, 9), z_loss=0.25), derivatives=True),
    Sample(
        "none reduced, columns", _sample((2, 5, 19), reduction="none", weighted=True, ignored=3, label_smoothing=0.1)
    ),
    Sample("channels last", _sample((2, 5, 9), True, reduction="sum")),
    Sample("probabilities, columns", _soft_sample((2, 4, 19), reduction="none")),
    Sample("probabilities, channels last", _soft_sample((2, 5, 9), True, reduction="sum")),
    Sample("long rows, shifted", _sample((2, 4100), shift=40.0, reduction="sum")),
    Sample("no rows", _sample((0, 7), reduction="sum")),
)
checked(
    "nll_loss",
    nll_loss,
    _torch.nll_loss,
    Sample("rows, weighted", _sample((4, 5), weighted=True, ignored=1), derivatives=True),
    Sample("columns", _sample((2, 5, 19), reduction="none")),
)
