"""The machine under the numbers: its name, its versions, and the ceilings that no kernel can pass."""

import dataclasses
import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "numpy", "torch-pyops", "liger-kernel", "flag-gems")
CLOCK_FIELDS = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw"


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Measured limits: copy bandwidth in bytes/s (bytes read plus bytes written) and FMA rate in flop/s."""

    copy_bandwidth: float
    fma_rate: float
    threads: int
    source: str

    def limit(self, bytes: int, flops: int) -> tuple[float, str]:
        """Least possible seconds for this work, and whether memory or arithmetic sets them."""
        memory, arithmetic = bytes / self.copy_bandwidth, flops / self.fma_rate
        return max(memory, arithmetic), "memory" if memory >= arithmetic else "arithmetic"


@dataclasses.dataclass(frozen=True)
class Limits:
    """What no kernel on a GPU passes: bytes/s, and flop/s on the CUDA cores and, in half types, the tensor cores."""

    name: str
    bandwidth: float
    fma_rate: float
    matrix_rate: float
    source: str

    def floor_s(self, bytes: int, flops: int, matrix: bool) -> float:
        """Least possible seconds."""
        return max(bytes / self.bandwidth, flops / (self.matrix_rate if matrix else self.fma_rate))


GPU_LIMITS = (
    Limits("H200", 4.3e12, 67e12, 790e12, "copy and bf16 product measured on the card, fp32 of the data sheet"),
    Limits("H100", 3.35e12, 67e12, 790e12, "bandwidth and fp32 of the data sheet, bf16 product as on the H200"),
)
# Between the launch of a kernel and its first byte, and between kernels of one op.
LAUNCH_S = 2e-6


def gpu_limits(name: str) -> Limits:
    """Limits of the GPU of that name; of the first in the table where it is not in it."""
    return next((limits for limits in GPU_LIMITS if limits.name in name), GPU_LIMITS[0])


def ceilings_of(device: str, threads: Sequence[int], known: dict[int, Ceilings] | None = None) -> dict[int, Ceilings]:
    """Ceilings by number of threads; the better of these and those `known` from an earlier, perhaps slower moment.

    More threads never have a lower ceiling than fewer: where they measure lower, the machine was disturbed.
    """
    result: dict[int, Ceilings] = {}
    for count in threads:
        found = measured_ceilings(device, count)
        others = [c for c in (*result.values(), (known or {}).get(count)) if c is not None]
        bandwidth = max(c.copy_bandwidth for c in (found, *others))
        rate = max(c.fma_rate for c in (found, *others))
        result[count] = Ceilings(bandwidth, rate, count, found.source)
    return result


def measured_ceilings(device: str, threads: int) -> Ceilings:
    """One measurement of this machine: by `pyops._host` on the CPU where it is built, else by torch."""
    if device == "cpu":
        torch.set_num_threads(threads)
        try:
            values = host_ceilings(threads)
            return Ceilings(values["copy_bandwidth"], values["fma_rate"], threads, "pyops._host")
        except (ImportError, AttributeError, KeyError):
            pass
    return torch_ceilings(device, threads)


def host_ceilings(threads: int) -> dict[str, float]:
    host = importlib.import_module("pyops._host")
    try:
        return host.ceilings(threads)  # type: ignore[no-any-return]
    except TypeError:
        return host.ceilings()  # type: ignore[no-any-return]


def torch_ceilings(device: str, threads: int) -> Ceilings:
    """Stand-in for `pyops._host`, and the measurement on GPUs: the best of several torch copies and float32 products.

    torch's copy does not use streaming stores on the CPU, so this bandwidth is a little below what the machine can do.
    """
    elements, n = (1 << 28, 8192) if device == "cuda" else (1 << 24, 1024)
    source = torch.rand(elements, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() * source.itemsize / best_of(lambda: target.copy_(source), device)
    a, b = torch.rand(n, n, device=device), torch.rand(n, n, device=device)
    rate = 2 * n**3 / best_of(lambda: a @ b, device)
    return Ceilings(bandwidth, rate, threads, "torch copy and float32 matrix product")


def best_of(work: Any, device: str, repeats: int = 15) -> float:
    """Shortest of several timed runs, in seconds."""
    work()
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def cpu_model() -> str:
    """Name of the processor as the kernel reports it."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()


def cores() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_bytes() -> int:
    """Size of the last-level cache, 64 MiB where the system does not tell."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KMG])", file.read_text().strip())
        if match:
            sizes.append(int(match[1]) << {"K": 10, "M": 20, "G": 30}[match[2]])
    return max(sizes, default=64 << 20)


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"{cpu_model()} {cores()} cores"


def slug(name: str) -> str:
    """A file name: lower case, words joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the numbers depend on; absent packages are left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def gpu_clocks() -> dict[str, str]:
    """What nvidia-smi says about the first GPU now: driver, clocks, temperature, power; empty without one."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={CLOCK_FIELDS}", "--format=csv,noheader", "--id=0"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    if answer.returncode != 0:
        return {}
    return dict(zip(CLOCK_FIELDS.split(","), (value.strip() for value in answer.stdout.strip().split(","))))


def describe(device: str) -> dict[str, Any]:
    """The machine as the results file records it."""
    machine: dict[str, Any] = {
        "name": device_name(device),
        "device": device,
        "cpu": cpu_model(),
        "cores": cores(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        machine["gpu"] = {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "clocks": gpu_clocks(),
        }
    else:
        machine["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    return machine
