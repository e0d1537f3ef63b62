"""Activation functions: ``y = f(x)`` element by element, and gates ``y = a * f(b)``.

Every function is one row of ``FUNCTIONS`` in pyops/core/activations.py: its number in csrc/common/activation.h and, in
plain torch, its truth.

Sources: torch.nn.functional; He et al. 2015 (prelu), https://arxiv.org/abs/1502.01852; Clevert et al. 2016 (elu),
https://arxiv.org/abs/1511.07289; Klambauer et al. 2017 (selu), https://arxiv.org/abs/1706.02515; Hendrycks, Gimpel 2016
(gelu, silu), https://arxiv.org/abs/1606.08415; Misra 2019 (mish), https://arxiv.org/abs/1908.08681; Howard et al. 2019
(hardswish), https://arxiv.org/abs/1905.02244; Dauphin et al. 2017 (glu), https://arxiv.org/abs/1612.08083.

All functions take a Tensor of any shape in float32, float64, bfloat16 or float16 and return one of the same shape,
dtype and, where x is dense in memory (contiguous, channels last, transposed), the same strides. They compute in float32
(float64 for float64), are bitwise deterministic, send NaN to NaN, and have gradients of every order, forward mode,
vmap and torch.compile. ``inplace=True`` overwrites the input, as in torch. They raise NotImplementedError for an input
that is not floating point and TypeError for what is no tensor or no number.

The gradient at NaN is that of torch's vector code on the CPU, everywhere: NaN for smooth functions, elu, selu, celu and
hardswish; the slope of the side that NaN falls on for relu, leaky_relu, prelu and threshold; 0 for hardtanh, relu6,
hardsigmoid, hardshrink and softshrink. torch itself differs between vectors, the scalar tail of a tensor and the GPU
(elu, hardswish, hardtanh and the shrinks). The gradient of softsign at infinity is its limit 0; torch has NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ..core import autocast, backend, check, library
from ..core.activations import FUNCTIONS, SELU_ALPHA, SELU_SCALE, TRUTH
from ..core.activations import hardsigmoid as _hardsigmoid_truth
from ..core.activations import hardswish as _hardswish_truth
from ..core.autograd import Formula, Tensors, differentiable
from ..core.intercept import route
from ..core.layout import flatten_dense, from_memory_order, in_memory_order
from ..core.samples import Maker, Sample, checked

_kernels = library.triton_kernels("activation")
_torch = torch.nn.functional


def _like(x, *_):
    return torch.empty_like(x)


def _like_second(dy, x, *_):
    return torch.empty_like(x)


_PARAMETERS = "int kind, float a, float b, float c"
_fwd = library.declare(f"activation_fwd(Tensor x, {_PARAMETERS}) -> Tensor", _like, _kernels)
_bwd = library.declare(f"activation_bwd(Tensor dy, Tensor x, {_PARAMETERS}) -> Tensor", _like_second, _kernels)
_inplace = library.declare(f"activation_inplace(Tensor(a!) x, {_PARAMETERS}) -> ()", lambda *_: None, _kernels)
_gated_fwd = library.declare(
    "gated_fwd(Tensor x, int kind) -> Tensor", lambda x, kind: x.new_empty(x.shape[0], x.shape[2]), _kernels
)
_gated_bwd = library.declare("gated_bwd(Tensor dy, Tensor x, int kind) -> Tensor", _like_second, _kernels)
_prelu_fwd = library.declare("prelu_fwd(Tensor x, Tensor weight) -> Tensor", _like, _kernels)
_prelu_bwd = library.declare(
    "prelu_bwd(Tensor dy, Tensor x, Tensor weight, bool need_dw) -> (Tensor, Tensor)",
    lambda dy, x, weight, need_dw: (torch.empty_like(x), weight.new_empty(weight.shape[0] if need_dw else 0)),
    _kernels,
)


def _fold(forward, batch, dims, inputs, constants):
    """A batch of inputs is a larger one."""
    return forward(inputs[0].movedim(dims[0], 0).contiguous(), *constants), 0


def _gated_fold(forward, batch, dims, inputs, constants):
    x = inputs[0].movedim(dims[0], 0)
    _, m, _, n = x.shape
    return forward(x.reshape(batch * m, 2, n), *constants).view(batch, m, n), 0


def _prelu_reference(x, weight):
    return (torch.where(x > 0, x, x * weight[:, None]),)


_apply = differentiable(
    Formula(
        _fwd, _bwd, 1, 1,
        lambda dy, inputs, statistics, constants, needs: (dy, *inputs, *constants),
        lambda x, kind, a, b, c: (TRUTH[kind](x, a, b, c),),
        _fold,
    )
)  # fmt: skip
_apply_gated = differentiable(
    Formula(
        _gated_fwd, _gated_bwd, 1, 1,
        lambda dy, inputs, statistics, constants, needs: (dy, *inputs, *constants),
        lambda x, kind: (x[:, 0] * TRUTH[kind](x[:, 1], 0.0, 0.0, 0.0),),
        _gated_fold,
    )
)  # fmt: skip


def _prelu_arguments(dy, inputs: Tensors, statistics: Tensors, constants: Tensors, needs) -> Tensors:
    return dy, *inputs, needs[1]


_apply_prelu = differentiable(Formula(_prelu_fwd, _prelu_bwd, 2, 2, _prelu_arguments, _prelu_reference))


def _call(op: str, name: str, x: torch.Tensor, inplace: bool, a: float = 0.0, b: float = 0.0, c: float = 0.0) -> Any:
    check.floating(op, "input", x)
    (x,) = autocast.cast(op, x)
    namespace = backend.namespace_for(op, x)
    arguments = FUNCTIONS[name][0], float(a), float(b), float(c)
    if not inplace:
        moved, order = in_memory_order(x)
        return from_memory_order(_apply(namespace, moved, *arguments), order)
    if (torch.is_grad_enabled() and x.requires_grad) or not x.is_contiguous() or torch.compiler.is_compiling():
        # The gradient needs the old x, which is about to be lost.
        moved, order = in_memory_order(x.clone())
        return x.copy_(from_memory_order(_apply(namespace, moved, *arguments), order))
    if torch._C._are_functorch_transforms_active():
        return x.copy_(_call(op, name, x.clone(), False, a, b, c))
    _inplace(namespace, x, *arguments)
    return x


def _number(op: str, argument: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        check.fail(TypeError, op, argument, type(value).__name__, "a number")
    return float(value)


# The functions


def relu(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """``max(x, 0)``; drops in for torch.nn.functional.relu. The gradient at 0 is 0."""
    return _call("relu", "relu", input, inplace)


def relu_(input: torch.Tensor) -> torch.Tensor:
    """``relu`` in place."""
    return _call("relu", "relu", input, True)


def relu6(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """``min(max(x, 0), 6)``; drops in for torch.nn.functional.relu6. The gradient at 0 and 6 is 0."""
    return _call("relu6", "hardtanh", input, inplace, 0.0, 6.0)


def hardtanh(input: torch.Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> torch.Tensor:
    """``min(max(x, min_val), max_val)``; drops in for torch.nn.functional.hardtanh.

    Raises:
        ValueError: ``min_val > max_val``.
    """
    low, high = _number("hardtanh", "min_val", min_val), _number("hardtanh", "max_val", max_val)
    if low > high:
        check.fail(ValueError, "hardtanh", "min_val", min_val, f"at most max_val, {max_val}")
    return _call("hardtanh", "hardtanh", input, inplace, low, high)


def leaky_relu(input: torch.Tensor, negative_slope: float = 0.01, inplace: bool = False) -> torch.Tensor:
    """``x if x > 0 else negative_slope * x``; drops in for torch.nn.functional.leaky_relu."""
    return _call("leaky_relu", "leaky_relu", input, inplace, _number("leaky_relu", "negative_slope", negative_slope))


def threshold(input: torch.Tensor, threshold: float, value: float, inplace: bool = False) -> torch.Tensor:
    """``x if x > threshold else value``; drops in for torch.nn.functional.threshold."""
    bounds = _number("threshold", "threshold", threshold), _number("threshold", "value", value)
    return _call("threshold", "threshold", input, inplace, *bounds)


def elu(input: torch.Tensor, alpha: float = 1.0, inplace: bool = False) -> torch.Tensor:
    """``x if x > 0 else alpha * (exp(x) - 1)``; drops in for torch.nn.functional.elu."""
    return _call("elu", "elu", input, inplace, _number("elu", "alpha", alpha), 1.0, 1.0)


def selu(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """``scale * elu(x, alpha)`` with the two constants of Klambauer et al.; drops in for torch.nn.functional.selu."""
    return _call("selu", "elu", input, inplace, SELU_ALPHA, SELU_SCALE, 1.0)


def celu(input: torch.Tensor, alpha: float = 1.0, inplace: bool = False) -> torch.Tensor:
    """``x if x > 0 else alpha * (exp(x / alpha) - 1)``; drops in for torch.nn.functional.celu.

    Raises:
        RuntimeError: ``alpha`` is 0.
    """
    if _number("celu", "alpha", alpha) == 0:
        check.fail(RuntimeError, "celu", "alpha", alpha, "a number that is not 0")
    return _call("celu", "elu", input, inplace, alpha, 1.0, 1.0 / alpha)


def gelu(input: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """``x * Φ(x)``, Φ the normal distribution function; drops in for torch.nn.functional.gelu.

    Args:
        input: Tensor[*].
        approximate: ``"none"``, or ``"tanh"`` for ``0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³)))``.

    Raises:
        RuntimeError: another ``approximate``.
    """
    if approximate not in ("none", "tanh"):
        check.fail(RuntimeError, "gelu", "approximate", repr(approximate), "'none' or 'tanh'")
    return _call("gelu", "gelu" if approximate == "none" else "gelu_tanh", input, False)


def silu(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """``x * sigmoid(x)``; drops in for torch.nn.functional.silu."""
    return _call("silu", "silu", input, inplace)


def mish(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """``x * tanh(log(1 + exp(x)))``; drops in for torch.nn.functional.mish."""
    return _call("mish", "mish", input, inplace)


def sigmoid(input: torch.Tensor) -> torch.Tensor:
    """``1 / (1 + exp(-x))``; drops in for torch.sigmoid."""
    return _call("sigmoid", "sigmoid", input, False)


def sigmoid_(input: torch.Tensor) -> torch.Tensor:
    """``sigmoid`` in place."""
    return _call("sigmoid", "sigmoid", input, True)


def hardsigmoid(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """``min(max(x + 3, 0), 6) / 6``; drops in for torch.nn.functional.hardsigmoid."""
    return _call("hardsigmoid", "hardsigmoid", input, inplace)


def hardswish(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """``x * hardsigmoid(x)``; drops in for torch.nn.functional.hardswish."""
    return _call("hardswish", "hardswish", input, inplace)


def softplus(input: torch.Tensor, beta: float = 1.0, threshold: float = 20.0) -> torch.Tensor:
    """``log(1 + exp(beta * x)) / beta``, x itself where ``beta * x > threshold``; as torch.nn.functional.softplus."""
    arguments = _number("softplus", "beta", beta), _number("softplus", "threshold", threshold)
    return _call("softplus", "softplus", input, False, *arguments)


def softsign(input: torch.Tensor) -> torch.Tensor:
    """``x / (1 + |x|)``; drops in for torch.nn.functional.softsign."""
    return _call("softsign", "softsign", input, False)


def tanh(input: torch.Tensor) -> torch.Tensor:
    """Hyperbolic tangent; drops in for torch.tanh."""
    return _call("tanh", "tanh", input, False)


def tanh_(input: torch.Tensor) -> torch.Tensor:
    """``tanh`` in place."""
    return _call("tanh", "tanh", input, True)


def logsigmoid(input: torch.Tensor) -> torch.Tensor:
    """``log(sigmoid(x))`` without overflow; drops in for torch.nn.functional.logsigmoid."""
    return _call("logsigmoid", "logsigmoid", input, False)


def hardshrink(input: torch.Tensor, lambd: float = 0.5) -> torch.Tensor:
    """``0 if |x| <= lambd else x``; drops in for torch.nn.functional.hardshrink."""
    return _call("hardshrink", "hardshrink", input, False, _number("hardshrink", "lambd", lambd))


def softshrink(input: torch.Tensor, lambd: float = 0.5) -> torch.Tensor:
    """``sign(x) * max(|x| - lambd, 0)``; drops in for torch.nn.functional.softshrink.

    Raises:
        RuntimeError: a negative ``lambd``.
    """
    if _number("softshrink", "lambd", lambd) < 0:
        check.fail(RuntimeError, "softshrink", "lambd", lambd, "a number >= 0")
    return _call("softshrink", "softshrink", input, False, lambd)


def tanhshrink(input: torch.Tensor) -> torch.Tensor:
    """``x - tanh(x)``; drops in for torch.nn.functional.tanhshrink."""
    return _call("tanhshrink", "tanhshrink", input, False)


def glu(input: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """``a * sigmoid(b)`` with a and b the halves of the input; drops in for torch.nn.functional.glu.

    Args:
        input: Tensor[*, 2 n, *].
        dim: the dimension that is halved.

    Returns:
        Tensor[*, n, *], its dimensions in the input's order in memory (channels last stays channels last).

    Raises:
        RuntimeError: a scalar input, or an odd size.
        IndexError: no such dimension.
    """
    return gated("glu", input, dim, "sigmoid")


def gated(op: str, input: torch.Tensor, dim: int, function: str) -> torch.Tensor:
    """``a * f(b)`` with a and b the halves of the input along ``dim``."""
    check.floating(op, "input", input)
    if input.dim() == 0:
        check.fail(RuntimeError, op, "input", "a scalar", "at least one dimension")
    if not isinstance(dim, int) or not -input.dim() <= dim < input.dim():
        check.fail(IndexError, op, "dim", dim, f"a dimension of an input of shape {list(input.shape)}")
    dim = dim % input.dim()
    if input.shape[dim] % 2:
        check.fail(RuntimeError, op, "input", f"size {input.shape[dim]} in dimension {dim}", "an even size")
    moved, order = in_memory_order(input)
    shape, at = moved.shape, order.index(dim)
    half = (*shape[:at], shape[at] // 2, *shape[at + 1 :])
    x = moved.view(math.prod(shape[:at]), 2, math.prod(half[at:]))
    y = _apply_gated(backend.namespace_for(op, input), x, FUNCTIONS[function][0])
    return from_memory_order(y.view(half), order)


def prelu(input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x if x > 0 else weight[c] * x``; drops in for torch.nn.functional.prelu.

    Args:
        input: Tensor[N, C, *] or Tensor[*].
        weight: Tensor[C], Tensor[1] or a scalar tensor, of the input's dtype.

    Returns:
        Tensor of the input's shape and strides (channels last stays channels last).

    Raises:
        RuntimeError: a weight that does not fit the input.
    """
    check.floating("prelu", "input", input)
    check.floating("prelu", "weight", weight)
    input, weight = autocast.cast("prelu", input, weight)
    channels = input.shape[1] if input.dim() > 1 else 1
    if weight.dim() > 1 or weight.numel() not in (1, channels):
        check.fail(RuntimeError, "prelu", "weight", f"shape {list(weight.shape)}", f"[1] or [{channels}]")
    if weight.dtype != input.dtype or weight.device != input.device:
        got = f"{weight.dtype} on {weight.device}"
        check.fail(RuntimeError, "prelu", "weight", got, f"{input.dtype} on {input.device}, as the input")
    namespace = backend.namespace_for("prelu", input)
    weight = weight.reshape(-1).contiguous()
    if weight.numel() == 1:
        flat, restore = flatten_dense(input)
        return restore(_apply_prelu(namespace, flat.view(1, 1, -1), weight).view(-1))
    moved, order = in_memory_order(input)
    at = order.index(1)
    before, after = math.prod(moved.shape[:at]), math.prod(moved.shape[at + 1 :])
    y = _apply_prelu(namespace, moved.view(before, channels, after), weight)
    return from_memory_order(y.view(moved.shape), order)


