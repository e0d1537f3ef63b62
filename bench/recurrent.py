"""What the benches of recurrent rooms share: sequences and single steps; rooms differ in gates and states."""

from dataclasses import dataclass
from typing import Any

import torch

from .case import Case, Function, Provider, with_both_directions
from .peers import standard_providers

NAMES = ("w_ih", "w_hh", "b_ih", "b_hh")
LAYERS = {"cpu": 3, "cuda": 6}
CENTRED = tuple(f"{name}{k or ''}" for k in range(max(LAYERS.values())) for name in NAMES)


def parameters(layer: int) -> list[str]:
    """Their names among the tensors of a case."""
    return [f"{name}{layer or ''}" for name in NAMES]


@dataclass(frozen=True)
class Recurrent:
    """The functions of one room.

    gates: rows of its weights per hidden unit; states: 2 with a cell state, else 1; stacked: also cases of many layers.
    """

    ops: tuple[str, ...]
    gates: int
    states: int
    stacked: bool = False

    def cases(self, device: str) -> list[Case]:
        """Sequences [T, B, H] and steps [B, H], of as many features as hidden units; layers as in a speaker encoder."""
        if device == "cpu":
            sequences, steps, dtype = (
                [(128, 16, 256), (128, 1, 256), (128, 16, 512), (128, 1, 512)],
                [(16, 256)],
                torch.float32,
            )
        else:
            sequences, steps, dtype = [(1024, 16, 768), (512, 64, 1024), (512, 1, 1024)], [(64, 1024)], torch.bfloat16
        found = [
            Case(op, s, dtype, device, quick=i == 0)
            for op in self.ops
            if "cell" not in op
            for i, s in enumerate(sequences)
        ]
        if device != "cpu":
            others = torch.float16, torch.float32, torch.float64
            found += [Case(op, sequences[1], other, device) for op in self.ops if "cell" not in op for other in others]
        if self.stacked:
            args = {"layers": LAYERS[device], "hidden": 256}
            shape = (160, 16, 40) if device == "cpu" else (512, 10, 256)
            found.append(Case(self.ops[0], shape, dtype, device, args=args, output=(*shape[:2], 256)))
        found += [Case(op, s, dtype, device) for op in self.ops if "cell" in op for s in steps]
        return with_both_directions(found)

    def tiny(self, device: str) -> list[Case]:
        found = [Case(op, (3, 17) if "cell" in op else (2, 3, 17), device=device, backward=True) for op in self.ops]
        if self.stacked:
            args = {"layers": 2, "hidden": 5}
            found.append(Case(self.ops[0], (2, 3, 4), device=device, backward=True, args=args, output=(2, 3, 5)))
        return found

    def layers(self, case: Case) -> int:
        return int(case.args.get("layers", 1))

    def shapes(self, case: Case) -> dict[str, tuple[int, ...]]:
        batch, features = case.shape[-2:]
        size, layers = case.args.get("hidden", features), self.layers(case)
        state = (batch, size) if "cell" in case.op else (layers, batch, size)
        rows = self.gates * size
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys("hc"[: self.states], state)
        for k in range(layers):
            of_layer: list[tuple[int, ...]] = [(rows, size if k else features), (rows, size), (rows,), (rows,)]
            shapes |= zip(parameters(k), of_layer)
        return shapes

    def bytes(self, case: Case) -> int:
        """Forward: every tensor once, and what comes out; backward: the same, and a gradient of each."""
        numels = {name: torch.Size(s).numel() for name, s in self.shapes(case).items()}
        read = case.numel + sum(numels.values())
        output = case.numel if case.output is None else torch.Size(case.output).numel()
        written = output + (0 if "cell" in case.op else numels["h"]) + numels.get("c", 0)
        return (read + written + case.backward * (2 * read + written)) * case.dtype.itemsize

    def flops(self, case: Case) -> int:
        """In each step and layer a product of each weight with B rows, twice more in the backward pass."""
        weights = sum(torch.Size(s).numel() for name, s in self.shapes(case).items() if name.startswith("w_"))
        rows = case.numel // case.shape[-1]
        return 2 * rows * weights * (1 + 2 * case.backward)

    def bind(self, functional: Any, case: Case) -> Function:
        # torch's recurrent layers are functions of torch itself
        function = getattr(torch if functional is torch.nn.functional else functional, case.op)

        def states(t: dict[str, torch.Tensor]) -> Any:
            return (t["h"], t["c"]) if self.states == 2 else t["h"]

        if "cell" in case.op:
            step = lambda t: function(t["x"], states(t), *(t[n] for n in NAMES))
            return (lambda t: step(t)[0]) if self.states == 2 else step
        layers = self.layers(case)
        names = [name for k in range(layers) for name in parameters(k)]
        return lambda t: function(t["x"], states(t), [t[n] for n in names], True, layers, 0.0, True, False, False)[0]

    def loop_of_cells(self, case: Case) -> Function:
        """What a model does that needs the state between steps: torch's cell in Python."""
        cell = getattr(torch, case.op + "_cell")

        def run(t: dict[str, torch.Tensor]) -> torch.Tensor:
            y = t["x"]
            for k in range(self.layers(case)):
                state, outputs = tuple(t[n][k] for n in "hc"[: self.states]), []
                for x in y:
                    given = state if self.states == 2 else state[0]
                    found = cell(x, given, *(t[n] for n in parameters(k)))
                    state = found if self.states == 2 else (found,)
                    outputs.append(state[0])
                y = torch.stack(outputs)
            return y

        return run

    def providers(self, case: Case) -> dict[str, Provider]:
        if "cell" in case.op:
            return standard_providers(self.bind, case)
        # torch.compile breaks its graph at a recurrent layer: it would measure torch again
        found = {name: p for name, p in standard_providers(self.bind, case).items() if name != "torch.compile"}
        return found | {"torch loop of cells": Provider(lambda: self.loop_of_cells(case))}
