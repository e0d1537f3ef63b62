"""Linear layers: the products by core/product.py, bias, activation and their gradients in one pass by pyops.

    linear      y[m,o] = Σ_i x[m,i] w[o,i] + b[o]
    linear_act  y      = f(x wᵀ + b)
    bilinear    y[m,o] = Σ_ij x1[m,i] w[o,i,j] x2[m,j] + b[o]
    bias_act    y      = f(x + b),  dx = dy f'(x + b),  db[c] = sum of dx over all but the channels

    x: [M, I], w: [O, I], b: [O]; bias_act: x [N, C, S], b [C]

Rows of b are laid out first and the product is added to them, so nothing is read again to add a bias. With an
activation the product is left bare, and bias and activation are one pass over it; the backward pass reads dy and the
product once, writes dx, and sums the columns of what it writes. Sums go in two stages whose order the shape fixes.

Sources: torch.nn.functional.linear, bilinear; docs/math/linear.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ..core import activations, autocast, backend, check, library, multilinear, product
from ..core.bias_act import apply as _bias_act
from ..core.bias_act import apply_inplace, channel_sum, recorded
from ..core.explain import explains
from ..core.intercept import Unsupported, route
from ..core.layout import channels, restore
from ..core.multilinear import Multilinear, first
from ..core.samples import Maker, Sample, checked

_kernels = library.triton_kernels("linear")
_torch = torch.nn.functional

_rows_op = library.declare(
    "bias_rows(Tensor bias, int rows) -> Tensor", lambda bias, rows: bias.new_empty(rows, bias.shape[0]), _kernels
)


# The gradient of a bias that stands in each row is the sum of the columns.


def _rows_fold(namespace, batch, dims, inputs, constants):
    bias = first(batch, dims[0], inputs[0])
    return _rows(namespace, bias.reshape(-1), *constants).view(constants[0], *bias.shape).movedim(0, 1), 0


_rows: Callable[..., torch.Tensor] = multilinear.differentiable(
    Multilinear(
        _rows_op,
        1,
        lambda namespace, dy, inputs, constants, needs: (channel_sum(namespace, dy),),
        lambda namespace, inputs, tangents, constants: _rows(namespace, tangents[0], *constants),
        _rows_fold,
        kept=(),
    )
)

# The checks


def _alike(op: str, input: torch.Tensor, **others: torch.Tensor | None) -> None:
    """All tensors have the input's dtype and device."""
    check.floating(op, "input" if op != "bilinear" else "input1", input)
    for name, t in others.items():
        if t is None:
            continue
        if not isinstance(t, torch.Tensor):
            check.fail(TypeError, op, name, type(t).__name__, "a tensor" + " or None" * (name == "bias"))
        if t.dtype != input.dtype or t.device != input.device:
            got, wanted = f"{t.dtype} on {t.device}", f"{input.dtype} on {input.device}, as the input"
            check.fail(RuntimeError, op, name, got, wanted)


def _bias_of(op: str, bias: torch.Tensor | None, outputs: int) -> torch.Tensor | None:
    """The bias as [outputs]: one number serves all, as in torch."""
    if bias is None:
        return None
    if bias.dim() > 1:
        raise Unsupported(f"{op}: argument 'bias': got shape {list(bias.shape)}, expected [{outputs}]")
    if bias.numel() not in (1, outputs) or (bias.dim() == 1 and bias.numel() == 0 != outputs):
        check.fail(RuntimeError, op, "bias", f"shape {list(bias.shape)}", f"[{outputs}]")
    return bias.expand(outputs).contiguous()


