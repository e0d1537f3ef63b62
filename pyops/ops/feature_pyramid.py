"""Feature pyramid network, and the convolution blocks that detectors are built of.

    inner_l = lateral_l(x_l) + upsample(inner_{l+1})        lateral: 1 x 1, from coarse to fine
    y_l = output_l(inner_l)                                 output: 3 x 3

    x_l: [N, C_l, H_l, W_l], finest first     y_l: [N, C, H_l, W_l]

Modules of torch, put together as torchvision.ops does, with its names of parameters, so that its checkpoints load.
Source: Lin et al. 2017, https://arxiv.org/abs/1612.03144; torchvision.ops.feature_pyramid_network, misc.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..core import check

Layer = Callable[..., nn.Module]


class FrozenBatchNorm2d(nn.Module):
    """Batch norm with fixed statistics and fixed scale, as buffers: ``y = x * scale + shift`` per channel.

    Args:
        num_features: channels C of the input [N, C, H, W].
        eps: added to the variance.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    running_mean: torch.Tensor
    running_var: torch.Tensor

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((num_features,), value))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # checkpoints of a trained BatchNorm2d count their batches
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.weight.shape[0]}, eps={self.eps})"


class _ConvNormActivation(nn.Sequential):
    """Convolution, then norm, then activation, the latter two where they are given."""

    convolution: Layer

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Any, stride: Any, padding: Any, groups: int,
        norm_layer: Layer | None, activation_layer: Layer | None, dilation: Any, inplace: bool | None,
        bias: bool | None,
    ) -> None:  # fmt: skip
        if padding is None:
            padding = _same(kernel_size, dilation)
        layers = [
            self.convolution(
                in_channels, out_channels, kernel_size, stride, padding,
                dilation=dilation, groups=groups, bias=norm_layer is None if bias is None else bias,
            )
        ]  # fmt: skip
        if norm_layer is not None:
            layers.append(norm_layer(out_channels))
        if activation_layer is not None:
            layers.append(activation_layer() if inplace is None else activation_layer(inplace=inplace))
        super().__init__(*layers)
        self.out_channels = out_channels


def _same(kernel_size: Any, dilation: Any) -> Any:
    """The padding that keeps the size at stride 1, for odd kernels."""
    if isinstance(kernel_size, int) and isinstance(dilation, int):
        return (kernel_size - 1) // 2 * dilation
    rank = len(kernel_size) if isinstance(kernel_size, Sequence) else len(dilation)
    kernels = kernel_size if isinstance(kernel_size, Sequence) else [kernel_size] * rank
    dilations = dilation if isinstance(dilation, Sequence) else [dilation] * rank
    return tuple((k - 1) // 2 * d for k, d in zip(kernels, dilations))


class Conv2dNormActivation(_ConvNormActivation):
    """``Conv2d``, norm, activation; see torchvision.ops.Conv2dNormActivation.

    Args:
        padding: None keeps the size at stride 1.
        norm_layer, activation_layer: constructors, or None for none.
        inplace: of the activation; None leaves it to the activation.
        bias: of the convolution; None means where there is no norm.
    """

    convolution = nn.Conv2d

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1, padding: int | tuple[int, int] | str | None = None, groups: int = 1,
        norm_layer: Layer | None = nn.BatchNorm2d, activation_layer: Layer | None = nn.ReLU,
        dilation: int | tuple[int, int] = 1, inplace: bool | None = True, bias: bool | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, groups, norm_layer, activation_layer, dilation,
            inplace, bias,
        )  # fmt: skip


class Conv3dNormActivation(_ConvNormActivation):
    """``Conv3d``, norm, activation; see ``Conv2dNormActivation``."""

    convolution = nn.Conv3d

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int, int] = 3,
        stride: int | tuple[int, int, int] = 1, padding: int | tuple[int, int, int] | str | None = None,
        groups: int = 1, norm_layer: Layer | None = nn.BatchNorm3d, activation_layer: Layer | None = nn.ReLU,
        dilation: int | tuple[int, int, int] = 1, inplace: bool | None = True, bias: bool | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, groups, norm_layer, activation_layer, dilation,
            inplace, bias,
        )  # fmt: skip


class SqueezeExcitation(nn.Module):
    """Channels scaled by what a bottleneck makes of their means (Hu et al. 2018); see torchvision's."""

    def __init__(
        self, input_channels: int, squeeze_channels: int, activation: Layer = nn.ReLU,
        scale_activation: Layer = nn.Sigmoid,
    ) -> None:  # fmt: skip
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(input_channels, squeeze_channels, 1)
        self.fc2 = nn.Conv2d(squeeze_channels, input_channels, 1)
        self.activation = activation()
        self.scale_activation = scale_activation()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.scale_activation(self.fc2(self.activation(self.fc1(self.avgpool(input))))) * input


