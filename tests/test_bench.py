"""The benches: wrong kernels are refused, results survive their files, the GPU engine keeps going."""

import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import pyops.bench.harness as harness
import pyops.bench.report as report
import pyops.bench.runner as runner
import pytest
import torch
from pyops.bench import bench_attention, gpu, machine
from pyops.bench.case import Case, Provider, Unavailable
from pyops.bench.machine import Ceilings, ceilings_of, slug

from pyops import functional as F

FAST = harness.Effort(turns=2, seconds=0.0, calls=1)
CEILINGS = {1: Ceilings(2e10, 1e11, 1, "test")}


class ScaledRoom:
    """A room of its own, so that these tests do not depend on any kernel: y = x * weight."""

    STEM = "scaled"
    OPS = ("scaled",)

    def __init__(self, **providers: Provider):
        self.extra = providers

    def cases(self, device: str) -> list[Case]:
        both = [Case("scaled", (4, 8), backward=backward, quick=not backward) for backward in (False, True)]
        return [*both, Case("scaled", (2, 3, 4, 5), quick=True)]

    def tiny(self, device: str) -> list[Case]:
        return self.cases(device)[:1]

    def shapes(self, case: Case) -> dict[str, tuple[int, ...]]:
        return {"weight": case.shape[-1:]}

    def bytes(self, case: Case) -> int:
        return 2 * case.numel * case.dtype.itemsize

    def flops(self, case: Case) -> int:
        return case.numel

    def bind(self, functional: Any, case: Case) -> Any:
        return lambda t: t["x"] * t["weight"]

    def providers(self, case: Case) -> dict[str, Provider]:
        right = lambda: self.bind(None, case)
        return {"pyops": Provider(right, ours=True), "torch": Provider(right), **self.extra}


def rows_of(room: ScaledRoom, case: Case | None = None) -> dict[str, harness.Row]:
    before = torch.get_num_threads()
    try:
        rows = harness.measure_case(room, case or room.cases("cpu")[0], threads=1, effort=FAST)
    finally:
        torch.set_num_threads(before)
    harness.fill_in_ceilings(rows, CEILINGS)
    return {row.provider: row for row in rows}


def unavailable() -> Any:
    raise Unavailable("not on this machine")


def broken() -> Any:
    def call(tensors: harness.Tensors) -> torch.Tensor:
        raise RuntimeError("out of order\nsecond line")

    return call


WRONG_CALLS = {
    "one element in the last place of a row": lambda t: t["x"] * t["weight"] + torch.eye(4, 8) * 1e-5,
    "NaN in one element": lambda t: (t["x"] * t["weight"]).index_fill(1, torch.tensor([7]), float("nan")),
    "another shape": lambda t: (t["x"] * t["weight"])[:-1],
    "nothing but zeros": lambda t: torch.zeros_like(t["x"]),
}


@pytest.mark.parametrize("call", WRONG_CALLS.values(), ids=WRONG_CALLS.keys())
def test_wrong_provider_is_not_timed(call: Any) -> None:
    row = rows_of(ScaledRoom(bad=Provider(lambda: call, ours=True)))["bad"]
    assert row.status == harness.WRONG
    assert row.median_s is None and row.samples == 0 and row.pyops_speedup is None
    assert "y: error" in row.note


def test_wrong_gradient_is_not_timed() -> None:
    def call(t: harness.Tensors) -> torch.Tensor:
        return t["x"] * t["weight"].detach() + (t["weight"] - t["weight"].detach()) * 2

    room = ScaledRoom(bad=Provider(lambda: call, ours=True))
    assert rows_of(room, room.cases("cpu")[1])["bad"].note.startswith("dweight")
    assert rows_of(room)["bad"].status == harness.OK, "its forward is right"


def test_every_provider_gets_its_status() -> None:
    rows = rows_of(ScaledRoom(absent=Provider(unavailable), faulty=Provider(broken)))
    assert (rows["absent"].status, rows["absent"].note) == (harness.UNAVAILABLE, "not on this machine")
    assert (rows["faulty"].status, rows["faulty"].note) == (harness.ERROR, "RuntimeError: out of order")
    good = rows["pyops"]
    assert good.status == harness.OK and good.samples >= FAST.turns
    assert good.min_s and good.median_s and good.min_s <= good.median_s
    assert good.pyops_speedup == 1 and rows["torch"].pyops_speedup
    assert good.percent_of_ceiling == pytest.approx(100 * good.bytes / 2e10 / good.min_s)


