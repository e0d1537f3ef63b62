"""The emulator: every primitive right in every schedule, and every detector proven by a planted bug."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

from tests import emulator_library as emulator

SCHEDULES = ("forward", "reverse", "random:7", "deep", "deep-reverse")


@pytest.fixture(scope="session")
def library():
    if not emulator.cuda_include_dirs():
        pytest.skip("no CUDA headers: a toolkit, or requirements/emulator.txt")
    return emulator.Library(emulator.build())


def configured(library, **settings):
    library.configure(schedule="forward", silence="", threads=1, poison=1, capability=90, **settings)
    return library


@pytest.fixture
def plain(library):
    return configured(library, race=0)


@pytest.fixture
def race(library):
    return configured(library, race=1)


def passing(library):
    return [n for n in library.names() if not n.startswith(("bug_", "conformance_"))]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_primitives_plain(plain, schedule):
    plain.configure(schedule=schedule)
    assert {n: r for n in passing(plain) if (r := plain.run(n))} == {}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_primitives_race(race, schedule):
    race.configure(schedule=schedule)
    assert {n: r for n in passing(race) if (r := race.run(n))} == {}


def test_every_primitive_is_there(plain):
    assert len(passing(plain)) >= 35


def test_host_threads(plain):
    plain.configure(threads=3)
    assert {n: r for n in passing(plain) if (r := plain.run(n))} == {}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cluster_shared_memory", "clusters need sm_90"),
        ("mbarrier_ring", "mbarrier_init needs sm_90"),
        ("stmatrix", "stmatrix needs sm_90"),
        ("wgmma_columns", "needs sm_90"),
    ],
)
def test_an_older_device_refuses_what_it_lacks(plain, name, message):
    plain.configure(capability=80)
    assert message in plain.run(name)
    plain.configure(capability=90)
    assert plain.run(name) == ""


def test_a_newer_device_has_no_wgmma(plain):
    plain.configure(capability=100)
    assert "wgmma needs sm_90a" in plain.run("wgmma_columns")


@pytest.mark.parametrize("capability", [80, 86, 90, 120])
def test_shared_memory_of_each_device(plain, capability):
    plain.configure(capability=capability)
    assert plain.run("device_questions", capability) == ""


# bug: (what the message says, the detector that says it). None: part of the primitive's own definition, never silent
# (a misaligned vector load would fault in the CPU itself).
BUGS = {
    "missing_barrier": (r"uninitialised shared memory|data race .* on shared memory", "uninitialised,race"),
    "missing_barrier_after_returned_struct": (r"uninitialised shared memory|data race .* shared", "uninitialised,race"),
    "shared_race": (r"data race .* on shared memory", "race"),
    "missing_syncwarp": (r"uninitialised shared memory|data race .* on shared memory", "uninitialised,race"),
    "uninitialised_shared": (r"read of uninitialised shared memory \+160", "uninitialised"),
    "read_past_end": (r"read outside every tensor \(0 bytes past the end of in\)", "bounds"),
    "write_past_end": (r"write outside every tensor .* past the end of out", "bounds"),
    "write_to_input": (r"write to the input in \+\d+", "read_only"),
    "two_blocks_one_address": (r"data race \(write after write\) on out \+0 .* another block", "race"),
    "read_of_other_block": (r"data race .* another block", "race"),
    "plain_add_against_atomic": (r"data race .* on out \+0", "race"),
    "missing_threadfence": (r"data race .* another block", "race"),
    "shuffle_mask": (r"__shfl_xor_sync .* names a lane that has exited", "warp"),
    "lane_outside_mask": (r"__shfl_down_sync .* not in its own mask", None),
    "exited_lane": (r"names a lane that has exited", "warp"),
    "divergent_barrier": (r"__syncthreads .* divergent", "barrier"),
    "return_before_barrier": (r"__syncthreads .* exited", "barrier"),
    "missing_cp_async_wait": (r"while an asynchronous copy to it has not been waited for", "async_wait"),
    "missing_cp_async_barrier": (r"uninitialised shared memory|data race .* on shared memory", "uninitialised,race"),
    "cp_async_never_waited": (r"cp.async still outstanding", "async_wait"),
    "misaligned_vector_load": (r"misaligned access .* needs a multiple of 16", None),
    "misaligned_word": (r"misaligned access .* needs a multiple of 4", "alignment"),
    "index_past_member_array": (r"index 64 is outside an array of type 'float \[64\]'", "bounds"),
    "shared_overrun": (r"write past the end of shared memory", "bounds,shared_overrun"),
    "launch_with_too_little_shared_memory": (r"shared_storage .* needs 16384 bytes", None),
    "local_memory_of_other_thread": (r"read of another thread's local memory", "bounds"),
    "endless_spin": (r"livelock", None),
    "missing_mbarrier_wait": (r"uninitialised|asynchronous copy .* not been waited", "uninitialised,async_wait,race"),
    "missing_empty_wait": (r"more arrivals than the barrier counts", None),
    "mbarrier_used_before_its_barrier": (r"data race .* by mbarrier|mbarrier is not initialised", None),
    "too_many_arrivals": (r"more arrivals than the barrier counts", None),
    "wrong_expected_bytes": (r"deadlock: .* wait in mbarrier_wait", None),
    "missing_proxy_fence": (r"missing proxy fence on shared memory", "proxy_fence"),
    "missing_store_wait": (r"data race \(write after read\) .* asynchronous operation", "race"),
    "missing_cluster_sync": (r"uninitialised shared memory|data race .* on shared memory", "uninitialised,race"),
    "exit_while_cluster_reads": (r"exit.* shared memory|shared memory of a block that has exited", "race"),
    "missing_wgmma_wait": (r"data race \(write after read\) .* asynchronous operation", "race"),
    "missing_wgmma_fence": (r"wgmma without wgmma_fence", None),
    "wgmma_never_waited": (r"wgmma still outstanding", "async_wait"),
    "too_many_registers": (r"setmaxnreg waits for ever: 512 registers of 504", None),
    "misaligned_tma_tile": (r"TMA load .* misaligned shared address", None),
    "unaligned_tma_coordinate": (r"TMA load .* innermost coordinate must be a multiple of 16 bytes", None),
}


def test_every_bug_is_listed(race):
    assert sorted(n.removeprefix("bug_") for n in race.names() if n.startswith("bug_")) == sorted(BUGS)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug(race, bug, schedule):
    race.configure(schedule=schedule)
    message, detector = BUGS[bug]
    assert race.run(f"bug_{bug}", 0) == "", "the correct variant must pass"
    found = race.run(f"bug_{bug}", 1)
    assert re.search(message, found, re.DOTALL), found
    if detector is not None:
        race.configure(silence=detector)
        assert not re.search(message, race.run(f"bug_{bug}", 1), re.DOTALL), "found without its detector?"


def test_messages_name_file_line_block_and_thread(race):
    for bug in ("shared_race", "read_past_end", "missing_proxy_fence", "misaligned_vector_load", "shuffle_mask"):
        found = race.run(f"bug_{bug}", 1)
        assert re.search(r"bugs(_hopper)?\.cu:\d+.*block \(0,0,0\) thread \(\d+,0,0\)", found), found


def test_plain_mode_finds_misuse(plain):
    bugs = ["shuffle_mask", "divergent_barrier", "cp_async_never_waited", "missing_wgmma_fence", "shared_overrun"]
    for bug in [*bugs, "misaligned_vector_load", "misaligned_word"]:
        assert re.search(BUGS[bug][0], plain.run(f"bug_{bug}", 1)), bug


def test_statistics_and_configuration(plain):
    plain.configure(statistics="reset")
    assert plain.run("mma_bf16_ldmatrix") == ""
    assert (plain.statistic("launches"), plain.statistic("mma"), plain.statistic("ldmatrix")) == (1, 2, 4)
    assert plain.statistic("no such counter") == 2**64 - 1
    with pytest.raises(ValueError):
        plain.configure(schedule="sideways")


@pytest.fixture
def h100(plain):
    plain.configure(multiprocessors=132)
    yield plain
    plain.configure(multiprocessors=2, one_mapping=1)


def test_a_grid_of_132_multiprocessors(h100):
    assert h100.run("grid_barrier", 1) == ""


def test_stacks_in_mappings_of_their_own(h100):
    """As before Linux 6.13: right where they are few, and too many are refused by the name of the limit."""
    h100.configure(one_mapping=0)
    assert h100.run("grid_barrier") == ""
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    found = h100.run("grid_barrier", 1)
    assert (
        (found == "") if limit > 100_000 else re.search(rf"33792 threads .*67584 .*vm.max_map_count.* {limit}", found)
    )
    assert h100.run("grid_barrier") == ""


def test_a_stack_that_overflows_ends_the_process(library):
    """By its guard page, in both ways of making one; elsewhere it would write into the next thread's stack."""
    for one_mapping in (1, 0):
        done = subprocess.run(
            [sys.executable, "-c", OVERFLOW_SCRIPT, str(emulator.build()), str(one_mapping)],
            capture_output=True,
            cwd=emulator.ROOT,
        )
        assert done.returncode == -signal.SIGSEGV, done