def _matrices(op: str, input: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The input as [M, I]; the weight as [O, I]."""
    if input.dim() == 0:
        check.fail(RuntimeError, op, "input", "a scalar", "at least one dimension, [*, I]")
    if weight.dim() not in (1, 2):
        check.fail(RuntimeError, op, "weight", f"shape {list(weight.shape)}", "[O, I] or [I]")
    if weight.shape[-1] != input.shape[-1]:
        wanted = f"{input.shape[-1]} columns for an input of shape {list(input.shape)}"
        check.fail(RuntimeError, op, "weight", f"shape {list(weight.shape)}", wanted)
    x = input if input.dim() == 2 else input.reshape(math.prod(input.shape[:-1]), input.shape[-1])
    return x, weight if weight.dim() == 2 else weight.unsqueeze(0)


# The functions


def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x wᵀ + b``; drops in for torch.nn.functional.linear.

    Args:
        input: Tensor[*, I] in float32, float64, bfloat16 or float16.
        weight: Tensor[O, I], or Tensor[I] for one output without a dimension of its own.
        bias: Tensor[O], or one number for all outputs, or None.

    Returns:
        Tensor[*, O], contiguous; Tensor[*] for a weight [I].

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
        Unsupported (NotImplementedError): a bias of two or more dimensions; ``pyops.use`` leaves it to torch.

    The product is torch's, or, in float32 and float64 on a CPU half of whose vectors torch leaves unused, our own:
    ``python -m pyops explain linear`` says which. The gradient of the bias is a sum of columns in a fixed order, in
    float32 for half types.
    """
    _alike("linear", input, weight=weight, bias=bias)
    input, weight, bias = autocast.cast("linear", input, weight, bias)
    x, w = _matrices("linear", input, weight)
    shape = (*input.shape[:-1], *weight.shape[:-1])
    bias = _bias_of("linear", bias, w.shape[0])
    namespace = backend.namespace_for("linear", x)
    if bias is None or product.is_ours(namespace, x, w, bias):
        return product.linear(x, w, bias).view(shape)
    rows = _rows(namespace, bias, x.shape[0])
    return _plus(rows, x, w).view(shape)


def _plus(rows: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """rows + x wᵀ, into ``rows``, which are ours alone, where no transform forbids it."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return torch.addmm(rows, x, w.mT)
    return rows.addmm_(x, w.mT)


def linear_act(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str = "relu"
) -> torch.Tensor:
    """``f(x wᵀ + b)`` with bias and activation in one pass, and one pass for both their gradients.

    Args:
        input: Tensor[*, I] in float32, float64, bfloat16 or float16.
        weight: Tensor[O, I].
        bias: Tensor[O] or None.
        activation: a name as in ``bias_act``.

    Returns:
        Tensor[*, O], contiguous.

    Raises:
        ValueError: an unknown activation.
        RuntimeError: shapes, dtypes or devices that do not fit.

    Nothing but the bare product is kept for the backward pass; without gradients it is overwritten by the result.
    Where a half type rounds, torch's two calls round the sum once more.
    """
    numbers = activations.fused("linear_act", activation)
    _alike("linear_act", input, weight=weight, bias=bias)
    input, weight, bias = autocast.cast("linear", input, weight, bias)
    x, w = _matrices("linear_act", input, weight)
    bias = _bias_of("linear_act", bias, w.shape[0])
    z = product.linear(x, w, None)
    bias = z.new_zeros(w.shape[0]) if bias is None else bias
    namespace = backend.namespace_for("linear_act", x)
    shape = (*input.shape[:-1], *weight.shape[:-1])
    if recorded(x, w, bias):
        return _bias_act(namespace, z.unsqueeze(-1), bias, *numbers).view(shape)
    apply_inplace(namespace, z.unsqueeze(-1), bias, *numbers)
    return z.view(shape)


def bias_act(input: torch.Tensor, bias: torch.Tensor, activation: str = "relu", dim: int = 1) -> torch.Tensor:
    """``f(x + b)`` with one bias for each index of a dimension, in one pass forward and one backward.

    Args:
        input: Tensor[*, C, *] in float32, float64, bfloat16 or float16.
        bias: Tensor[C] of the input's dtype.
        activation: ``"relu"``, ``"gelu"``, ``"gelu_tanh"``, ``"silu"``, ... with the parameters that
            torch.nn.functional has by default; all names are those of ``pyops.core.activations.FUSED``.
        dim: the dimension of the bias.

    Returns:
        Tensor of the input's shape; channels last stays channels last where ``dim`` is 1.

    Raises:
        ValueError: an unknown activation.
        IndexError: no such dimension.
        RuntimeError: a bias that does not fit.
    """
    numbers = activations.fused("bias_act", activation)
    _alike("bias_act", input, bias=bias)
    if not isinstance(dim, int) or not -input.dim() <= dim < input.dim():
        check.fail(IndexError, "bias_act", "dim", dim, f"a dimension of an input of shape {list(input.shape)}")
    dim %= input.dim()
    if bias.shape != (input.shape[dim],):
        check.fail(RuntimeError, "bias_act", "bias", f"shape {list(bias.shape)}", f"[{input.shape[dim]}]")
    namespace, bias = backend.namespace_for("bias_act", input), bias.contiguous()
    last = False
    if dim == 1 and input.dim() > 2:
        input, last = channels(input)
        dim = input.dim() - 1 if last else 1
    x = input.contiguous()
    y = _bias_act(namespace, x.reshape(math.prod(x.shape[:dim]), bias.shape[0], math.prod(x.shape[dim + 1 :])), bias,
                  *numbers)  # fmt: skip
    return restore(y.view(x.shape), last)


def bilinear(
    input1: torch.Tensor, input2: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``Σ_ij x1[i] w[o,i,j] x2[j] + b[o]``; drops in for torch.nn.functional.bilinear.

    Args:
        input1: Tensor[*, I] in float32, float64, bfloat16 or float16.
        input2: Tensor[*, J] with the same leading sizes.
        weight: Tensor[O, I, J].
        bias: Tensor[O] or None.

    Returns:
        Tensor[*, O], contiguous.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.

    Two products: the longer of I and J is summed first, which leaves M · O · min(I, J) numbers between them.
    """
    _alike("bilinear", input1, input2=input2, weight=weight, bias=bias)
    if input1.dim() == 0 or input1.shape[:-1] != input2.shape[:-1]:
        wanted = f"the leading sizes of input1, {list(input1.shape)}"
        check.fail(RuntimeError, "bilinear", "input2", f"shape {list(input2.shape)}", wanted)
    if weight.dim() != 3 or weight.shape[1:] != (input1.shape[-1], input2.shape[-1]):
        wanted = f"[O, {input1.shape[-1]}, {input2.shape[-1]}]"
        check.fail(RuntimeError, "bilinear", "weight", f"shape {list(weight.shape)}", wanted)
    outputs, i, j = weight.shape
    if bias is not None and bias.shape != (outputs,):
        check.fail(RuntimeError, "bilinear", "bias", f"shape {list(bias.shape)}", f"[{outputs}]")
    shape = (*input1.shape[:-1], outputs)
    m = math.prod(input1.shape[:-1])
    x1, x2 = input1.reshape(m, i), input2.reshape(m, j)
    if i < j:
        x1, x2, weight = x2, x1, weight.mT
    if autocast.enabled(x1):
        # torch counts it with the sums, which keep their dtype, and not with the products
        with torch.autocast(x1.device.type, enabled=False):
            return _two_products(x1, x2, weight, bias).view(shape)
    return _two_products(x1, x2, weight, bias).view(shape)


def _two_products(x1, x2, weight, bias):
    """[M, O], over the dimension of x1 first."""
    m, (outputs, i, j) = x1.shape[0], weight.shape
    between = product.linear(x1, weight.mT.reshape(outputs * j, i)).view(m, outputs, j)
    if bias is None:
        return torch.bmm(between, x2.unsqueeze(-1)).squeeze(-1)
    rows = _rows(backend.namespace_for("bilinear", x1), bias.contiguous(), m)
    return torch.baddbmm(rows.unsqueeze(-1), between, x2.unsqueeze(-1)).squeeze(-1)


# The modules


class Linear(torch.nn.Linear):
    """torch.nn.Linear whose forward is pyops.functional.linear."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return linear(input, self.weight, self.bias)


class Bilinear(torch.nn.Bilinear):
    """torch.nn.Bilinear whose forward is pyops.functional.bilinear."""

    def forward(self, input1: torch.Tensor, input2: torch.Tensor) -> torch.Tensor:
        return bilinear(input1, input2, self.weight, self.bias)


# Routes, explanations and samples

route((_torch.linear,), "linear", linear)
route((_torch.bilinear, torch.bilinear), "bilinear", bilinear)
explains("linear", product.explanation)
explains("linear_act", product.explanation)


def _linear_sample(shape, outputs, bias=True):
    def make(t: Maker):
        x, w = t.input(shape), t.input((*([] if outputs is None else [outputs]), shape[-1]))
        return (x, w, t.input((outputs,)) if bias else None), {}

    return make


_SHAPES = (
    Sample("ragged rows", _linear_sample((3, 5), 4), derivatives=True),
    Sample("one row without a batch", _linear_sample((6,), 5)),
    Sample("several batch dimensions, more than a chunk of rows", _linear_sample((2, 150, 5), 7)),
    Sample("more columns than a block", _linear_sample((3, 2), 1237)),
    Sample("without a bias", _linear_sample((3, 5), 4, bias=False)),
    Sample("no rows", _linear_sample((0, 4), 3)),
    Sample("nothing to sum over", _linear_sample((3, 0), 2)),
)
checked("linear", linear, _torch.linear, *_SHAPES, Sample("a weight of one row", _linear_sample((3, 5), None, False)))
checked(
    "linear_act",
    lambda x, w, b: linear_act(x, w, b, "gelu"),
    lambda x, w, b: _torch.gelu(_torch.linear(x, w, b)),
    *_SHAPES,
)


def _bias_sample(shape, dim=1, channels_last=False, activation="gelu"):
    def make(t: Maker):
        x = t.input(shape, channels_last=channels_last)
        return (x, t.input((shape[dim],))), {"activation": activation, "dim": dim}

    return make


def _bias_act_truth(x, bias, activation, dim):
    wide = check.accumulate_dtype(x.dtype)
    added = x.to(wide) + bias.to(wide).view(*(-1 if d == dim % x.dim() else 1 for d in range(x.dim())))
    return activations.truth(activation)(added).to(x.dtype)


checked(
    "bias_act",
    bias_act,
    _bias_act_truth,
    Sample("planes", _bias_sample((2, 3, 4)), derivatives=True),
    Sample("rows", _bias_sample((5, 3), activation="silu"), derivatives=True),
    Sample("channels last", _bias_sample((2, 5, 3, 3), channels_last=True)),
    Sample("planes longer than a block", _bias_sample((2, 2, 33, 65), activation="tanh")),
    Sample("many rows, vectors", _bias_sample((300, 16), activation="hardswish")),
    Sample("the first dimension", _bias_sample((3, 4, 2), dim=0, activation="leaky_relu")),
    Sample("the last dimension", _bias_sample((3, 4, 5), dim=-1, activation="elu")),
    Sample("no rows", _bias_sample((0, 3))),
    Sample("no elements in a plane", _bias_sample((2, 3, 0))),
)


def _bilinear_sample(lead, i, j, outputs, bias=True):
    def make(t: Maker):
        inputs = t.input((*lead, i)), t.input((*lead, j)), t.input((outputs, i, j))
        return (*inputs, t.input((outputs,)) if bias else None), {}

    return make


checked(
    "bilinear",
    bilinear,
    _torch.bilinear,
    Sample("the first input longer", _bilinear_sample((3,), 5, 4, 2), derivatives=True),
    Sample("the second input longer, two batch dimensions", _bilinear_sample((2, 3), 2, 6, 3)),
    Sample("without a bias", _bilinear_sample((4,), 3, 3, 2, bias=False)),
    Sample("no rows", _bilinear_sample((0,), 3, 2, 2)),
)
