"""Steps of a fixed shape: a batch padded to its bucket, for devices that compile a step or capture it as a graph.

`pad_batch` turns a batch into arrays whose shapes depend on the bucket alone, and `StepProgram` computes logits from
them with tensor operations alone: no host data, no synchronisation, no shape that depends on a value. Who runs the
program (eagerly, as a graph, compiled) is an executor's business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tokenplane_core.backend.records import I32, PAD_BLOCK, Bucket, DecodeBatch, PrefillBatch

from .kernels import AttentionKernels
from .kv_cache import LayerCache
from .module import DecoderModule
from .slots import SlotState
from .step import PagedStep, Rows, StepPlan

Inputs = Mapping[str, I32]


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a program is compiled for. Two batches with equal shapes run the same program."""

    phase: Literal["prefill", "decode"]
    rows: int
    tokens: int
    row_tokens: int  # no row has more new tokens
    blocks: int  # width of the tables
    total_blocks: int = 0  # all rows together have no more blocks; 0: nobody counts
    adapted: bool = False  # some row has a LoRA adapter
    fresh: bool = False  # an executor's variant: no row has anything in the cache before the step


@dataclass(frozen=True, slots=True)
class PaddedStep:
    """A batch as arrays, all i32 so that they travel in one copy.

    token_ids [t] (TOKEN_ON_DEVICE: look it up), token_slots [t], positions [t], write_index [t] where K and V go in
    the cache seen as one row per token; slots [r], first_tokens [r], num_tokens [r], context_lens [r],
    last_tokens [r] the token after which a row is sampled; tables [r, blocks] unless the device keeps them;
    token_adapters [t] if the shape is adapted.
    """

    shape: StepShape
    inputs: Inputs


def step_shape(bucket: Bucket, rectangle: bool, max_blocks: int, block_rule: str) -> StepShape:
    """The shape that batches of a bucket are padded to.

    rectangle: prefill rows have bucket.tokens / bucket.rows tokens each. block_rule: ShapePolicy.context_rule.
    """
    row_tokens = 1 if bucket.phase == "decode" else bucket.tokens // bucket.rows if rectangle else bucket.tokens
    # A row has no more blocks than all rows together.
    blocks = max_blocks if block_rule == "none" else min(bucket.context_blocks, max_blocks)
    total_blocks = bucket.context_blocks if block_rule == "total" else 0
    return StepShape(bucket.phase, bucket.rows, bucket.tokens, row_tokens, blocks, total_blocks)


def pad_batch(batch: PrefillBatch | DecodeBatch, shape: StepShape, slots: SlotState, block_tokens: int) -> PaddedStep:
    """Pad a batch whose head `slots` has already applied. The core has laid the rows out for the bucket."""
    rows, tokens, real = shape.rows, shape.tokens, batch.num_rows
    if isinstance(batch, DecodeBatch):
        first, new = np.arange(rows, dtype=np.int32), np.ones(rows, np.int32)
    else:
        first, new = batch.row_starts[:rows], batch.num_new_tokens
    row_of_token = np.repeat(np.arange(real), new[:real])
    offsets = np.arange(len(row_of_token)) - np.repeat(np.cumsum(new[:real]) - new[:real], new[:real])
    at = first[row_of_token] + offsets
    positions = batch.context_lens[row_of_token] + offsets
    tables = slots.blocks[batch.slots, : shape.blocks]
    inputs = {
        "token_ids": batch.token_ids,
        "token_slots": _scattered(tokens, at, batch.slots[row_of_token], slots.pad_slot),
        "positions": _scattered(tokens, at, positions, 0),
        "write_index": _scattered(
            tokens,
            at,
            tables[row_of_token, positions // block_tokens] * block_tokens + positions % block_tokens,
            PAD_BLOCK * block_tokens,
        ),
        "slots": batch.slots,
        "first_tokens": first,
        "num_tokens": new,
        "context_lens": batch.context_lens,
        "last_tokens": np.clip(first + new - 1, 0, tokens - 1),
    }
    if slots.device_blocks is None:
        inputs["tables"] = tables
    if shape.adapted:
        inputs["token_adapters"] = _scattered(tokens, at, slots.adapters[batch.slots[row_of_token]], 0)
    return PaddedStep(shape, {name: np.ascontiguousarray(array, np.int32) for name, array in inputs.items()})


def empty_batch(shape: StepShape, slots: SlotState) -> PaddedStep:
    """Nothing but padding: what a program is compiled or captured with."""
    rows, tokens = shape.rows, shape.tokens
    decode = shape.phase == "decode"
    zeros, per_row = np.zeros(tokens, np.int32), np.zeros(rows, np.int32)
    first = np.arange(rows, dtype=np.int32) * (1 if decode else shape.row_tokens if tokens > shape.row_tokens else 0)
    inputs = {
        "token_ids": zeros,
        "token_slots": np.full(tokens, slots.pad_slot, np.int32),
        "positions": zeros,
        "write_index": zeros,  # PAD_BLOCK is block 0
        "slots": np.full(rows, slots.pad_slot, np.int32),
        "first_tokens": first,
        "num_tokens": per_row + 1 if decode else per_row,
        "context_lens": per_row,
        "last_tokens": np.clip(first, 0, tokens - 1),
    }
    if slots.device_blocks is None:
        inputs["tables"] = np.full((rows, shape.blocks), PAD_BLOCK, np.int32)
    if shape.adapted:
        inputs["token_adapters"] = zeros
    return PaddedStep(shape, inputs)


class StepProgram:
    """From the padded inputs on the device to logits [rows, vocab]. A function of its inputs, the slots' tokens and
    the cache; changes the latter two.
    """

    def __init__(
        self, module: DecoderModule, layers: list[LayerCache], slots: SlotState, kernels: AttentionKernels, tokens: int
    ) -> None:
        self._module, self._layers, self._slots, self._kernels = module, layers, slots, kernels
        self._block_tokens = tokens

    def state(self) -> list[Tensor]:
        """What it changes."""
        return [self._slots.tokens, *(tensor for layer in self._layers for tensor in layer.tensors())]

    def __call__(self, shape: StepShape, inputs: Mapping[str, Tensor]) -> Tensor:
        token_ids = self._slots.enter(inputs["token_slots"], inputs["positions"], inputs["token_ids"])
        rows = Rows(
            inputs["first_tokens"],
            inputs["num_tokens"],
            inputs["context_lens"],
            self._tables(inputs),
            self._block_tokens,
            most_tokens=shape.row_tokens,
            most_keys=shape.blocks * self._block_tokens,
            fresh=shape.fresh,
            extra=inputs,
        )
        plan = StepPlan(
            token_ids,
            inputs["positions"].long(),
            inputs["write_index"].long(),
            inputs["last_tokens"].long(),
            decode=rows if shape.phase == "decode" else None,
            prefill=rows if shape.phase == "prefill" else None,
        )
        adapters = self._module.adapters
        adapted = adapters.masked(inputs["token_adapters"]) if adapters is not None and shape.adapted else None
        step = PagedStep(plan, self._layers, self._kernels, adapted)
        return self._module.logits(token_ids, plan.positions, plan.logits_index, step)

    def _tables(self, inputs: Mapping[str, Tensor]) -> Tensor:
        if self._slots.device_blocks is None:
            return inputs["tables"]
        return self._slots.device_blocks[inputs["slots"].long()]


def _scattered(length: int, at: NDArray[np.int64], values: NDArray[np.integer], fill: int) -> I32:
    out = np.full(length, fill, np.int32)
    out[at] = values
    return out
