"""The engine of `make gpu`: build for the GPU of this machine, test, sanitize, measure, all offline.

    python bench/gpu.py --part build,test,conformance,sanitize,bench --op layer_norm

It starts with nothing but the standard library and torch. Every step runs in a process of its own with a share of the
time that is left, so that one failure, one hang or one poisoned CUDA context ends that step only; each reports what it
did, and its whole output stands in a log under ``--out``.
"""

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEMS = sorted(path.stem.removeprefix("bench_") for path in (ROOT / "bench").glob("bench_*.py"))
TOTAL_S = 530.0
# The most valuable part first. A part's number is its claim on the time that is left when its turn comes.
PARTS = {"build": 3.0, "test": 3.0, "conformance": 0.6, "sanitize": 1.2, "bench": 3.0}
# Wheels carried along for a machine without a package index: `make gpu-wheels` fills it.
WHEELS = ROOT / "wheels"
# Libraries built elsewhere for this machine's GPU, Python and torch; where libpyops.so is among them nothing is built.
PREBUILT = ROOT / "prebuilt"
# What a run leaves in the tree to be committed; copied into ``--out`` as well, which may be all that comes back.
KEPT = ("bench/results", "tests/emulator/golden")
# A bench with less time than this measures the quick subset, and says so in its results.
QUICK_BELOW_S = 90.0
OK, FAILED, TIMEOUT, SKIPPED = "ok", "FAILED", "TIMEOUT", "skipped"
TAIL_LINES = {OK: 6, FAILED: 40, TIMEOUT: 25}


@dataclass
class Step:
    """One process of the plan. A step without a command is skipped and says why."""

    part: str
    name: str
    command: list[str]
    weight: float = 1.0
    environment: dict[str, str] = field(default_factory=dict)
    why_not: str = ""
    budget_option: str = ""


@dataclass
class Outcome:
    step: Step
    status: str
    seconds: float
    note: str = ""


IMPORT = "import pyops.bench, torch; print(torch.cuda.get_device_name())"

Execute = Callable[[Step, float, Path], Outcome]


def why_no_gpu() -> str:
    """Empty where torch sees an NVIDIA GPU, else every reason found."""
    reasons = []
    if shutil.which("nvidia-smi") is None:
        reasons.append("nvidia-smi is not on PATH")
    try:
        import torch
    except ImportError:
        reasons.append("torch is not installed")
    else:
        if torch.version.cuda is None:
            reasons.append(f"torch {torch.__version__} is built without CUDA")
        elif torch.cuda.is_available():
            return ""
        else:
            reasons.append(f"torch {torch.__version__} finds no device")
    return "; ".join(reasons)


def architecture() -> str:
    """The GPU's own architecture as TORCH_CUDA_ARCH_LIST spells it; Hopper and Blackwell with the suffix a."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}{'a' if major in (9, 10) else ''}"


def plan(parts: Sequence[str], ops: Sequence[str], arch: str, out: Path) -> list[Step]:
    """Every step of the chosen parts for the chosen ops, in the order they run."""
    makers = {
        "build": build_steps,
        "test": test_steps,
        "conformance": conformance_steps,
        "sanitize": sanitize_steps,
        "bench": bench_steps,
    }
    return [step for part in PARTS if part in parts for step in makers[part](ops or STEMS, bool(ops), arch, out)]


def build_steps(ops: Sequence[str], chosen: bool, arch: str, out: Path) -> list[Step]:
    install = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "-e", "."]
    environment = {"PYOPS_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": arch}
    missing = "" if shutil.which("nvcc") else "nvcc is not on PATH"
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--find-links", str(WHEELS)]
    carried = [
        Step("build", "wheels", [*pip, "-r", "requirements/gpu.txt"], 0.5),
        Step("build", "wheels of peers", [*pip, "--no-deps", "-r", "requirements/gpu-peers.txt"], 0.5),
    ]
    build = Step("build", f"build for sm_{arch.replace('.', '')}", install, 6.0, environment, missing)
    if (PREBUILT / "libpyops.so").exists():
        files = [str(path) for path in sorted(PREBUILT.glob("*.so"))]
        build = Step("build", "take prebuilt libraries", ["cp", *files, str(ROOT / "pyops")], 0.2)
    return [
        *(carried if any(WHEELS.glob("*.whl")) else []),
        build,
        Step("build", "import", [sys.executable, "-c", IMPORT]),
    ]


def test_steps(ops: Sequence[str], chosen: bool, arch: str, out: Path) -> list[Step]:
    files = [f"tests/test_{op}.py" for op in ops] if chosen else ["tests"]
    options = [] if importlib.util.find_spec("pytest_benchmark") else ["-o", "addopts=-q"]
    if importlib.util.find_spec("xdist"):
        options += ["-n", str(min((os.cpu_count() or 2) - 1, 15) or 1), "--dist", "worksteal"]
    command = [sys.executable, "-m", "pytest", *files, *options, "--backend", "cuda", "--backend", "triton"]
    missing = "" if importlib.util.find_spec("pytest") else "pytest is not installed"
    return [Step("test", "pytest on cuda and triton", command, why_not=missing)]


def conformance_steps(ops: Sequence[str], chosen: bool, arch: str, out: Path) -> list[Step]:
    """What this GPU makes of the emulator's primitives: the golden outputs that CI holds the emulator against."""
    missing = "" if shutil.which("nvcc") else "nvcc is not on PATH"
    command = [sys.executable, "-m", "tests.emulator_library", f"sm_{arch.replace('.', '')}"]
    return [Step("conformance", "golden outputs for the emulator", command, why_not=missing)]


