"""Slot state on the host, for plugins that want it there: block tables and token ids, kept from step heads.

A plugin that keeps its tables on the device applies the deltas itself; this is the plain way, and the one the
simulated devices use.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .records import I32, PAD_BLOCK, TOKEN_ON_DEVICE, DecodeBatch, KVLayout, PrefillBatch, StepHead
from .sampling import History


def draws_of(batch: PrefillBatch) -> tuple[NDArray[np.int64], I32]:
    """For each token that a batch draws, in order, i64 and i32 [n]: its row, and how many tokens come before it."""
    ends = batch.context_lens + batch.num_new_tokens
    if batch.num_drafts is None:
        rows = np.flatnonzero(batch.sample[: batch.num_rows])
        return rows, ends[rows]
    counts = (batch.sample + batch.num_drafts)[: batch.num_rows]
    rows = np.repeat(np.arange(batch.num_rows), counts)
    still_to_draw = np.repeat(np.cumsum(counts), counts) - np.arange(len(rows)) - 1  # after it, for the same row
    return rows, (ends[rows] - still_to_draw).astype(np.int32)


class SlotTables:
    """Per slot: block table i32 [slots + 1, blocks], token ids i32 [slots + 1, tokens], prompt length and adapter index
    i32 [slots + 1].

    The last row belongs to the padding slot.
    """

    def __init__(self, layout: KVLayout, max_model_tokens: int) -> None:
        slots = layout.num_slots + 1
        self.blocks = np.full((slots, layout.max_blocks_per_sequence), PAD_BLOCK, np.int32)
        self.token_ids = np.zeros((slots, max_model_tokens + 1), np.int32)
        self.num_prompt_tokens = np.zeros(slots, np.int32)
        self.adapters = np.zeros(slots, np.int32)

    def apply(self, head: StepHead) -> None:
        """Apply a step head: closed slots, opened slots, table deltas."""
        self.blocks[head.closed] = PAD_BLOCK
        for opened in head.opened:
            self.blocks[opened.slot] = PAD_BLOCK
            self.num_prompt_tokens[opened.slot] = opened.num_prompt_tokens
            self.adapters[opened.slot] = opened.adapter
            self.token_ids[opened.slot, : len(opened.cached_token_ids)] = opened.cached_token_ids
        self.blocks[head.table_slots, head.table_positions] = head.table_blocks

    def enter_prefill(self, batch: PrefillBatch) -> I32:
        """Note the batch's tokens; return its token ids with TOKEN_ON_DEVICE resolved.

        A token still on the device is looked up where `drawn` left it.
        """
        token_ids = batch.token_ids.copy()
        for i in range(batch.num_rows):
            slot, start, context = int(batch.slots[i]), int(batch.row_starts[i]), int(batch.context_lens[i])
            end = start + int(batch.num_new_tokens[i])
            known = self.token_ids[slot, context : context + end - start]
            token_ids[start:end] = np.where(token_ids[start:end] == TOKEN_ON_DEVICE, known, token_ids[start:end])
            known[:] = token_ids[start:end]
        return token_ids

    def enter_decode(self, batch: DecodeBatch) -> I32:
        """The same for a decode batch."""
        known = self.token_ids[batch.slots, batch.context_lens]
        token_ids = np.where(batch.token_ids == TOKEN_ON_DEVICE, known, batch.token_ids)
        self.token_ids[batch.slots, batch.context_lens] = token_ids
        return token_ids.astype(np.int32)

    def drawn(self, slots: I32, positions: I32, token_ids: I32) -> None:
        """Note sampled tokens where the next step will look for them."""
        self.token_ids[slots, positions] = token_ids

    def history(self, slot: int, length: int) -> History:
        """The first `length` tokens of a slot, for the reference sampler."""
        return History(self.token_ids[slot, :length], int(self.num_prompt_tokens[slot]))
