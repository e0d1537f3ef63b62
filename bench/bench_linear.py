"""linear: a product by torch, with the bias, the activation and their gradients around it."""

import math
from typing import Any

import torch

from .case import Case, Function, Provider, with_both_directions
from .peers import standard_providers

STEM = "linear"
OPS = ("linear", "linear_act", "bias_act", "bilinear")


def _linear(op: str, rows: int, inputs: int, outputs: int, **how: Any) -> Case:
    args = {"activation": "gelu"} if op == "linear_act" else {}
    return Case(op, (rows, inputs), args={"outputs": outputs, **args}, output=(rows, outputs), **how)


def cases(device: str) -> list[Case]:
    if device == "cpu":
        return with_both_directions(
            [
                _linear("linear_act", 4096, 256, 1024, quick=True),
                _linear("linear", 4096, 256, 1024, quick=True),
                _linear("linear", 8192, 64, 1024),
                Case("bias_act", (8, 64, 112, 112), args={"activation": "gelu"}),
                Case("bias_act", (8192, 1024), args={"activation": "silu"}),
                Case("bilinear", (512, 64), args={"outputs": 64}, output=(512, 64)),
            ]
        )
    half: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    return with_both_directions(
        [
            _linear("linear_act", 16384, 1024, 4096, quick=True, **half),
            _linear("linear", 16384, 1024, 4096, quick=True, **half),
            Case("bias_act", (256, 64, 112, 112), args={"activation": "gelu"}, **half),
            Case("bias_act", (32768, 4096), args={"activation": "silu"}, **half),
            Case("bilinear", (4096, 256), args={"outputs": 256}, output=(4096, 256), **half),
        ]
    )


def tiny(device: str) -> list[Case]:
    how: dict[str, Any] = {"device": device, "backward": True}
    return [
        _linear("linear_act", 33, 5, 7, **how),
        _linear("linear", 33, 5, 7, **how),
        Case("bias_act", (2, 3, 5, 7), args={"activation": "gelu"}, **how),
        Case("bias_act", (70, 8), args={"activation": "silu"}, **how),
        Case("bilinear", (5, 4), args={"outputs": 3}, output=(5, 3), **how),
    ]


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    if case.op == "bias_act":
        return {"bias": (case.shape[1],)}
    outputs, inputs = case.args["outputs"], case.shape[1]
    if case.op == "bilinear":
        return {"other": case.shape, "weight": (outputs, inputs, inputs), "bias": (outputs,)}
    return {"weight": (outputs, inputs), "bias": (outputs,)}


def bytes(case: Case) -> int:
    """Every tensor and every gradient once; with an activation the backward pass reads the product as well."""
    tensors = [case.numel, *(math.prod(s) for s in shapes(case).values())]
    output = math.prod(case.output or case.shape)
    kept = output if case.backward and case.op == "linear_act" else 0
    moved = sum(tensors) + output + case.backward * (2 * sum(tensors) + output) + 2 * kept
    return moved * case.dtype.itemsize


def flops(case: Case) -> int:
    if case.op == "bias_act":
        return 11 * case.numel * (1 + case.backward)
    outputs, (rows, inputs) = case.args["outputs"], case.shape
    products = inputs * inputs if case.op == "bilinear" else inputs
    return 2 * rows * outputs * products * (3 if case.backward else 1)


def bind(functional: Any, case: Case) -> Function:
    reference = functional is torch.nn.functional
    if case.op == "linear":
        return lambda t: functional.linear(t["x"], t["weight"], t["bias"])
    if case.op == "bilinear":
        return lambda t: functional.bilinear(t["x"], t["other"], t["weight"], t["bias"])
    name = case.args["activation"]
    function = getattr(torch.nn.functional, name)
    if case.op == "linear_act":
        if reference:
            return lambda t: function(torch.nn.functional.linear(t["x"], t["weight"], t["bias"]))
        return lambda t: functional.linear_act(t["x"], t["weight"], t["bias"], name)
    if reference:
        over = (-1, *(1,) * (len(case.shape) - 2))
        return lambda t: function(t["x"] + t["bias"].view(over))
    return lambda t: functional.bias_act(t["x"], t["bias"], name)


def providers(case: Case) -> dict[str, Provider]:
    return standard_providers(bind, case)