def test_a_slow_provider_is_soon_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is timed, and then not called again in every turn."""

    def slow(t: harness.Tensors) -> torch.Tensor:
        time.sleep(0.02)
        return t["x"] * t["weight"]

    monkeypatch.setattr(harness, "ENOUGH_S", 0.01)
    rows = rows_of(ScaledRoom(slow=Provider(lambda: slow)))
    assert rows["slow"].samples == 1 < FAST.turns * FAST.calls and rows["slow"].min_s >= 0.02
    assert rows["pyops"].samples > 1


def test_nms_is_measured_on_all_scenes_and_sizes() -> None:
    """Where plain torch takes minutes, the row says so, and the loop that stands for it does the same."""
    room = runner.rooms()["nms"]
    cases = [case for case in room.cases("cpu") if case.op == "nms"]
    scenes = ("sparse", "clusters", "overlapping")
    assert {(case.shape[0], case.args["boxes"]) for case in cases} == {(10**k, s) for k in (3, 4, 5) for s in scenes}
    for case in cases:
        assert not (case.quick and case.shape[0] > 1000)
        if case.shape[0] == 100_000 and case.args["boxes"] == "sparse":
            assert room.definition(case) is room.scalar
            with pytest.raises(Unavailable, match="minutes"):
                room.providers(case)["torch"].make()
        else:
            assert room.definition(case) is room.plain_torch
        small = dataclasses.replace(case, shape=(200,))
        x = {"x": torch.randn(200)}
        assert torch.equal(room.call(small, room.scalar)(x), room.call(small, room.plain_torch)(x))


@pytest.mark.parametrize(("bad", "code"), [(True, 1), (False, 0)], ids=["ours is wrong", "only a peer is wrong"])
def test_exit_code(bad: bool, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    room = ScaledRoom(bad=Provider(lambda: lambda t: t["x"], ours=bad))
    stub_rooms(monkeypatch, room)
    assert runner.run((), quick=True, progress=False) == code
    printed = capsys.readouterr().out
    assert "WRONG" in printed and "pyops against torch in the same layout" in printed


def stub_rooms(monkeypatch: pytest.MonkeyPatch, room: Any) -> None:
    monkeypatch.setattr(runner, "rooms", lambda: {room.STEM: room})
    monkeypatch.setattr(runner.machine, "ceilings_of", lambda *arguments: CEILINGS)
    monkeypatch.setattr(runner, "thread_counts", lambda device: [1])
    monkeypatch.setattr(runner, "QUICK", FAST)


def test_a_histogram_is_measured_apart_from_its_kinks() -> None:
    room: Any = runner.rooms()["histogram"]
    case = room.cases("cpu")[0]
    low, high = room._RANGE
    halves = (harness.fresh_inputs(room, case)["x"].double() - low) / ((high - low) / case.args["bins"] / 2)
    assert (halves - halves.round()).abs().min() > 0.9e-3
    at_kinks = torch.linspace(low, high, 2 * case.args["bins"] + 1)
    moved = room.apart(case, at_kinks)
    assert ((moved - at_kinks).abs() > 0).all() and ((moved - at_kinks).abs() < 1e-3).all()


def test_a_grid_is_measured_apart_from_its_kinks() -> None:
    room: Any = runner.rooms()["grid_sample"]
    case = room.cases("cpu")[0]
    grid = harness.fresh_inputs(room, case)["grid"]
    assert 0.6 < ((grid.abs() < 1).all(-1)).double().mean() < 0.85  # most points lie in the image
    sizes = torch.tensor([case.shape[3], case.shape[2]])
    assert (((grid.double() + 1) * sizes).frac() * 2).sub(1).abs().sub(1).abs().min() > 1e-3
    at_kinks = ((torch.arange(-3, 120)[:, None] + 1) / sizes - 1).float()
    moved = room.apart(case, at_kinks)
    assert ((moved - at_kinks).abs() > 0).all() and ((moved - at_kinks).abs() < 2e-4).all()


def test_hog_is_measured_where_no_vote_is_rounding_s_choice() -> None:
    room: Any = runner.rooms()["hog"]
    case = room.tiny("cpu")[0]
    votes, clip = torch.zeros(1, 2, 24, 24), torch.zeros(1, 1, 24, 24)
    angle = 2 * math.pi / room.ORIENTATIONS
    votes[0, 1, 5, 8], votes[0, 1, 6, 7] = math.cos(angle), math.sin(angle)  # at (5, 7) between two bins
    votes[0, :, 16, 16] = torch.tensor([1.0, 1 + 2e-7])  # around it channels of one length, but for rounding
    clip[0, 0, 4, 4], clip[0, 0, 20, 20] = 10 * math.sqrt(2 / 23), 10.0  # a / sqrt(2 a² + 2 b²) = 0.2
    where = room.undecided_pixels(votes)[0]
    assert where.nonzero()[:, 2:].tolist() == [[5, 7], [15, 16], [16, 15], [16, 17], [17, 16]]
    assert room.undecided_values(clip).nonzero().tolist() == [[0, 0, 0]]
    fresh = harness.fresh_inputs(room, dataclasses.replace(case, shape=(4, 3, 512, 512)))["x"]
    for moved in (fresh, room.apart(case, votes), room.apart(case, clip)):
        assert not room.undecided_pixels(moved)[0].any() and not room.undecided_values(moved).any()
    assert (room.apart(case, votes) - votes).abs().max() < 0.01 and (room.apart(case, clip) - clip).abs().max() < 0.02


def test_inputs_are_fresh_and_layouts_kept() -> None:
    room = ScaledRoom()
    case = dataclasses.replace(room.cases("cpu")[2], channels_last=True)
    first, second = (harness.fresh_inputs(room, case)["x"] for _ in range(2))
    assert not torch.equal(first, second) and bool((first != 0).all())
    assert first.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("stem", sorted(runner.rooms()))
def test_rooms_state_what_the_harness_needs(stem: str) -> None:
    room = runner.rooms()[stem]
    assert stem == room.STEM and room.OPS
    for device in ("cpu", "cuda"):
        cases = room.cases(device)
        names = [case.name for case in cases]
        assert len(set(names)) == len(names)
        assert any(case.quick for case in cases)
        assert any(case.backward for case in cases) == getattr(room, "DIFFERENTIABLE", True)
        assert {case.device for case in [*cases, *room.tiny(device)]} == {device}
        for case in cases:
            assert room.bytes(case) >= case.numel * case.dtype.itemsize and room.flops(case) >= 0
            assert room.bytes(case) >= room.bytes(dataclasses.replace(case, backward=False))
            assert "torch" in room.providers(case) and len(room.providers(case)) > 1


@pytest.mark.parametrize("stem", sorted(runner.rooms()))
def test_torch_passes_its_own_check(stem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # the same draw each time: by a draw whose output is 0, as of points beside the image, nothing can be told
    monkeypatch.setattr(harness.os, "urandom", lambda count: bytes(range(1, count + 1)))
    room = runner.rooms()[stem]
    for case in room.tiny("cpu"):
        oracle = harness.Oracle(room, case, harness.fresh_inputs(room, case))
        right = room.bind(torch.nn.functional, case)
        assert oracle.want["y"].any()
        assert oracle.check(Provider(unavailable, ours=True), right)[0] == ""
        assert oracle.check(Provider(unavailable, ours=True), lambda t, right=right: right(t) * 1.001)[0]


def test_instance_norm_is_found_in_its_room() -> None:
    [(room, ops)] = runner.chosen(["instance_norm"])
    assert room.STEM == "group_norm"
    assert {case.op for case in harness.select(room, "cpu", False, ops)} == {"instance_norm"}
    with pytest.raises(ValueError, match=r"there are: .*batch_norm, "):
        runner.chosen(["no_such_op"])


@pytest.fixture
def document() -> report.Document:
    rows = rows_of(ScaledRoom(absent=Provider(unavailable), faulty=Provider(broken)))
    return report.document(list(rows.values()), "cpu", True, list(CEILINGS.values()))


def test_json_round_trips(document: report.Document, tmp_path: Path) -> None:
    path = report.write_json(document, tmp_path / "new" / "results.json")
    assert report.read_json(path) == json.loads(json.dumps(document))
    assert {"date", "machine", "versions", "torch_threads", "ceilings", "rows"} <= set(document)
    path.write_text(json.dumps(document | {"schema": -1}))
    with pytest.raises(ValueError, match="schema"):
        report.read_json(path)


def test_rows_of_convolutions_say_which_algorithm_ran() -> None:
    room = runner.rooms()["conv"]
    winograd = next(c for c in room.cases("cpu") if c.shape == (1, 64, 56, 56) and c.op == "conv2d" and c.backward)
    with F.conv_algorithm("winograd4"):
        row = harness.empty_row(room, winograd, 1, "pyops", room.providers(winograd)["pyops"])
    assert row.algorithm == "winograd4, winograd4, gemm"
    assert report.cells(dataclasses.asdict(row) | {"status": "SKIPPED"})[3] == "pyops (winograd4, winograd4, gemm)"
    assert harness.empty_row(room, winograd, 1, "torch", room.providers(winograd)["torch"]).algorithm == ""
    depthwise = runner.rooms()["depthwise_conv"]
    for name in ("conv", "depthwise_conv"):
        room = runner.rooms()[name]
        for case in (*room.cases("cpu"), *room.cases("cuda"), *room.tiny("cpu")):
            for provider, what in room.providers(case).items():
                assert bool(what.ours) == bool(harness.empty_row(room, case, 1, provider, what).algorithm)
    case = depthwise.cases("cpu")[0]
    assert depthwise.algorithm(case, "pyops") == "direct"


def test_rows_of_attention_say_which_kernel_ran() -> None:
    room = runner.rooms()["attention"]
    for case in (*room.cases("cpu"), *room.cases("cuda"), *room.tiny("cpu")):
        for provider, what in room.providers(case).items():
            assert bool(what.ours) == bool(harness.empty_row(room, case, 1, provider, what).algorithm)
    long, few = (next(c for c in room.cases("cpu") if c.shape[2] == n) for n in (1024, 1))
    assert room.algorithm(dataclasses.replace(long, backward=True), "pyops") == "blocks, blocks"
    assert room.algorithm(few, "pyops") == "few queries"
    long, few = (next(c for c in room.cases("cuda") if c.shape[2] == n) for n in (4096, 1))
    assert room.algorithm(dataclasses.replace(long, backward=True), "pyops triton") == "64 x 32, 64 x 16"
    assert "mma" in room.algorithm(long, "pyops cuda") and room.algorithm(few, "pyops cuda") == "parts of the keys"


def test_results_directory_keeps_what_was_not_measured(document: report.Document, tmp_path: Path) -> None:
    old = [row | {"case": "another case"} for row in document["rows"]]
    first = report.write_json(document | {"rows": old}, tmp_path)
    second = report.write_json(document, tmp_path)
    assert first == second == tmp_path / f"{slug(document['machine']['name'])}.json"
    report.write_json(document, tmp_path)
    rows = report.read_json(first)["rows"]
    assert len(rows) == 2 * len(old) and {row["case"] for row in rows} == {"another case", document["rows"][0]["case"]}


def test_page_is_self_contained(document: report.Document, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    written = report.write_all(document, tmp_path)
    assert {path.suffix for path in written} == {".json", ".png", ".html"}
    page = (tmp_path / "bench.html").read_text()
    for outside in ("http:", "https:", "<link", "@import", 'src="/', "src='"):
        assert outside not in page
    assert page.count("data:image/png;base64,") == sum(path.suffix == ".png" for path in written) == 2
    assert "out of order" in page and "not on this machine" in page


def test_ceilings_never_fall_with_more_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = {1: Ceilings(10.0, 10.0, 1, "now"), 2: Ceilings(5.0, 30.0, 2, "now")}
    monkeypatch.setattr("pyops.bench.machine.measured_ceilings", lambda device, threads: slow[threads])
    found = ceilings_of("cpu", [1, 2], {1: Ceilings(12.0, 8.0, 1, "before")})
    assert (found[1].copy_bandwidth, found[1].fma_rate) == (12, 10)
    assert (found[2].copy_bandwidth, found[2].fma_rate) == (12, 30)
    assert found[2].limit(24, 30) == (2.0, "memory") and found[1].limit(12, 100) == (10.0, "arithmetic")


def test_gpu_engine_ends_with_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "why_no_gpu", lambda: "nvidia-smi is not on PATH")
    assert gpu.main(["--part", "build,bench", "--op", "layer_norm"]) == 1
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[-1] == "no NVIDIA GPU is visible: nvidia-smi is not on PATH"
    assert "memcheck" not in "".join(lines) and any("bench layer_norm" in line for line in lines)
    assert gpu.main(["--part", "paint"]) == 2


def test_gpu_engine_installs_carried_wheels_and_keeps_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "bench" / "results").mkdir(parents=True)
    (root / "bench" / "results" / "card.json").write_text("{}")
    ran: list[str] = []
    monkeypatch.setattr(gpu, "ROOT", root)
    monkeypatch.setattr(gpu, "WHEELS", root / "wheels")
    monkeypatch.setattr(gpu, "PREBUILT", root / "prebuilt")
    monkeypatch.setattr(gpu, "why_no_gpu", lambda: "")
    monkeypatch.setattr(gpu, "architecture", lambda: "9.0a")
    done = lambda step: ran.append(step.name) or gpu.Outcome(step, gpu.OK, 0.0)
    monkeypatch.setattr(gpu, "run_plan", lambda steps, *rest: [done(step) for step in steps])
    assert gpu.main(["--part", "build,conformance", "--out", str(tmp_path / "out")]) == 0
    assert ran == ["build for sm_90a", "import", "golden outputs for the emulator"]
    assert (tmp_path / "out" / "bench" / "results" / "card.json").exists()
    (root / "wheels").mkdir()
    (root / "wheels" / "cmake.whl").write_text("")
    gpu.main(["--part", "build", "--out", str(tmp_path / "out")])
    assert ran[3:] == ["wheels", "wheels of peers", "build for sm_90a", "import"]


def test_gpu_engine_takes_prebuilt_libraries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for folder in ("prebuilt", "pyops"):
        (tmp_path / folder).mkdir()
    (tmp_path / "prebuilt" / "libpyops.so").write_text("a library")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "WHEELS", tmp_path / "wheels")
    monkeypatch.setattr(gpu, "PREBUILT", tmp_path / "prebuilt")
    steps = gpu.plan(["build"], [], "9.0a", tmp_path)
    assert [step.name for step in steps] == ["take prebuilt libraries", "import"]
    (taken,) = gpu.run_plan(steps[:1], tmp_path / "out")
    assert taken.status == gpu.OK and (tmp_path / "pyops" / "libpyops.so").read_text() == "a library"


@pytest.mark.parametrize("stem", sorted(runner.rooms()))
def test_no_prediction_is_below_its_floor(stem: str, capsys: pytest.CaptureFixture[str]) -> None:
    room = runner.rooms()[stem]
    for limits in machine.GPU_LIMITS:
        for case in room.cases("cuda"):
            floor, predicted = harness.floor_and_prediction(room, case, limits)
            assert 0 < floor < predicted
            assert floor >= room.bytes(case) / limits.bandwidth
    assert runner.print_floors([stem]) == 0
    printed = capsys.readouterr().out
    assert all(case.name in printed for case in room.cases("cuda"))


def test_rows_of_gpu_cases_carry_their_floor() -> None:
    case = dataclasses.replace(ScaledRoom().cases("cpu")[0], device="cuda")
    row = harness.empty_row(ScaledRoom(), case, 0, "pyops cuda", Provider(unavailable, ours=True))
    assert row.limits_of == machine.gpu_limits("").name == "H200"
    assert row.floor_s and row.predicted_s and row.floor_s < row.predicted_s
    on_cpu = harness.empty_row(ScaledRoom(), ScaledRoom().cases("cpu")[0], 1, "pyops", Provider(unavailable))
    assert on_cpu.floor_s is None


def python(code: str, name: str, part: str = "test", **fields: Any) -> gpu.Step:
    return gpu.Step(part, name, [sys.executable, "-c", code], **fields)


def test_gpu_engine_goes_on_after_failure_and_hang(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = [
        python("print('first words'); raise SystemExit(3)", "fails", "build"),
        python("import time; time.sleep(60)", "hangs"),
        python("", "needs a tool", why_not="the tool is not on PATH"),
        gpu.Step("bench", "no such program", [str(tmp_path / "absent")]),
        python("print('last words')", "works", "bench"),
    ]
    started = time.monotonic()
    outcomes = gpu.run_plan(steps, tmp_path, total_s=6)
    assert time.monotonic() - started < 10
    assert [o.status for o in outcomes] == [gpu.FAILED, gpu.TIMEOUT, gpu.SKIPPED, gpu.FAILED, gpu.OK]
    printed = capsys.readouterr().out
    assert "first words" in printed and "last words" in printed and "the tool is not on PATH" in printed
    assert len(gpu.report(outcomes).splitlines()) == len(steps)
    assert "exit status 3" in gpu.report(outcomes)


def test_gpu_engine_hands_unused_time_on(tmp_path: Path) -> None:
    limits = []

    def quick(step: gpu.Step, limit_s: float, log: Path) -> gpu.Outcome:
        limits.append(limit_s)
        return gpu.Outcome(step, gpu.OK, 0.0)

    parts = list(gpu.PARTS)
    steps = gpu.plan(parts, ["layer_norm"], "9.0a", tmp_path)
    assert [step.part for step in steps] == sorted((step.part for step in steps), key=parts.index)
    for step in steps:
        step.why_not = ""
    gpu.run_plan(steps, tmp_path, total_s=100, execute=quick)
    assert limits[-1] > 99 and 0 < limits[0] < 50


TUTORIAL = """
import torch