def rrelu(
    input: torch.Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, inplace: bool = False
) -> torch.Tensor:
    """``x if x > 0 else a * x`` with a random slope; drops in for torch.nn.functional.rrelu.

    In training each element has its own ``a``, uniform in ``[lower, upper)`` from torch's generator; else ``a`` is
    their mean.

    Raises:
        RuntimeError: ``lower > upper``.
    """
    low, high = _number("rrelu", "lower", lower), _number("rrelu", "upper", upper)
    if low > high:
        check.fail(RuntimeError, "rrelu", "lower", lower, f"at most upper, {upper}")
    if not training:
        return _call("rrelu", "leaky_relu", input, inplace, (low + high) / 2)
    check.floating("rrelu", "input", input)
    flat, restore = flatten_dense(input.clone() if inplace else input)
    slope = torch.rand(flat.shape, dtype=flat.dtype, device=flat.device) * (high - low) + low
    y = restore(_apply_prelu(backend.namespace_for("rrelu", input), flat.view(1, -1, 1), slope).view(-1))
    return input.copy_(y) if inplace else y


# The modules: torch's, with the forward of pyops


def _module(base: type, call: Callable[[Any, torch.Tensor], torch.Tensor]) -> Any:
    doc = f"torch.nn.{base.__name__} whose forward is pyops'."
    return type(base.__name__, (base,), {"forward": call, "__doc__": doc, "__module__": __name__})


