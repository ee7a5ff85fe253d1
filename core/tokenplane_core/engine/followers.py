"""Prompts that begin with what another one is computing just now, and wait for it instead of computing it again.

Knows keys of blocks and sequences; when to wait, and where to go afterwards, is the scheduler's to say.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

from .kv_cache import BlockKey
from .sequence import Sequence


class Followers:
    """Blocks that running sequences will publish, and the sequences that wait for one of them."""

    def __init__(self) -> None:
        self._leaders: dict[BlockKey, Sequence] = {}
        self._waiting: dict[BlockKey, list[Sequence]] = {}

    def lead(self, sequence: Sequence, keys: Rows[BlockKey]) -> None:
        """`sequence` will compute these blocks, unless somebody does already."""
        for key in keys:
            self._leaders.setdefault(key, sequence)

    def num_led(self, keys: Rows[BlockKey]) -> int:
        """How many of the blocks, from the first on, somebody computes."""
        for i, key in enumerate(keys):
            if key not in self._leaders:
                return i
        return len(keys)

    def follow(self, sequence: Sequence, key: BlockKey) -> None:
        """`sequence` waits for the block, which somebody computes."""
        self._waiting.setdefault(key, []).append(sequence)

    def published(self, key: BlockKey) -> list[Sequence]:
        """The block is there for all; returns those who waited for it."""
        self._leaders.pop(key, None)
        return self._waiting.pop(key, [])

    def left(self, sequence: Sequence, keys: Rows[BlockKey]) -> list[Sequence]:
        """`sequence` will not publish these blocks any more; returns those who waited for it."""
        own = [key for key in keys if self._leaders.get(key) is sequence]
        return [follower for key in own for follower in self.published(key)]

    def all(self) -> list[Sequence]:
        """Everybody who waits."""
        return [follower for followers in self._waiting.values() for follower in followers]
