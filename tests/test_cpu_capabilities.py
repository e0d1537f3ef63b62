import os
import subprocess
import sys

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