OVERFLOW_SCRIPT = """
import sys
from tests import emulator_library as emulator
library = emulator.Library(sys.argv[1])
library.configure(one_mapping=sys.argv[2])
library.run("stack_depth", 1)
"""


ASAN_SCRIPT = """
import sys
from tests import emulator_library as emulator
library = emulator.Library(sys.argv[1])
library.configure(schedule=sys.argv[2])
names = sys.argv[4:] or [n for n in library.names() if not n.startswith(("bug_", "conformance_"))]
print({n: r for n in names if (r := library.run(n, int(sys.argv[3])))})
"""


def under_asan(schedule: str, variant: int, *names: str) -> subprocess.CompletedProcess:
    """Tests of the AddressSanitizer build, in a process of their own: a finding ends it."""
    library = emulator.build(asan=True)
    runtime = [
        subprocess.run(["c++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment = os.environ | {"LD_PRELOAD": " ".join(runtime), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-c", ASAN_SCRIPT, str(library), schedule, str(variant), *names]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=emulator.ROOT)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["forward", "deep-reverse"])
def test_primitives_under_address_sanitizer(schedule):
    done = under_asan(schedule, 0)
    assert (done.returncode, done.stdout.strip()) == (0, "{}"), done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bug", "words"),
    [
        ("read_past_end", ["heap-buffer-overflow", "READ of size 4", "bugs.cu"]),
        ("write_past_end", ["heap-buffer-overflow", "WRITE of size 4", "bugs.cu"]),
        ("shared_overrun", ["use-after-poison", "WRITE of size 4", "bugs.cu"]),
    ],
)
def test_address_sanitizer_finds(bug, words):
    """Past a tensor, and past the shared memory of a block."""
    fine = under_asan("forward", 0, f"bug_{bug}")
    assert (fine.returncode, fine.stdout.strip()) == (0, "{}"), fine.stderr[-3000:]
    found = under_asan("forward", 1, f"bug_{bug}")
    assert found.returncode != 0
    assert all(word in found.stderr for word in words), found.stderr[-3000:]


