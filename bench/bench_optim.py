"""optim: one step over all parameters of a network, each read and written once; torch as foreach and as fused.

``x`` holds the parameters one after another, ``grad`` their gradients; a case's ``net`` says how they are cut.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from pyops import optim

from .case import Case, Function, Provider, Tensors
from .peers import pyops_providers

STEM = "optim"
DIFFERENTIABLE = False
RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {"momentum": 0.9}),
    "adagrad": ("Adagrad", {}),
    "rmsprop": ("RMSprop", {}),
    "adam": ("Adam", {}),
    "adamw": ("AdamW", {"amsgrad": True}),
    "clip_grad_norm": ("", {}),
    "clip_grad_value": ("", {}),
    "ema": ("", {}),
}
OPS = tuple(RULES)
# float32 moved per parameter: read p, g and the states; write p and the states
TRAFFIC = {
    "sgd": 5, "adagrad": 5, "rmsprop": 5, "adam": 7, "adamw": 9, "clip_grad_norm": 3, "clip_grad_value": 2, "ema": 3,
}  # fmt: skip
FLOPS = {
    "sgd": 4, "adagrad": 7, "rmsprop": 8, "adam": 13, "adamw": 14, "clip_grad_norm": 3, "clip_grad_value": 2, "ema": 3,
}  # fmt: skip


def resnet50() -> list[tuple[int, ...]]:
    """The 161 parameters of ResNet-50, 25.6 million numbers."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, channels, 1, 1), (width,), (width,), (width, width, 3, 3), (width,), (width,)]
            shapes += [(4 * width, width, 1, 1), (4 * width,), (4 * width,)]
            if block == 0:
                shapes += [(4 * width, channels, 1, 1), (4 * width,), (4 * width,)]
            channels = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


NETS: dict[str, Callable[[], list[tuple[int, ...]]]] = {
    "resnet50": resnet50,
    "small": lambda: [(16, 16), (16,)] * 20,  # a step over little is the price of a call
    "tiny": lambda: [(3, 5), (1,), (17,)],
    "layers": lambda: [(4096, 4096), (4096, 16384), (16384, 4096)] * 6,
}


def size(net: str) -> int:
    return sum(math.prod(shape) for shape in NETS[net]())


def case_of(op: str, net: str, device: str = "cpu", quick: bool = False, dtype: torch.dtype = torch.float32) -> Case:
    return Case(op, (size(net),), dtype, device, quick=quick, args={"net": net})


def cases(device: str) -> list[Case]:
    if device == "cpu":
        nets = [case_of(op, "resnet50", quick=op in ("adam", "sgd")) for op in OPS]
        return [*nets, case_of("adam", "small"), case_of("sgd", "small")]
    nets = [case_of(op, "resnet50", device, quick=op == "adam") for op in OPS]
    return [*nets, case_of("adam", "layers", device), case_of("adam", "layers", device, dtype=torch.bfloat16)]


def tiny(device: str) -> list[Case]:
    return [case_of(op, "tiny", device) for op in OPS]


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    return {"grad": case.shape}


def bytes(case: Case) -> int:
    return case.numel * case.dtype.itemsize * TRAFFIC[case.op]


def flops(case: Case) -> int:
    return case.numel * FLOPS[case.op]


def traffic(case: Case) -> tuple[int, int]:
    return bytes(case), 3 if case.op == "clip_grad_norm" else 1


def views(flat: torch.Tensor, net: str) -> list[torch.Tensor]:
    pieces = flat.split([math.prod(shape) for shape in NETS[net]()])
    return [piece.view(shape) for piece, shape in zip(pieces, NETS[net]())]


def stepping(module: Any, case: Case, **arguments: Any) -> Function:
    """The first call on some tensors makes the optimizer; every call takes a step. Clipping returns the gradients; an
    average of weights has ``x`` follow ``grad``."""
    kept: list[Any] = [None, None]  # the tensor that holds the parameters, and what was made of it

    def parameters(t: Tensors) -> list[torch.Tensor]:
        params = [p.detach().requires_grad_() for p in views(t["x"], case.args["net"])]
        for p, g in zip(params, views(t["grad"], case.args["net"])):
            p.grad = g
        return params

    def step(t: Tensors) -> torch.Tensor:
        if kept[0] is not t["x"]:
            name, options = RULES[case.op]
            kept[:] = t["x"], getattr(module, name)(parameters(t), **options, **arguments)
        kept[1].step()
        return t["x"]

    def clip(t: Tensors) -> torch.Tensor:
        if kept[0] is not t["x"]:
            kept[:] = t["x"], parameters(t)
        getattr(module, f"{case.op}_")(kept[1], 1.0, **arguments)
        return t["grad"]

    def average(t: Tensors) -> torch.Tensor:
        if kept[0] is not t["x"]:
            kept[:] = t["x"], [views(t[name], case.args["net"]) for name in ("x", "grad")]
        follow(*kept[1], None)
        return t["x"]

    if case.op == "ema":
        follow = module.get_ema_multi_avg_fn(0.99)
        return average
    return clip if case.op.startswith("clip") else step


def bind(functional: Any, case: Case) -> Function:
    if functional is not torch.nn.functional:
        return stepping(optim, case)
    if case.op == "ema":
        return stepping(torch.optim.swa_utils, case)
    return stepping(torch.nn.utils if case.op.startswith("clip") else torch.optim, case, foreach=True)


def providers(case: Case) -> dict[str, Provider]:
    found = pyops_providers(bind, case)
    found["torch"] = Provider(lambda: bind(torch.nn.functional, case))
    if case.op in ("sgd", "adagrad", "adam", "adamw"):
        found["torch fused"] = Provider(lambda: stepping(torch.optim, case, fused=True))
    return found
