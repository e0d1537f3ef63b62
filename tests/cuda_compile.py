"""Compiles every CUDA source for sm_80 and sm_90a and reports what ptxas made of it; a spill in a hot kernel fails,
and so does a kernel of warpgroup products without them, or one in which ptxas makes each wait for the one before.

Needs nvcc, no GPU. ``python tests/cuda_compile.py [stem ...]``
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("sm_80", "sm_90a")
HOPPER_ONLY = ("hopper", "wgmma")  # sources whose name ends so need sm_90a
LIBRARY = ROOT / "csrc" / "cuda"
TESTS = ROOT / "tests" / "emulator"  # nothing of these is measured: what spills there is told, and fails nothing
PLANTED_BUGS = "bugs"  # sources whose name begins so are wrong on purpose: they only have to compile
# One register that finds no place is stored and loaded a few times; more bytes than this are a real spill.
TOLERATED_BYTES = 16
MATRIX_INSTRUCTIONS = ("HGMMA", "HMMA", "DMMA", "IMMA", "UTMALDG", "LDGSTS", "LDSM")


def sources(stems: list[str]) -> list[Path]:
    """The kernels of the rooms, and the emulator's test kernels."""
    found = sorted(LIBRARY.glob("*.cu")) + sorted(TESTS.glob("*.cu"))
    return [p for p in found if not stems or p.stem in stems]


def compile_one(source: Path, architecture: str, folder: Path) -> tuple[Path, str, subprocess.CompletedProcess, Path]:
    """One nvcc run to a cubin, with ptxas' resource report."""
    torch = Path(importlib.util.find_spec("torch").origin).parent
    cubin = folder / f"{source.stem}.{architecture}.cubin"
    command = ["nvcc", "-std=c++20", "-O3", f"-arch={architecture}", "-cubin", "-Xptxas", "-v"]
    command += ["--expt-relaxed-constexpr", "-DPYOPS_CUDA", "-DPYOPS_CUDA_HOPPER"]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
    command += [f"-I{torch / 'include'}", f"-I{ROOT / 'csrc'}", str(source), "-o", str(cubin)]
    return source, architecture, subprocess.run(command, capture_output=True, text=True), cubin


def kernels(report: str) -> list[tuple[str, int, int, int]]:
    """(mangled name, registers, spilled bytes, shared bytes) of every kernel in ptxas' report."""
    rows = []
    for block in re.split(r"ptxas info\s+: Compiling entry function '", report)[1:]:
        name = block.split("'", 1)[0]
        registers = int(re.search(r"Used (\d+) registers", block)[1])
        spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", block))
        shared = re.search(r"(\d+) bytes smem", block)
        rows.append((name, registers, spilled, int(shared[1]) if shared else 0))
    return rows


def template_of(mangled: str) -> str:
    """``name<arguments>`` of a mangled kernel name."""
    text = subprocess.run(["c++filt", mangled], capture_output=True, text=True).stdout.strip()
    return text.split(">(", 1)[0].removeprefix("void ") + (">" if ">(" in text else "")


def is_hot(template: str) -> bool:
    """float64 is the type of derivative checks; everything else is measured."""
    return "<double" not in template and ", double" not in template


def disassembled(cubin: Path) -> str:
    """The SASS of a cubin, by the disassembler Triton ships; empty without it."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return ""
    tool = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return ""
    return subprocess.run([tool, "-sass", cubin], capture_output=True, text=True).stdout


def on_a_slower_path(sass: str) -> list[str]:
    """Kernels that are named after wgmma and have no HGMMA."""
    functions = re.split(r"Function : ", sass)[1:]
    names = {f.split(None, 1)[0]: "HGMMA" in f for f in functions}
    return [template_of(name) for name, has_it in names.items() if "wgmma" in name and not has_it]


def serialized(report: str) -> list[str]:
    """Kernels whose warpgroup products ptxas could not leave asynchronous."""
    return [template_of(name) for name in re.findall(r"instructions are serialized .*function '(\w+)'", report)]


def matrix_instructions(sass: str) -> str:
    """Counts of tensor-core and asynchronous-copy instructions in the SASS."""
    count = Counter(word for word in MATRIX_INSTRUCTIONS for _ in range(len(re.findall(rf"\b{word}\b", sass))))
    return ", ".join(f"{n} {word}" for word, n in count.items())


def main(stems: list[str]) -> int:
    if shutil.which("nvcc") is None:
        print("cuda_compile: nvcc is not on PATH")
        return 1
    bad = 0
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(compile_one, source, architecture, Path(name))
            for source in sources(stems)
            for architecture in ARCHITECTURES
            if architecture == "sm_90a" or not source.stem.endswith(HOPPER_ONLY)
        ]
        for job in jobs:
            source, architecture, done, cubin = job.result()
            if done.returncode != 0:
                bad += 1
                print(f"FAILED {source.name} {architecture}\n{done.stderr}")
                continue
            rows = kernels(done.stderr)
            spilling = [(template_of(row[0]), *row[1:]) for row in rows if row[2]]
            failing = [r for r in spilling if r[2] > TOLERATED_BYTES and is_hot(r[0]) and source.parent == LIBRARY]
            sass = disassembled(cubin)
            slower = on_a_slower_path(sass)
            waiting = serialized(done.stderr)
            if not source.stem.startswith(PLANTED_BUGS):
                bad += len(failing) + len(slower) + len(waiting)
            most = max((row[1] for row in rows), default=0)
            print(
                f"{source.name:28} {architecture:7} {len(rows):4} kernels, at most {most:3} registers, "
                f"{len(spilling)} spill, {len(failing)} too much  {matrix_instructions(sass)}",
                flush=True,
            )
            for row in spilling:
                print(f"    {row[2]:6} bytes, {row[1]} registers{', TOO MUCH' if row in failing else ''}: {row[0]}")
            for kernel in slower:
                print(f"    NO HGMMA: {kernel}")
            for kernel in waiting:
                print(f"    SERIALIZED: {kernel}")
    print("cuda_compile:", "ok" if bad == 0 else f"{bad} problem(s)")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
