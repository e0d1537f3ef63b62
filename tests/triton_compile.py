"""Compiles every Triton kernel for sm_80 and sm_90 without a GPU, and reports registers and spills.

    python tests/triton_compile.py [WORD ...]      only kernels whose name contains one of the words

Each module of kernels/ lists its kernels in `specimens()`. The exit status is 1 when a kernel does not compile or a hot
one spills. Registers are those of the cubin, read with the cuobjdump of the Triton wheel.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = (90, 80)


class Result(NamedTuple):
    name: str
    arch: int
    registers: int
    spill_bytes: int
    shared: int
    hot: bool
    error: str


def load_specimens() -> list[Any]:
    """One entry per kernel, signature and constants, from every module of kernels/."""
    # A kernel decorated under the interpreter cannot be compiled.
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise RuntimeError("compile in a process without TRITON_INTERPRET")
    sys.path.insert(0, str(ROOT))
    found: dict[str, Any] = {}
    for path in sorted((ROOT / "kernels").glob("*.py")):
        module = importlib.import_module(f"kernels.{path.stem}") if path.stem != "__init__" else None
        for s in getattr(module, "specimens", list)():
            found.setdefault(f"{s.kernel.__name__} {s.signature} {s.constants}", s)
    return list(found.values())


def compile_specimen(specimen: Any, arch: int) -> Result:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, signature, constants = specimen.kernel, dict(specimen.signature), dict(specimen.constants)
    missing = set(kernel.arg_names) - set(signature) - set(constants)
    signature = {a: "constexpr" if a in constants else signature.get(a, "?") for a in kernel.arg_names}
    x = next((signature[a][1:] for a in ("x", "part") if signature.get(a, "").startswith("*")), "")
    sizes = " ".join(f"{k}={v}" for k, v in constants.items() if k.startswith("BLOCK"))
    name = f"{kernel.__name__} {x} {sizes}"
    if missing:
        return Result(name, arch, 0, 0, 0, specimen.hot, f"no type for {sorted(missing)}")
    # Triton specialises pointers and sizes that 16 divides, which is what real tensors have.
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, (a, t) in enumerate(signature.items())
        if t.startswith("*") or a in ("N", "C", "S", "strip", *specimen.divisible)
    }
    target = GPUTarget("cuda", arch, 32)
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attrs)
    try:
        built = triton.compile(source, target=target, options={"num_warps": specimen.num_warps})
    except (triton.CompilationError, RuntimeError, AssertionError, ValueError, TypeError) as e:
        return Result(name, arch, 0, 0, 0, specimen.hot, f"{type(e).__name__}: {e}")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(built.asm["cubin"])
        f.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run(
            [str(tool), "--dump-resource-usage", f.name], capture_output=True, text=True, check=True
        ).stdout
    registers = int(re.findall(r"REG:(\d+)", usage)[-1])
    # Spilled registers live on the stack; kernels without local arrays have no other use for it.
    spill = int(re.findall(r"STACK:(\d+)", usage)[-1]) + int(re.findall(r"LOCAL:(\d+)", usage)[-1])
    return Result(name, arch, registers, spill, int(built.metadata.shared), specimen.hot, "")


def worth_compiling(specimen: Any, arch: int) -> bool:
    """float16 differs from bfloat16 in its conversions, and float64 is for derivative checks: one architecture each."""
    return arch == ARCHITECTURES[0] or not {"*fp16", "*fp64"} & set(specimen.signature.values())


def compile_all(words: tuple[str, ...] = (), architectures: tuple[int, ...] = ARCHITECTURES) -> list[Result]:
    return [
        compile_specimen(s, arch)
        for s in load_specimens()
        if not words or any(w in f"{s.kernel.fn.__module__} {s.kernel.__name__}" for w in words)
        for arch in architectures
        if worth_compiling(s, arch)
    ]


def main() -> int:
    results = compile_all(tuple(sys.argv[1:]))
    bad = 0
    for r in results:
        failed = bool(r.error) or (r.hot and r.spill_bytes > 0)
        bad += failed
        note = r.error or ("spills" if r.spill_bytes else "")
        print(f"sm_{r.arch} {r.registers:4d} reg {r.spill_bytes:5d} B stack {r.shared:6d} B smem  {r.name}  {note}")
    print(f"{len(results)} compiled, {bad} bad")
    return 1 if bad or not results else 0


if __name__ == "__main__":
    sys.exit(main())
