"""One loaded model on one card: turns the core's batches into launches, and launches into step outputs.

Everything it launches runs in order, so a step may count on the table deltas and the tokens of the steps before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from acme_runtime import Buffer, Card, CardError, Executable, Launch, OutOfCardMemory
from numpy.typing import NDArray

from tokenplane_core.backend.errors import DeviceLost, OutOfMemory
from tokenplane_core.backend.records import (
    F32,
    I64,
    Bucket,
    DecodeBatch,
    KVLayout,
    ModelSpec,
    PrefillBatch,
    SamplingBatch,
    StepOutput,
)
from tokenplane_core.backend.sampling import uniforms

from .model import LlamaStep, step_inputs
from .tables import apply_deltas, delta_inputs, deltas


class Runner:
    """Owns the card's memory: weights, cache, tables."""

    def __init__(self, card: Card, model: ModelSpec, weights: Mapping[str, F32]) -> None:
        """Upload the weights. Raises OutOfMemory."""
        self._card, self._model = card, model
        self._state: dict[str, Buffer] = {}
        self._executables: dict[Bucket, Executable] = {}
        try:
            self._weights = {name: card.upload(tensor) for name, tensor in weights.items()}
        except OutOfCardMemory as error:
            raise OutOfMemory(f"{model.model_id} does not fit on the card: {error}") from error
        tied = "lm_head.weight" not in weights
        self._weights["head"] = self._weights["model.embed_tokens.weight" if tied else "lm_head.weight"]

    def allocate(self, layout: KVLayout) -> None:
        """Take the cache and the tables, giving back an earlier cache first. Raises OutOfMemory; then there is none."""
        self.release()
        self._layout = layout
        spec, slots = self._model, layout.num_slots + 1
        cells = (spec.num_layers, layout.num_blocks, layout.block_tokens, spec.num_kv_heads, spec.head_dim)
        try:
            self._state["tables"] = self._card.zeros((slots, layout.max_blocks_per_sequence), np.int32)
            self._state["last_drawn"] = self._card.zeros((slots,), np.int32)
            self._state["keys"] = self._card.zeros(cells, np.float32)
            self._state["values"] = self._card.zeros(cells, np.float32)
        except OutOfCardMemory as error:
            self.release()
            raise OutOfMemory(f"a KV cache of {layout.num_blocks} blocks does not fit: {error}") from error
        self._apply_deltas = self._card.compile(apply_deltas, self._state, delta_inputs(layout.pad_slot))

    def release(self) -> None:
        """Give the cache and the tables back."""
        for buffer in self._state.values():
            self._card.release(buffer)
        self._state, self._executables = {}, {}

    def compile(self, bucket: Bucket) -> Executable:
        width = bucket.tokens // bucket.rows
        program = LlamaStep(self._model, self._layout.block_tokens, bucket.context_blocks)
        inputs = step_inputs(bucket.rows, width, self._layout.pad_slot)
        executable = self._card.compile(program, {**self._weights, **self._state}, inputs)
        self._executables[bucket] = executable
        return executable

    def launch(self, batch: PrefillBatch | DecodeBatch, sampling: SamplingBatch) -> AcmeStep:
        """Queue the batch's table deltas, then the batch."""
        assert batch.bucket is not None, "the core gives every batch a bucket when shapes are hard"
        for piece in deltas(batch.head, self._layout.pad_slot):
            self._card.launch(self._apply_deltas, piece)
        compiled = batch.bucket not in self._executables  # warm-up missed one: it still runs, but the kit will tell
        executable = self.compile(batch.bucket) if compiled else self._executables[batch.bucket]
        inputs, sampled = self._inputs(batch, sampling)
        launch = self._card.launch(executable, inputs)
        return AcmeStep(batch.head.step, launch, sampled, sampling.return_logits, int(compiled))

    def _inputs(
        self, batch: PrefillBatch | DecodeBatch, sampling: SamplingBatch
    ) -> tuple[dict[str, NDArray[Any]], I64]:
        """The step's inputs, and which of its rows are sampled: i64 [n], in batch order.

        With `pad_rows` the core has laid prefill rows out as a rectangle already, and all arrays are as long as the
        bucket: nothing is left to pad.
        """
        rows = len(batch.slots)
        inputs = step_inputs(rows, len(batch.token_ids) // rows, self._layout.pad_slot)
        inputs["token_ids"][:] = batch.token_ids.reshape(rows, -1)
        inputs["context_lens"][:], inputs["slots"][:] = batch.context_lens, batch.slots
        if isinstance(batch, PrefillBatch):
            inputs["num_new"][:], inputs["sample"][:] = batch.num_new_tokens, batch.sample
        else:
            inputs["num_new"][: batch.num_rows], inputs["sample"][: batch.num_rows] = 1, True
        sampled = np.flatnonzero(inputs["sample"])
        if not sampling.return_logits:
            for name in ("temperature", "top_k", "top_p"):
                inputs[name][sampled] = getattr(sampling, name)
            inputs["us"][sampled] = uniforms(sampling.seeds, sampling.positions)
        return inputs, sampled


@dataclass(frozen=True)
class AcmeStep:
    """The StepHandle of a launch: the core asks for the result when it has launched the next one."""

    step: int
    launch: Launch
    sampled: I64  # i64 [n] rows of the launch that are rows of the SamplingBatch
    wants_logits: bool
    compiled: int

    def done(self) -> bool:
        return self.launch.done()

    def result(self) -> StepOutput:
        try:
            out = self.launch.read("logits" if self.wants_logits else "token_ids")[self.sampled]
            busy_s = self.launch.busy_s()
        except CardError as error:
            raise DeviceLost(f"acme: {error}") from error
        if self.wants_logits:
            return StepOutput(self.step, np.zeros(0, np.int32), logits=out, device_s=busy_s, compiled=self.compiled)
        return StepOutput(self.step, out, device_s=busy_s, compiled=self.compiled)
