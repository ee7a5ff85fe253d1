"""Mistakes with masks, planted one at a time in simulated devices: a named law catches each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tokenplane_core.backend.hookspecs import hookimpl
from tokenplane_core.backend.records import DecodeBatch, ModelSpec, PrefillBatch, SamplingBatch, StepHandle, TokenMask
from tokenplane_core.kit.checkpoint import write_tiny_llama
from tokenplane_core.kit.laws import LAWS, Subject
from tokenplane_core.kit.simulated import SimulatedBackend, SimulatedCuda, SimulatedGaudi, SimulatedTpu
from tokenplane_core.model import describe_model

Change = Callable[[SamplingBatch, TokenMask], SamplingBatch]


def planted(base: type[SimulatedBackend], change: Change) -> type[SimulatedBackend]:
    """A simulated device that sees every mask through `change`."""

    def changed(sampling: SamplingBatch) -> SamplingBatch:
        return sampling if sampling.mask is None else change(sampling, sampling.mask)

    class Planted(base):  # type: ignore[misc, valid-type]
        @hookimpl
        def prefill(self, batch: PrefillBatch, sampling: SamplingBatch) -> StepHandle:
            return super().prefill(batch, changed(sampling))

        @hookimpl
        def decode(self, batch: DecodeBatch, sampling: SamplingBatch) -> StepHandle:
            return super().decode(batch, changed(sampling))

    return Planted


def forgotten(sampling: SamplingBatch, mask: TokenMask) -> SamplingBatch:
    """No mask is looked at."""
    return replace(sampling, mask=None)


def rows_ignored(sampling: SamplingBatch, mask: TokenMask) -> SamplingBatch:
    """Masks are taken to be those of the first rows."""
    return replace(sampling, mask=TokenMask(np.arange(len(mask.rows), dtype=np.int32), mask.words))


def other_end_first(sampling: SamplingBatch, mask: TokenMask) -> SamplingBatch:
    """The highest bit of a word is taken for its first id."""

    def words() -> np.ndarray:
        bits = np.unpackbits(mask.words().view(np.uint8), axis=-1, bitorder="little")
        turned = bits.reshape(len(mask.rows), -1, 32)[:, :, ::-1].reshape(bits.shape)
        return np.packbits(turned, axis=-1, bitorder="little").view(np.uint32)

    return replace(sampling, mask=TokenMask(mask.rows, words))


def spills_over(sampling: SamplingBatch, mask: TokenMask) -> SamplingBatch:
    """Rows without a mask get the first one."""
    rows = np.arange(len(sampling), dtype=np.int32)
    of_row = {int(row): i for i, row in enumerate(mask.rows)}
    return replace(sampling, mask=TokenMask(rows, lambda: mask.words()[[of_row.get(int(row), 0) for row in rows]]))


PLANTS = [
    (forgotten, SimulatedCuda, "masks_are_never_violated"),
    (forgotten, SimulatedGaudi, "masks_are_never_violated"),
    (rows_ignored, SimulatedTpu, "masks_are_never_violated"),
    (other_end_first, SimulatedCuda, "masks_are_never_violated"),
    (spills_over, SimulatedCuda, "masks_concern_nobody_else"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return describe_model(write_tiny_llama(Path(tmp_path_factory.mktemp("tiny-llama"))))


@pytest.mark.parametrize(("change", "base", "law_name"), PLANTS)
def test_a_law_catches(change: Change, base: type[SimulatedBackend], law_name: str, model: ModelSpec) -> None:
    with pytest.raises(AssertionError):
        LAWS[law_name](Subject("planted", planted(base, change), model))
    LAWS[law_name](Subject("sound", base, model))
