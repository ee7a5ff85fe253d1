"""`--cuda-graphs`: the user says for which batch sizes a decode step is captured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tokenplane_core.backend.hookspecs import hookimpl
from tokenplane_core.backend.records import Capabilities, LoadOptions, ModelSpec
from tokenplane_core.kit.checkpoint import reference_greedy, write_tiny_llama
from tokenplane_core.kit.runner import LocalEngine
from tokenplane_core.model import describe_model
from tokenplane_torch.choice import Candidate
from tokenplane_torch.fixed_kernels import FixedKernels
from tokenplane_torch.testing.graphs import HostGpuBackend, pinned_memory_is_memory

PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [10, 11], [12]]


class Wishing(HostGpuBackend):
    def __init__(self, *graph_rows: int) -> None:
        super().__init__([Candidate("fixed", lambda needs, device: FixedKernels())])
        self.graph_rows = graph_rows

    @hookimpl
    def load(self, model: ModelSpec, options: LoadOptions) -> Capabilities:
        return super().load(model, replace(options, graph_rows=self.graph_rows))


@pytest.mark.parametrize(("wish", "captured"), [((1, 4), [1, 4]), ((2, 500), [2]), ((), []), ((500,), [])])
def test_the_wished_sizes_are_captured_and_no_others(
    wish: tuple[int, ...], captured: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Larger batches than the largest size run uncaptured; the text is the same."""
    pinned_memory_is_memory(monkeypatch)
    write_tiny_llama(tmp_path)
    engine = LocalEngine(lambda: Wishing(*wish), describe_model(tmp_path, dtype="float32"))
    assert [bucket.rows for bucket in engine.capabilities.shapes.buckets] == captured
    assert ("graphs" in engine.capabilities.kernels) is bool(captured)
    assert engine.num_warmed_up == len(captured)
    outcomes = engine.generate(PROMPTS, 6)
    for prompt, outcome in zip(PROMPTS, outcomes, strict=True):
        assert outcome == reference_greedy(tmp_path, prompt, 6)
    assert engine.engine.stats.compiled_shapes == 0
