"""Group normalisation, and instance normalisation, which is group normalisation with one channel in a group.

    y[n,c,s] = (x[n,c,s] - mean[n,g]) * rstd[n,g] * w[c] + b[c]        g = c // (C/G), statistics over (C/G, S)

    x, y: [N, C, *], channels last [N, *, C], S positions   w, b: [C]   mean, rstd, var: [N, G]

Source: Wu, He 2018, https://arxiv.org/abs/1803.08494; Ulyanov et al. 2016, https://arxiv.org/abs/1607.08022;
torch.nn.functional.group_norm and instance_norm. The gradient is derived in docs/math/norms.md.
"""

from __future__ import annotations

import math

import torch

from ..core import autocast, backend, blocking, check, layout, library
from ..core.autograd import Formula, Tensors, differentiable
from ..core.explain import explains
from ..core.intercept import route
from ..core.samples import Maker, Sample, checked

_kernels = library.triton_kernels("group_norm")


def _fwd_fake(x, weight, bias, groups, eps, channels_last):
    statistic = x.new_empty((x.shape[0], groups), dtype=check.accumulate_dtype(x.dtype))
    return torch.empty_like(x), statistic, torch.empty_like(statistic), torch.empty_like(statistic)


def _bwd_fake(dy, x, weight, mean, rstd, groups, channels_last, need_dx, need_dw):
    dtype = weight.dtype if weight is not None else mean.dtype
    dw = x.new_empty(x.shape[-1 if channels_last else 1] if need_dw else 0, dtype=dtype)
    return torch.empty_like(x) if need_dx else x.new_empty(0), dw, torch.empty_like(dw)


_fwd = library.declare(
    "group_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, int groups, float eps, bool channels_last)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _fwd_fake,
    _kernels,
)
_bwd = library.declare(
    "group_norm_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, int groups, bool channels_last,"
    " bool need_dx, bool need_dw) -> (Tensor, Tensor, Tensor)",
    _bwd_fake,
    _kernels,
)


