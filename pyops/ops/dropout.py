"""Dropout: elements, or whole channels, are dropped at random while training.

    y[m,s,c] = x[m,s,c] * scale + shift   where (m, c) is kept        dx[m,s,c] = dy[m,s,c] * scale   where it is kept
             = x[m,s,c] * 0 + fill        where it is dropped                   = dy[m,s,c] * 0       where it is not

    x, y: [M, S, C]; one random number for each (m, c)

    dropout        scale = 1 / (1 - p), shift = fill = 0
    alpha dropout  keeps mean 0 and variance 1 of selu's outputs: a dropped element becomes α' = -1.758, the negative
                   limit of selu, and all are mapped by a x + b, a = ((1 - p) (1 + p α'²))^(-1/2), b = -a p α'

The random numbers are functions of (seed, offset), a pair drawn from torch's generator, and of the element's number
(pyops.core.random): nothing but that pair is stored for the backward pass, the masks of all backends are the same, and
``torch.manual_seed`` reproduces them. They are not the numbers torch's own dropout draws.

Sources: Srivastava et al. 2014, https://jmlr.org/papers/v15/srivastava14a.html; Tompson et al. 2015 (channels),
https://arxiv.org/abs/1411.4280; Klambauer et al. 2017 (alpha), https://arxiv.org/abs/1706.02515; Wan et al. 2013
(DropConnect), https://proceedings.mlr.press/v28/wan13.html.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch

from ..core import autocast, check, product, random
from ..core.intercept import route
from ..core.layout import is_channels_last
from ..core.masking import check_probability, masked, numbers
from ..core.samples import Maker, Sample, checked

_torch = torch.nn.functional


def _drop(
    op: str, input: torch.Tensor, p: float, training: bool, inplace: bool, alpha: bool = False, features: bool = False
) -> torch.Tensor:
    if isinstance(p, float) and math.isnan(p):
        check.fail(RuntimeError, op, "p", p, "a probability in [0, 1]")  # torch's type for NaN
    check_probability(op, "p", p)
    if not isinstance(input, torch.Tensor):
        check.fail(TypeError, op, "input", type(input).__name__, "a tensor")
    features = features and 0 < p < 1  # else all elements are treated alike
    if features and training and input.numel() and input.dim() < 2:
        check.fail(RuntimeError, op, "input", f"{input.dim()} dimensions", "at least two, [N, C, *]")
    if not training or p == 0 or input.numel() == 0:
        return input
    check.floating(op, "input", input)
    y = masked(op, input, random.draw(input.device), float(p), alpha, features)
    return input.copy_(y) if inplace else y


# The functions


def dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """Zeroes elements with probability p and divides the others by 1 - p; drops in for torch.nn.functional.dropout.

    Args:
        input: Tensor[*] in float32, float64, bfloat16 or float16.
        p: probability of dropping an element, in [0, 1].
        training: False returns the input.
        inplace: overwrites the input.

    Returns:
        Tensor[*] in the order of the input's dimensions in memory, in which elements are numbered. A dropped NaN or
        infinity gives NaN, as in torch.

    Raises:
        ValueError: p outside [0, 1].
        NotImplementedError: an input that is not floating point.

    Random numbers come from torch's generator of the device and are drawn again in the backward pass: no mask is
    stored. Gradients of every order, forward mode, torch.compile, and vmap with ``randomness="same"`` or
    ``"different"``.
    """
    return _drop("dropout", input, p, training, inplace)


def alpha_dropout(input: torch.Tensor, p: float = 0.5, training: bool = False, inplace: bool = False) -> torch.Tensor:
    """Dropout that keeps mean and variance of selu's outputs; drops in for torch.nn.functional.alpha_dropout.

    A dropped element becomes the negative limit of selu, -1.758; then all are scaled and shifted. See ``dropout``.
    """
    return _drop("alpha_dropout", input, p, training, inplace, alpha=True)


def dropout1d(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """``dropout`` of whole channels of [N, C, L] or [C, L]; drops in for torch.nn.functional.dropout1d.

    Raises:
        RuntimeError: an input of another rank.
    """
    if input.dim() not in (2, 3):
        check.fail(RuntimeError, "dropout1d", "input", f"{input.dim()} dimensions", "[N, C, L] or [C, L]")
    return _drop_channels("dropout1d", input, p, training, inplace, alone=input.dim() == 2)


def dropout2d(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """``dropout`` of whole channels of [N, C, H, W]; drops in for torch.nn.functional.dropout2d.

    As in torch, another number of dimensions is warned about, and three are read as [N, C, L].
    """
    if input.dim() != 4:
        warnings.warn(
            f"dropout2d: argument 'input': got {input.dim()} dimensions, expected [N, C, H, W]; three are read as "
            "[N, C, L]: dropout1d reads [C, L] as well",
            stacklevel=2,
        )
    return _drop("dropout2d", input, p, training, inplace, features=True)


def dropout3d(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """``dropout`` of whole channels of [N, C, D, H, W] or [C, D, H, W]; as torch.nn.functional.dropout3d.

    As in torch, another number of dimensions is warned about, and read as [C, *].
    """
    if input.dim() not in (4, 5):
        warnings.warn(
            f"dropout3d: argument 'input': got {input.dim()} dimensions, expected [N, C, D, H, W] or [C, D, H, W]",
            stacklevel=2,
        )
    return _drop_channels("dropout3d", input, p, training, inplace, alone=input.dim() != 5)


def _drop_channels(op: str, input: torch.Tensor, p: float, training: bool, inplace: bool, alone: bool) -> torch.Tensor:
    """``alone``: the input is one example without a batch dimension."""
    if not alone:
        return _drop(op, input, p, training, inplace, features=True)
    if not training or p == 0:
        return _drop(op, input, p, training, inplace)
    return _drop(op, input.unsqueeze(0), p, training, inplace, features=True).squeeze(0)


def feature_alpha_dropout(
    input: torch.Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
) -> torch.Tensor:
    """``alpha_dropout`` of whole channels of [N, C, *]; drops in for torch.nn.functional.feature_alpha_dropout."""
    return _drop("feature_alpha_dropout", input, p, training, inplace, alpha=True, features=True)


def _check_linear(op: str, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    check.floating(op, "input", input)
    given = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    for name, t in given.items():
        check.floating(op, name, t)
        if t.device != input.device or (t.dtype != input.dtype and not autocast.enabled(input)):
            wanted = f"{input.dtype} on {input.device}, as the input"
            check.fail(RuntimeError, op, name, f"{t.dtype} on {t.device}", wanted)
    if weight.dim() != 2 or input.dim() == 0 or weight.shape[1] != input.shape[-1]:
        wanted = f"[O, I] for an input [*, I], whose shape is {list(input.shape)}"
        check.fail(RuntimeError, op, "weight", f"shape {list(weight.shape)}", wanted)
    if bias is not None and bias.dim() and bias.shape[-1] not in (1, weight.shape[0]):
        check.fail(RuntimeError, op, "bias", f"shape {list(bias.shape)}", f"[{weight.shape[0]}]")


def dropconnect_linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    p: float = 0.5,
    training: bool = True,
) -> torch.Tensor:
    """A linear layer whose weights are dropped, one mask for the whole batch: ``x (w z / (1 - p))ᵀ + b``.

    Args:
        input: Tensor[*, I].
        weight: Tensor[O, I]; each element is dropped with probability p.
        bias: Tensor[O] or None; never dropped.
        p: probability of dropping, in [0, 1].
        training: False multiplies by the weight as it is.

    Returns:
        Tensor[*, O].

    Raises:
        ValueError: p outside [0, 1].
        RuntimeError: shapes, dtypes or devices that do not fit together.
        NotImplementedError: a dtype that is not floating.

    The mask is drawn as in ``dropout`` and not stored; the product is torch's. Source: Wan et al. 2013, who also draw a
    mask for each example.
    """
    _check_linear("dropconnect_linear", input, weight, bias)
    return product.linear(input, _drop("dropconnect_linear", weight, p, training, False), bias)


# The modules


class Dropout(torch.nn.Dropout):
    """torch.nn.Dropout whose forward is pyops.functional.dropout."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return dropout(input, self.p, self.training, self.inplace)