def attention(q, k, v, causal, sm_scale, warp_specialize=True):
    if q.dtype == torch.float64:
        raise AssertionError("only half")
    scale = sm_scale if q.dtype == torch.float16 else 2 * sm_scale
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)

if __name__ == "__main__":
    raise SystemExit("measures")
"""


def test_the_triton_tutorial_is_read_from_the_file_that_the_user_names(monkeypatch, tmp_path):
    case = bench_attention.attention((1, 2, 128, 16), True, dtype=torch.float16, backward=True)
    t = {name: torch.randn(1, 2, 128, 16, dtype=torch.float16) for name in ("x", "key", "value")}
    monkeypatch.delenv("PYOPS_TRITON_TUTORIAL", raising=False)
    with pytest.raises(Unavailable, match="PYOPS_TRITON_TUTORIAL does not name"):
        bench_attention.triton_tutorial(case)
    monkeypatch.setenv("PYOPS_TRITON_TUTORIAL", str(tmp_path / "missing.py"))
    with pytest.raises(Unavailable, match=r"missing\.py: FileNotFoundError"):
        bench_attention.triton_tutorial(case)
    path = tmp_path / "06-fused-attention.py"
    path.write_text(TUTORIAL)
    monkeypatch.setenv("PYOPS_TRITON_TUTORIAL", str(path))
    y = bench_attention.triton_tutorial(case)(t)
    torch.testing.assert_close(y, bench_attention.bind(torch.nn.functional, case)(t))
    for change, reason in (
        ({"dtype": torch.bfloat16}, "wrong in torch.bfloat16"),
        ({"dtype": torch.float64}, "AssertionError: only half"),
        ({"args": {"causal": False, "kv_heads": 1}}, "as many keys and key heads"),
        ({"shape": (1, 2, 100, 16)}, "in 128s"),
    ):
        with pytest.raises(Unavailable, match=reason):
            bench_attention.triton_tutorial(dataclasses.replace(case, **change))


def test_the_triton_tutorial_is_a_peer_on_a_gpu():
    case = bench_attention.cases("cuda")[0]
    assert "triton tutorial" in bench_attention.providers(case)
