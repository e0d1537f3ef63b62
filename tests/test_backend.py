"""The choice of a backend: remembered per device, forgotten when another is forced, no obstacle to torch.compile."""

import pytest
import torch

from pyops import functional as F
from pyops.core import backend as backends

X = torch.randn(3, 4)


def test_a_forced_backend_ends_with_its_block():
    before = backends.namespace_for("layer_norm", X)
    with backends.backend("emulator"):
        assert backends.namespace_for("layer_norm", X) == "pyops_emulator"
        with backends.backend("cpu"):
            assert backends.namespace_for("layer_norm", X) == "pyops"
        assert backends.namespace_for("layer_norm", X) == "pyops_emulator"
    assert backends.namespace_for("layer_norm", X) == before


def test_a_refused_backend_changes_nothing():
    with pytest.raises(ValueError, match="'gpu'"):
        backends.backend("gpu")
    assert backends.forced() is None and backends.namespace_for("layer_norm", X) == "pyops"


def test_the_first_choice_may_be_made_while_compiling():
    backends._chosen.clear()
    compiled = torch.compile(lambda x: F.layer_norm(x, (4,)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), torch.nn.functional.layer_norm(X, (4,)))
    with backends.backend("emulator"):
        torch.testing.assert_close(compiled(X), torch.nn.functional.layer_norm(X, (4,)))


def test_compiled_once_for_a_backend():
    graphs = []
    count = lambda graph, _: graphs.append(graph) or graph.forward
    torch._dynamo.reset()
    with backends.backend(None):
        compiled = torch.compile(lambda x: F.layer_norm(x, (4,)), fullgraph=True, backend=count)
        compiled(X)
        compiled(X)
        assert len(graphs) == 1
        with backends.backend("emulator"):
            compiled(X)
        assert ["pyops_emulator" in graph.code for graph in graphs] == [False, True]


def test_a_compiled_call_says_why_nothing_can_run(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(backends, "_problem", "PYOPS_BACKEND: got 'gpu'")
    backends._chosen.clear()
    with pytest.raises(RuntimeError, match=r"^layer_norm: PYOPS_BACKEND: got 'gpu'$"):
        torch.compile(lambda x: F.layer_norm(x, (4,)), backend="aot_eager")(X)