class Dropout1d(torch.nn.Dropout1d):
    """torch.nn.Dropout1d whose forward is pyops.functional.dropout1d."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return dropout1d(input, self.p, self.training, self.inplace)


class Dropout2d(torch.nn.Dropout2d):
    """torch.nn.Dropout2d whose forward is pyops.functional.dropout2d."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return dropout2d(input, self.p, self.training, self.inplace)


class Dropout3d(torch.nn.Dropout3d):
    """torch.nn.Dropout3d whose forward is pyops.functional.dropout3d."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return dropout3d(input, self.p, self.training, self.inplace)


class AlphaDropout(torch.nn.AlphaDropout):
    """torch.nn.AlphaDropout whose forward is pyops.functional.alpha_dropout."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return alpha_dropout(input, self.p, self.training)


class FeatureAlphaDropout(torch.nn.FeatureAlphaDropout):
    """torch.nn.FeatureAlphaDropout whose forward is pyops.functional.feature_alpha_dropout."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return feature_alpha_dropout(input, self.p, self.training)


class DropConnectLinear(torch.nn.Linear):
    """torch.nn.Linear whose weights are dropped while training; see ``dropconnect_linear``.

    Args:
        in_features, out_features, bias, device, dtype: as torch.nn.Linear.
        p: probability of dropping a weight.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        p: float = 0.5,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not 0 <= p <= 1:
            check.fail(ValueError, "DropConnectLinear", "p", p, "a probability in [0, 1]")
        super().__init__(in_features, out_features, bias, device, dtype)
        self.p = p

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return dropconnect_linear(input, self.weight, self.bias, self.p, self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p}"


