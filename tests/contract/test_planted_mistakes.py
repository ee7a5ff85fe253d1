"""Mistakes that a plugin's author could make, planted one at a time: a named law must catch each.

The plants sit in simulated devices, whose text depends on every cell that is read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tokenplane_core.backend.hookspecs import hookimpl
from tokenplane_core.backend.records import (
    PAD_BLOCK,
    DecodeBatch,
    ModelSpec,
    PrefillBatch,
    SamplingBatch,
    StepHandle,
)
from tokenplane_core.kit.checkpoint import write_tiny_llama
from tokenplane_core.kit.laws import LAWS, Subject
from tokenplane_core.kit.simulated import (
    SimulatedBackend,
    SimulatedCuda,
    SimulatedGaudi,
    SimulatedNeuron,
    SimulatedTpu,
    oracle,
    oracle_logprobs,
)
from tokenplane_core.model import describe_model

Batch = PrefillBatch | DecodeBatch
Change = Callable[[SimulatedBackend, Batch], Batch]


def planted(base: type[SimulatedBackend], change: Change) -> type[SimulatedBackend]:
    """A simulated device that sees every batch through `change`."""

    class Planted(base):  # type: ignore[misc, valid-type]
        @hookimpl
        def prefill(self, batch: PrefillBatch, sampling: SamplingBatch) -> StepHandle:
            return super().prefill(change(self, batch), sampling)

        @hookimpl
        def decode(self, batch: DecodeBatch, sampling: SamplingBatch) -> StepHandle:
            return super().decode(change(self, batch), sampling)

    return Planted


def swapped_block(device: SimulatedBackend, batch: Batch) -> Batch:
    """Each decode step exchanges the first two blocks of its rows."""
    if isinstance(batch, DecodeBatch):
        for slot in batch.slots[: batch.num_rows]:
            first, second = device.tables.blocks[slot, :2]
            if PAD_BLOCK not in (first, second):
                device.tables.blocks[slot, :2] = second, first
    return batch


def stale_delta(device: SimulatedBackend, batch: Batch) -> Batch:
    """Table changes that come with a decode step are lost."""
    if isinstance(batch, PrefillBatch):
        return batch
    none = np.zeros(0, np.int32)
    return replace(batch, head=replace(batch.head, table_slots=none, table_positions=none, table_blocks=none))


def context_off_by_one(device: SimulatedBackend, batch: Batch) -> Batch:
    """Decode believes that one token fewer is in the cache."""
    if isinstance(batch, PrefillBatch):
        return batch
    return replace(batch, context_lens=np.maximum(batch.context_lens - 1, 0).astype(np.int32))


def forgotten_context(device: SimulatedBackend, batch: Batch) -> Batch:
    """Every prompt chunk is written from position 0, as if nothing were in the cache."""
    if isinstance(batch, DecodeBatch):
        return batch
    return replace(batch, context_lens=np.zeros_like(batch.context_lens))


def padding_runs_over(device: SimulatedBackend, batch: Batch) -> Batch:
    """Padding rows are taken for rows of slot 0."""
    if isinstance(batch, PrefillBatch) or batch.num_rows == len(batch.slots):
        return batch
    device._write(0, batch.context_lens[-1:], batch.token_ids[-1:])
    return batch


def forgotten_seed(device: SimulatedBackend, batch: Batch) -> Batch:
    """The sampled tokens of a step are looked up one slot off."""
    device.tables.token_ids = np.roll(device.tables.token_ids, 1, axis=0)
    return batch


def rows_share_parameters(device: SimulatedBackend, batch: Batch) -> Batch:
    """Every slot is taken to have the prompt length of slot 0, so penalties count prompts as output."""
    device.tables.num_prompt_tokens[:] = device.tables.num_prompt_tokens[0]
    return batch


def resumed_with_old_table(device: SimulatedBackend, batch: Batch) -> Batch:
    """A sequence that comes back after preemption is given the table that its slot had before."""
    if isinstance(batch, DecodeBatch):
        return batch
    ends = dict(zip(batch.slots.tolist(), (batch.context_lens + batch.num_new_tokens).tolist(), strict=True))
    head = batch.head
    resumed = [opened.slot for opened in head.opened if ends[opened.slot] > opened.num_prompt_tokens]
    fresh = ~np.isin(head.table_slots, resumed)
    head = replace(
        head,
        closed=head.closed[~np.isin(head.closed, resumed)],
        opened=tuple(opened for opened in head.opened if opened.slot not in resumed),
        table_slots=head.table_slots[fresh],
        table_positions=head.table_positions[fresh],
        table_blocks=head.table_blocks[fresh],
    )
    return replace(batch, head=head)


def short_memory(device: SimulatedBackend, batch: Batch) -> Batch:
    """The first token of every sequence is lost, in all circumstances alike."""
    device.cells[device.tables.blocks[batch.slots[: batch.num_rows], 0], 0] = 0
    return batch


def successor_off_by_one(device: SimulatedBackend, batch: Batch) -> Batch:
    """A prompt token's log-probability is taken for the token after it."""
    if isinstance(batch, DecodeBatch) or batch.next_token_ids is None:
        return batch
    wanted = batch.next_token_ids >= 0
    moved = batch.next_token_ids.copy()
    moved[wanted] = np.roll(moved[wanted], -1)
    return replace(batch, next_token_ids=moved)


