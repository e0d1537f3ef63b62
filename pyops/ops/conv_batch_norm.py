"""A batch norm with running statistics behind a convolution is another convolution.

    y = γ (w * x + b - μ) / √(σ² + ε) + β  =  (s w) * x + s (b - μ) + β,     s[k] = γ[k] / √(σ²[k] + ε)

    w: [K, C/G, *taps] (transposed: [C, K/G, *taps])   b, γ, β, μ, σ²: [K]

Put together from the rooms conv and batch_norm. Source: torch.nn.utils.fusion; docs/math/norms.md.
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from ..core import check

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# What a call of a module runs, and who may have written it: of anyone else's nothing is known.
_CALLED = ("__call__", "forward", "_conv_forward", "_function", "_output_padding")
_AUTHORS = ("torch.nn.modules.", __name__.rpartition(".")[0] + ".")


class ConvBatchNorm(nn.Module):
    """A convolution and its batch norm; in eval one convolution, in training the two.

    Args:
        conv: Conv1d to Conv3d or ConvTranspose1d to ConvTranspose3d, of torch or of pyops.
        bn: a batch norm of K channels.
    """

    def __init__(self, conv: nn.Module, bn: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn = conv, bn

    def folded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of the one convolution, in the convolution's dtype; gradients reach all that they are of."""
        conv: Any = self.conv
        bn: Any = self.bn
        weight, wide = conv.weight, check.accumulate_dtype(conv.weight.dtype)
        scale = torch.rsqrt(bn.running_var.to(wide) + bn.eps)
        if bn.weight is not None:
            scale = scale * bn.weight.to(wide)
        shift = -bn.running_mean.to(wide) if conv.bias is None else conv.bias.to(wide) - bn.running_mean.to(wide)
        shift = shift * scale if bn.bias is None else shift * scale + bn.bias.to(wide)
        if isinstance(conv, _TRANSPOSED):
            by_output = weight.unflatten(0, (conv.groups, -1)).to(wide)
            scaled = (by_output * scale.view(conv.groups, 1, -1, *[1] * (weight.dim() - 2))).flatten(0, 1)
        else:
            scaled = weight.to(wide) * scale.view(-1, *[1] * (weight.dim() - 1))
        return scaled.to(weight.dtype), shift.to(weight.dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        conv: Any = self.conv
        if self.bn.training or self.bn.running_var is None:
            result: torch.Tensor = self.bn(conv(input))
            return result
        weight, bias = self.folded()
        if not isinstance(conv, _TRANSPOSED):
            result = conv._conv_forward(input, weight, bias)
            return result
        function = getattr(type(conv), "_function", None)
        if function is None:
            function = getattr(nn.functional, f"conv_transpose{weight.dim() - 2}d")
        result = function(
            input, weight, bias, conv.stride, conv.padding, conv.output_padding, conv.groups, conv.dilation
        )
        return result


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        ours = isinstance(m, (*_CONVOLUTIONS, *_TRANSPOSED, *_NORMS))
        return ours or super().is_leaf_module(m, module_qualified_name)


def _pairs(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names of the convolutions whose only reader is a batch norm, and of these.

    Told by the graph of the model; of a model that torch.fx cannot trace, by the graphs of its children and by the
    order in Sequential.
    """
    try:
        graph = _Tracer().trace(model)
    except Exception:
        children = list(model.named_children())
        if type(model) is nn.Sequential:
            for (first, _), (second, _) in itertools.pairwise(children):
                yield prefix + first, prefix + second
        for name, child in children:
            yield from _pairs(child, f"{prefix}{name}.")
        return
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and len(node.args) == 1 else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        once = calls[node.target] == calls[before.target] == 1
        if once and len(before.args) == 1 and not before.kwargs:
            yield f"{prefix}{before.target}", f"{prefix}{node.target}"


def _computes_as_declared(module: nn.Module) -> bool:
    """Whether a call is the convolution or norm of torch or pyops and nothing besides.

    A subclass with a forward of its own may pad, scale or standardise; a hook may do anything (weight_norm and
    spectral_norm of torch.nn.utils compute the weight in one). Parametrisations are read with the weight.
    """
    for name in _CALLED:
        owner = next((c for c in type(module).__mro__ if name in vars(c)), None)
        if name in vars(module) or (owner is not None and not owner.__module__.startswith(_AUTHORS)):
            return False
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return not any(getattr(module, kind) for kind in hooks)


def fuse_conv_bn(model: nn.Module) -> nn.Module:
    """A copy of the model in which each convolution that only a batch norm reads computes both at once in eval.

    ``y = (s w) * x + s (b - μ) + β`` with ``s = γ / √(σ² + ε)``: one convolution, no pass over its output.

    Args:
        model: any module. What torch.fx can trace is searched by its graph, the rest by its children and the order in
            Sequential. Convolutions or norms that are shared, whose output is read elsewhere, that have hooks, or whose
            class has a ``forward`` that is neither torch's nor pyops' own, stay as they are.

    Returns:
        A copy; the convolution became a ``ConvBatchNorm`` that holds both modules, the norm an Identity. Parameters and
        statistics are kept, so training goes on where it was: in training mode both run one after the other, and in
        eval gradients reach the weights, γ and β. Keys of the state_dict change accordingly.

    Raises:
        TypeError: not a module.

    In eval the result differs from that of the two modules by rounding; bitwise deterministic.
    """
    if not isinstance(model, nn.Module):
        check.fail(TypeError, "fuse_conv_bn", "model", type(model).__name__, "a torch.nn.Module")
    fused = copy.deepcopy(model)
    owners = Counter(id(m) for _, m in fused.named_modules(remove_duplicate=False))
    for conv_name, bn_name in list(_pairs(fused)):
        conv, bn = fused.get_submodule(conv_name), fused.get_submodule(bn_name)
        if not isinstance(conv, (*_CONVOLUTIONS, *_TRANSPOSED)) or not isinstance(bn, _NORMS):
            continue
        if owners[id(conv)] > 1 or owners[id(bn)] > 1:
            continue
        if not (_computes_as_declared(conv) and _computes_as_declared(bn)):
            continue
        if conv.out_channels != bn.num_features:
            continue
        _replace(fused, conv_name, ConvBatchNorm(conv, bn))
        _replace(fused, bn_name, nn.Identity())
    return fused


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
