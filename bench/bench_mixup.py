"""mixup, cutmix: a batch of images mixed with itself; the baseline is torchvision's algorithm in plain torch.

All providers draw from a generator with the same seed, so that they mix alike.
"""

from typing import Any

import torch

from pyops import functional as F

from .case import Case, Function, Provider, with_both_directions
from .peers import pyops_providers

STEM = "mixup"
OPS = ("mixup", "cutmix")
SEED = 3
CLASSES = 1000


def cases(device: str) -> list[Case]:
    shape = (32, 3, 224, 224) if device == "cpu" else (256, 3, 224, 224)
    return with_both_directions([Case(op, shape, device=device, quick=op == "mixup") for op in OPS])


def tiny(device: str) -> list[Case]:
    return [Case(op, (3, 2, 5, 7), device=device, backward=True) for op in OPS]


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    return {}


def bytes(case: Case) -> int:
    """Forward x → y; backward dy → dx."""
    return 2 * case.numel * case.dtype.itemsize * (1 + case.backward)


def flops(case: Case) -> int:
    """Two products and a sum where images are mixed."""
    return 3 * case.numel * (1 + case.backward) if case.op == "mixup" else 0


def mixup(x: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    share = float(torch._sample_dirichlet(torch.ones(2, device=x.device), generator)[0])
    for t in (labels, x):
        mixed = t.roll(1, 0).mul_(1.0 - share).add_(t.mul(share))
    return mixed


def cutmix(x: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    share = float(torch._sample_dirichlet(torch.ones(2, device=x.device), generator)[0])
    half = 0.5 * (1.0 - share) ** 0.5
    box = []
    for size in x.shape[-2:]:
        centre = int(torch.randint(size, (), device=x.device, generator=generator))
        box.append(slice(max(centre - int(half * size), 0), min(centre + int(half * size), size)))
    mixed = x.clone()
    mixed[..., box[0], box[1]] = x.roll(1, 0)[..., box[0], box[1]]
    area = (box[0].stop - box[0].start) * (box[1].stop - box[1].start)
    share = 1.0 - area / (x.shape[-2] * x.shape[-1])
    labels.roll(1, 0).mul_(1.0 - share).add_(labels.mul(share))
    return mixed


def bind(functional: Any, case: Case) -> Function:
    index = torch.randint(CLASSES, case.shape[:1], generator=torch.Generator().manual_seed(0))
    labels = torch.nn.functional.one_hot(index, CLASSES).to(case.device, case.dtype)
    generator = torch.Generator(case.device)
    if functional is F:
        ours = getattr(F, case.op)
        return lambda t: ours(t["x"], labels, generator=generator.manual_seed(SEED))[0]
    plain = {"mixup": mixup, "cutmix": cutmix}[case.op]
    return lambda t: plain(t["x"], labels, generator.manual_seed(SEED))


def providers(case: Case) -> dict[str, Provider]:
    return pyops_providers(bind, case) | {"torch": Provider(lambda: bind(torch.nn.functional, case))}
