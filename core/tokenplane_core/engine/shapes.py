"""Which bucket a tentative batch falls into, and what it costs. One table for ragged, soft and hard devices."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from ..backend.records import Bucket, Limits, ShapePolicy

Phase = Literal["prefill", "decode"]


@dataclass(slots=True)
class Extent:
    """How big a batch is: what decides its bucket."""

    rows: int = 0
    prompts: int = 0  # rows that are not decode rows
    tokens: int = 0
    widest: int = 0  # most new tokens in a row
    most_blocks: int = 0  # most context blocks of a row
    total_blocks: int = 0

    def plus(self, tokens: int, blocks: int, prompt: bool) -> Extent:
        """The extent with one more row."""
        return Extent(
            self.rows + 1,
            self.prompts + prompt,
            self.tokens + tokens,
            max(self.widest, tokens),
            max(self.most_blocks, blocks),
            self.total_blocks + blocks,
        )

    def plus_decoding(self, blocks: Collection[int]) -> Extent:
        """The extent with a decode row for each entry, which is the row's context blocks; at least one."""
        return Extent(
            self.rows + len(blocks),
            self.prompts,
            self.tokens + len(blocks),
            max(self.widest, 1),
            max(self.most_blocks, max(blocks)),
            self.total_blocks + sum(blocks),
        )

    def plus_drafts(self, count: int, blocks_before: int, blocks: int) -> Extent:
        """The extent with `count` drafts behind the one token of a decode row, whose context blocks they change."""
        return Extent(
            self.rows,
            self.prompts,
            self.tokens + count,
            max(self.widest, 1 + count),
            max(self.most_blocks, blocks),
            self.total_blocks + blocks - blocks_before,
        )


class ShapeTable:
    """Answers `fit` and `room` from a device's ShapePolicy and Limits."""

    def __init__(self, policy: ShapePolicy, limits: Limits) -> None:
        self.policy = policy
        self.limits = limits
        self._buckets: dict[Phase, list[Bucket]] = {"prefill": [], "decode": []}
        for bucket in sorted(policy.buckets, key=lambda b: (b.tokens, b.rows, b.context_blocks)):
            # A bucket above the step limit is of no use, and must not hide that a soft device runs the batch without.
            if bucket.tokens <= limits.max_step_tokens and policy.mode != "ragged":
                self._buckets[bucket.phase].append(bucket)
        self._tokens = {phase: [bucket.tokens for bucket in buckets] for phase, buckets in self._buckets.items()}

    def bucket(self, phase: Phase, extent: Extent) -> Bucket | None:
        """The cheapest listed shape that holds the batch, or None."""
        buckets = self._buckets[phase]
        for i in range(bisect_left(self._tokens[phase], extent.tokens), len(buckets)):
            if self._holds(buckets[i], extent):
                return buckets[i]
        return None

    def cost(self, phase: Phase, extent: Extent) -> int | None:
        """Padded tokens the batch costs, or None if the device cannot run it."""
        limits = self.limits
        if extent.rows > limits.max_sequences or extent.prompts > limits.max_prefill_rows:
            return None
        if limits.max_table_entries is not None and extent.rows * extent.most_blocks > limits.max_table_entries:
            return None
        bucket = self.bucket(phase, extent)
        if bucket is not None:
            cost = bucket.tokens
        elif self.policy.mode == "hard":
            return None
        else:
            cost = extent.rows * extent.widest if phase == "prefill" and self.policy.pad_rows else extent.tokens
        return cost if cost <= self.limits.max_step_tokens else None

    def room(self, phase: Phase, extent: Extent) -> int:
        """Most new tokens one more row could have, as far as listed shapes and the step limit say."""
        limit = self.limits.max_step_tokens - (0 if self.policy.pad_rows else extent.tokens)
        if self.policy.mode != "hard":
            return limit
        rooms = [
            self._row_tokens(bucket) if self.policy.pad_rows else bucket.tokens - extent.tokens
            for bucket in self._buckets[phase]
            if bucket.rows > extent.rows and (not self.policy.pad_rows or self._row_tokens(bucket) >= extent.widest)
        ]
        return min(limit, max(rooms, default=0))

    def longest_prompt(self, chunked: bool, max_model_tokens: int) -> int:
        """Most prompt tokens the device can take in: all of them if it takes them in pieces."""
        return max_model_tokens if chunked else min(max_model_tokens, self.room("prefill", Extent()))

    @staticmethod
    def _row_tokens(bucket: Bucket) -> int:
        return bucket.tokens // bucket.rows

    def _holds(self, bucket: Bucket, extent: Extent) -> bool:
        if bucket.rows < extent.rows:
            return False
        if self.policy.pad_rows and bucket.phase == "prefill":
            if self._row_tokens(bucket) < extent.widest:
                return False
        elif bucket.tokens < extent.tokens:
            return False
        if self.policy.context_rule == "max_per_row":
            return bucket.context_blocks >= extent.most_blocks
        if self.policy.context_rule == "total":
            return bucket.context_blocks >= extent.total_blocks
        return True
