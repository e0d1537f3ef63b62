"""Check, then measure: no provider is timed before its result was compared with float64.

Providers of a case take turns within one run, on the same fresh random inputs, so that a slow minute of a shared
machine falls on all of them. Every turn begins with one untimed call, and the caches are emptied before each timed
call, as `triton.testing.do_bench` does on the GPU: otherwise a small case would be measured against the wrong memory.
"""

import dataclasses
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .case import Case, Function, Provider, Room, Tensors, Unavailable
from .machine import LAUNCH_S, Ceilings, Limits, cache_bytes, device_name, gpu_limits

OK, WRONG, ERROR, UNAVAILABLE, SKIPPED = "ok", "WRONG", "ERROR", "unavailable", "skipped"
STATE = ("running_mean", "running_var")


NOTE_LENGTH = 160
# A median this far above the minimum measured the neighbours on the machine, not the kernel.
NOISE = 1.5


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long one provider of one case is measured: turns × seconds, at least `calls` timed calls a turn."""

    turns: int
    seconds: float
    calls: int


# On the CPU a provider that has been timed for so long is not called again: a slow baseline is known well enough.
ENOUGH_S = 20.0

QUICK = Effort(turns=3, seconds=0.02, calls=2)
FULL = Effort(turns=10, seconds=0.05, calls=3)


@dataclasses.dataclass
class Row:
    """One line of the results: a provider on a case with a number of threads. Times are seconds per call."""

    stem: str
    op: str
    case: str
    shape: list[int]
    dtype: str
    device: str
    backward: bool
    threads: int
    provider: str
    ours: bool
    status: str
    note: str = ""
    algorithm: str = ""
    error: float | None = None
    error_limit: float | None = None
    min_s: float | None = None
    median_s: float | None = None
    samples: int = 0
    noisy: bool = False
    bytes: int = 0
    flops: int = 0
    gb_per_s: float | None = None
    gflop_per_s: float | None = None
    floor_s: float | None = None
    predicted_s: float | None = None
    limits_of: str = ""
    ceiling_s: float | None = None
    bound: str = ""
    percent_of_ceiling: float | None = None
    pyops_speedup: float | None = None
    pyops_speedup_of_min: float | None = None
    date: str = ""


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def fresh_inputs(room: Room, case: Case) -> Tensors:
    """Random inputs with a new seed each time: never zeros, off-centre, with parameters that differ per channel."""
    generator = torch.Generator(device=case.device)
    generator.manual_seed(int.from_bytes(os.urandom(7), "little"))

    def normal(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float32, device=case.device, generator=generator)

    tensors = {"x": (normal(case.shape) + 0.5).to(case.dtype)}
    shapes = room.shapes(case)
    # Beside running statistics, which are never in half precision, torch takes its fast path with float32 parameters.
    dtype = at_least_float32(case.dtype) if any(name in STATE for name in shapes) else case.dtype
    for name, shape in shapes.items():
        centred = name in getattr(room, "CENTRED", ())
        tensors[name] = (normal(shape) / shape[-1] ** 0.5 if centred else (normal(shape) * 0.2 + 1.0).abs()).to(dtype)
    if apart := getattr(room, "apart", None):
        name = getattr(room, "APART", "x")
        tensors[name] = apart(case, tensors[name])
    tensors["dy"] = normal(case.shape if case.output is None else case.output).to(case.dtype)
    return in_layout(tensors, case.channels_last)


def in_layout(tensors: Tensors, channels_last: bool) -> Tensors:
    """The same tensors, with the images among them in channels_last on request."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return {name: t.contiguous(memory_format=layout) if t.dim() == 4 else t for name, t in tensors.items()}


def leaves(case: Case, tensors: Tensors) -> list[str]:
    return [name for name in tensors if name not in (*STATE, "dy")] if case.backward else []


def prepared(case: Case, tensors: Tensors) -> Tensors:
    """Own copies of the inputs, as leaves where a gradient is wanted."""
    wanted = leaves(case, tensors)
    return {name: t.detach().clone().requires_grad_(name in wanted) for name, t in tensors.items()}


def call(case: Case, function: Function, tensors: Tensors) -> Callable[[], tuple[torch.Tensor, ...]]:
    """The timed region: the op, and its backward pass where the case wants it. Gradients are not accumulated."""
    if not case.backward:
        return lambda: (function(tensors),)
    wanted = [tensors[name] for name in leaves(case, tensors)]

    def forward_backward() -> tuple[torch.Tensor, ...]:
        y = function(tensors)
        return (y, *torch.autograd.grad(y, wanted, tensors["dy"]))

    return forward_backward


