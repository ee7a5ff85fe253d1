"""What a slot holds between steps: its block table and its tokens.

Block tables live on the host, where steps are planned; a device whose compiled steps look blocks up themselves keeps
a copy. Tokens live on the device, so that a step may use the token that the step before it has drawn and that the
host has not seen yet, and so that penalties can count it. Knows no model and no kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokenplane_core.backend.records import I32, PAD_BLOCK, KVLayout, StepHead
from tokenplane_core.backend.sampling import PENALTIES

from .device import TorchDevice


@dataclass(frozen=True, slots=True)
class Histories:
    """The tokens before each drawn one, for penalties. Entries from a row's length on mean nothing."""

    token_ids: Tensor  # i32 [n, longest]
    lengths: Tensor  # i64 [n]
    num_prompt_tokens: Tensor  # i64 [n]

    def part(self, start: int, end: int) -> Histories:
        """Those of some rows."""
        return Histories(self.token_ids[start:end], self.lengths[start:end], self.num_prompt_tokens[start:end])


class SlotState:
    """Per slot: block table i32 [slots + 1, blocks], prompt length and adapter index i32 [slots + 1] on the host, token
    ids i32 [slots + 1, tokens] on the device. The last row belongs to the padding slot.
    """

    def __init__(self, layout: KVLayout, max_model_tokens: int, device: TorchDevice) -> None:
        slots = layout.num_slots + 1
        self._device = device
        self._keeps_histories = bool(device.sampling.features & PENALTIES)  # else nothing reads a prefix hit's tokens
        self.pad_slot = layout.pad_slot
        self.blocks = np.full((slots, layout.max_blocks_per_sequence), PAD_BLOCK, np.int32)
        self.num_prompt_tokens = np.zeros(slots, np.int32)
        self.adapters = np.zeros(slots, np.int32)
        self.tokens = torch.zeros((slots, max_model_tokens + 1), dtype=torch.int32, device=device.torch_device)
        self.device_blocks = device.upload(self.blocks.copy()) if device.tables_on_device else None

    @staticmethod
    def size_bytes(num_slots: int, max_model_tokens: int, block_tokens: int) -> int:
        """What a state takes on the device, at most."""
        return 4 * (num_slots + 1) * (max_model_tokens + 1 + -(-max_model_tokens // block_tokens))

    def apply(self, head: StepHead) -> None:
        """Apply a step head: closed slots, opened slots, table deltas."""
        self.blocks[head.closed] = PAD_BLOCK
        for opened in head.opened:
            self.blocks[opened.slot] = PAD_BLOCK
            self.num_prompt_tokens[opened.slot] = opened.num_prompt_tokens
            self.adapters[opened.slot] = opened.adapter
            if self._keeps_histories and len(opened.cached_token_ids):
                known = self._device.upload(opened.cached_token_ids)
                self.tokens[opened.slot, : len(opened.cached_token_ids)] = known
        self.blocks[head.table_slots, head.table_positions] = head.table_blocks
        if self.device_blocks is not None:
            self._update_device_blocks(self.device_blocks, head)

    def _update_device_blocks(self, device_blocks: Tensor, head: StepHead) -> None:
        cleared = [*head.closed.tolist(), *(opened.slot for opened in head.opened)]
        if cleared:
            device_blocks[self._device.upload(np.array(cleared, np.int64))] = PAD_BLOCK
        if len(head.table_slots):
            delta = self._device.upload(np.stack([head.table_slots, head.table_positions, head.table_blocks]))
            device_blocks[delta[0].long(), delta[1].long()] = delta[2]

    def enter(self, slots: Tensor, positions: Tensor, token_ids: Tensor) -> Tensor:
        """Note a step's tokens; return their ids i64 [t], those still on the device looked up.

        Shapes:
            slots, positions and token_ids [t], of any integer type; padding tokens name the padding slot.
        """
        at = (slots.long(), positions.long())
        known = self.tokens[at]
        resolved = torch.where(token_ids < 0, known, token_ids.to(torch.int32))
        self.tokens.index_put_(at, resolved)
        return resolved.long()

    def drawn(self, slots: Tensor, positions: Tensor, token_ids: Tensor) -> None:
        """Note sampled tokens [n] where the next step will look for them."""
        self.tokens.index_put_((slots.long(), positions.long()), token_ids.to(torch.int32))

    def histories(self, slots: I32, lengths: I32) -> Histories:
        """The first `lengths` tokens of some slots."""
        at = self._device.upload(slots.astype(np.int64))
        return Histories(
            self.tokens[at, : int(lengths.max(initial=0))],
            self._device.upload(lengths.astype(np.int64)),
            self._device.upload(self.num_prompt_tokens[slots].astype(np.int64)),
        )
