"""What is installed, what can run here, and why the rest cannot: ``python -m pyops info``."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json as json_format
import os
import platform
import sys
from typing import Any

import torch

from . import backend, library

_VARIABLES = ("PYOPS_BACKEND", "PYOPS_CPU_CAPABILITY", "PYOPS_EMULATOR", "PYOPS_TUNING", "TRITON_INTERPRET")


def collect() -> dict[str, Any]:
    """Everything ``info`` knows, in types that JSON has.

    Returns:
        versions: of pyops, python, torch, triton, numpy (None where absent).
        backends: per backend ``built``, ``usable`` and ``why_not`` (None where usable).
        forced_backend: its name, or None.
        cpu: ``capability`` in use, all ``capabilities`` of this build on this CPU, torch's ``threads``; from the host
            module also ``model``, ``logical_cores``, ``usable_cores``, ``instructions``, ``caches`` (bytes) and
            ``variants``.
        gpus: name, compute capability and memory in bytes of each GPU that torch sees.
        cuda_architectures: compiled into libpyops.so.
        hopper_kernels: whether the kernels for sm_90a alone are in it.
        host_module: ``why_not`` it cannot be imported (None where it can), and its ``build``.
        environment: the variables that steer pyops, where they are set.
    """
    host, host_problem = _host_module()
    cpu: dict[str, Any] = {
        "capability": library.cpu_capability() or None,
        "capabilities": list(library.cpu_capabilities()),
        "threads": torch.get_num_threads(),
    }
    if host is not None:
        cpu |= host.cpu_features()
        cpu["variants"] = host.variants()
    return {
        "versions": _versions(),
        "backends": _backends(),
        "forced_backend": backend.forced(),
        "cpu": cpu,
        "gpus": _gpus(),
        "cuda_architectures": library.cuda_architectures().split(),
        "hopper_kernels": "90a-real" in library.cuda_architectures().split(),
        "host_module": {"why_not": host_problem, "build": host.build_info() if host is not None else None},
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def print_info(json: bool = False) -> None:
    """Prints ``collect()``, for a reader or as one JSON object."""
    info = collect()
    print(json_format.dumps(info, indent=2) if json else "\n".join(_lines(info)))


def _host_module() -> tuple[Any, str | None]:
    """The pybind11 module, or why it cannot be imported. Ops do not need it."""
    try:
        return importlib.import_module("pyops._host"), None
    except ImportError as error:
        return None, str(error)


def _versions() -> dict[str, str | None]:
    def installed(distribution: str) -> str | None:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {
        "pyops": getattr(sys.modules["pyops"], "__version__", None),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": installed("triton"),
        "numpy": installed("numpy"),
    }


def _backends() -> dict[str, dict[str, Any]]:
    built = {
        "cpu": (library.PACKAGE / "libpyops.so").exists(),
        "cuda": bool(library.cuda_architectures()),
        "triton": importlib.util.find_spec("triton") is not None,
        "emulator": any(library.PACKAGE.glob("libpyops_emulator*.so")),
    }
    return {
        name: {"built": built[name], "usable": problem is None, "why_not": problem}
        for name, problem in library.status().items()
    }


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [{"name": p.name, "capability": f"{p.major}.{p.minor}", "memory": p.total_memory} for p in properties]


def _lines(info: dict[str, Any]) -> list[str]:
    cpu, host = info["cpu"], info["host_module"]
    versions = [f"{name} {version}" for name, version in info["versions"].items() if version is not None]
    lines = [_row("versions", " · ".join(versions))]
    for name, state in info["backends"].items():
        text = "ready" if state["usable"] else f"{'built, but' if state['built'] else 'not built:'} {state['why_not']}"
        lines.append(_row(name, text))
    lines.append(_row("forced", info["forced_backend"] or "nothing: each device runs its default backend"))

    if cpu["capability"] is not None:
        built = ", ".join(cpu["capabilities"])
        lines.append(_row("CPU kernels", f"{cpu['capability']} in use; in this build, for this CPU: {built}"))
    if "model" in cpu:
        caches = [f"{name} {_size(size)}" for name, size in cpu["caches"].items()]
        lines.append(_row("CPU", " · ".join([cpu["model"], f"{cpu['usable_cores']} cores usable", *caches])))
    lines.append(_row("threads", f"{cpu['threads']} (torch)"))

    if info["cuda_architectures"]:
        hopper = "with" if info["hopper_kernels"] else "without"
        names = " ".join(info["cuda_architectures"])
        lines.append(_row("CUDA kernels", f"{names} · {hopper} kernels for sm_90a alone"))
    for gpu in info["gpus"]:
        lines.append(_row("GPU", f"{gpu['name']} · compute capability {gpu['capability']} · {_size(gpu['memory'])}"))
    if not info["gpus"]:
        lines.append(_row("GPU", "none that torch sees"))

    if host["build"] is not None:
        build = host["build"]
        text = f"{build['compiler']} {build['compiler_version']} · C++{build['cxx_standard']} · {build['build_type']}"
        lines.append(_row("build", text))
    else:
        lines.append(_row("host module", f"absent (ops work without it): {host['why_not']}"))
    if info["environment"]:
        lines.append(_row("environment", " ".join(f"{k}={v}" for k, v in info["environment"].items())))
    return lines


def _row(label: str, text: str) -> str:
    return f"{label:<13} {text}"


def _size(size: int) -> str:
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size} B"
