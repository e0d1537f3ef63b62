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
# What a call of a module runs, and who may have written it: of anyone else's nothing is known, unless it can be traced.
_TRACED = ("forward", "_conv_forward")
_CALLED = ("__call__", "_function", "_output_padding")
_AUTHORS = ("torch.nn.modules.", __name__.rpartition(".")[0] + ".")


class ConvBatchNorm(nn.Module):
    """A convolution and its batch norm; in eval one convolution, in training the two.

    Args:
        conv: Conv1d to Conv3d or ConvTranspose1d to ConvTranspose3d, of torch or of pyops, or a subclass of the first
            three whose ``forward`` is proven to be one convolution (``fuse_conv_bn``); with others the two run in eval
            as well.
        bn: a batch norm of K channels.

    Attributes:
        folds: whether it is one convolution in eval.
        traced: what a ``forward`` of its own does, as a function of (input, weight, bias); None for torch's and pyops'.
    """

    def __init__(self, conv: nn.Module, bn: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn = conv, bn
        norm = _is_plain(bn) and _is_declared(bn, _TRACED)
        self.traced = _traced(conv) if norm and _is_plain(conv) and not _is_declared(conv, _TRACED) else None
        self.folds = norm and _is_plain(conv) and (self.traced is not None or _is_declared(conv, _TRACED))

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
        trains = self.bn.training or (self.traced is not None and conv.training)  # which may pad in another way
        if not self.folds or trains or self.bn.running_var is None:
            result: torch.Tensor = self.bn(conv(input))
            return result
        weight, bias = self.folded()
        if self.traced is not None:
            result = self.traced(input, weight, bias)
            return result
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


def _is_declared(module: nn.Module, names: tuple[str, ...]) -> bool:
    """Whether these methods are torch's or pyops' own, on the class and on the instance."""
    for name in names:
        owner = next((c for c in type(module).__mro__ if name in vars(c)), None)
        if name in vars(module) or (owner is not None and not owner.__module__.startswith(_AUTHORS)):
            return False
    return True


def _is_plain(module: nn.Module) -> bool:
    """Whether a call is the forward of the module's class and nothing besides.

    A hook may do anything (weight_norm and spectral_norm of torch.nn.utils compute the weight in one). Parametrisations
    are read with the weight.
    """
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    patched = any(name in vars(module) for name in _TRACED)
    return not patched and _is_declared(module, _CALLED) and not any(getattr(module, kind) for kind in hooks)


def _traced(conv: nn.Module) -> fx.GraphModule | None:
    """A ``forward`` of its own as a function of (input, weight, bias), where it is one convolution with the two.

    Proven on the graph that torch.fx records of it: the result is that of one call of torch's convolution, whose weight
    and bias are ``self.weight`` and ``self.bias``; nothing else reads these but their shapes, and no other parameter
    or buffer is read. So it is linear in the weight and affine in the bias, filter by filter, whatever is done with
    the input before, and the graph, which is what runs afterwards, may get others. A forward that branches by the
    input has no graph. What tracing could get wrong (a branch by the input's class) shows in the values for two
    random inputs, which are compared besides. All of this happens on a copy in eval.
    """
    if not isinstance(conv, _CONVOLUTIONS):
        return None
    trial: Any = copy.deepcopy(conv).eval()
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            graph = fx.Tracer().trace(trial)
            if not _takes_weight_and_bias(graph, trial):
                return None
            function = fx.GraphModule(trial, graph, type(conv).__name__)
            for spare in (4, 9):
                sides = [d * (k - 1) + spare for d, k in zip(trial.dilation, trial.kernel_size)]
                x = torch.randn(2, trial.in_channels, *sides, generator=torch.Generator().manual_seed(spare))
                x = x.to(trial.weight)
                torch.testing.assert_close(function(x, trial.weight, trial.bias), trial(x))
    except Exception:
        return None
    return fx.GraphModule(conv, graph, type(conv).__name__)


def _takes_weight_and_bias(graph: fx.Graph, conv: Any) -> bool:
    """Makes weight and bias arguments of the graph; False where it is not one convolution with them."""
    (input, *more), call = graph.find_nodes(op="placeholder"), next(iter(reversed(graph.nodes))).args[0]
    if more or not isinstance(call, fx.Node):
        return False
    if call.target is not getattr(nn.functional, f"conv{conv.weight.dim() - 2}d"):
        return False
    given = dict(zip(("input", "weight", "bias"), call.args)) | call.kwargs
    read = {name: given.get(name) for name in ("weight", "bias")[: 1 if conv.bias is None else 2]}
    if given["input"] in read.values() or (conv.bias is None and given.get("bias") is not None):
        return False
    if any(getattr(node, "target", None) != name or node.op != "get_attr" for name, node in read.items()):
        return False
    for node in graph.nodes:
        if node.op == "get_attr":
            known = read.get(node.target) is node
            if not known or not all(user is call or _asks_for_a_shape(user, node) for user in node.users):
                return False
        if node.op == "call_module":  # one with a state would be held twice, by conv and by the graph
            m = conv.get_submodule(node.target)
            if any(True for _ in itertools.chain(m.parameters(), m.buffers())):
                return False
    with graph.inserting_after(input):
        bias = graph.placeholder("bias")
    with graph.inserting_after(input):
        weight = graph.placeholder("weight")
    if len(call.args) > 2:
        call.update_arg(2, bias)
    else:
        call.update_kwarg("bias", bias)
    for name, argument in (("weight", weight), ("bias", bias)):
        if name in read:
            read[name].replace_all_uses_with(argument)
            graph.erase_node(read[name])
    graph.lint()
    return True


def _asks_for_a_shape(node: fx.Node, of: fx.Node) -> bool:
    if not node.args or node.args[0] is not of:
        return False
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel")
    return node.target is getattr and node.args[1] in ("shape", "ndim", "dtype", "device")


def fuse_conv_bn(model: nn.Module) -> nn.Module:
    """A copy of the model in which each convolution that only a batch norm reads computes both at once in eval.

    ``y = (s w) * x + s (b - μ) + β`` with ``s = γ / √(σ² + ε)``: one convolution, no pass over its output.

    Args:
        model: any module. What torch.fx can trace is searched by its graph, the rest by its children and the order in
            Sequential. Convolutions or norms that are shared, whose output is read elsewhere or that have hooks stay
            as they are. So do those whose class has a ``forward`` that is neither torch's nor pyops' own, but for
            subclasses of Conv1d to Conv3d whose forward torch.fx can trace and whose graph is one convolution of
            anything made of the input with ``self.weight`` and ``self.bias``, as where it pads by itself; see Notes.

    Returns:
        A copy; the convolution became a ``ConvBatchNorm`` that holds both modules, the norm an Identity. Parameters and
        statistics are kept, so training goes on where it was: in training mode both run one after the other, and in
        eval gradients reach the weights, γ and β. Keys of the state_dict change accordingly.

    Raises:
        TypeError: not a module.

    In eval the result differs from that of the two modules by rounding; bitwise deterministic.

    Notes:
        A forward is a convolution in ``weight`` and ``bias`` if its graph says so: the only tensors that it reads
        besides its input are these two (but for their shapes), once each, as weight and bias of the call whose result
        it returns. No example proves that, and none is trusted to; two random inputs only confirm that the graph is
        that of the forward. From then on the graph runs in eval, with the folded weight and bias, so what the forward
        reads of its module's settings is what stood there when it was fused. While the convolution is in training mode,
        frozen norm or not, the two modules run: a forward may do something else then. A forward that branches by its
        input (padding by its size) cannot be traced and stays.
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
        if isinstance(fused.get_submodule(conv_name.rpartition(".")[0]), ConvBatchNorm):  # of an earlier fusion
            continue
        if conv.out_channels != bn.num_features:
            continue
        pair = ConvBatchNorm(conv, bn)
        if pair.folds:
            _replace(fused, conv_name, pair)
            _replace(fused, bn_name, nn.Identity())
    return fused


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
