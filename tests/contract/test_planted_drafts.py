"""Mistakes with drafts, planted one at a time in simulated devices and in the core: the law of speculation catches
each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tokenplane_core.backend.errors import ContractViolation
from tokenplane_core.backend.hookspecs import hookimpl
from tokenplane_core.backend.plugins import Backend
from tokenplane_core.backend.records import (
    F32,
    I32,
    Capabilities,
    DecodeBatch,
    KVLayout,
    LoadOptions,
    ModelSpec,
    PrefillBatch,
    SamplingBatch,
    StepHandle,
    StepOutput,
)
from tokenplane_core.engine import masks
from tokenplane_core.engine.engine import Engine
from tokenplane_core.kit.checkpoint import write_tiny_llama
from tokenplane_core.kit.laws import LAWS, NotApplicable, Subject
from tokenplane_core.kit.simulated import SimulatedBackend, SimulatedCuda, SimulatedTpu
from tokenplane_core.model import describe_model

LAW = LAWS["speculation_equals_none"]


def ends_of(slots: list[int], lengths: list[int]) -> list[int]:
    """How long the row of each draw is, with all its drafts."""
    ends = {slot: max(n for s, n in zip(slots, lengths, strict=True) if s == slot) for slot in slots}
    return [ends[slot] for slot in slots]


class DrawsFromTheLastLogits(SimulatedCuda):
    """All draws of a row are made from the logits after its last token."""

    def _contexts(self, slots: list[int], lengths: list[int]) -> list[int]:
        return super()._contexts(slots, ends_of(slots, lengths))


class SeesLaterDrafts(SimulatedCuda):
    """A token attends to the draft behind it, as with a causal mask that is off by one."""

    def _contexts(self, slots: list[int], lengths: list[int]) -> list[int]:
        ends = ends_of(slots, lengths)
        return super()._contexts(slots, [min(n + 1, end) for n, end in zip(lengths, ends, strict=True)])


class PenalisesLaterDrafts(SimulatedCuda):
    """Penalties count all of the row's tokens, whichever is drawn."""

    def _sample(
        self, step: int, logits: F32, slots: list[int], lengths: list[int], sampling: SamplingBatch
    ) -> StepOutput:
        return super()._sample(step, logits, slots, ends_of(slots, lengths), sampling)


class Appends(SimulatedCuda):
    """Counts the tokens of a slot itself, and puts what comes behind the last it has."""

    @hookimpl
    def kv_alloc(self, layout: KVLayout) -> bool:
        self.counts = np.zeros(layout.num_slots + 1, np.int32)
        return super().kv_alloc(layout)

    @hookimpl
    def prefill(self, batch: PrefillBatch, sampling: SamplingBatch) -> StepHandle:
        context = self._context(batch)
        self.counts[batch.slots] += batch.num_new_tokens
        return super().prefill(replace(batch, context_lens=context), sampling)

    @hookimpl
    def decode(self, batch: DecodeBatch, sampling: SamplingBatch) -> StepHandle:
        context = self._context(batch)
        self.counts[batch.slots[: batch.num_rows]] += 1
        return super().decode(replace(batch, context_lens=context), sampling)

    def _context(self, batch: PrefillBatch | DecodeBatch) -> I32:
        for opened in batch.head.opened:
            self.counts[opened.slot] = len(opened.cached_token_ids)
        context = batch.context_lens.copy()
        context[: batch.num_rows] = np.minimum(self.counts[batch.slots[: batch.num_rows]], self._max_model_tokens - 8)
        return context


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return describe_model(write_tiny_llama(Path(tmp_path_factory.mktemp("tiny-llama"))))


PLANTS = [DrawsFromTheLastLogits, SeesLaterDrafts, Appends, PenalisesLaterDrafts]


@pytest.mark.parametrize("plant", PLANTS)
def test_the_law_catches(plant: type[SimulatedBackend], model: ModelSpec) -> None:
    with pytest.raises(AssertionError):
        LAW(Subject("planted", plant, model))


def commits_one_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """The core takes what was drawn behind the first wrong draft."""
    before = Engine._commit_behind

    def changed(self, row, token_ids, output, index, masks, speculation):  # type: ignore[no-untyped-def]
        if row.drafts:
            row.drafts = [token_ids[index], *row.drafts[1:]]
        return before(self, row, token_ids, output, index, masks, speculation)

    monkeypatch.setattr(Engine, "_commit_behind", changed)


def masks_do_not_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask of every draw is that of the row's first."""
    monkeypatch.setattr(masks, "guesses", lambda guide, drafts: [guide for _ in drafts])


@pytest.mark.parametrize("plant", [commits_one_too_many, masks_do_not_follow])
def test_the_law_catches_a_core_that(
    plant: Callable[[pytest.MonkeyPatch], None], model: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        LAW(Subject("planted", SimulatedCuda, model))


@pytest.mark.parametrize("on_host", [False, True])
def test_a_sound_device_passes(on_host: bool, model: ModelSpec) -> None:
    class Sound(SimulatedCuda):
        @hookimpl
        def load(self, model: ModelSpec, options: LoadOptions) -> Capabilities:
            caps = super().load(model, options)
            return replace(caps, sampling=replace(caps.sampling, features=frozenset())) if on_host else caps

    LAW(Subject("sound", Sound, model))


def test_who_claims_nothing_is_not_asked(model: ModelSpec) -> None:
    with pytest.raises(NotApplicable, match="max_drafts is 0"):
        LAW(Subject("simulated-tpu", SimulatedTpu, model))


@pytest.mark.parametrize(
    ("changes", "why"), [({"mixed": False}, "without mixed"), ({"max_drafts": 9}, "but 4 were asked for")]
)
def test_a_claim_that_cannot_hold_is_refused(changes: dict[str, object], why: str, model: ModelSpec) -> None:
    class Claims(SimulatedCuda):
        @hookimpl
        def load(self, model: ModelSpec, options: LoadOptions) -> Capabilities:
            return replace(super().load(model, options), **changes)  # type: ignore[arg-type]

    with pytest.raises(ContractViolation, match=why):
        Backend("acme", Claims()).load(model, LoadOptions(max_drafts=4))
