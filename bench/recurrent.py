"""What the benches of recurrent rooms share: sequences and single steps; rooms differ in gates and states."""

from dataclasses import dataclass
from typing import Any

import torch

from .case import Case, Function, Provider, with_both_directions
from .peers import standard_providers

CENTRED = ("w_ih", "w_hh", "b_ih", "b_hh")


@dataclass(frozen=True)
class Recurrent:
    """The functions of one room. gates: rows of its weights per hidden unit; states: 2 with a cell state, else 1."""

    ops: tuple[str, ...]
    gates: int
    states: int

    def cases(self, device: str) -> list[Case]:
        """Sequences [T, B, H] and steps [B, H], of as many features as hidden units."""
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
        found += [Case(op, s, dtype, device) for op in self.ops if "cell" in op for s in steps]
        return with_both_directions(found)

    def tiny(self, device: str) -> list[Case]:
        return [Case(op, (3, 17) if "cell" in op else (2, 3, 17), device=device, backward=True) for op in self.ops]

    def shapes(self, case: Case) -> dict[str, tuple[int, ...]]:
        batch, size = case.shape[-2:]
        state = (batch, size) if "cell" in case.op else (1, batch, size)
        weights = dict.fromkeys(("w_ih", "w_hh"), (self.gates * size, size))
        return {
            **dict.fromkeys("hc"[: self.states], state),
            **weights,
            **dict.fromkeys(("b_ih", "b_hh"), (self.gates * size,)),
        }

    def bytes(self, case: Case) -> int:
        """Forward: every tensor once, and what comes out; backward: the same, and a gradient of each."""
        numels = {name: torch.Size(s).numel() for name, s in self.shapes(case).items()}
        read = case.numel + sum(numels.values())
        written = case.numel + (0 if "cell" in case.op else numels["h"]) + numels.get("c", 0)
        return (read + written + case.backward * (2 * read + written)) * case.dtype.itemsize

    def flops(self, case: Case) -> int:
        """Two products of 2 B (gates H) H in each step, each twice more in the backward pass."""
        return 4 * case.numel * self.gates * case.shape[-1] * (1 + 2 * case.backward)

    def bind(self, functional: Any, case: Case) -> Function:
        # torch's recurrent layers are functions of torch itself
        function = getattr(torch if functional is torch.nn.functional else functional, case.op)

        def states(t: dict[str, torch.Tensor]) -> Any:
            return (t["h"], t["c"]) if self.states == 2 else t["h"]

        if "cell" in case.op:
            step = lambda t: function(t["x"], states(t), t["w_ih"], t["w_hh"], t["b_ih"], t["b_hh"])
            return (lambda t: step(t)[0]) if self.states == 2 else step
        names = ("w_ih", "w_hh", "b_ih", "b_hh")
        return lambda t: function(t["x"], states(t), [t[n] for n in names], True, 1, 0.0, True, False, False)[0]

    def loop_of_cells(self, case: Case) -> Function:
        """What a model does that needs the state between steps: torch's cell in Python."""
        cell = getattr(torch, case.op + "_cell")

        def run(t: dict[str, torch.Tensor]) -> torch.Tensor:
            state = tuple(t[n][0] for n in "hc"[: self.states])
            outputs = []
            for x in t["x"]:
                given = state if self.states == 2 else state[0]
                found = cell(x, given, t["w_ih"], t["w_hh"], t["b_ih"], t["b_hh"])
                state = found if self.states == 2 else (found,)
                outputs.append(state[0])
            return torch.stack(outputs)

        return run

    def providers(self, case: Case) -> dict[str, Provider]:
        if "cell" in case.op:
            return standard_providers(self.bind, case)
        # torch.compile breaks its graph at a recurrent layer: it would measure torch again
        found = {name: p for name, p in standard_providers(self.bind, case).items() if name != "torch.compile"}
        return found | {"torch loop of cells": Provider(lambda: self.loop_of_cells(case))}