def border_forgotten(device: SimulatedBackend, batch: Batch) -> Batch:
    """The first token of a chunk that continues a prompt gets the log-probability of another id."""
    if isinstance(batch, DecodeBatch) or batch.next_token_ids is None:
        return batch
    moved = batch.next_token_ids.copy()
    for i in range(batch.num_rows):
        start = batch.row_starts[i]
        if batch.context_lens[i] > 0 and moved[start] >= 0:
            moved[start] = (moved[start] + 1) % 100
    return replace(batch, next_token_ids=moved)


def fewer_alternatives(device: SimulatedBackend, batch: Batch) -> Batch:
    """Each token of a prompt gets one alternative less than the most that a row of the batch asks for."""
    if isinstance(batch, DecodeBatch) or batch.num_prompt_top_logprobs < 2:
        return batch
    return replace(batch, num_prompt_top_logprobs=batch.num_prompt_top_logprobs - 1)


PLANTS = [
    (fewer_alternatives, SimulatedTpu, "prompt_top_logprobs_are_those_of_a_draw"),
    (successor_off_by_one, SimulatedCuda, "prompt_logprobs_are_right"),
    (successor_off_by_one, SimulatedGaudi, "prompt_logprobs_are_right"),
    (border_forgotten, SimulatedCuda, "prompt_logprobs_do_not_depend_on_circumstances"),
    (border_forgotten, SimulatedTpu, "prompt_logprobs_outlive_preemption"),
    (rows_share_parameters, SimulatedCuda, "sampler_keeps_the_law"),
    (short_memory, SimulatedCuda, "text_is_right"),
    (swapped_block, SimulatedCuda, "decode_equals_prefill"),
    (swapped_block, SimulatedTpu, "batch_equals_singles"),
    (stale_delta, SimulatedCuda, "batch_equals_singles"),
    (stale_delta, SimulatedGaudi, "decode_equals_prefill"),
    (context_off_by_one, SimulatedCuda, "decode_equals_prefill"),
    (context_off_by_one, SimulatedNeuron, "decode_equals_prefill"),
    (forgotten_context, SimulatedCuda, "chunked_prefill_equals_whole"),
    (forgotten_context, SimulatedGaudi, "prefix_hit_equals_recompute"),
    (padding_runs_over, SimulatedTpu, "padding_changes_nothing"),
    (resumed_with_old_table, SimulatedCuda, "preempted_equals_uninterrupted"),
    (resumed_with_old_table, SimulatedGaudi, "preempted_equals_uninterrupted"),
    (forgotten_seed, SimulatedTpu, "async_depth_changes_nothing"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return describe_model(write_tiny_llama(Path(tmp_path_factory.mktemp("tiny-llama"))))


@pytest.mark.parametrize(("change", "base", "law_name"), PLANTS)
def test_a_law_catches(change: Change, base: type[SimulatedBackend], law_name: str, model: ModelSpec) -> None:
    reference = partial(oracle, vocab_size=model.vocab_size)
    logprobs = partial(oracle_logprobs, vocab_size=model.vocab_size)
    with pytest.raises(AssertionError):
        LAWS[law_name](Subject("planted", planted(base, change), model, reference, logprobs))
    LAWS[law_name](Subject("sound", base, model, reference, logprobs))
