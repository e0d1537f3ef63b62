"""Runs rooms: chooses cases, measures them with progress, prints the table and writes the reports."""

import argparse
import dataclasses
import importlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from . import machine, report
from .case import Case, Room
from .harness import (
    ERROR,
    FULL,
    OK,
    QUICK,
    SKIPPED,
    WRONG,
    Oracle,
    Row,
    checked,
    empty_row,
    fill_in_ceilings,
    floor_and_prediction,
    fresh_inputs,
    measure_case,
    select,
)

PATIENCE_S = 2.0


def rooms() -> dict[str, Room]:
    """Every bench room by its stem."""
    stems = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))
    return {stem: cast(Room, importlib.import_module(f".bench_{stem}", __package__)) for stem in stems}


def chosen(names: Sequence[str]) -> list[tuple[Room, set[str] | None]]:
    """Rooms for stems or op names, each with the ops asked for; all rooms for no names."""
    known = rooms()
    if not names:
        return [(room, None) for room in known.values()]
    result: list[tuple[Room, set[str] | None]] = []
    for name in names:
        room = known.get(name) or next((room for room in known.values() if name in room.OPS), None)
        if room is None:
            ops = sorted({op for room in known.values() for op in room.OPS})
            raise ValueError(f"no bench for {name!r}; there are: {', '.join(ops)}")
        result.append((room, None if name == room.STEM else {name}))
    return result


def thread_counts(device: str) -> list[int]:
    """One thread is the primary measurement on the CPU, all cores the secondary one; the GPU has neither."""
    return [0] if device == "cuda" else sorted({1, machine.cores()})


