import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyops.core import library

_IN_A_FRESH_PROCESS = """
import sys, torch
from pyops.core import library, samples
from pyops import functional, testing, vision
torch.set_num_threads(1)
values = {}
for op, room in samples.all_checked().items():
    for sample in room.samples:
        for dtype in (torch.float32, torch.bfloat16):
            results = testing._run(room.function, testing._Case(room, "cpu", (dtype,), False), sample, dtype)
            values[f"{op}, {sample.name}, {dtype}"] = {k: v.detach() for k, v in results.items()}
torch.save((library.cpu_capability(), values), sys.argv[1])
"""


def test_the_kernels_of_every_instruction_set_agree(tmp_path):
    """On the samples of every op, with its gradients; one process for each instruction set that this CPU runs."""
    names = library.cpu_capabilities()
    if len(names) == 1:
        pytest.skip(f"this build has {names[0]} alone: `make capabilities` builds and compares all")
    results = []
    for name in names:
        path = tmp_path / f"{name}.pt"
        environment = {**os.environ, "PYOPS_CPU_CAPABILITY": name, "PYOPS_BACKEND": "cpu"}
        arguments = [sys.executable, "-c", _IN_A_FRESH_PROCESS, str(path)]
        subprocess.run(arguments, env=environment, check=True, timeout=600)
        active, values = torch.load(path)
        assert active == name
        results.append(values)
    for name, values in zip(names[1:], results[1:]):
        for case, expected in results[0].items():
            for what, want in expected.items():
                got = values[case][what]
                epsilon = torch.finfo(want.dtype).eps if want.is_floating_point() else 0.0
                scale = max(1.0, want.double().abs().nan_to_num().max().item()) if want.numel() else 1.0
                torch.testing.assert_close(
                    got, want, rtol=0, atol=16 * epsilon * scale, equal_nan=True,
                    msg=lambda text, name=name, case=case, what=what: f"{name} and {names[0]}: {case}, {what}: {text}",
                )  # fmt: skip


def test_the_widest_instruction_set_of_the_machine_is_active():
    """An editable install compiles it alone, a wheel all; either way it is what runs."""
    listing = Path("/proc/cpuinfo")
    flags = set(listing.read_text().partition("flags")[2].partition("\n")[0].split()) if listing.exists() else set()
    if not flags or "PYOPS_CPU_CAPABILITY" in os.environ:
        pytest.skip("this machine does not list what its CPU runs, or another instruction set was asked for")
    needed = {
        "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma", "f16c"},
        "avx2": {"avx2", "fma", "f16c"},
    }
    widest = next((name for name, wanted in needed.items() if wanted <= flags), "baseline")
    assert library.cpu_capability() == widest
