"""The implementations that pyops is compared with, each wrapped as a `Provider`."""

import functools
import importlib
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

import pyops
from pyops import functional as F
from pyops.core import convolution_notes

from .case import Case, Function, Provider, Unavailable

Bind = Callable[[Any, Case], Function]


def standard_providers(bind: Bind, case: Case) -> dict[str, Provider]:
    """pyops on its backends, torch as it is called and at its best memory format, and torch.compile."""
    reference = torch.nn.functional
    providers = pyops_providers(bind, case)
    providers["torch"] = Provider(lambda: bind(reference, case))
    if len(case.shape) == 4 and not case.channels_last:
        providers["torch channels_last"] = Provider(lambda: bind(reference, case), channels_last=True)
    providers["torch.compile"] = Provider(lambda: compiled(bind(reference, case)))
    return providers


def pyops_providers(bind: Bind, case: Case) -> dict[str, Provider]:
    """pyops as its users get it on the CPU; each GPU backend by name on CUDA."""
    names = {"pyops": "cpu"} if case.device == "cpu" else {"pyops cuda": "cuda", "pyops triton": "triton"}
    function = lambda: bind(F, case)
    return {name: Provider(function, functools.partial(forced, which), ours=True) for name, which in names.items()}


def convolution_algorithms(case: Case, provider: str, weight: tuple[int, ...], stride: int, groups: int) -> str:
    """Those of the forward pass and, where the case has one, of the backward pass: in the input, in the weight."""
    backend = {"pyops": "cpu"}.get(provider, provider.removeprefix("pyops "))
    _, passes, _ = convolution_notes.passes(
        case.op, [case.shape, weight], case.dtype, backend, stride=stride, padding=weight[-1] // 2, groups=groups,
        channels_last=case.channels_last,
    )  # fmt: skip
    return ", ".join(p.algorithm for p in passes[: 3 if case.backward else 1])


def forced(backend: str) -> AbstractContextManager[Any]:
    """The backend and no other; `Unavailable` where it cannot run."""
    try:
        return pyops.backend(backend)
    except RuntimeError as reason:
        raise Unavailable(str(reason)) from reason


def compiled(function: Function) -> Function:
    """torch.compile with static shapes, from a clean slate so that one case never generalises the next."""
    torch._dynamo.reset()
    options = {"cpp.threads": torch.get_num_threads()}
    return torch.compile(function, dynamic=False, options=options)  # type: ignore[no-any-return]


def imported(module: str, attribute: str) -> Any:
    """An attribute of an optional package, or `Unavailable` with the reason."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a peer's import may fail in any way, and that is not ours to report as a fault
        raise Unavailable(f"{module.split('.')[0]}: {type(error).__name__}: {error}") from error


def gpu_peers(case: Case, **makers: Callable[[], Function]) -> dict[str, Provider]:
    """Peers that have GPU kernels only: nothing on the CPU."""
    return {name.replace("_", "-"): Provider(make) for name, make in makers.items()} if case.device == "cuda" else {}


def flag_gems_aten(bind: Bind, case: Case, *ops: str) -> dict[str, Provider]:
    """FlagGems replaces the named aten ops while its context is open; the call is torch's own."""
    if case.device != "cuda":
        return {}

    def make() -> Function:
        imported("flag_gems", "use_gems")
        return bind(torch.nn.functional, case)

    return {"flag-gems": Provider(make, lambda: imported("flag_gems", "use_gems")(include=list(ops)))}
