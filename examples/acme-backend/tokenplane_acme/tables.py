"""The block tables on the card, and the program that changes them: deltas come in pieces of one compiled shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenplane_core.backend.records import I32, PAD_BLOCK, StepHead

Arrays = Mapping[str, NDArray[Any]]

PIECE = 64
"""Deltas of one launch. At least as many as there are slots, so that the first piece opens them all."""


def apply_deltas(memory: Arrays, inputs: Arrays) -> dict[str, NDArray[Any]]:
    """Program: empty the rows of opened slots, then enter blocks. Padding empties the padding slot, which is empty.

    Closed slots need nothing: what their rows still say is read by nobody until they are opened again.
    """
    tables = memory["tables"]
    tables[inputs["opened"]] = PAD_BLOCK
    tables[inputs["slots"], inputs["positions"]] = inputs["blocks"]
    return {}


def delta_inputs(pad_slot: int) -> dict[str, NDArray[Any]]:
    """The inputs of `apply_deltas`, filled with padding."""
    return {
        "opened": np.full(PIECE, pad_slot, np.int32),
        "slots": np.full(PIECE, pad_slot, np.int32),
        "positions": np.zeros(PIECE, np.int32),
        "blocks": np.full(PIECE, PAD_BLOCK, np.int32),
    }


def deltas(head: StepHead, pad_slot: int) -> Iterator[dict[str, NDArray[Any]]]:
    """The pieces that apply a step's head; none if it changes nothing."""
    opened = np.array([slot.slot for slot in head.opened], np.int32)
    columns: dict[str, I32] = {
        "slots": head.table_slots,
        "positions": head.table_positions,
        "blocks": head.table_blocks,
    }
    for start in range(0, max(len(opened), len(head.table_slots)), PIECE):
        piece = delta_inputs(pad_slot)
        for name, values in {"opened": opened, **columns}.items():
            some = values[start : start + PIECE]
            piece[name][: len(some)] = some
        yield piece
