"""Batch normalisation: every channel over the batch and all spatial positions.

    training   y = (x - mean[c]) * rstd[c] * w[c] + b[c]      mean, var over N and S; rstd = 1 / sqrt(var + eps)
    inference  the same with the running statistics in place of mean and var

    x, y: [N, C, *], channels last [N, *, C], S positions   w, b, mean, rstd, var: [C]

Source: Ioffe, Szegedy 2015, https://arxiv.org/abs/1502.03167; torch.nn.functional.batch_norm.
The gradient is derived in docs/math/norms.md.
"""

from __future__ import annotations

import torch

from ..core import autocast, backend, blocking, check, layout, library
from ..core.autograd import Formula, Tensors, differentiable
from ..core.explain import explains
from ..core.intercept import route
from ..core.samples import Maker, Sample, checked

_kernels = library.triton_kernels("batch_norm")


def _channels(x, channels_last):
    return x.shape[-1 if channels_last else 1]


def _fwd_fake(x, weight, bias, eps, channels_last):
    statistic = x.new_empty(_channels(x, channels_last), dtype=check.accumulate_dtype(x.dtype))
    return torch.empty_like(x), statistic, torch.empty_like(statistic), torch.empty_like(statistic)


def _infer_fake(x, weight, bias, mean, var, eps, channels_last):
    return torch.empty_like(x)


def _bwd_fake(dy, x, weight, mean, rstd, training, channels_last, need_dx, need_dw):
    dtype = weight.dtype if weight is not None else mean.dtype
    dw = x.new_empty(_channels(x, channels_last) if need_dw else 0, dtype=dtype)
    return torch.empty_like(x) if need_dx else x.new_empty(0), dw, torch.empty_like(dw)


_fwd = library.declare(
    "batch_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, float eps, bool channels_last)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _fwd_fake,
    _kernels,
)
_infer = library.declare(
    "batch_norm_infer(Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps, bool channels_last)"
    " -> Tensor",
    _infer_fake,
    _kernels,
)
_bwd = library.declare(
    "batch_norm_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, bool training, bool channels_last,"
    " bool need_dx, bool need_dw) -> (Tensor, Tensor, Tensor)",
    _bwd_fake,
    _kernels,
)


def _affine(x, mean, rstd, weight, bias, channels_last):
    """The norm in the dtype of its statistics."""
    along = (lambda t: t) if channels_last else lambda t: layout.along_channels(t, x.dim())
    y = (x - along(mean)) * along(rstd)
    y = y if weight is None else y * along(weight.to(y.dtype))
    return y if bias is None else y + along(bias.to(y.dtype))


def _reference(x, weight, bias, eps, channels_last):
    channel = x.dim() - 1 if channels_last else 1
    over = [d for d in range(x.dim()) if d != channel]
    wide = x.to(check.accumulate_dtype(x.dtype))
    mean = wide.mean(over)
    var = (wide - wide.mean(over, keepdim=True)).square().mean(over)
    rstd = (var + eps).rsqrt()
    y = _affine(wide, mean, rstd, weight, bias, channels_last)
    return y.to(x.dtype), mean.detach(), rstd.detach(), var.detach()


def _infer_reference(x, weight, bias, mean, var, eps, channels_last):
    y = _affine(x.to(mean.dtype), mean, (var + eps).rsqrt(), weight, bias, channels_last)
    return (y.to(x.dtype),)


def _fold(forward, batch, dims, inputs, constants):
    """A batch of batch norms is one batch norm over more channels: [B] moves beside C."""
    if dims[0] is None:
        return None
    channels_last = constants[-1]
    x, *per_channel = inputs
    start = x.dim() - 2 if channels_last else 1
    x = x.movedim(dims[0], start)
    shape = x.shape
    wide = [
        None if t is None else (t.expand(batch, *t.shape) if d is None else t.movedim(d, 0)).reshape(-1)
        for t, d in zip(per_channel, dims[1:])
    ]
    outputs = forward(x.flatten(start, start + 1), *wide, *constants)
    if isinstance(outputs, torch.Tensor):
        return outputs.reshape(shape), start
    y, *statistics = outputs
    return (y.reshape(shape), *(s.reshape(batch, -1) for s in statistics)), (start, *(0,) * len(statistics))


def _backward_arguments(dy, inputs: Tensors, statistics: Tensors, constants: Tensors, needs) -> Tensors:
    x, weight, _ = inputs
    mean, rstd, _ = statistics
    return dy, x, weight, mean, rstd, True, constants[-1], needs[0], needs[1] or needs[2]


def _infer_backward_arguments(dy, inputs: Tensors, statistics: Tensors, constants: Tensors, needs) -> Tensors:
    x, weight, _, mean, var = inputs
    eps, channels_last = constants
    return dy, x, weight, mean, (var + eps).rsqrt(), False, channels_last, needs[0], needs[1] or needs[2]


_apply = differentiable(Formula(_fwd, _bwd, 3, 3, _backward_arguments, _reference, _fold))
_apply_infer = differentiable(Formula(_infer, _bwd, 5, 3, _infer_backward_arguments, _infer_reference, _fold))