def run(
    stems: Sequence[str] = (),
    *,
    quick: bool = False,
    device: str = "cpu",
    out: str | os.PathLike[str] | None = None,
    json_path: str | os.PathLike[str] | None = None,
    progress: bool = True,
    compile: bool | None = None,
    budget_s: float | None = None,
) -> int:
    """Measures pyops against torch and its peers; returns 0, or 1 if a pyops result is wrong, failed or absent.

    Args:
        stems: rooms or ops; empty for all.
        quick: the short subset with short timing.
        device: "cpu" or "cuda".
        out: directory for bench.json, bench.html and the plots; None writes none of them.
        json_path: file for the JSON; a directory gets ``<machine>.json``, in which other rooms' rows are kept.
        progress: show a progress bar once the run takes longer than two seconds.
        compile: include torch.compile; by default unless `quick`, since compiling takes longer than measuring.
        budget_s: start no new case after this many seconds; what was left out is reported.

    Raises:
        ValueError: unknown room, or CUDA asked for where there is none.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"bench: device must be 'cpu' or 'cuda', got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("bench: no NVIDIA GPU is visible to torch")
    started = time.monotonic()
    with_compile = not quick if compile is None else compile
    counts = thread_counts(device)
    work = [
        (room, case, threads)
        for room, ops in chosen(stems)
        for case in select(room, device, quick, ops)
        for threads in counts
    ]
    before = torch.get_num_threads()
    rows: list[Row] = []
    ceilings = machine.ceilings_of(device, counts)
    try:
        for room, case, threads in with_bar(work, progress):
            if budget_s is not None and time.monotonic() - started > budget_s:
                rows.append(left_out(room, case, threads))
                continue
            rows += measured(room, case, threads, quick, with_compile)
        ceilings = machine.ceilings_of(device, counts, ceilings)
    finally:
        torch.set_num_threads(before)
    fill_in_ceilings(rows, ceilings)
    document = report.document(rows, device, quick, list(ceilings.values()))
    print(report.table(document))
    if json_path is not None:
        print(f"wrote {report.write_json(document, Path(json_path))}")
    if out is not None:
        for path in report.write_all(document, Path(out)):
            print(f"wrote {path}")
    ours = [row.status for row in rows if row.ours]
    return int(OK not in ours or WRONG in ours or ERROR in ours)


def measured(room: Room, case: Case, threads: int, quick: bool, with_compile: bool) -> list[Row]:
    """Rows of one case; a case that does not fit into memory is a row that says so."""
    include: Callable[[str], bool] = lambda name: with_compile or name != "torch.compile"
    try:
        return measure_case(room, case, threads=threads, effort=QUICK if quick else FULL, include=include)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return [left_out(room, case, threads, "does not fit into the memory of this machine")]


def left_out(room: Room, case: Case, threads: int, why: str = "time budget spent") -> Row:
    any_provider = next(iter(room.providers(case).values()))
    row = empty_row(room, case, threads, "all", any_provider)
    return dataclasses.replace(row, status=SKIPPED, note=why, ours=False)


def with_bar(work: list[tuple[Room, Case, int]], progress: bool) -> Iterable[tuple[Room, Case, int]]:
    """The work, under a tqdm bar that names the case and appears only when the run is not over soon."""
    if not progress:
        yield from work
        return
    try:
        from tqdm import tqdm
    except ImportError:
        print(f"{len(work)} cases (install tqdm for a progress bar)", file=sys.stderr)
        yield from work
        return
    with tqdm(work, unit="case", delay=PATIENCE_S, dynamic_ncols=True, leave=False) as bar:
        for item in bar:
            bar.set_description(item[1].name + report.on_threads(item[2], ", "))
            yield item


def print_floors(stems: Sequence[str] = ()) -> int:
    """For every GPU case, without a GPU: bytes, flops, and floor and prediction on each GPU of the table."""
    for limits in machine.GPU_LIMITS:
        print(f"{limits.name}: {limits.bandwidth / 1e12:.3g} TB/s, {limits.fma_rate / 1e12:.3g} TFLOP/s fp32, ", end="")
        print(f"{limits.matrix_rate / 1e12:.3g} TFLOP/s bf16 products ({limits.source})")
    print(
        f"{'case':56}{'MB':>9}{'GFLOP':>9}"
        + "".join(f"{g.name + ' floor':>14}{'predicted':>11}" for g in machine.GPU_LIMITS)
    )
    for room, ops in chosen(stems):
        for case in select(room, "cuda", False, ops):
            line = f"{case.name:56}{room.bytes(case) / 1e6:9.1f}{room.flops(case) / 1e9:9.2f}"
            for limits in machine.GPU_LIMITS:
                floor, predicted = floor_and_prediction(room, case, limits)
                line += f"{report.seconds(floor):>14}{report.seconds(predicted):>11}"
            print(line)
    return 0


def check_smallest(stems: Sequence[str] = (), device: str = "cpu", provider: str | None = None) -> int:
    """Runs pyops once, forward and backward, on the smallest case of each kernel and checks it; times nothing.

    This is what compute-sanitizer watches. Returns 1 if a result is wrong, failed or if nothing ran.
    """
    ran, failed = 0, 0
    for room, ops in chosen(stems):
        for case in room.tiny(device):
            if ops is not None and case.op not in ops:
                continue
            # The oracle stays on the CPU: under compute-sanitizer every kernel of torch would cost time.
            tensors = fresh_inputs(room, dataclasses.replace(case, device="cpu"))
            oracle = Oracle(room, case, tensors)
            for name, candidate in room.providers(case).items():
                if not candidate.ours or provider not in (None, name):
                    continue
                row = empty_row(room, case, 0, name, candidate)
                checked(row, case, candidate, oracle)
                ran += 1
                failed += row.status != OK
                print(f"{row.status:12}{name:14}{case.name}  {row.note}".rstrip(), flush=True)
    print(f"{ran} smallest cases, {failed} failed")
    return int(failed > 0 or ran == 0)


def main(arguments: Sequence[str]) -> int:
    """Command line of `python -m pyops.bench`."""
    parser = argparse.ArgumentParser(prog="python -m pyops.bench", description=run.__doc__.splitlines()[0])  # type: ignore[union-attr]
    add_arguments(parser)
    parser.add_argument("--smallest", action="store_true", help="run and check the smallest cases only, time nothing")
    parser.add_argument("--provider", help="with --smallest: this pyops provider only, such as 'pyops cuda'")
    parser.add_argument(
        "--floors", action="store_true", help="print floors and predictions of the GPU cases, time nothing"
    )
    options: Any = parser.parse_args(arguments)
    try:
        if options.floors:
            return print_floors(options.op)
        if options.smallest:
            return check_smallest(options.op, options.device, options.provider)
        return run(
            options.op,
            quick=options.quick,
            device=options.device,
            out=options.out,
            json_path=options.json,
            compile=options.compile,
            budget_s=options.budget,
        )
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the bench command, for `python -m pyops bench` as well."""
    parser.add_argument("op", nargs="*", help="stems or ops; all if none is named")
    parser.add_argument("--quick", action="store_true", help="short subset with short timing")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", metavar="FILE", help="write the results here; a directory gets <machine>.json")
    parser.add_argument("--out", metavar="DIR", help="write bench.json, bench.html and plots here")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="include torch.compile")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="start no new case after this time")