def conformance_names():
    names = (re.findall(r"PYOPS_TEST\((conformance_\w+)\)", p.read_text()) for p in emulator.SOURCES.glob("conf*.cu"))
    return sorted(n for group in names for n in group)


@pytest.mark.parametrize("name", conformance_names())
def test_conformance_with_a_gpu(plain, name):
    """Layouts bit for bit; products within the rounding of their 16 terms."""
    assert plain.run(name) == ""
    ours = plain.recorded()
    assert len(ours) > 0
    golden = emulator.GOLDEN / f"{name}.bin"
    if not golden.exists():
        pytest.skip("no GPU has recorded golden outputs yet: the layouts are checked against their documentation only")
    if name.startswith("conformance_exact_"):
        assert ours == golden.read_bytes()
    else:
        got, want = (numpy.frombuffer(b, numpy.float32) for b in (ours, golden.read_bytes()))
        numpy.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_vocabulary_compiles_for_gpus(architecture, tmp_path):
    """What the emulator runs is also CUDA: nvcc accepts every test kernel."""
    nvcc = emulator.program("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    for source in sorted(emulator.SOURCES.glob("*.cu")):
        if architecture == "sm_80" and source.name in emulator.HOPPER_ONLY:
            continue
        command = [
            nvcc,
            "-std=c++20",
            f"-arch={architecture}",
            "-cubin",
            "-I",
            str(emulator.ROOT / "csrc"),
            str(source),
        ]
        done = subprocess.run([*command, "-o", str(tmp_path / "out.cubin")], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
