"""Runs padded steps as HPU graphs, and makes of block tables what the kernels read.

A decode step gets one list of all blocks of the batch, padded to its bucket. A prefill step in which no row has
anything in the cache yet, as most prompts begin, is captured a second time: its attention needs no mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenplane_core.backend.records import I32, PAD_BLOCK
from tokenplane_torch.executors import Program
from tokenplane_torch.padded import PaddedStep, StepShape

from .bridge import Bridge, Graph
from .buckets import BLOCK_TOKENS, blocks_for

NOWHERE = 1 << 30
"""Position of a block that only fills the list up: behind every query, so nobody sees it."""


class GraphExecutor:
    def __init__(self, bridge: Bridge) -> None:
        self.compiled = 0
        self._bridge = bridge
        self._captured: dict[StepShape, _Captured] = {}

    def run(self, program: Program, step: PaddedStep) -> Tensor:
        arrays = {**step.inputs, **flat_blocks(step)}
        captured = self._captured.get(step.shape)
        if captured is None:
            captured = self._captured[step.shape] = self._capture(program, step.shape, arrays)
            self.compiled += len(captured.graphs)
        captured.inputs.copy_(torch.from_numpy(_packed(arrays)), non_blocking=True)
        fresh = True in captured.graphs and not step.inputs["context_lens"].any()
        return captured.graphs[fresh].replay()

    def _capture(self, program: Program, shape: StepShape, arrays: Mapping[str, I32]) -> _Captured:
        inputs = self._bridge.upload(_packed(arrays))
        parts = torch.split(inputs, [array.size for array in arrays.values()])
        named = {name: part.view(array.shape) for (name, array), part in zip(arrays.items(), parts, strict=True)}
        graphs = {
            variant.fresh: self._bridge.capture(lambda variant=variant: program(variant, named))  # type: ignore[misc]
            for variant in variants(shape)
        }
        return _Captured(inputs, graphs)


@dataclass(frozen=True, slots=True)
class _Captured:
    """One bucket: the buffer i32 that its inputs are read from, and its graphs, by whether all rows are fresh."""

    inputs: Tensor
    graphs: Mapping[bool, Graph]


def variants(shape: StepShape) -> Iterator[StepShape]:
    """What is captured for a bucket. Of buckets that differ in context alone, new prompts go to the smallest."""
    yield shape
    if shape.phase == "prefill" and shape.total_blocks <= shape.rows * blocks_for(shape.row_tokens):
        yield replace(shape, fresh=True)


def flat_blocks(step: PaddedStep) -> dict[str, I32]:
    """All blocks of a decode step's rows in one list, up to the one that gets the new token; nothing for a prefill.

    flat_blocks i32 [total] block ids, flat_rows [total] the row of each, flat_starts [total] the position of its
    first token.
    """
    if step.shape.phase == "prefill":
        return {}
    tables, total = step.inputs["tables"], step.shape.total_blocks
    used = np.arange(tables.shape[1]) <= step.inputs["context_lens"][:, None] // BLOCK_TOKENS
    rows, columns = np.nonzero(used & (tables[:, :1] != PAD_BLOCK))
    return {
        "flat_blocks": _filled(tables[rows, columns], total, PAD_BLOCK),
        "flat_rows": _filled(rows, total, 0),
        "flat_starts": _filled(columns * BLOCK_TOKENS, total, NOWHERE),
    }


def _filled(values: NDArray[np.integer], length: int, fill: int) -> I32:
    out = np.full(length, fill, np.int32)
    out[: len(values)] = values
    return out


def _packed(arrays: Mapping[str, I32]) -> I32:
    return np.concatenate([array.reshape(-1) for array in arrays.values()])
