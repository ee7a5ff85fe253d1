"""The native program's paged KV cache: for each layer keys and values in the kernels' own layout."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .memory import address, zeroed_memory


class Cache:
    """Memory is committed when it is first written."""

    def __init__(self, block_bytes: Sequence[tuple[int, int]]) -> None:
        """block_bytes: of the keys and of the values of one block, for each layer."""
        self._bytes = block_bytes
        self._memory: list[tuple[mmap.mmap, mmap.mmap]] = []

    @property
    def block_bytes(self) -> int:
        return sum(map(sum, self._bytes))

    def allocate(self, num_blocks: int) -> None:
        self._memory = [(zeroed_memory(k * num_blocks), zeroed_memory(v * num_blocks)) for k, v in self._bytes]

    def drop(self) -> None:
        self._memory = []

    def blocks(self) -> list[NDArray[np.uint8]]:
        """The memory u8 [blocks, bytes] of keys and of values of each layer, in the kernels' layout."""
        sizes = [size for layer in self._bytes for size in layer]
        memories = [memory for layer in self._memory for memory in layer]
        return [np.frombuffer(m, np.uint8).reshape(-1, size) for m, size in zip(memories, sizes, strict=True)]

    def addresses(self) -> list[tuple[int, int]]:
        return [(address(keys), address(values)) for keys, values in self._memory]