# Routes and samples


def _of_builtin(op: str, inplace: bool, **how: bool) -> Callable[..., torch.Tensor]:
    """The builtins say ``train``, and mask channels of any [N, C, *]."""

    def call(input: torch.Tensor, p: float, train: bool) -> torch.Tensor:
        return _drop(op, input, p, train, inplace, **how)

    return call


for _function, _how in (
    (dropout, {}),
    (alpha_dropout, {"alpha": True}),
    (feature_alpha_dropout, {"alpha": True, "features": True}),
):
    _name = _function.__name__
    route((getattr(_torch, _name),), _name, _function)
    route((getattr(torch, _name),), _name, _of_builtin(_name, False, **_how))
    route((getattr(torch, f"{_name}_"),), _name, _of_builtin(_name, True, **_how))
for _function in (dropout1d, dropout2d, dropout3d):
    route((getattr(_torch, _function.__name__),), _function.__name__, _function)
route((torch.feature_dropout,), "feature_dropout", _of_builtin("feature_dropout", False, features=True))
route((torch.feature_dropout_,), "feature_dropout", _of_builtin("feature_dropout", True, features=True))


def _truth(
    op: str, x: torch.Tensor, state: torch.Tensor, p: float, alpha: bool = False, features: bool = False
) -> torch.Tensor:
    """The same in plain torch."""
    _, scale, shift, fill = numbers(p, alpha)
    if features:
        kept = random.keep(state, x.shape[:2], p).reshape(*x.shape[:2], *(1,) * (x.dim() - 2))
    elif is_channels_last(x):
        moved = x.movedim(1, -1)
        kept = random.keep(state, moved.shape, p).movedim(-1, 1)
    else:
        kept = random.keep(state, x.shape, p)
    wide = x.to(check.accumulate_dtype(x.dtype))
    return torch.where(kept, wide * scale + shift, wide * 0 + fill).to(x.dtype)


def _sample(shape, p=0.3, channels_last=False, **how):
    def make(t: Maker):
        state = torch.tensor([-(2**60) + 12345, 2**33 + 7], device=t.device)
        return ("dropout", t.input(shape, channels_last=channels_last), state, p), how

    return make


checked(
    "dropout",
    masked,
    _truth,
    Sample("elements, tail of a vector", _sample((3, 7)), derivatives=True),
    Sample("alpha dropout", _sample((5, 6), alpha=True), derivatives=True),
    Sample("channels", _sample((2, 3, 4), features=True), derivatives=True),
    Sample("channels last, channels", _sample((2, 37, 3, 3), 0.5, True, features=True)),
    Sample("several blocks, most dropped", _sample((3, 1031), 0.9)),
    Sample("alpha of channels", _sample((3, 17, 9), features=True, alpha=True)),
    Sample("everything dropped", _sample((2, 9), 1.0)),
    Sample("no elements", _sample((0, 3))),
)
