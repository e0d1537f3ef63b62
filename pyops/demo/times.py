"""A network's answer with torch and with pyops, what each of its ops costs, and the table that says so."""

from __future__ import annotations

import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..core.intercept import Entry, Report, counts, milliseconds, table, use

KINDS = ("views", "new tensors", "elementwise", "matrix products", "copies, picks, sorts, joins", "others")
_PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm"}
_NEW = {"empty", "empty_like", "new_empty", "zeros", "arange"}  # made of nothing but sizes
_MOVES = {
    *("clone", "copy_", "_to_copy", "lift_fresh", "index", "index_select", "nonzero", "cat", "stack", "flip", "repeat"),
    *("_local_scalar_dense", "sort", "argsort", "scatter_"),
}


class Kernels(TorchDispatchMode):
    """Counts the kernels of torch that run while it is active, by kind; those of pyops are not among them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "aten":
            name = op.overloadpacket.__name__
            if op.is_view or name == "detach":
                kind = "views"
            elif name in _NEW:
                kind = "new tensors"
            elif _converts(name, args, kwargs or {}) or (torch.Tag.pointwise in op.tags and name not in _MOVES):
                kind = "elementwise"
            elif name in _MOVES:  # clone among them, which torch calls pointwise
                kind = "copies, picks, sorts, joins"
            else:
                kind = "matrix products" if name in _PRODUCTS else "others"
            self.calls[kind][name] += 1
        return op(*args, **(kwargs or {}))


def _converts(name: str, args: Any, kwargs: Any) -> bool:
    """Is this a change of dtype, where the numbers are?"""
    return (
        name == "_to_copy"
        and kwargs.get("dtype", args[0].dtype) != args[0].dtype
        and kwargs.get("device", args[0].device) == args[0].device
    )


def left_rows(left: dict[str, Counter[str]]) -> list[list[str]]:
    """Kind, calls and ops, the most frequent first."""
    named = {kind: [op for op, _ in ops.most_common()] for kind, ops in left.items()}
    return [[kind, str(sum(ops.values())), ", ".join(named[kind]) or "none"] for kind, ops in left.items()]


@dataclass
class Comparison:
    """One call with torch and under ``pyops.use()``; times are medians of runs in turns.

    Attributes:
        by_torch, by_pyops: what the call returned.
        report: what ran on pyops, and why not.
        torch_ops, pyops_ops: op -> its time in a run where nothing is routed, and in one where everything is.
        left: calls of torch's own kernels that remain under ``pyops.use()``, by kind and op.
        seconds_torch, seconds_pyops: of the whole call, without the clocks around each op.
        by_fused, seconds_fused: of the call with batch norms folded, under ``pyops.use()``; None where there is none.
    """

    by_torch: Any
    by_pyops: Any
    report: Report
    torch_ops: dict[str, Entry]
    pyops_ops: dict[str, Entry]
    left: dict[str, Counter[str]]
    seconds_torch: float
    seconds_pyops: float
    by_fused: Any = None
    seconds_fused: float | None = None

    @property
    def ran(self) -> bool:
        """Did any op run on pyops?"""
        return any(entry.backends for entry in self.report.entries.values())

    def show(self, device: torch.device, what: str) -> None:
        print(table(op_rows(self.report, self.torch_ops, self.pyops_ops)))
        print("\nLeft to torch, in calls of its kernels:")
        print(table([["kind", "calls", "which"], *left_rows(self.left)]))
        where = "GPU" if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        print(f"\nMedian times of {what} ({where}).")
        print(f"The whole: torch {milliseconds(self.seconds_torch)}, pyops {milliseconds(self.seconds_pyops)}.")
        if self.seconds_fused is not None:
            print(f"Batch norms folded into convolutions, fuse_conv_bn: pyops {milliseconds(self.seconds_fused)}.")

    def numbers(self) -> dict[str, Any]:
        """For demo.json."""
        return {
            "seconds": {"torch": self.seconds_torch, "pyops": self.seconds_pyops, "pyops_fused": self.seconds_fused},
            "ops": self.report.to_dict()["ops"],
            "left_to_torch": self.left,
            "seconds_by_op": {
                "torch": {op: e.seconds_torch for op, e in self.torch_ops.items()},
                "pyops": {op: e.seconds_pyops + e.seconds_torch for op, e in self.pyops_ops.items()},
            },
        }


def comparison(
    call: Callable[[], Any], device: torch.device, repeats: int, fused: Callable[[], Any] | None = None
) -> Comparison:
    """Runs the call with torch and with pyops, in turns: once for its answers, then with and without clocks.

    ``fused`` is the call of the same model after ``fuse_conv_bn``, which runs with pyops alone.
    """

    def with_pyops(call: Callable[[], Any]) -> Any:
        with use():
            return call()

    by_torch = call()
    with use() as report:
        by_pyops = call()
    with use(), Kernels() as kernels:
        call()
    kept: list[Report] = []
    routed: list[Report] = []
    runs = [call, lambda: with_pyops(call), *([] if fused is None else [lambda: with_pyops(fused)])]
    whole: list[list[float]] = [[] for _ in runs]
    for _ in bar(range(repeats), "time per op, and of the whole"):
        for reports, ops in ((kept, ()), (routed, None)):
            with use(ops, timing=True) as timed:
                call()
            reports.append(timed)
        for spent, run in zip(whole, runs):
            spent.append(seconds_of(run, device))
    found = Comparison(
        by_torch, by_pyops, report, median_entries(kept), median_entries(routed), kernels.calls,
        *(statistics.median(spent) for spent in whole[:2]),
    )  # fmt: skip
    if fused is not None:
        found.by_fused, found.seconds_fused = with_pyops(fused), statistics.median(whole[2])
    return found


def median_entries(reports: list[Report]) -> dict[str, Entry]:
    """The entries of reports of equal runs, with the median of their times."""
    entries = {}
    for op, entry in reports[0].entries.items():
        same = [report.entries[op] for report in reports]
        entry.seconds_torch = statistics.median(e.seconds_torch for e in same)
        entry.seconds_pyops = statistics.median(e.seconds_pyops for e in same)
        entries[op] = entry
    return entries


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def bar(items: Iterable[Any], what: str) -> Iterable[Any]:
    """A progress bar once it takes longer than two seconds."""
    from tqdm import tqdm

    return tqdm(items, desc=what, delay=2, leave=False, disable=not sys.stderr.isatty())


def op_rows(report: Report, torch_report: dict[str, Entry], pyops_report: dict[str, Entry]) -> list[list[str]]:
    """The table of ops: those on pyops first, then by time."""
    rows = [["op", "calls", "backend that ran", "time torch", "time pyops", "why not, where torch kept it"]]
    for e in sorted(report.entries.values(), key=lambda e: (not e.backends, -torch_report[e.op].seconds_torch)):
        ours = pyops_report[e.op].seconds_pyops if e.backends else 0.0
        ran = ", ".join([*e.backends, *(["torch"] if e.kept else [])])
        theirs = torch_report[e.op].seconds_torch
        rows.append([e.op, str(e.calls), ran, milliseconds(theirs), milliseconds(ours), counts(e.kept)])
    return rows
