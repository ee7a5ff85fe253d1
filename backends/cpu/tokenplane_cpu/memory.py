"""Memory that the library computes over, taken from the system page by page."""

from __future__ import annotations

import contextlib
import ctypes
import mmap


def zeroed_memory(size_bytes: int) -> mmap.mmap:
    """Zeroed memory, on huge pages where the system has some: a step goes through gigabytes once."""
    memory = mmap.mmap(-1, max(1, size_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def address(memory: mmap.mmap) -> int:
    """Where it lies; the mapping must outlive every use."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