ReLU = _module(torch.nn.ReLU, lambda self, input: relu(input, self.inplace))
Hardtanh = _module(torch.nn.Hardtanh, lambda self, input: hardtanh(input, self.min_val, self.max_val, self.inplace))
ReLU6 = _module(torch.nn.ReLU6, lambda self, input: relu6(input, self.inplace))
LeakyReLU = _module(torch.nn.LeakyReLU, lambda self, input: leaky_relu(input, self.negative_slope, self.inplace))
Threshold = _module(torch.nn.Threshold, lambda self, input: threshold(input, self.threshold, self.value, self.inplace))
ELU = _module(torch.nn.ELU, lambda self, input: elu(input, self.alpha, self.inplace))
SELU = _module(torch.nn.SELU, lambda self, input: selu(input, self.inplace))
CELU = _module(torch.nn.CELU, lambda self, input: celu(input, self.alpha, self.inplace))
GELU = _module(torch.nn.GELU, lambda self, input: gelu(input, self.approximate))
SiLU = _module(torch.nn.SiLU, lambda self, input: silu(input, self.inplace))
Mish = _module(torch.nn.Mish, lambda self, input: mish(input, self.inplace))
Sigmoid = _module(torch.nn.Sigmoid, lambda self, input: sigmoid(input))
Hardsigmoid = _module(torch.nn.Hardsigmoid, lambda self, input: hardsigmoid(input, self.inplace))
Hardswish = _module(torch.nn.Hardswish, lambda self, input: hardswish(input, self.inplace))
Softplus = _module(torch.nn.Softplus, lambda self, input: softplus(input, self.beta, self.threshold))
Softsign = _module(torch.nn.Softsign, lambda self, input: softsign(input))
Tanh = _module(torch.nn.Tanh, lambda self, input: tanh(input))
LogSigmoid = _module(torch.nn.LogSigmoid, lambda self, input: logsigmoid(input))
Hardshrink = _module(torch.nn.Hardshrink, lambda self, input: hardshrink(input, self.lambd))
Softshrink = _module(torch.nn.Softshrink, lambda self, input: softshrink(input, self.lambd))
Tanhshrink = _module(torch.nn.Tanhshrink, lambda self, input: tanhshrink(input))
GLU = _module(torch.nn.GLU, lambda self, input: glu(input, self.dim))
PReLU = _module(torch.nn.PReLU, lambda self, input: prelu(input, self.weight))
RReLU = _module(torch.nn.RReLU, lambda self, input: rrelu(input, self.lower, self.upper, self.training, self.inplace))


