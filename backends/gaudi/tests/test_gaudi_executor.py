"""Graphs: what is captured in warm-up is all that ever runs, each step is one copy and one replay."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from habana_stand_in import Refused, Runtime, StandInBackend, open_bridge

from tokenplane_core.backend.records import ModelSpec
from tokenplane_core.kit.laws import Subject
from tokenplane_core.kit.runner import LocalEngine
from tokenplane_core.messages import SamplingParams
from tokenplane_gaudi.bridge import Bridge
from tokenplane_gaudi.executor import NOWHERE, flat_blocks
from tokenplane_torch.padded import PaddedStep, StepShape


@pytest.fixture
def runtime() -> Runtime:
    return Runtime()


@pytest.fixture
def bridge(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> Bridge:
    return open_bridge(monkeypatch, runtime, {})


def serve(model: ModelSpec, runtime: Runtime) -> tuple[LocalEngine, Subject]:
    """With every kind of bucket that a card has for such a model: several rows of several blocks among them."""
    subject = Subject("gaudi", lambda: StandInBackend(runtime), model)
    return subject.engine(max_step_tokens=2048), subject


def test_the_flat_list_names_every_block_up_to_the_new_token() -> None:
    tables = np.array([[7, 3, 0], [9, 0, 0], [5, 6, 8], [0, 0, 0]], np.int32)
    context = np.array([128, 127, 130, 0], np.int32)  # the first row's new token begins its second block
    step = PaddedStep(StepShape("decode", 4, 4, 1, 3, 7), {"tables": tables, "context_lens": context})
    flat = flat_blocks(step)
    assert flat["flat_blocks"].tolist() == [7, 3, 9, 5, 6, 0, 0]  # 8 is not needed yet
    assert flat["flat_rows"].tolist() == [0, 0, 1, 2, 2, 0, 0]
    assert flat["flat_starts"].tolist() == [0, 128, 0, 0, 128, NOWHERE, NOWHERE]
    assert {array.dtype for array in flat.values()} == {np.dtype(np.int32)}


def test_a_prefill_has_no_flat_list() -> None:
    assert flat_blocks(PaddedStep(StepShape("prefill", 1, 128, 128, 2, 2), {})) == {}


def test_nothing_compiles_after_warm_up(model: ModelSpec) -> None:
    """Neither graphs nor what is computed between them, over prompts of all lengths, prefix hits, drawn and greedy."""
    runtime = Runtime()
    with runtime.lazy:
        engine, subject = serve(model, runtime)
        try:
            assert engine.num_warmed_up == 26 and runtime.serving
            prompts = [*subject.prompts(9), [i % 200 for i in range(300)], [i % 200 for i in range(200)]]
            for sampling in (None, SamplingParams(temperature=0.9, top_p=0.8, seed=4), SamplingParams(num_logprobs=2)):
                for _ in range(2):
                    engine.generate(prompts, 4, sampling)
            assert engine.engine.stats.compiled_shapes == 0
            assert runtime.late_recipes == []
        finally:
            engine.close()


def test_a_step_is_one_replay(model: ModelSpec) -> None:
    runtime = Runtime()
    engine, _ = serve(model, runtime)
    before = runtime.replays
    engine.generate([[1, 2, 3]], 6)
    assert runtime.replays - before == 6
    engine.close()


def test_fresh_prompts_go_without_a_mask_and_others_with_one(model: ModelSpec) -> None:
    """Seen in what warm-up captured: three layers for each graph."""
    runtime = Runtime()
    engine, _ = serve(model, runtime)
    prefill = [bucket for bucket in engine.capabilities.shapes.buckets if bucket.phase == "prefill"]
    captured = runtime.sdpa_calls[-3 * (len(prefill) + 6) :]
    assert captured.count("mask") == 3 * len(prefill) and captured.count("causal") == 3 * 6
    engine.close()


# --- What the stand-in refuses, so that the laws over it mean something ---------------------------------------


def test_a_replay_sees_new_inputs_at_old_addresses_and_nothing_else(bridge: Bridge) -> None:
    given, factor = torch.ones(3), [2.0]
    graph = bridge.capture(lambda: given * factor[0] + 1)
    given.copy_(torch.tensor([1.0, 2.0, 3.0]))
    factor[0] = 5.0
    assert graph.replay().tolist() == [3.0, 5.0, 7.0]


@pytest.mark.parametrize(
    "run",
    [
        lambda bridge, outside: outside * float(outside.sum()),
        lambda bridge, outside: outside[outside > 0],
        lambda bridge, outside: outside.nonzero(),
        lambda bridge, outside: outside.view(2, 2).index_fill_(0, torch.tensor([0]), 1.0),
        lambda bridge, outside: outside.double(),
        lambda bridge, outside: bridge.upload(np.zeros(4, np.int32)),
        lambda bridge, outside: bridge.capture(lambda: outside),
    ],
    ids=["reads a value", "shape by a mask", "shape by values", "updates a view", "float64", "uploads", "captures"],
)
def test_what_a_graph_cannot_hold_is_refused(run, bridge: Bridge) -> None:  # type: ignore[no-untyped-def]
    outside = torch.ones(4)
    with pytest.raises(Refused):
        bridge.capture(lambda: run(bridge, outside))


def test_a_capture_after_warm_up_is_refused(runtime: Runtime, bridge: Bridge) -> None:
    runtime.serving = True
    with pytest.raises(Refused, match="after warm-up"):
        bridge.capture(lambda: torch.ones(1))


def test_a_late_recipe_is_noticed(runtime: Runtime, bridge: Bridge) -> None:
    with runtime.lazy:
        _ = torch.ones(3) + torch.ones(3)
        bridge.launch()
        runtime.serving = True
        _ = torch.ones(3) + torch.ones(3)
        bridge.launch()
        assert runtime.late_recipes == []
        _ = torch.ones(4) + torch.ones(4)
        bridge.launch()
    assert len(runtime.late_recipes) == 1