class MLP(nn.Sequential):
    """Linear layers, each but the last followed by norm, activation and dropout; drops in for torchvision.ops.MLP.

    Args:
        in_channels: features of the input.
        hidden_channels: features after every layer.
        norm_layer, activation_layer: constructors; no norm where None.
        inplace: of the activation and the dropout; None leaves it to them.
        bias: of the linear layers.
        dropout: probability, after every layer.
    """

    def __init__(
        self, in_channels: int, hidden_channels: list[int], norm_layer: Layer | None = None,
        activation_layer: Layer | None = nn.ReLU, inplace: bool | None = None, bias: bool = True, dropout: float = 0.0,
    ) -> None:  # fmt: skip
        how = {} if inplace is None else {"inplace": inplace}
        widths = [in_channels, *hidden_channels]
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(itertools.pairwise(widths)):
            layers.append(nn.Linear(before, after, bias=bias))
            if i + 2 < len(widths):
                layers += [norm_layer(after)] if norm_layer is not None else []
                layers += [activation_layer(**how)] if activation_layer is not None else []
            layers.append(nn.Dropout(dropout, **how))
        super().__init__(*layers)


class Permute(nn.Module):
    """``torch.permute`` as a module; see torchvision.ops.Permute."""

    def __init__(self, dims: list[int]) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(self.dims)


class ExtraFPNBlock(nn.Module):
    """Base of blocks that append maps to a pyramid: ``forward(results, x, names) -> (results, names)``."""

    def forward(
        self, results: list[torch.Tensor], x: list[torch.Tensor], names: list[str]
    ) -> tuple[list[torch.Tensor], list[str]]:
        raise NotImplementedError


class LastLevelMaxPool(ExtraFPNBlock):
    """Appends ``"pool"``: every second pixel of the coarsest map."""

    def forward(
        self, results: list[torch.Tensor], x: list[torch.Tensor], names: list[str]
    ) -> tuple[list[torch.Tensor], list[str]]:
        return [*results, results[-1][..., ::2, ::2].contiguous()], [*names, "pool"]


class LastLevelP6P7(ExtraFPNBlock):
    """Appends ``"p6"`` and ``"p7"``, two strided convolutions (RetinaNet)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.p6 = nn.Conv2d(in_channels, out_channels, 3, 2, 1)
        self.p7 = nn.Conv2d(out_channels, out_channels, 3, 2, 1)
        for convolution in (self.p6, self.p7):
            _initialise(convolution)
        self.use_P5 = in_channels == out_channels

    def forward(
        self, results: list[torch.Tensor], x: list[torch.Tensor], names: list[str]
    ) -> tuple[list[torch.Tensor], list[str]]:
        p6 = self.p6(results[-1] if self.use_P5 else x[-1])
        return [*results, p6, self.p7(nn.functional.relu(p6))], [*names, "p6", "p7"]


def _initialise(convolution: nn.Conv2d) -> None:
    nn.init.kaiming_uniform_(convolution.weight, a=1)
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)


class FeaturePyramidNetwork(nn.Module):
    """Maps of equal depth at every scale from maps of growing depth; drops in for torchvision's.

    Args:
        in_channels_list: channels of every input map, finest first.
        out_channels: channels of every output map.
        extra_blocks: an ``ExtraFPNBlock`` that appends maps, or None.
        norm_layer: norm after every convolution, or None.
    """

    _version = 2

    def __init__(
        self, in_channels_list: list[int], out_channels: int, extra_blocks: ExtraFPNBlock | None = None,
        norm_layer: Layer | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        op = "FeaturePyramidNetwork"
        if not in_channels_list or min(in_channels_list) < 1:
            check.fail(ValueError, op, "in_channels_list", in_channels_list, "numbers of channels >= 1")
        if extra_blocks is not None and not isinstance(extra_blocks, ExtraFPNBlock):
            check.fail(TypeError, op, "extra_blocks", type(extra_blocks).__name__, "an ExtraFPNBlock or None")
        block = lambda channels, kernel: Conv2dNormActivation(
            channels, out_channels, kernel, norm_layer=norm_layer, activation_layer=None
        )
        self.inner_blocks = nn.ModuleList(block(channels, 1) for channels in in_channels_list)
        self.layer_blocks = nn.ModuleList(block(out_channels, 3) for _ in in_channels_list)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                _initialise(module)
        self.extra_blocks = extra_blocks

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, metadata: Any, *rest: Any) -> None:
        # before version 2 each block was a bare convolution
        if (metadata.get("version") or 1) < 2:
            for blocks in ("inner_blocks", "layer_blocks"):
                for i in range(len(self.inner_blocks)):
                    for name in ("weight", "bias"):
                        if (old := f"{prefix}{blocks}.{i}.{name}") in state_dict:
                            state_dict[f"{prefix}{blocks}.{i}.0.{name}"] = state_dict.pop(old)
        super()._load_from_state_dict(state_dict, prefix, metadata, *rest)

    def forward(self, x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Maps by name, finest first, to maps of ``out_channels`` under the same names and those of the extra block."""
        names, maps = list(x), list(x.values())
        if len(maps) != len(self.inner_blocks):
            check.fail(RuntimeError, "FeaturePyramidNetwork", "x", f"{len(maps)} maps", f"{len(self.inner_blocks)}")
        inner: torch.Tensor | None = None
        results: list[torch.Tensor] = []
        for lateral, output, m in reversed(list(zip(self.inner_blocks, self.layer_blocks, maps))):
            side = lateral(m)
            inner = side if inner is None else side + nn.functional.interpolate(inner, size=side.shape[-2:])
            results.insert(0, output(inner))
        if self.extra_blocks is not None:
            results, names = self.extra_blocks(results, maps, names)
        return OrderedDict(zip(names, results))
