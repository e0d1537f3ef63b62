"""Local response normalisation: each channel divided by the energy of its neighbours.

    q[c] = k + alpha/size · sum_{c' in window(c)} x[c']²          y[c] = x[c] q[c]^-beta
    dx[c] = dy[c] q[c]^-beta - 2 alpha beta/size · x[c] · sum_{c': c in window(c')} dy[c'] x[c'] q[c']^-(beta+1)

    x: [N, C, *]   window(c) = c - floor(size/2) .. c + floor((size - 1)/2), what lies outside counts as 0

Sources: torch.nn.functional.local_response_norm; Krizhevsky et al., ImageNet classification (2012). The gradient is
derived in docs/math/norms.md.
"""

from __future__ import annotations

from typing import Any

import torch

from ..core import autocast, backend, check, layout, library
from ..core.autograd import Formula, Tensors, differentiable
from ..core.intercept import route
from ..core.samples import Sample, checked

_SCHEMA = "int size, float alpha, float beta, float k, bool channels_last) -> Tensor"
_kernels = library.triton_kernels("local_response_norm")
_fwd = library.declare(
    f"local_response_norm_fwd(Tensor x, {_SCHEMA}", lambda x, *constants: x.new_empty(x.shape), _kernels
)
_bwd = library.declare(
    f"local_response_norm_bwd(Tensor dy, Tensor x, {_SCHEMA}", lambda dy, x, *constants: x.new_empty(x.shape), _kernels
)


def _reference(x, size, alpha, beta, k, channels_last):
    squares = (x * x).movedim(-1, 1) if channels_last else x * x
    zeros = squares.new_zeros(squares.shape[0], 1, *squares.shape[2:])
    padded = torch.cat([*[zeros] * (size // 2), squares, *[zeros] * ((size - 1) // 2)], 1)
    total = torch.stack([padded.narrow(1, j, squares.shape[1]) for j in range(size)]).sum(0)
    total = total.movedim(1, -1) if channels_last else total
    return (x * (total * (alpha / size) + k) ** -beta,)


def _arguments(dy, inputs: Tensors, kept: Tensors, constants: Tensors, needs) -> Tensors:
    return dy, inputs[0], *constants


def _fold(forward, batch, dims, inputs, constants):
    """A batch is more of N."""
    x = inputs[0].movedim(dims[0], 0)
    y = forward(x.flatten(0, 1).contiguous(), *constants)
    return y.reshape(x.shape), 0


_apply: Any = differentiable(Formula(_fwd, _bwd, 1, 1, _arguments, _reference, _fold, keep=()))


def local_response_norm(
    input: torch.Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> torch.Tensor:
    """Divides each channel by a power of its neighbours' energy; drops in for torch.nn.functional.local_response_norm.

        y[c] = x[c] / (k + alpha/size · sum over the window of x²)^beta

    Args:
        input: Tensor[N, C, *] with at least one dimension in *, contiguous or channels last, float32, float64, bfloat16
            or float16.
        size: channels in a window; of an even number one more lies before the channel than behind it.
        alpha, beta, k: the factor, the exponent and what is added; the base of the power must be positive (it is where
            k > 0 and alpha >= 0), else the result is NaN or infinite.

    Returns:
        Tensor of the input's shape and memory format.

    Raises:
        ValueError: fewer than 3 dimensions.
        RuntimeError: size < 1.
        TypeError: a size that is no int.
        NotImplementedError: a dtype without kernels.

    Sums in float32 (float64 for float64), each window anew. Bitwise deterministic; gradients of every order, forward
    mode, vmap and torch.compile.
    """
    op = "local_response_norm"
    check.floating(op, "input", input)
    if input.dim() < 3:
        check.fail(ValueError, op, "input", f"shape {list(input.shape)}", "at least 3 dimensions")
    if isinstance(size, bool) or not isinstance(size, int):
        check.fail(TypeError, op, "size", repr(size), "an int")
    if size < 1:
        if input.numel():
            check.fail(RuntimeError, op, "size", size, "an int >= 1")
        size = 1  # of nothing torch takes any size
    # as torch, which averages images with avg_pool3d and sequences with avg_pool2d
    cast: Any = autocast.cast("avg_pool3d", input)[0] if input.dim() > 3 else input
    x, channels_last = layout.channels(cast)
    y = _apply(backend.namespace_for(op, x), x, size, float(alpha), float(beta), float(k), channels_last)
    return layout.restore(y, channels_last)


route((torch.nn.functional.local_response_norm,), "local_response_norm", local_response_norm)


class LocalResponseNorm(torch.nn.LocalResponseNorm):
    """torch.nn.LocalResponseNorm whose forward is pyops.functional.local_response_norm."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return local_response_norm(input, self.size, self.alpha, self.beta, self.k)


def _torch_reference(input, *args, **kwargs):
    """torch's function. Its average pooling knows no half types on the CPU, so there they are widened; autocast does.

    Its views refuse some strides, so it gets a contiguous input.
    """
    x = input.contiguous()
    if input.dtype in autocast.HALF:
        return torch.nn.functional.local_response_norm(x.float(), *args, **kwargs).to(input.dtype)
    return torch.nn.functional.local_response_norm(x, *args, **kwargs)


def _sample(shape, size, channels_last=False, **arguments):
    return lambda t: ((t.input(shape, channels_last=channels_last), size), {"alpha": 0.5, **arguments})


checked(
    "local_response_norm",
    local_response_norm,
    _torch_reference,
    Sample("odd window", _sample((1, 4, 2, 3), 3), derivatives=True),
    Sample("even window of a sequence", _sample((2, 3, 2), 4, beta=0.6, k=2.0), derivatives=True),
    Sample("every argument", _sample((2, 7, 3, 25), 5, alpha=2.0, beta=1.3, k=0.5)),
    Sample("channels last", _sample((2, 37, 3, 2), 5, True)),
    Sample("more than there are channels", _sample((2, 3, 2, 2, 3), 9)),
    Sample("one channel in a window", _sample((2, 3, 70), 1)),
    Sample("no examples", _sample((0, 3, 2, 2), 3)),
)
