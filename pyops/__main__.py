"""Command line of pyops: ``python -m pyops info | check | bench | explain | demo``.

Exit codes: 0 done, 1 a check or a benchmark found something wrong, 2 bad arguments or environment variables, 3 what was
asked for cannot run on this machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import importlib
import json
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from . import __version__, functional, vision
from .core import backend, info, library
from .core.explain import explain


class Exit(enum.IntEnum):
    OK = 0
    WRONG = 1
    USAGE = 2
    UNAVAILABLE = 3


class Stop(Exception):
    """Ends the command with one line on stderr."""

    def __init__(self, code: Exit, message: str) -> None:
        super().__init__(message)
        self.code = code


class Parser(argparse.ArgumentParser):
    """argparse, with one line per mistake in place of the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(Exit.USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def public_ops() -> dict[str, str]:
    """Every public function and the stem of the room that holds it; no types, and no context managers."""
    found = {name: getattr(facade, name) for facade in (functional, vision) for name in facade.__all__}
    functions = {name: f for name, f in found.items() if not isinstance(f, type)}
    return {name: f.__module__.rsplit(".", 1)[-1] for name, f in functions.items()}


def op_name(text: str) -> str:
    """An op of pyops, for argparse."""
    if text not in public_ops():
        raise argparse.ArgumentTypeError(f"unknown op {text!r}, expected one of {', '.join(sorted(public_ops()))}")
    return text


def shape(text: str) -> tuple[int, ...]:
    """``32x128x56x56`` or ``32,128,56,56``, for argparse."""
    if not re.fullmatch(r"\d+([x,]\d+)*", text):
        raise argparse.ArgumentTypeError(f"cannot read shape {text!r}, expected sizes such as 32x128x56x56")
    return tuple(int(size) for size in re.split("[x,]", text))


EXTRA_PADDING = {"stride": "", "padding": ", same or valid", "dilation": ""}


def sides(text: str) -> int | tuple[int, ...] | str:
    """``2``, ``2x1``, or a word for padding, for argparse."""
    if text in ("same", "valid"):
        return text
    if not re.fullmatch(r"\d+([x,]\d+)*", text):
        raise argparse.ArgumentTypeError(f"cannot read {text!r}, expected integers such as 2 or 2x1")
    values = tuple(int(value) for value in re.split("[x,]", text))
    return values if len(values) > 1 else values[0]


def dtype(text: str) -> torch.dtype:
    """A torch dtype by name, for argparse."""
    found = getattr(torch, text, None)
    if not isinstance(found, torch.dtype):
        raise argparse.ArgumentTypeError(f"unknown dtype {text!r}, expected a name such as float32 or bfloat16")
    return found


def parser() -> Parser:
    """The command line."""
    top = Parser(prog="python -m pyops", description="Kernels that drop in for torch ops.")
    top.add_argument("--version", action="version", version=f"pyops {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    sub = command("info", run_info, "what is installed, what can run here, and why the rest cannot")
    sub.add_argument("--json", action="store_true", help="print one JSON object")

    sub = command("check", run_check, "is every op right, with its gradients, on every backend of this machine")
    sub.add_argument("op", nargs="*", type=op_name, help="ops to check; all if none is named")
    sub.add_argument("--backend", choices=backend.NAMES, help="check this backend only")
    sub.add_argument("--race", action="store_true", help="the emulator, under its race detector")
    sub.add_argument("--json", action="store_true", help="print one JSON object")

    sub = command("bench", run_bench, "what an op costs here, against torch and against the limit of the machine")
    sub.add_argument("op", nargs="*", help="rooms or ops to measure; all if none is named")
    sub.add_argument("--quick", action="store_true", help="short subset with short timing")
    sub.add_argument("--json", metavar="FILE", help="write the results here")
    sub.add_argument("--out", metavar="DIR", help="write JSON, plots and a web page here")
    sub.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where torch sees a GPU, else cpu")

    sub = command("explain", run_explain, "which code an op would run for these shapes, and why")
    sub.add_argument("op", type=op_name, metavar="OP")
    sub.add_argument("shape", nargs="+", type=shape, metavar="SHAPE", help="such as 32x128x56x56, the input first")
    sub.add_argument("--dtype", type=dtype, default=torch.float32, help="such as bfloat16; default float32")
    sub.add_argument("--device", choices=("cpu", "cuda"), help="default: where the backend runs")
    sub.add_argument("--backend", choices=backend.NAMES, help="this backend in place of the one that would run")
    for name in ("stride", "padding", "dilation"):
        sub.add_argument(f"--{name}", type=sides, help=f"of a convolution: such as 2 or 2x1{EXTRA_PADDING[name]}")
    sub.add_argument("--groups", type=int, help="of a convolution; default: what the shapes say")
    sub.add_argument("--layout", choices=("planes", "channels_last"), help="of a convolution's tensors; default planes")
    sub.add_argument("--json", action="store_true", help="print one JSON object")

    sub = command("demo", run_demo, "pretrained networks on real photos, with torch and with pyops")
    sub.add_argument("--out", metavar="DIR", default="out", help="where pictures and tables go; default out/")
    sub.add_argument("--quick", action="store_true", help="fewer photos and a shorter benchmark")
    return top


def run_info(options: argparse.Namespace) -> int:
    info.print_info(json=options.json)
    return Exit.OK


def run_explain(options: argparse.Namespace) -> int:
    home = {"cuda": "cuda", "cpu": "cpu", "emulator": "cpu"}
    device = options.device or home.get(options.backend) or default_device()
    stem = public_ops()[options.op]
    names = ("stride", "padding", "dilation", "groups")
    geometry = {name: value for name in names if (value := getattr(options, name)) is not None}
    if options.layout is not None:
        geometry["channels_last"] = options.layout == "channels_last"
    try:
        answer = explain(
            options.op, options.shape, options.dtype, device, wanted=options.backend, stem=stem, geometry=geometry
        )
    except ValueError as error:
        raise Stop(Exit.USAGE, f"explain: {error}") from error
    print(json.dumps(dataclasses.asdict(answer), indent=2) if options.json else answer)
    return Exit.OK


def run_bench(options: argparse.Namespace) -> int:
    bench = optional_module("pyops.bench", "the benchmarks need more packages: pip install 'torch-pyops[bench]'")
    try:
        return bench.run(
            options.op,
            quick=options.quick,
            device=options.device or default_device(),
            out=options.out,
            json_path=options.json,
            progress=True,
        )
    except ValueError as error:
        raise Stop(Exit.USAGE, str(error)) from error


def run_demo(options: argparse.Namespace) -> int:
    demo = optional_module("pyops.demo", "the demo needs more packages: make demo installs them")
    return demo.run(options.out, quick=options.quick) or Exit.OK


def run_check(options: argparse.Namespace) -> int:
    if options.race and options.backend not in (None, "emulator"):
        raise Stop(Exit.USAGE, f"check: --race is a mode of the emulator, not of {options.backend}")
    only = "emulator" if options.race else options.backend
    restart_for_check(options)
    status = library.status() if only is None else {only: library.why_not(only)}
    if only is not None and status[only] is not None:
        raise Stop(Exit.UNAVAILABLE, f"check: backend {only} cannot run here: {status[only]}")
    results = checked(options.op or sorted(public_ops()), [name for name, why_not in status.items() if why_not is None])
    if options.json:
        rows = [dataclasses.asdict(result) for result in results]
        print(json.dumps({"results": rows, "left_out": {k: v for k, v in status.items() if v is not None}}, indent=2))
    else:
        print("\n".join(check_table(results, status)))
    return Exit.OK if results and all(result.ok for result in results) else Exit.WRONG


def restart_for_check(options: argparse.Namespace) -> None:
    """Starts this command anew where a mode must be known before the libraries load.

    Triton without a GPU runs in its interpreter, and reads that wish when kernels are defined; the emulator's race
    detector is a build of its own.
    """
    wanted = {}
    if options.race:
        wanted["PYOPS_EMULATOR"] = "race"
    elif options.backend in (None, "triton") and not torch.cuda.is_available():
        wanted["TRITON_INTERPRET"] = "1"
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        command = [sys.executable, "-m", "pyops", *options.arguments]
        sys.stdout.flush()
        os.execve(command[0], command, {**os.environ, **wanted})


def checked(ops: Sequence[str], backends: Sequence[str]) -> list[Any]:
    """Results of all checks of these ops on these backends, under a progress bar."""
    from tqdm import tqdm

    from . import testing

    results: list[Any] = []
    pairs = [(op, name) for op in ops for name in backends]
    with tqdm(pairs, unit="room", delay=2, leave=False, disable=not sys.stderr.isatty()) as bar:
        for op, name in bar:
            bar.set_description(f"{op} on {name}")
            results += testing.check_room(op, name)
    return results


def check_table(results: Sequence[Any], status: dict[str, str | None]) -> list[str]:
    """Ops down, backends across, then every failure, then what was left out and why."""
    ops = list(dict.fromkeys(result.op for result in results))
    names = list(dict.fromkeys(result.backend for result in results))
    width = max([len(op) for op in ops], default=0) + 2
    lines = ["".join([" " * width, *(f"{name:<12}" for name in names)]).rstrip()]
    for op in ops:
        cells = []
        for name in names:
            here = [result.ok for result in results if (result.op, result.backend) == (op, name)]
            text = f"{'✓' if all(here) else '✗'} {sum(here)}/{len(here)}" if here else "·"
            cells.append(colour(f"{text:<12}", all(here)) if here else f"{text:<12}")
        lines.append(f"{op:<{width}}" + "".join(cells).rstrip())
    failures = [result for result in results if not result.ok]
    lines += [colour(f"✗ {r.op} on {r.backend}: {r.check}: {r.detail}", False) for r in failures]
    lines += [f"left out {name}: {why_not}" for name, why_not in status.items() if why_not is not None]
    return lines


def colour(text: str, ok: bool) -> str:
    """Green or red on a terminal; plain elsewhere and under NO_COLOR."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    return f"\033[{32 if ok else 31}m{text}\033[0m"


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def optional_module(name: str, hint: str) -> Any:
    """A part of pyops that stands on more packages than the ops do."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise Stop(Exit.UNAVAILABLE, f"{error}; {hint}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    # A terminal that cannot show a mark gets a question mark, not an exception.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(arguments)
    options.arguments = arguments
    try:
        if (problem := library.environment_problem()) is not None:
            raise Stop(Exit.USAGE, f"{options.command}: {problem}")
        return int(options.run(options))
    except Stop as stop:
        print(f"pyops {stop}", file=sys.stderr)
        return stop.code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
