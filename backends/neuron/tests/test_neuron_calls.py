"""Buckets, padding and the conversion of batches: the very tensors that reach the vendor's model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from neuron_stand_in import Bench, StandInBackend

import tokenplane_neuron.plugin
from tokenplane_core.backend.records import I32, LoadOptions, ModelSpec, PrefillBatch
from tokenplane_core.kit.checkpoint import reference_greedy
from tokenplane_core.kit.runner import LocalEngine
from tokenplane_neuron import calls
from tokenplane_neuron.calls import Graphs, context_buckets


@pytest.mark.parametrize(
    ("longest", "buckets"),
    [
        (1, (1,)),
        (100, (100,)),
        (128, (128,)),
        (129, (128, 129)),
        (512, (128, 256, 512)),
        (4096, (128, 256, 512, 1024, 2048, 4096)),
        (5000, (128, 256, 512, 1024, 2048, 4096, 5000)),
    ],
)
def test_context_buckets_double_up_to_the_longest_sequence(longest: int, buckets: tuple[int, ...]) -> None:
    assert context_buckets(longest) == buckets


def test_a_prompt_takes_the_smallest_graph_that_holds_it(
    bench: Bench, plugin: StandInBackend, model: ModelSpec
) -> None:
    engine = LocalEngine(lambda: plugin, model)
    for length, width in ((2, 128), (128, 128), (129, 256), (256, 256), (257, 512), (511, 512)):
        bench.calls.clear()
        engine.generate([[7] * length], 1)
        (ids, positions, lines, sampling) = bench.calls[0]
        assert ids.shape == positions.shape == (1, width)
        assert ids[0].tolist() == [7] * length + [0] * (width - length)
        assert positions[0].tolist() == [*range(length), *[0] * (width - length)]
        assert sampling.tolist() == [[1.0, 1.0, 1.0]]
        assert (ids.dtype, positions.dtype, lines.dtype) == (torch.int64,) * 3
    assert engine.engine.stats.compiled_shapes == 0


def test_decoding_gives_every_line_its_row_and_idle_lines_a_cell_that_is_never_read(
    bench: Bench, plugin: StandInBackend, model: ModelSpec
) -> None:
    engine = LocalEngine(lambda: plugin, model)
    bench.calls.clear()
    engine.generate([[1, 2, 3], [4, 5]], 2)
    *prompts, (ids, positions, lines, sampling) = bench.calls
    assert [(int(call[2]), call[0][0, :3].tolist()) for call in prompts] == [(0, [1, 2, 3]), (1, [4, 5, 0])]
    assert lines.tolist() == list(range(8))
    assert positions[:, 0].tolist() == [3, 2] + [511] * 6
    assert ids.shape == (8, 1) and ids[2:].eq(0).all()
    assert sampling.tolist() == [[1.0, 1.0, 1.0]] * 8


def test_a_prompt_of_one_token_is_decoded_at_position_0(bench: Bench, plugin: StandInBackend, model: ModelSpec) -> None:
    engine = LocalEngine(lambda: plugin, model)
    bench.calls.clear()
    engine.generate([[9]], 1)
    ((ids, positions, lines, _),) = bench.calls
    assert (ids[:, 0].tolist(), positions[:, 0].tolist()) == ([9] + [0] * 7, [0] + [511] * 7)
    assert lines.tolist() == list(range(8))


def test_warmup_runs_every_graph_once_and_disturbs_nobody(
    bench: Bench, plugin: StandInBackend, model: ModelSpec
) -> None:
    facts = plugin.load(model, LoadOptions(max_sequences=3))
    assert plugin.warmup() == len(facts.shapes.buckets) == 4
    assert [tuple(call[0].shape) for call in bench.calls] == [(1, 128), (1, 256), (1, 512), (3, 1)]


@pytest.mark.parametrize(("wish", "rows"), [(None, 8), (0, 1), (3, 3), (10**6, 128)])
def test_the_wish_for_sequences_is_what_gets_compiled(
    plugin: StandInBackend, model: ModelSpec, wish: int | None, rows: int
) -> None:
    facts = plugin.load(replace(model, max_model_tokens=64), LoadOptions(max_sequences=wish))
    decode = [bucket for bucket in facts.shapes.buckets if bucket.phase == "decode"]
    assert [(bucket.rows, bucket.tokens) for bucket in decode] == [(rows, rows)]
    assert facts.limits.max_sequences == rows
    assert facts.limits.max_step_tokens == max(64, rows)


def test_a_single_line_works_too(plugin: StandInBackend, model: ModelSpec) -> None:
    wide = LocalEngine(StandInBackend, model)
    prompts = [[5], [6, 7, 8], [9] * 130]
    expected = wide.generate(prompts, 4)
    assert LocalEngine(lambda: plugin, model, max_sequences=1).generate(prompts, 4) == expected


# --- Would a mistake show? ----------------------------------------------------------------------------------

PROMPTS = [[3] * 40, [11], [5, 60], [80, 2, 9], [4] * 128, [77]]


def text_is_right(plugin: StandInBackend, model: ModelSpec, folder: Path) -> bool:
    texts = LocalEngine(lambda: plugin, model).generate(PROMPTS, 6)
    return texts == [reference_greedy(folder, prompt, 6) for prompt in PROMPTS]


def idle_rows_at_position_0(slots: I32, token_ids: I32, positions: I32, graphs: Graphs) -> calls.Call:
    return GENERATION(slots, token_ids, positions, replace(graphs, line_tokens=1))


def padding_at_position_1(slot: int, token_ids: I32, num_tokens: int) -> calls.Call:
    call = CONTEXT(slot, token_ids, num_tokens)
    call.position_ids[0, num_tokens:] = 1
    return call


def one_token_as_a_prompt(batch: PrefillBatch, graphs: Graphs) -> calls.Call:
    return CONTEXT(int(batch.slots[0]), batch.token_ids, int(batch.num_new_tokens[0]))


GENERATION, CONTEXT = calls._generation, calls.context_call


def test_the_text_is_right(plugin: StandInBackend, model: ModelSpec, folder: Path) -> None:
    assert text_is_right(plugin, model, folder)


@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        ("_generation", idle_rows_at_position_0),
        ("context_call", padding_at_position_1),
        ("prefill_call", one_token_as_a_prompt),
    ],
)
def test_a_planted_mistake_changes_the_text(
    plugin: StandInBackend,
    model: ModelSpec,
    folder: Path,
    name: str,
    mistake: Callable[..., calls.Call],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So the stand-in is strict enough for the text to prove the conversion."""
    where = tokenplane_neuron.plugin if name == "prefill_call" else calls
    monkeypatch.setattr(where, name, mistake)
    assert not text_is_right(plugin, model, folder)


@pytest.mark.parametrize(
    "call",
    [
        calls.context_call(0, np.zeros(100, np.int32), 50),  # no such bucket
        calls.context_call(8, np.zeros(128, np.int32), 50),  # no such line
        calls.context_call(0, np.full(128, 211, np.int32), 50),  # no such token
    ],
)
def test_the_stand_in_refuses_what_was_not_compiled(plugin: StandInBackend, model: ModelSpec, call: calls.Call) -> None:
    plugin.load(model, LoadOptions())
    with pytest.raises(RuntimeError, match=r"no graph was compiled|no cache lines|outside the vocabulary"):
        plugin._run(call)
