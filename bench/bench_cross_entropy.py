"""cross_entropy: a vocabulary, classes of images, pixels of segmentations; labels that are probabilities; fused with
its linear layer; and nll_loss, of given log-probabilities."""

from typing import Any

import torch

from .case import Case, Function, Provider, with_both_directions
from .peers import standard_providers

STEM = "cross_entropy"
OPS = ("cross_entropy", "linear_cross_entropy", "nll_loss")


def cases(device: str) -> list[Case]:
    if device == "cpu":
        shapes, dtype = [((4096, 32000), True), ((4096, 1000), True), ((4, 21, 256, 256), False)], torch.float32
        linear = Case("linear_cross_entropy", (1024, 512), dtype, device, args={"C": 8192}, output=())
    else:
        shapes, dtype = [((8192, 128256), True), ((32768, 4096), False), ((32, 21, 512, 512), False)], torch.bfloat16
        linear = Case("linear_cross_entropy", (8192, 4096), dtype, device, args={"C": 128256}, output=())
    found = [Case("cross_entropy", s, dtype, device, quick=q, output=()) for s, q in shapes]
    rows = shapes[1][0]
    soft = Case("cross_entropy", rows, dtype, device, args={"target": "probabilities"}, output=())
    nll = Case("nll_loss", (1 << 16 if device == "cpu" else 1 << 20, 10), dtype, device, output=())
    return with_both_directions([*found, linear, soft, nll])


def tiny(device: str) -> list[Case]:
    found = [Case("cross_entropy", s, device=device, backward=True, output=()) for s in ((3, 17), (2, 5, 7), (2, 1100))]
    soft = Case("cross_entropy", (3, 17), device=device, backward=True, args={"target": "probabilities"}, output=())
    linear = Case("linear_cross_entropy", (5, 8), device=device, backward=True, args={"C": 16}, output=())
    return [*found, soft, linear, Case("nll_loss", (3, 17), device=device, backward=True, output=())]


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    return {"w": (case.args["C"], case.shape[1])} if case.op == "linear_cross_entropy" else {}


def bytes(case: Case) -> int:
    """Forward x; backward x → dx; probabilities are read as well. The fused layer: x and w, and their gradients. Of
    ten log-probabilities a row one is read, but memory comes in lines; backward dx."""
    size = case.dtype.itemsize
    if case.op == "linear_cross_entropy":
        operands = (case.numel + case.args["C"] * case.shape[1]) * size
        return operands * (1 + 2 * case.backward)
    if case.op == "nll_loss":
        return case.numel * size * (1 + case.backward)
    if "target" in case.args:
        return case.numel * size * (2 + 3 * case.backward)
    return case.numel * size * (1 + 2 * case.backward)


def flops(case: Case) -> int:
    """An exponential of some ten operations, a comparison and a sum; the fused layer: its products."""
    if case.op == "linear_cross_entropy":
        return 2 * case.numel * case.args["C"] * (1 + 2 * case.backward)
    if case.op == "nll_loss":
        return case.shape[0]
    return case.numel * 12 * (1 + case.backward)


def labels(case: Case) -> torch.Tensor:
    """Of the classes; or probabilities of them, whose gradient nobody asks for."""
    generator = torch.Generator().manual_seed(0)
    if "target" in case.args:
        return torch.rand(case.shape, generator=generator).softmax(1).to(case.device)
    rows, classes = (case.shape[0], *case.shape[2:]), case.args.get("C", case.shape[1])
    return torch.randint(0, classes, rows, generator=generator).to(case.device)


def bind(functional: Any, case: Case) -> Function:
    target = labels(case)
    if "target" in case.args:
        return lambda t: functional.cross_entropy(t["x"], target.to(t["x"].dtype))
    if case.op != "linear_cross_entropy":
        function = getattr(functional, case.op)
        return lambda t: function(t["x"], target)
    if functional is torch.nn.functional:
        return lambda t: functional.cross_entropy(functional.linear(t["x"], t["w"]), target)
    return lambda t: functional.linear_cross_entropy(t["x"], t["w"], target)


def providers(case: Case) -> dict[str, Provider]:
    return standard_providers(bind, case)
