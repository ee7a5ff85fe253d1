"""Mistakes with LoRA adapters, planted one at a time in simulated devices and in the core: a named law catches each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest

from tokenplane_core.backend.hookspecs import hookimpl
from tokenplane_core.backend.records import (
    AdapterSpec,
    DecodeBatch,
    ModelSpec,
    PrefillBatch,
    SamplingBatch,
    SlotOpen,
    StepHandle,
)
from tokenplane_core.engine.adapters import Adapter, Adapters
from tokenplane_core.kit.checkpoint import write_tiny_llama
from tokenplane_core.kit.laws import LAWS, Subject
from tokenplane_core.kit.simulated import (
    SimulatedBackend,
    SimulatedCuda,
    SimulatedGaudi,
    SimulatedTpu,
    oracle_with_adapter,
)
from tokenplane_core.model import describe_model

Batch = TypeVar("Batch", PrefillBatch, DecodeBatch)


class SeesOpened(SimulatedCuda):
    """Sees every opened slot through `seen`."""

    def seen(self, opened: SlotOpen) -> SlotOpen:
        return opened

    def _changed(self, batch: Batch) -> Batch:
        opened = tuple(self.seen(one) for one in batch.head.opened)
        return replace(batch, head=replace(batch.head, opened=opened))

    @hookimpl
    def prefill(self, batch: PrefillBatch, sampling: SamplingBatch) -> StepHandle:
        return super().prefill(self._changed(batch), sampling)

    @hookimpl
    def decode(self, batch: DecodeBatch, sampling: SamplingBatch) -> StepHandle:
        return super().decode(self._changed(batch), sampling)


class Ignores(SeesOpened):
    """Computes all rows without."""

    def seen(self, opened: SlotOpen) -> SlotOpen:
        return replace(opened, adapter=0)


class KeepsTheSlots(SeesOpened):
    """A slot keeps its adapter when a sequence without one moves in."""

    def seen(self, opened: SlotOpen) -> SlotOpen:
        return replace(opened, adapter=opened.adapter or int(self.tables.adapters[opened.slot]))


class TakesTheFirst(SeesOpened):
    """All rows get the adapter of the first index, if they have any."""

    def seen(self, opened: SlotOpen) -> SlotOpen:
        return replace(opened, adapter=min(1, opened.adapter))


class ForgetsWhileDecoding(SimulatedTpu):
    """Applies adapters to prompts alone."""

    @hookimpl
    def decode(self, batch: DecodeBatch, sampling: SamplingBatch) -> StepHandle:
        self.tables.apply(batch.head)
        self.tables.adapters[batch.slots] = 0
        return super().decode(replace(batch, head=replace(batch.head, opened=())), sampling)


class LoadsOverTheFirst(SimulatedGaudi):
    """Keeps one adapter, whatever the index."""

    @hookimpl
    def adapter_load(self, index: int, adapter: AdapterSpec) -> bool:
        super().adapter_load(1, adapter)
        self._salts[:] = self._salts[1] * (np.arange(len(self._salts)) > 0)
        return True


class DropsTheNext(SimulatedCuda):
    """Off by one."""

    @hookimpl
    def adapter_drop(self, index: int) -> bool:
        return super().adapter_drop(min(index + 1, len(self._salts) - 1))


class TakesNoRefusal(SimulatedCuda):
    """Writes before it looks whether there is room."""

    @hookimpl
    def adapter_load(self, index: int, adapter: AdapterSpec) -> bool:
        self._salts[1:] += 1
        return super().adapter_load(index, adapter)


@pytest.fixture(scope="module")
def subject_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[type[SimulatedBackend]], Subject]:
    model: ModelSpec = describe_model(write_tiny_llama(Path(tmp_path_factory.mktemp("tiny-llama"))))
    reference = partial(oracle_with_adapter, model.vocab_size)

    def subject(base: type[SimulatedBackend]) -> Subject:
        return Subject("planted", base, model, adapter_reference=reference)

    return subject


SubjectOf = Callable[[type[SimulatedBackend]], Subject]


@pytest.mark.parametrize(
    ("plant", "law_name"),
    [
        (Ignores, "adapters_are_right"),
        (KeepsTheSlots, "adapters_are_right"),
        (ForgetsWhileDecoding, "adapters_are_right"),
        (TakesTheFirst, "adapters_do_not_mix"),
        (LoadsOverTheFirst, "adapters_do_not_mix"),
        (DropsTheNext, "adapters_come_and_go"),
        (TakesNoRefusal, "adapters_come_and_go"),
    ],
)
def test_a_law_catches(plant: type[SimulatedBackend], law_name: str, subject_of: SubjectOf) -> None:
    with pytest.raises(AssertionError):
        LAWS[law_name](subject_of(plant))


def test_a_law_catches_a_prefix_cache_that_does_not_know_adapters(
    subject_of: SubjectOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Adapter, "salt", b"")
    with pytest.raises(AssertionError):
        LAWS["adapters_share_no_prefixes"](subject_of(SimulatedCuda))


def test_a_law_catches_a_prefix_cache_that_knows_only_their_places(
    subject_of: SubjectOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Adapter, "salt", property(lambda self: bytes([self.index])))
    with pytest.raises(AssertionError):
        LAWS["adapters_share_no_prefixes"](subject_of(SimulatedCuda))


def test_a_law_catches_a_core_that_drops_what_is_still_used(
    subject_of: SubjectOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop_unused = Adapters.drop_unused
    monkeypatch.setattr(Adapters, "drop_unused", lambda self, in_use: drop_unused(self, ()))
    monkeypatch.setattr(
        Adapters, "unload", lambda self, number: (self.leaving.append(self[number]), self.drop_unused(()))
    )
    with pytest.raises((AssertionError, KeyError)):  # the core itself may find the hole first
        LAWS["adapters_come_and_go"](subject_of(SimulatedCuda))


@pytest.mark.parametrize("law_name", [name for name in LAWS if name.startswith("adapters_")])
def test_a_sound_device_passes(law_name: str, subject_of: SubjectOf) -> None:
    LAWS[law_name](subject_of(SimulatedCuda))
