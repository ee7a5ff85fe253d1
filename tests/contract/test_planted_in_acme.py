"""Mistakes in a backend that really computes, planted one at a time in examples/acme-backend: a named law catches each.

What a simulated device cannot get wrong is here: strides of the cache, masks, programs, and claims.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from tokenplane_acme import attention, model, runner, sampler, tables
from tokenplane_acme.plugin import AcmeBackend
from tokenplane_core.backend.hookspecs import hookimpl
from tokenplane_core.backend.records import Capabilities, LoadOptions, ModelSpec, SamplingBatch, SamplingCaps
from tokenplane_core.kit.checkpoint import reference_greedy, write_tiny_llama
from tokenplane_core.kit.laws import LAWS, NotApplicable, Subject
from tokenplane_core.model import describe_model

Plant = Callable[[pytest.MonkeyPatch], type[AcmeBackend]]


def claiming(**changes: Any) -> type[AcmeBackend]:
    """The backend, with other claims than it can keep."""

    class Claiming(AcmeBackend):
        @hookimpl
        def load(self, model: ModelSpec, options: LoadOptions) -> Capabilities:
            return replace(super().load(model, options), **changes)

    return Claiming


# --- Strides and masks --------------------------------------------------------------------------------------


def wrong_stride(patch: pytest.MonkeyPatch) -> type[AcmeBackend]:
    """Reads the cache as if a block had one cell fewer, so that blocks overlap."""

    def gathered(cache: Any, blocks: Any) -> Any:
        size = cache.shape[1]
        cells = blocks[:, :, None] * (size - 1) + np.arange(size)
        return cache.reshape(-1, *cache.shape[2:])[cells.reshape(len(blocks), -1)]

    patch.setattr(attention, "_gathered", gathered)
    return AcmeBackend


def swapped_heads(patch: pytest.MonkeyPatch) -> type[AcmeBackend]:
    """Takes the heads of a group for the groups: the strides of heads and groups are exchanged."""
    attend = attention.attention

    def swapped(keys: Any, values: Any, q: Any, k: Any, v: Any, where: Any) -> Any:
        groups = q.reshape(*q.shape[:2], 2, -1, q.shape[3]).swapaxes(2, 3)
        return attend(keys, values, groups.reshape(q.shape), k, v, where)

    patch.setattr(model, "attention", swapped)
    return AcmeBackend


def no_mask_on_padding(patch: pytest.MonkeyPatch) -> type[AcmeBackend]:
    """Hides what comes later in the row, but not the cells that only pad its context to the bucket."""
    lay_out = attention.rectangle

    def unmasked(tables: Any, slots: Any, context_lens: Any, num_new: Any, *sizes: int) -> Any:
        where = lay_out(tables, slots, context_lens, num_new, *sizes)
        padding = np.arange(where.hidden.shape[2]) >= (context_lens + num_new)[:, None]
        return where._replace(hidden=where.hidden & ~padding[:, None])

    patch.setattr(model, "rectangle", unmasked)
    return AcmeBackend


def padding_rows_write_to_slot_0(patch: pytest.MonkeyPatch) -> type[AcmeBackend]:
    """Fills unused rows with slot 0 and a token, as if they were real."""
    fill = model.step_inputs

    def filled(rows: int, width: int, pad_slot: int) -> Any:
        return {**fill(rows, width, 0), "num_new": np.ones(rows, np.int32)}

    class Unpadded(AcmeBackend):
        @hookimpl
        def decode(self, batch: Any, sampling: SamplingBatch) -> Any:
            real = np.arange(len(batch.slots)) < batch.num_rows
            return super().decode(replace(batch, slots=np.where(real, batch.slots, 0).astype(np.int32)), sampling)

    patch.setattr(runner, "step_inputs", filled)
    return Unpadded


# --- Tables and tokens --------------------------------------------------------------------------------------


def stale_table(patch: pytest.MonkeyPatch) -> type[AcmeBackend]:
    """Does not empty the row of an opened slot, and enters blocks into empty places only."""

    def apply(memory: Any, inputs: Any) -> Any:
        where = inputs["slots"], inputs["positions"]
        known = memory["tables"][where]
        memory["tables"][where] = np.where(known == 0, inputs["blocks"], known)
        return {}

    patch.setattr(runner, "apply_deltas", apply)
    return AcmeBackend


def lost_piece(patch: pytest.MonkeyPatch) -> type[AcmeBackend]:
    """Applies the first piece of many deltas only."""
    patch.setattr(runner, "deltas", lambda head, pad_slot: list(tables.deltas(head, pad_slot))[:1])
    patch.setattr(tables, "PIECE", 16)
    return AcmeBackend


def forgets_drawn_tokens(patch: pytest.MonkeyPatch) -> type[AcmeBackend]:
    """Claims to run ahead, but does not keep the drawn token on the card for the next step."""
    step = model.LlamaStep.__call__

    def forgetful(self: Any, memory: Any, inputs: Any) -> Any:
        return step(self, {**memory, "last_drawn": memory["last_drawn"].copy()}, inputs)

    patch.setattr(model.LlamaStep, "__call__", forgetful)
    return AcmeBackend


def first_rows_are_sampled(patch: pytest.MonkeyPatch) -> type[AcmeBackend]:
    """Returns the first rows of the batch, however many are sampled, instead of those that are."""
    real = runner.AcmeStep
    patch.setattr(runner, "AcmeStep", lambda step, launch, rows, *rest: real(step, launch, np.arange(len(rows)), *rest))
    return AcmeBackend


# --- Compiling ----------------------------------------------------------------------------------------------


def compiles_while_serving(patch: pytest.MonkeyPatch) -> type[AcmeBackend]:
    """Warms up the decode buckets only, and says it was all of them."""

    class Forgetful(AcmeBackend):
        @hookimpl
        def warmup(self) -> int:
            for bucket in self._buckets:
                if bucket.phase == "decode":
                    self._loaded.compile(bucket)
            return len(self._buckets)

    return Forgetful


def forgets_one_bucket(patch: pytest.MonkeyPatch) -> type[AcmeBackend]:
    """Leaves out the last bucket of the list: the largest, which few batches need."""

    class Forgetful(AcmeBackend):
        @hookimpl
        def warmup(self) -> int:
            for bucket in self._buckets[:-1]:
                self._loaded.compile(bucket)
            return len(self._buckets)

    return Forgetful


def warms_up_nothing(patch: pytest.MonkeyPatch) -> type[AcmeBackend]:
    class Lazy(AcmeBackend):
        @hookimpl
        def warmup(self) -> int:
            return 0

    return Lazy


# --- Claims -------------------------------------------------------------------------------------------------


def claims_min_p(patch: pytest.MonkeyPatch) -> type[AcmeBackend]:
    """Declares a sampling feature that its sampler passes over."""
    return claiming(sampling=SamplingCaps(sampler.FEATURES | {"min_p"}))


def claims_penalties_and_has_no_logits(patch: pytest.MonkeyPatch) -> type[AcmeBackend]:
    """The same where nobody can look at logits."""
    return claiming(sampling=SamplingCaps(sampler.FEATURES | {"presence_penalty"}, returns_logits=False))


def claims_logprobs(patch: pytest.MonkeyPatch) -> type[AcmeBackend]:
    return claiming(sampling=SamplingCaps(sampler.FEATURES | {"logprobs"}))


def claims_wider_batches(patch: pytest.MonkeyPatch) -> type[AcmeBackend]:
    """Declares more sequences than its widest decode bucket holds."""

    class Boasting(AcmeBackend):
        @hookimpl
        def load(self, model: ModelSpec, options: LoadOptions) -> Capabilities:
            caps = super().load(model, options)
            return replace(caps, limits=replace(caps.limits, max_sequences=caps.limits.max_sequences * 2))

    return Boasting


def claims_a_dtype(patch: pytest.MonkeyPatch) -> type[AcmeBackend]:
    """Says it computes in what it was asked for, on a device that has no such instructions."""
    return claiming(dtype="bfloat16")


def claims_another_contract(patch: pytest.MonkeyPatch) -> type[AcmeBackend]:
    return claiming(contract="0.1")


PLANTS: list[tuple[Plant, str]] = [
    (wrong_stride, "text_is_right"),
    (wrong_stride, "batch_equals_singles"),
    (swapped_heads, "text_is_right"),
    (no_mask_on_padding, "padding_changes_nothing"),
    (no_mask_on_padding, "text_is_right"),
    (padding_rows_write_to_slot_0, "padding_changes_nothing"),
    (stale_table, "preempted_equals_uninterrupted"),
    (stale_table, "slot_reuse_leaks_nothing"),
    (lost_piece, "text_is_right"),
    (forgets_drawn_tokens, "async_depth_changes_nothing"),
    (first_rows_are_sampled, "sampled_rows_behind_unsampled"),
    (compiles_while_serving, "no_compile_after_warmup"),
    (forgets_one_bucket, "no_compile_after_warmup"),
    (warms_up_nothing, "no_compile_after_warmup"),
    (claims_min_p, "sampler_keeps_the_law"),
    (claims_min_p, "declared_features_act"),
    (claims_penalties_and_has_no_logits, "declared_features_act"),
    (claims_logprobs, "declared_features_act"),
    (claims_wider_batches, "capabilities_are_honest"),
    (claims_a_dtype, "capabilities_are_honest"),
    (claims_another_contract, "capabilities_are_honest"),
]


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = write_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))
    model = describe_model(folder, dtype="float32")
    return Subject("planted", AcmeBackend, model, partial(reference_greedy, folder))


@pytest.mark.parametrize(("plant", "law_name"), PLANTS)
def test_a_law_catches(plant: Plant, law_name: str, subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    faulty = replace(subject, make_plugin=plant(monkeypatch))
    with pytest.raises(AssertionError):
        LAWS[law_name](faulty)


@pytest.mark.parametrize("law_name", sorted({law for _, law in PLANTS}))
def test_the_sound_backend_keeps_the_laws_that_catch(law_name: str, subject: Subject) -> None:
    try:
        LAWS[law_name](subject)
    except NotApplicable as reason:
        pytest.fail(f"{law_name} has lost its subject: {reason}")


def test_features_are_judged_where_no_logits_are_returned(subject: Subject) -> None:
    silent = claiming(sampling=SamplingCaps(sampler.FEATURES, returns_logits=False))
    LAWS["declared_features_act"](replace(subject, make_plugin=silent))