# Routes and samples

_ROUTES: tuple[tuple[Callable[..., Any], tuple[Callable[..., Any], ...]], ...] = (
    (relu, (_torch.relu, torch.relu, torch.Tensor.relu)),
    (relu_, (torch.relu_, torch.Tensor.relu_)),
    (relu6, (_torch.relu6,)),
    (hardtanh, (_torch.hardtanh,)),
    (leaky_relu, (_torch.leaky_relu,)),
    (threshold, (_torch.threshold, torch.threshold)),
    (elu, (_torch.elu,)),
    (selu, (_torch.selu, torch.selu)),
    (celu, (_torch.celu, torch.celu)),
    (gelu, (_torch.gelu,)),
    (silu, (_torch.silu,)),
    (mish, (_torch.mish,)),
    (sigmoid, (_torch.sigmoid, torch.sigmoid, torch.Tensor.sigmoid)),
    (sigmoid_, (torch.sigmoid_, torch.Tensor.sigmoid_)),
    (hardsigmoid, (_torch.hardsigmoid,)),
    (hardswish, (_torch.hardswish,)),
    (softplus, (_torch.softplus,)),
    (softsign, (_torch.softsign,)),
    (tanh, (_torch.tanh, torch.tanh, torch.Tensor.tanh)),
    (tanh_, (torch.tanh_, torch.Tensor.tanh_)),
    (logsigmoid, (_torch.logsigmoid,)),
    (hardshrink, (_torch.hardshrink, torch.hardshrink, torch.Tensor.hardshrink)),
    (softshrink, (_torch.softshrink,)),
    (tanhshrink, (_torch.tanhshrink,)),
    (glu, (_torch.glu,)),
    (prelu, (_torch.prelu, torch.prelu, torch.Tensor.prelu)),
    (rrelu, (_torch.rrelu,)),
)
for _function, _torch_functions in _ROUTES:
    route(_torch_functions, _function.__name__.rstrip("_"), _function)


