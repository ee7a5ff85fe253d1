"""Which block belongs to whom: a pool of fixed-size blocks and the index of full blocks by content.

Knows block ids and token ids; the memory behind an id belongs to the backend. A block is in one of three states:
used (reference count > 0), cached (count 0, full, still in the index: reusable by content until evicted), or
empty (count 0, not indexed). Cached and empty blocks are both free; empty ones are handed out first, then cached
ones, least recently used first.

Invariant: free + used = total, and every reference is held by a live sequence (checked by `check`).
"""

from __future__ import annotations

import hashlib
import os
import random
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from ..backend.records import PAD_BLOCK

BlockKey = bytes
"""Names the content of a full block and of everything before it: a chain of salted hashes."""


class BlockPool:
    """Reference-counted blocks with an index by content.

    num_blocks counts the block PAD_BLOCK, which is never handed out.
    """

    def __init__(self, num_blocks: int, block_tokens: int, prefix_cache: bool = True) -> None:
        self.block_tokens = block_tokens
        self.prefix_cache = prefix_cache
        self.num_total = num_blocks - 1
        self._counts = [0] * num_blocks
        self._keys: list[BlockKey | None] = [None] * num_blocks
        self._index: dict[BlockKey, int] = {}
        self._empty = [block for block in range(num_blocks - 1, -1, -1) if block != PAD_BLOCK]
        self._cached: OrderedDict[int, None] = OrderedDict()
        # A fresh salt for each process: nobody can craft a prompt whose hash meets another's.
        self._salt = os.urandom(16)

    @property
    def num_free(self) -> int:
        return len(self._empty) + len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_total - self.num_free

    def shuffle(self, rng: random.Random) -> None:
        """Hand empty blocks out in random order: for tests that must not depend on neighbours."""
        rng.shuffle(self._empty)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold that many tokens."""
        return -(-num_tokens // self.block_tokens)

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` blocks with one reference each, evicting cached content if needed; None if too few are free."""
        if count > self.num_free:
            return None
        blocks = []
        for _ in range(count):
            if self._empty:
                block = self._empty.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                self._forget(block)
            self._counts[block] = 1
            blocks.append(block)
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Add a reference to blocks that `match` returned."""
        for block in blocks:
            if self._counts[block] == 0:
                del self._cached[block]
            self._counts[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference each. Content that is indexed stays reusable.

        From the last block to the first, so that the tail of a chain is evicted before what leads to it.
        """
        for block in reversed(blocks):
            self._counts[block] -= 1
            assert self._counts[block] >= 0, f"block {block} released more often than taken"
            if self._counts[block] == 0:
                if self._keys[block] is None:
                    self._empty.append(block)
                else:
                    self._cached[block] = None

    def extend_keys(self, keys: list[BlockKey], token_ids: array[int], salt: bytes = b"") -> None:
        """Append to `keys` until every full block of the tokens has one.

        salt: what else their content depends on; of a length that no other keys' beginning has.
        """
        size = self.block_tokens
        for start in range(len(keys) * size, len(token_ids) - size + 1, size):
            parent = keys[-1] if keys else salt
            content = parent + token_ids[start : start + size].tobytes()
            keys.append(hashlib.blake2b(content, digest_size=16, key=self._salt).digest())

    def match(self, keys: Sequence[BlockKey]) -> list[int]:
        """The indexed blocks that hold the longest prefix of the content `keys` name. Takes no reference."""
        blocks: list[int] = []
        for key in keys:
            block = self._index.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def is_free(self, block: int) -> bool:
        return self._counts[block] == 0

    def publish(self, block: int, key: BlockKey) -> None:
        """Index a used block under its content. A block with the same content that came first stays the one found."""
        if self.prefix_cache and key not in self._index:
            self._index[key] = block
            self._keys[block] = key

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        if key is not None:
            del self._index[key]
            self._keys[block] = None

    def check(self, held: Iterable[Sequence[int]]) -> None:
        """Assert the invariants; `held` are the block lists of all live sequences."""
        expected = [0] * len(self._counts)
        for blocks in held:
            for block in blocks:
                expected[block] += 1
        assert expected == self._counts, "reference counts differ from what live sequences hold"
        assert expected[PAD_BLOCK] == 0, "the padding block was handed out"
        free = set(self._empty) | set(self._cached)
        assert len(free) == self.num_free, "a block is free twice"
        assert all(self._counts[block] == 0 for block in free), "a used block is free"
        assert self.num_free + sum(count > 0 for count in self._counts) == self.num_total, "a block is lost"
        assert all(self._keys[block] == key for key, block in self._index.items()), "the index points astray"