def _reference(x, weight, bias, groups, eps, channels_last):
    first = x.movedim(-1, 1) if channels_last else x
    n, c = first.shape[:2]
    wide = first.to(check.accumulate_dtype(x.dtype)).reshape(n, groups, c // groups, math.prod(first.shape[2:]))
    mean = wide.mean((2, 3))
    centred = wide - mean[:, :, None, None]
    var = centred.square().mean((2, 3))
    rstd = (var + eps).rsqrt()
    y = (centred * rstd[:, :, None, None]).reshape(first.shape)
    y = y if weight is None else y * layout.along_channels(weight.to(y.dtype), x.dim())
    y = y if bias is None else y + layout.along_channels(bias.to(y.dtype), x.dim())
    y = (y.movedim(1, -1) if channels_last else y).to(x.dtype)
    return y, mean.detach(), rstd.detach(), var.detach()


def _fold(forward, batch, dims, inputs, constants):
    """Examples are independent: a batch of inputs under one weight is a larger N."""
    x, weight, bias = inputs
    if dims[0] is None or dims[1] is not None or dims[2] is not None:
        return None
    x = x.movedim(dims[0], 0)
    outputs = forward(x.flatten(0, 1), weight, bias, *constants)
    return tuple(t.reshape(batch, x.shape[1], *t.shape[1:]) for t in outputs), (0,) * len(outputs)


def _backward_arguments(dy, inputs: Tensors, statistics: Tensors, constants: Tensors, needs) -> Tensors:
    x, weight, _ = inputs
    mean, rstd, _ = statistics
    groups, _, channels_last = constants
    return dy, x, weight, mean, rstd, groups, channels_last, needs[0], needs[1] or needs[2]


_apply = differentiable(Formula(_fwd, _bwd, 3, 3, _backward_arguments, _reference, _fold))


def group_norm(
    input: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """Normalises groups of channels within each example; drops in for torch.nn.functional.group_norm.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias`` with mean and biased variance over the channels of a group and
    all spatial positions of one example.

    Args:
        input: Tensor[N, C] or Tensor[N, C, *], float32, float64, bfloat16 or float16.
        num_groups: number of groups, >= 1, a divisor of C.
        weight: Tensor[C] or None (1), in the input's dtype or float32.
        bias: Tensor[C] or None (0), in the weight's dtype.
        eps: added to the variance, >= 0.

    Returns:
        Tensor of the input's shape and dtype; channels last where the input is.

    Raises:
        RuntimeError: fewer than 2 dimensions, num_groups that does not divide C, sizes, devices or dtypes that do not
            fit together.
        ValueError: a negative eps, one value per group.
        NotImplementedError: an input that is not floating point.

    Sums are taken in float32 (float64 for float64), the variance about the mean. Bitwise deterministic. Gradients of
    every order, forward mode, vmap and torch.compile are supported.
    """
    op = "group_norm"
    check.floating(op, "input", input)
    if input.dim() < 2:
        check.fail(RuntimeError, op, "input", f"{input.dim()} dimensions", "at least 2: [N, C, *]")
    if num_groups == 0:
        check.fail(ZeroDivisionError, op, "num_groups", num_groups, "an integer >= 1")
    if num_groups < 0 or input.shape[1] % num_groups != 0:
        check.fail(RuntimeError, op, "num_groups", num_groups, f"a divisor of {input.shape[1]} channels, >= 1")
    check.non_negative(op, "eps", eps)
    if input.numel() > 0 and input.numel() // num_groups == 1:
        check.fail(ValueError, op, "input", f"shape {list(input.shape)}", "more than 1 value per group")
    input, weight, bias = autocast.cast(op, input, weight, bias)
    check.affine(op, input, (input.shape[1],), weight=weight, bias=bias)
    x, channels_last = layout.channels(input)
    y, *_ = _apply(backend.namespace_for(op, input), x, weight, bias, int(num_groups), float(eps), channels_last)
    return layout.restore(y, channels_last)


class GroupNorm(torch.nn.GroupNorm):
    """torch.nn.GroupNorm whose forward is pyops.functional.group_norm."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


def instance_norm(
    input: torch.Tensor,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> torch.Tensor:
    """Normalises every channel of every example over space; drops in for torch.nn.functional.instance_norm.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``, per example and channel. With ``use_input_stats`` the
    statistics are those of the input, and running statistics, if given, move by ``momentum`` towards their average
    over the batch (of unbiased variances); otherwise the running statistics are used.

    Args:
        input: Tensor[N, C, *], float32, float64, bfloat16 or float16.
        running_mean: Tensor[C] or None; updated in place with use_input_stats, needed without.
        running_var: Tensor[C] or None, together with running_mean.
        weight: Tensor[C] or None (1), in the input's dtype or float32.
        bias: Tensor[C] or None (0), in the weight's dtype.
        use_input_stats: use the statistics of the input.
        momentum: weight of the new statistics in the running ones, >= 0.
        eps: added to the variance, >= 0.

    Returns:
        Tensor of the input's shape and dtype; channels last where the input is.

    Raises:
        ValueError: one spatial position with use_input_stats, a negative eps or momentum, one running statistic
            without the other.
        RuntimeError: sizes, devices or dtypes that do not fit together, no running statistics where they are needed.
        NotImplementedError: an input that is not floating point.

    Sums are taken in float32 (float64 for float64), the variance about the mean. Bitwise deterministic. Gradients of
    every order, forward mode, vmap and torch.compile are supported.
    """
    op = "instance_norm"
    check.floating(op, "input", input)
    if input.dim() < 2:
        check.fail(RuntimeError, op, "input", f"{input.dim()} dimensions", "at least 3: [N, C, *]")
    if (running_mean is None) != (running_var is None):
        check.fail(ValueError, op, "running_var", "one of running_mean and running_var", "both or neither")
    if not use_input_stats and running_mean is None:
        check.fail(RuntimeError, op, "running_mean", None, "a tensor when use_input_stats is False")
    check.non_negative(op, "momentum", momentum)
    check.non_negative(op, "eps", eps)
    positions = input.shape[2:].numel()
    if use_input_stats and positions == 1:
        check.fail(ValueError, op, "input", f"shape {list(input.shape)}", "more than 1 spatial element")
    input, weight, bias = autocast.cast(op, input, weight, bias)
    channels = (input.shape[1],)
    check.affine(op, input, channels, weight=weight, bias=bias)
    check.statistics(op, input, channels, running_mean=running_mean, running_var=running_var)
    if not use_input_stats:
        return _scale_by_running(input, running_mean, running_var, weight, bias, eps)
    namespace = backend.namespace_for(op, input)
    x, channels_last = layout.channels(input)
    y, mean, _, var = _apply(namespace, x, weight, bias, input.shape[1], float(eps), channels_last)
    if running_mean is not None and running_var is not None and input.numel() > 0:
        with torch.no_grad():
            unbiased = var.mean(0) * (positions / (positions - 1))
            running_mean.lerp_(mean.mean(0).to(running_mean.dtype), momentum)
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    return layout.restore(y, channels_last)


def _scale_by_running(input, running_mean, running_var, weight, bias, eps):
    """With given statistics the norm is one multiply-add per element, which torch.addcmul does in one pass."""
    wide = check.accumulate_dtype(input.dtype)
    scale = (running_var.detach().to(wide) + eps).rsqrt()
    scale = scale if weight is None else scale * weight.to(wide)
    shift = -running_mean.detach().to(wide) * scale
    shift = shift if bias is None else shift + bias.to(wide)
    shape = (-1,) + (1,) * (input.dim() - 2)
    return torch.addcmul(shift.reshape(shape), input.to(wide), scale.reshape(shape)).to(input.dtype)


class _InstanceNorm(torch.nn.modules.instancenorm._InstanceNorm):
    """The one place where torch's instance norm modules call the function; their forward adds unbatched input."""

    def _apply_instance_norm(self, input: torch.Tensor) -> torch.Tensor:
        return instance_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training or not self.track_running_stats,
            self.momentum if self.momentum is not None else 0.0,
            self.eps,
        )


class InstanceNorm1d(_InstanceNorm, torch.nn.InstanceNorm1d):
    """torch.nn.InstanceNorm1d whose forward is pyops.functional.instance_norm."""


class InstanceNorm2d(_InstanceNorm, torch.nn.InstanceNorm2d):
    """torch.nn.InstanceNorm2d whose forward is pyops.functional.instance_norm."""


class InstanceNorm3d(_InstanceNorm, torch.nn.InstanceNorm3d):
    """torch.nn.InstanceNorm3d whose forward is pyops.functional.instance_norm."""


def _notes(statistic):
    return lambda shapes, dtype, name: blocking.planes(shapes[0], dtype, statistic) if name == "cpu" else []


explains("group_norm", _notes("group"))
explains("instance_norm", _notes("plane"))

route((torch.nn.functional.group_norm, torch.group_norm), "group_norm", group_norm)
route((torch.nn.functional.instance_norm, torch.instance_norm), "instance_norm", instance_norm)


def _group_sample(shape, groups, affine=True, eps=1e-5, large_mean=0.0, channels_last=False):
    def make(t: Maker):
        x = t.input(shape, shift=large_mean, channels_last=channels_last)
        parameters = {"weight": t.input(shape[1:2]), "bias": t.input(shape[1:2])} if affine else {}
        return (x, groups), {**parameters, "eps": eps}

    return make


def _instance_sample(shape, affine=True, running=False, use_input_stats=True, eps=1e-5, channels_last=False):
    def make(t: Maker):
        x = t.input(shape, channels_last=channels_last)
        parameters = {"weight": t.input(shape[1:2]), "bias": t.input(shape[1:2])} if affine else {}
        if running:
            parameters |= {"running_mean": t.constant(shape[1:2])}
            parameters |= {"running_var": t.constant(shape[1:2], positive=True)}
        return (x,), {**parameters, "use_input_stats": use_input_stats, "momentum": 0.3, "eps": eps}

    return make


checked(
    "group_norm",
    group_norm,
    torch.nn.functional.group_norm,
    Sample("two groups", _group_sample((2, 4, 3), 2), derivatives=True),
    Sample("two groups, channels last", _group_sample((2, 4, 2, 2), 2, channels_last=True), derivatives=True),
    Sample("one group", _group_sample((2, 3, 2), 1, eps=0.1), derivatives=True),
    Sample("no affine, no space", _group_sample((3, 6), 3, affine=False, eps=0.1)),
    Sample("no examples", _group_sample((0, 4, 3), 2)),
    Sample("odd sizes", _group_sample((3, 6, 7, 11), 3)),
    Sample("odd sizes, channels last", _group_sample((3, 6, 7, 11), 3, channels_last=True)),
    Sample("a long group", _group_sample((1, 4, 5000), 2)),
    Sample("mean far above the deviation", _group_sample((2, 4, 40), 2, large_mean=1e3)),
)
checked(
    "instance_norm",
    instance_norm,
    torch.nn.functional.instance_norm,
    Sample("statistics of the input", _instance_sample((2, 3, 4)), derivatives=True),
    Sample("channels last", _instance_sample((2, 3, 2, 2), channels_last=True), derivatives=True),
    Sample("no affine", _instance_sample((2, 3, 5), affine=False)),
    Sample("running statistics are updated", _instance_sample((3, 2, 4), running=True)),
    Sample("running statistics are used", _instance_sample((2, 3, 4), running=True, use_input_stats=False)),
    Sample("odd planes", _instance_sample((2, 5, 7, 37))),
    Sample("odd planes, channels last", _instance_sample((2, 5, 7, 37), channels_last=True)),
)