def _sample(shape, channels_last=False, weight=None, **arguments):
    def make(t: Maker):
        x = t.input(shape, channels_last=channels_last)
        extra = {} if weight is None else {"weight": t.input((weight,))}
        return (x,), {**extra, **arguments}

    return make


def _samples(weight=None, **arguments) -> tuple[Sample, ...]:
    channels = lambda c: None if weight is None else c
    return (
        Sample("ragged", _sample((3, 5), weight=channels(5), **arguments), derivatives=True),
        Sample("channels last", _sample((2, 5, 3, 3), True, weight=channels(5), **arguments)),
        Sample("more than a block, tail of a vector", _sample((2, 3, 413), weight=channels(3), **arguments)),
        Sample("empty", _sample((0, 7), weight=channels(7), **arguments)),
    )


_CHECKED: dict[str, tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]] = {
    "relu": (relu, _torch.relu, {}),
    "relu6": (relu6, _torch.relu6, {}),
    "hardtanh": (hardtanh, _torch.hardtanh, {"min_val": -0.3, "max_val": 0.9}),
    "leaky_relu": (leaky_relu, _torch.leaky_relu, {"negative_slope": 0.2}),
    "threshold": (threshold, _torch.threshold, {"threshold": 0.1, "value": -2.0}),
    "elu": (elu, _torch.elu, {"alpha": 1.7}),
    "selu": (selu, _torch.selu, {}),
    "celu": (celu, lambda x, alpha: torch.where(x > 0, x, alpha * torch.expm1(x / alpha)), {"alpha": 0.7}),
    "gelu": (gelu, _torch.gelu, {}),
    "gelu_tanh": (lambda x: gelu(x, "tanh"), lambda x: _torch.gelu(x, approximate="tanh"), {}),
    "silu": (silu, _torch.silu, {}),
    "mish": (mish, _torch.mish, {}),
    "sigmoid": (sigmoid, torch.sigmoid, {}),
    "hardsigmoid": (hardsigmoid, _hardsigmoid_truth, {}),
    "hardswish": (hardswish, _hardswish_truth, {}),
    "softplus": (softplus, _torch.softplus, {"beta": 1.5, "threshold": 2.0}),
    "softsign": (softsign, _torch.softsign, {}),
    "tanh": (tanh, torch.tanh, {}),
    "logsigmoid": (logsigmoid, _torch.logsigmoid, {}),
    "hardshrink": (hardshrink, _torch.hardshrink, {"lambd": 0.4}),
    "softshrink": (softshrink, _torch.softshrink, {"lambd": 0.4}),
    "tanhshrink": (tanhshrink, _torch.tanhshrink, {}),
    "prelu": (prelu, _torch.prelu, {"weight": True}),
    "rrelu": (rrelu, _torch.rrelu, {"lower": 0.1, "upper": 0.5}),
}
for _name, (_function, _reference, _arguments) in _CHECKED.items():
    checked(_name, _function, _reference, *_samples(**_arguments))
checked(
    "glu",
    glu,
    _torch.glu,
    Sample("a middle dimension", _sample((3, 4, 5), dim=1), derivatives=True),
    Sample("the last dimension", _sample((2, 5, 6))),
    Sample("more than a block", _sample((2, 2470))),
    Sample("empty", _sample((0, 4))),
)