def sanitize_steps(ops: Sequence[str], chosen: bool, arch: str, out: Path) -> list[Step]:
    """memcheck and racecheck on the smallest cases of each CUDA kernel, without torch's overrun-hiding allocator."""
    sanitizer = shutil.which("compute-sanitizer")
    missing = "" if sanitizer else "compute-sanitizer is not on PATH"
    smallest = [sys.executable, "-m", "pyops.bench", *ops, "--smallest", "--device", "cuda", "--provider", "pyops cuda"]
    return [
        Step(
            "sanitize",
            tool,
            [sanitizer or "compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *smallest],
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            why_not=missing,
        )
        for tool in ("memcheck", "racecheck")
    ]


def bench_steps(ops: Sequence[str], chosen: bool, arch: str, out: Path) -> list[Step]:
    steps = []
    for op in ops:
        command = [sys.executable, "-m", "pyops.bench", op, "--device", "cuda", "--json", "bench/results"]
        command += ["--out", str(out / op)]
        steps.append(Step("bench", f"bench {op}", command, budget_option="--budget"))
    return steps


def execute(step: Step, limit_s: float, log: Path) -> Outcome:
    """Runs one step in its own process group within the limit; the whole group ends with it."""
    command = list(step.command)
    if step.budget_option:
        # Ending by itself keeps the results; being killed loses them.
        command += [step.budget_option, f"{max(limit_s - 25, limit_s / 2):.0f}"]
        command += ["--quick"] * (limit_s < QUICK_BELOW_S)
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | step.environment
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as output:
        output.write(" ".join(command) + "\n")
        output.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=limit_s)
            status, note = (OK, "") if code == 0 else (FAILED, f"exit status {code}")
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status, note = TIMEOUT, f"stopped after {limit_s:.0f} s"
    return Outcome(step, status, time.monotonic() - started, note)


def run_plan(steps: Sequence[Step], out: Path, total_s: float = TOTAL_S, execute: Execute = execute) -> list[Outcome]:
    """Runs every step whatever became of the ones before; time that one leaves over goes to those after it."""
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + total_s
    outcomes = []
    for number, step in enumerate(steps):
        share = share_of_time(steps[number:])
        limit = share * (end - time.monotonic())
        print(f"\n== {step.part}: {step.name}", flush=True)
        if step.why_not or limit < 1:
            outcome = Outcome(step, SKIPPED, 0.0, step.why_not or "no time left")
        else:
            log = out / f"{number:02d}_{step.name.replace(' ', '_')}.log"
            try:
                outcome = execute(step, limit, log)
            except OSError as error:
                outcome = Outcome(step, FAILED, 0.0, str(error))
            if log.exists():
                lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
                print("\n".join(lines[-TAIL_LINES.get(outcome.status, 10) :]))
        outcomes.append(outcome)
        print(f"-- {outcome.status} in {outcome.seconds:.0f} s {outcome.note}".rstrip(), flush=True)
    return outcomes


def share_of_time(steps: Sequence[Step]) -> float:
    """The first step's claim among those still to run: its part's claim, divided within the part by weights."""
    first = steps[0]
    waiting = [step for step in steps if not step.why_not]
    within = sum(step.weight for step in waiting if step.part == first.part) or 1.0
    among = sum(PARTS[part] for part in {step.part for step in waiting}) or 1.0
    return PARTS[first.part] / among * first.weight / within


def report(outcomes: Sequence[Outcome]) -> str:
    """One line per step."""
    width = max((len(outcome.step.name) for outcome in outcomes), default=0)
    lines = [f"{o.status:8} {o.seconds:5.0f} s  {o.step.name:{width}}  {o.note}".rstrip() for o in outcomes]
    return "\n".join(lines)


def names(text: str) -> list[str]:
    return [name for name in text.replace(",", " ").split() if name]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 if every step that ran passed; 1 if one failed or no GPU is visible; 2 for a wrong argument."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", type=names, default=list(PARTS), help=f"of {','.join(PARTS)}; all by default")
    parser.add_argument("--op", type=names, default=[], help=f"of {','.join(STEMS)}; all by default")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu", help="logs, plots and pages")
    parser.add_argument("--seconds", type=float, default=TOTAL_S, help="time for everything")
    options = parser.parse_args(arguments)
    for kind, given, known in (("part", options.part, PARTS), ("op", options.op, STEMS)):
        if unknown := [name for name in given if name not in known]:
            print(f"unknown {kind} {', '.join(unknown)}; there are: {', '.join(known)}")
            return 2
    parts = options.part or list(PARTS)
    no_gpu = why_no_gpu()
    steps = plan(parts, options.op, "0.0" if no_gpu else architecture(), options.out.resolve())
    if no_gpu:
        print("would run:\n" + "\n".join(f"  {step.part:13}{step.name}" for step in steps))
        print(f"no NVIDIA GPU is visible: {no_gpu}")
        return 1
    outcomes = run_plan(steps, options.out.resolve(), options.seconds)
    for folder in KEPT:
        if (ROOT / folder).is_dir():
            shutil.copytree(ROOT / folder, options.out.resolve() / folder, dirs_exist_ok=True)
    print("\n" + report(outcomes))
    return int(any(outcome.status in (FAILED, TIMEOUT) for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
