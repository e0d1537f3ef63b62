"""layer_norm_lstm, layer_norm_lstm_cell: sequences and single steps, against the same put together from torch's ops."""

from typing import Any

import torch

from .case import Case, Function, Provider, with_both_directions
from .peers import standard_providers

STEM = "layer_norm_lstm"
OPS = ("layer_norm_lstm", "layer_norm_lstm_cell")
CENTRED = ("w_ih", "w_hh", "b_ih", "b_hh")
MATRIX = True
# Both errors, torch's and ours, are single draws from one distribution with a long tail: docs/adr/0009.
SLACK = 4
_GAINS = ("gain_ih", "gain_hh", "gain_c")


def cases(device: str) -> list[Case]:
    """Sequences [T, B, H] and steps [B, H], of as many features as hidden units."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    sequences = [(128, 16, 256), (128, 1, 256)] if device == "cpu" else [(512, 64, 1024)]
    found = [Case("layer_norm_lstm", s, dtype, device, quick=i == 0) for i, s in enumerate(sequences)]
    found.append(Case("layer_norm_lstm_cell", (16, 256) if device == "cpu" else (64, 1024), dtype, device))
    return with_both_directions(found)


def tiny(device: str) -> list[Case]:
    return [
        Case("layer_norm_lstm", (2, 3, 17), device=device, backward=True),
        Case("layer_norm_lstm_cell", (3, 17), device=device, backward=True),
    ]


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    batch, size = case.shape[-2:]
    state = (batch, size) if "cell" in case.op else (1, batch, size)
    found: dict[str, tuple[int, ...]] = dict.fromkeys(("h", "c"), state)
    found |= dict.fromkeys(("w_ih", "w_hh"), (4 * size, size))
    found |= dict.fromkeys(("b_ih", "b_hh", "gain_ih", "gain_hh"), (4 * size,))
    return found | dict.fromkeys(("gain_c", "bias_c"), (size,))


def bytes(case: Case) -> int:
    """Forward: every tensor once, and what comes out; backward: the same, and a gradient of each."""
    numels = {name: torch.Size(s).numel() for name, s in shapes(case).items()}
    read = case.numel + sum(numels.values())
    written = case.numel + numels["c"] + (0 if "cell" in case.op else numels["h"])
    return (read + written + case.backward * (2 * read + written)) * case.dtype.itemsize


def flops(case: Case) -> int:
    """Two products of 2 B (4 H) H in each step, each twice more in the backward pass."""
    return 16 * case.numel * case.shape[-1] * (1 + 2 * case.backward)


def _composed_cell(x: torch.Tensor, hx: Any, w_ih: Any, w_hh: Any, gains: Any, biases: Any) -> tuple[Any, Any]:
    norm = torch.nn.functional.layer_norm
    a = norm(x @ w_ih.mT, gains[0].shape, gains[0], biases[0]) + norm(
        hx[0] @ w_hh.mT, gains[1].shape, gains[1], biases[1]
    )
    i, f, g, o = a.chunk(4, 1)
    c = f.sigmoid() * hx[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * norm(c, c.shape[-1:], gains[2], biases[2]).tanh(), c


def bind(functional: Any, case: Case) -> Function:
    """torch has no such layer: its side is put together from matrix products, layer_norm and activations."""
    composed = functional is torch.nn.functional

    def run(t: dict[str, torch.Tensor]) -> torch.Tensor:
        gains, biases = [t[n] for n in _GAINS], [t["b_ih"], t["b_hh"], t["bias_c"]]
        if composed:
            if "cell" in case.op:
                return _composed_cell(t["x"], (t["h"], t["c"]), t["w_ih"], t["w_hh"], gains, biases)[0]
            state, outputs = (t["h"][0], t["c"][0]), []
            for x in t["x"]:
                state = _composed_cell(x, state, t["w_ih"], t["w_hh"], gains, biases)
                outputs.append(state[0])
            return torch.stack(outputs)
        if "cell" in case.op:
            return functional.layer_norm_lstm_cell(t["x"], (t["h"], t["c"]), t["w_ih"], t["w_hh"], *gains, *biases)[0]
        params = [t["w_ih"], t["w_hh"], t["b_ih"], t["b_hh"], *gains, t["bias_c"]]
        return functional.layer_norm_lstm(t["x"], (t["h"], t["c"]), params, True, 1, 0.0, True, False, False)[0]

    return run


def providers(case: Case) -> dict[str, Provider]:
    found = standard_providers(bind, case)
    # compiling the loop unrolls it: minutes
    return found if "cell" in case.op else {name: p for name, p in found.items() if name != "torch.compile"}