def batch_norm(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> torch.Tensor:
    """Normalises every channel over batch and space; drops in for torch.nn.functional.batch_norm.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``, per channel. In training, mean and biased variance are those
    of the batch, and the running statistics move by ``momentum`` towards the mean and the unbiased variance; otherwise
    the running statistics are used.

    Args:
        input: Tensor[N, C] or Tensor[N, C, *], float32, float64, bfloat16 or float16.
        running_mean: Tensor[C] or None; updated in place in training, needed in inference.
        running_var: Tensor[C] or None, together with running_mean.
        weight: Tensor[C] or None (1), in the input's dtype or float32.
        bias: Tensor[C] or None (0), in the weight's dtype.
        training: use the statistics of the batch.
        momentum: weight of the new statistics in the running ones, >= 0.
        eps: added to the variance, > 0 in training, as torch demands.

    Returns:
        Tensor of the input's shape and dtype; channels last where the input is.

    Raises:
        ValueError: one value per channel in training, a negative eps or momentum, one running statistic without the
            other.
        RuntimeError: sizes, devices or dtypes that do not fit together, no running statistics in inference.
        IndexError: an input without a channel dimension.
        NotImplementedError: an input that is not floating point.

    Sums are taken in float32 (float64 for float64), the variance about the mean. Bitwise deterministic. Gradients of
    every order, forward mode, vmap and torch.compile are supported.
    """
    op = "batch_norm"
    check.floating(op, "input", input)
    if input.dim() < 2:
        check.fail(IndexError, op, "input", f"{input.dim()} dimensions", "at least 2: [N, C, *]")
    if (running_mean is None) != (running_var is None):
        check.fail(ValueError, op, "running_var", "one of running_mean and running_var", "both or neither")
    if not training and (running_mean is None or running_var is None):
        check.fail(RuntimeError, op, "running_mean", None, "a tensor in inference")
    check.non_negative(op, "momentum", momentum)
    check.non_negative(op, "eps", eps)
    if training and eps == 0:
        check.fail(ValueError, op, "eps", eps, "a positive number in training")
    input, weight, bias = autocast.cast(op, input, weight, bias)
    channels = (input.shape[1],)
    check.affine(op, input, channels, weight=weight, bias=bias)
    check.statistics(op, input, channels, running_mean=running_mean, running_var=running_var)
    count = input.numel() // max(input.shape[1], 1)
    if training and count == 1:
        check.fail(ValueError, op, "input", f"shape {list(input.shape)}", "more than 1 value per channel in training")

    namespace = backend.namespace_for(op, input)
    x, channels_last = layout.channels(input)
    if not training and running_mean is not None and running_var is not None:
        wide = check.accumulate_dtype(input.dtype)
        mean, var = _statistic(running_mean, wide), _statistic(running_var, wide)
        y = _apply_infer(namespace, x, weight, bias, mean, var, float(eps), channels_last)
        return layout.restore(y, channels_last)
    y, mean, _, var = _apply(namespace, x, weight, bias, float(eps), channels_last)
    if running_mean is not None and running_var is not None and count > 0:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)
    return layout.restore(y, channels_last)


def _statistic(running: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A running statistic as a kernel reads it: without gradient, contiguous, in the dtype of sums."""
    running = running.detach() if running.requires_grad else running
    return (running if running.dtype == dtype else running.to(dtype)).contiguous()


class _BatchNorm(torch.nn.modules.batchnorm._BatchNorm):
    """The forward that the three batch norm modules share; parameters, buffers and state_dict are torch's."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self._check_input_dim(input)
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                # cumulative average: every batch so far weighs the same
                momentum = 1.0 / float(self.num_batches_tracked)
        use_batch_statistics = self.training or (self.running_mean is None and self.running_var is None)
        keep_running = not self.training or self.track_running_stats
        return batch_norm(
            input,
            self.running_mean if keep_running else None,
            self.running_var if keep_running else None,
            self.weight,
            self.bias,
            use_batch_statistics,
            momentum,
            self.eps,
        )


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    """torch.nn.BatchNorm1d whose forward is pyops.functional.batch_norm."""


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    """torch.nn.BatchNorm2d whose forward is pyops.functional.batch_norm."""


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    """torch.nn.BatchNorm3d whose forward is pyops.functional.batch_norm."""


def _notes(shapes, dtype, name):
    return blocking.planes(shapes[0], dtype, "channel") if name == "cpu" else []


explains("batch_norm", _notes)

route((torch.nn.functional.batch_norm, torch.batch_norm), "batch_norm", batch_norm)


def _sample(shape, training=True, running=True, affine=True, eps=1e-5, large_mean=0.0, channels_last=False):
    def make(t: Maker):
        x = t.input(shape, shift=large_mean, channels_last=channels_last)
        parameters = {"weight": t.input(shape[1:2]), "bias": t.input(shape[1:2])} if affine else {}
        mean, var = (t.constant(shape[1:2]), t.constant(shape[1:2], positive=True)) if running else (None, None)
        return (x, mean, var), {**parameters, "training": training, "momentum": 0.3, "eps": eps}

    return make


checked(
    "batch_norm",
    batch_norm,
    torch.nn.functional.batch_norm,
    Sample("training", _sample((2, 3, 4), running=False), derivatives=True),
    Sample("training, channels last", _sample((2, 3, 2, 2), running=False, channels_last=True), derivatives=True),
    Sample("training, no space", _sample((4, 3), running=False, eps=0.1), derivatives=True),
    Sample("running statistics are updated", _sample((3, 2, 4))),
    Sample("inference", _sample((2, 3, 4), training=False), derivatives=True),
    Sample(
        "inference, channels last, no affine", _sample((2, 5, 3, 3), training=False, affine=False, channels_last=True)
    ),
    Sample("no affine", _sample((3, 4, 5), affine=False)),
    Sample("no examples", _sample((0, 3, 4), training=False)),
    Sample("a plane of several vectors, odd width", _sample((3, 5, 7, 37))),
    Sample("a plane of several vectors, channels last", _sample((3, 37, 7, 5), channels_last=True)),
    Sample("three spatial dimensions", _sample((2, 3, 3, 4, 5))),
    Sample("a long channel", _sample((2, 2, 5000))),
    Sample("mean far above the deviation", _sample((4, 3, 40), large_mean=1e3)),
)