def outputs(case: Case, function: Function, tensors: Tensors) -> Tensors:
    """Everything the call computes, by name: y, gradients, and the state it updates."""
    own = prepared(case, tensors)
    results = call(case, function, own)()
    named = dict(zip(["y", *("d" + name for name in leaves(case, own))], results))
    return {k: v.detach() for k, v in named.items()} | {k: own[k] for k in STATE if k in own}


def error_of(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest absolute difference, relative to the largest magnitude; infinite where shape or finiteness differ."""
    if got.shape != want.shape:
        return float("inf")
    if want.numel() == 0:
        return 0.0
    difference = (got.to(want.device).double() - want).abs().max().item()
    return difference / max(want.abs().max().item(), 1e-30) if difference == difference else float("inf")


class Oracle:
    """The float64 result of a case on its inputs, and how far from it a provider may be.

    pyops may be off by twice the error that torch makes on the same inputs in the same dtype and layout, plus one
    rounding; a room whose algorithm rounds more says how much in SLACK. Peers get `PEER_SLACK` times that: their
    accuracy is theirs to choose, but garbage is not timed.
    The oracle works where its tensors are, which may be the CPU for a case on the GPU.
    """

    PEER_SLACK = 8

    def __init__(self, room: Room, case: Case, tensors: Tensors):
        self.case = case
        self.tensors = tensors
        self.slack = getattr(room, "SLACK", 1)
        self.function = room.bind(torch.nn.functional, case)
        self.want = outputs(case, self.function, {name: t.double() for name, t in tensors.items()})
        self.torch_errors: dict[bool, dict[str, float]] = {}

    def errors_of_torch(self, channels_last: bool) -> dict[str, float]:
        if channels_last not in self.torch_errors:
            got = outputs(self.case, self.function, in_layout(self.tensors, channels_last))
            self.torch_errors[channels_last] = {name: error_of(got[name], want) for name, want in self.want.items()}
        return self.torch_errors[channels_last]

    def check(self, provider: Provider, function: Function) -> tuple[str, float, float]:
        """What is wrong ("" if nothing), with the error and the limit of the output that is worst against its limit."""
        channels_last = self.case.channels_last or provider.channels_last
        tensors = {name: t.to(self.case.device) for name, t in self.tensors.items()}
        got = outputs(self.case, function, in_layout(tensors, channels_last))
        slack = self.slack if provider.ours else self.PEER_SLACK
        epsilon = torch.finfo(self.case.dtype).eps
        worst = ("", 0.0, 0.0, -1.0)
        for name, torch_error in self.errors_of_torch(channels_last).items():
            error, limit = error_of(got[name], self.want[name]), slack * (2 * torch_error + epsilon)
            if error / limit > worst[3]:
                worst = (name, error, limit, error / limit)
        name, error, limit, quotient = worst
        return (f"{name}: error {error:.2e}, limit {limit:.2e}" if quotient > 1 else ""), error, limit


@dataclasses.dataclass
class Runner:
    """A provider that passed its check and is ready to be timed."""

    row: Row
    provider: Provider
    timed: Callable[[], Any]
    times: list[float] = dataclasses.field(default_factory=list)


def measure_case(
    room: Room, case: Case, *, threads: int, effort: Effort, include: Callable[[str], bool] = lambda name: True
) -> list[Row]:
    """All rows of one case: each provider checked, the right ones timed in turns, ratios filled in."""
    if case.device == "cpu":
        torch.set_num_threads(threads)
    else:
        torch.backends.cudnn.benchmark = True  # torch at its best: cuDNN tries its algorithms before the timing
    tensors = fresh_inputs(room, case)
    oracle = Oracle(room, case, tensors)
    layouts: dict[bool, Tensors] = {}
    rows, ready = [], []
    for name, provider in room.providers(case).items():
        if not include(name):
            continue
        row = empty_row(room, case, threads, name, provider)
        rows.append(row)
        if function := checked(row, case, provider, oracle):
            channels_last = case.channels_last or provider.channels_last
            if channels_last not in layouts:
                layouts[channels_last] = prepared(case, in_layout(tensors, channels_last))
            ready.append(Runner(row, provider, call(case, function, layouts[channels_last])))
    del oracle
    if case.device == "cuda":
        torch.cuda.empty_cache()
        time_on_gpu(ready, effort)
    else:
        time_on_cpu(ready, effort)
    for runner in ready:
        fill_in(runner.row, runner.times)
    fill_in_ratios(rows)
    gc.collect()
    return rows


def empty_row(room: Room, case: Case, threads: int, name: str, provider: Provider) -> Row:
    row = Row(
        stem=room.STEM,
        op=case.op,
        case=case.name,
        shape=list(case.shape),
        dtype=str(case.dtype).removeprefix("torch."),
        device=case.device,
        backward=case.backward,
        threads=threads,
        provider=name,
        ours=provider.ours,
        status=OK,
        bytes=room.bytes(case),
        flops=room.flops(case),
        date=time.strftime("%Y-%m-%d"),
    )
    if provider.ours and (algorithm := getattr(room, "algorithm", None)):
        row.algorithm = algorithm(case, name)
    if case.device == "cuda":
        limits = gpu_limits(device_name("cuda") if torch.cuda.is_available() else "")
        row.limits_of = limits.name
        row.floor_s, row.predicted_s = floor_and_prediction(room, case, limits)
    return row


def floor_and_prediction(room: Room, case: Case, limits: Limits) -> tuple[float, float]:
    """Seconds that no kernel goes below, and seconds that ours should take: its own traffic, and its launches."""
    matrix = getattr(room, "MATRIX", False) and case.dtype.itemsize == 2
    traffic = getattr(room, "traffic", lambda case: (room.bytes(case), 1 + 2 * case.backward))
    moved, launches = traffic(case)
    predicted = limits.floor_s(moved, room.flops(case), matrix) + launches * LAUNCH_S
    return limits.floor_s(room.bytes(case), room.flops(case), matrix), predicted


def checked(row: Row, case: Case, provider: Provider, oracle: Oracle) -> Function | None:
    """Makes the provider and checks it; a wrong, broken or missing one gets its status and no function to time."""
    try:
        function = provider.make()
        with provider.context():
            wrong, row.error, row.error_limit = oracle.check(provider, function)
    except Unavailable as reason:
        row.status, row.note = UNAVAILABLE, str(reason)
    except Exception as error:  # a broken provider is a row of the report, not the end of it
        row.status, row.note = ERROR, f"{type(error).__name__}: {error}".splitlines()[0][:NOTE_LENGTH]
    else:
        if not wrong:
            return function
        row.status, row.note = WRONG, wrong
    return None


def rotated(runners: list[Runner], turn: int) -> list[Runner]:
    """Another order each turn: whoever runs after a large neighbour does not do so always."""
    first = turn % len(runners) if runners else 0
    return runners[first:] + runners[:first]


def time_on_cpu(runners: list[Runner], effort: Effort) -> None:
    memory = torch.zeros(2 * cache_bytes() // 4)
    for turn in range(effort.turns):
        for runner in rotated(runners, turn):
            if sum(runner.times) > ENOUGH_S:
                continue
            with runner.provider.context():
                runner.timed()
                end = time.perf_counter() + effort.seconds
                calls = 0
                while calls < effort.calls or (time.perf_counter() < end and calls < 1000):
                    memory.sum()
                    start = time.perf_counter()
                    runner.timed()
                    runner.times.append(time.perf_counter() - start)
                    calls += 1
                    if sum(runner.times) > ENOUGH_S:
                        break


def time_on_gpu(runners: list[Runner], effort: Effort) -> None:
    from triton.testing import do_bench

    for turn in range(min(effort.turns, 3)):
        for runner in rotated(runners, turn):
            with runner.provider.context():
                milliseconds = do_bench(runner.timed, warmup=10, rep=1000 * effort.seconds, return_mode="all")
            runner.times += [1e-3 * t for t in milliseconds]


def fill_in(row: Row, times: list[float]) -> None:
    row.min_s, row.median_s, row.samples = min(times), statistics.median(times), len(times)
    row.noisy = row.median_s > NOISE * row.min_s
    row.gb_per_s = row.bytes / row.median_s / 1e9
    row.gflop_per_s = row.flops / row.median_s / 1e9


def fill_in_ceilings(rows: list[Row], ceilings: dict[int, Ceilings]) -> None:
    """The share of the ceiling, from the fastest call: what the kernel reaches when nobody disturbs it."""
    for row in rows:
        if row.min_s:
            row.ceiling_s, row.bound = ceilings[row.threads].limit(row.bytes, row.flops)
            row.percent_of_ceiling = 100 * row.ceiling_s / row.min_s


def fill_in_ratios(rows: list[Row]) -> None:
    """How many times faster pyops is than each provider: by medians, and by the fastest calls of each.

    Where pyops has several backends, the one with the lower median counts.
    """
    best = min((row for row in rows if row.ours and row.median_s), key=lambda row: row.median_s or 0, default=None)
    for row in rows:
        if best and best.median_s and best.min_s and row.median_s and row.min_s:
            row.pyops_speedup = row.median_s / best.median_s
            row.pyops_speedup_of_min = row.min_s / best.min_s


def select(room: Room, device: str, quick: bool, ops: set[str] | None = None) -> Iterator[Case]:
    """The room's cases on a device, narrowed to some of its ops and to the quick subset."""
    for case in room.cases(device):
        if (case.quick or not quick) and (ops is None or case.op in ops):
            yield case
