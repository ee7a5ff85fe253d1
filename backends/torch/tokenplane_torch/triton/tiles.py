"""How large the tiles of the attention kernel are, from shapes and the limits of the device. Knows no cards.

Chosen by rule and not by trying out: which kernel runs, and so every rounding, must not depend on what else the
machine was doing at start.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from tokenplane_core.backend.errors import UnsupportedModel

from .limits import DeviceLimits

MOST_DIM = 256  # head sizes beyond it leave no room for a useful tile
MOST_SPLITS = 64
LEAST_TILES = 4  # tiles of keys that make a split worth its second pass


@dataclass(frozen=True, slots=True)
class Tile:
    rows: int  # queries times heads; at least 16, the smallest product of matrix units
    keys: int
    warps: int
    stages: int  # depth of the compiler's pipeline over tiles of keys


def buffer_bytes(tile: Tile, width: int, item: int, compiler: str) -> int:
    """What the keys and values under way take; width: of a key and a value together."""
    # Matrix units that read shared memory themselves (64 rows and more, since Hopper) hold one stage longer.
    holds_one_more = compiler != "hip" and tile.rows >= 64
    depth = tile.stages if holds_one_more else max(tile.stages - 1, 1)
    return depth * tile.keys * width * item


def shared_bytes(tile: Tile, key_width: int, value_width: int, item: int, compiler: str) -> int:
    """What the attention kernel takes at most, as measured over the targets of aot.py, which checks what fits."""
    queries, weights = (item * tile.rows * width for width in (key_width, tile.keys))
    buffers = buffer_bytes(tile, key_width + value_width, item, compiler)
    if compiler == "hip":  # queries move on to registers before keys come
        return max(queries, weights + buffers)
    return queries + weights + buffers


def choose_tile(wanted_rows: int, key_dim: int, value_dim: int, dtype: torch.dtype, limits: DeviceLimits) -> Tile:
    """The tile for at most `wanted_rows` rows (tokens times heads of a group) of one KV head.

    Raises:
        UnsupportedModel: no tile fits.
    """
    if max(key_dim, value_dim) > MOST_DIM:
        raise UnsupportedModel(f"its head size is {max(key_dim, value_dim)}, and the Triton kernels end at {MOST_DIM}")
    widths = triton.next_power_of_2(key_dim), triton.next_power_of_2(value_dim)
    wide, item = max(widths) > 128, dtype.itemsize
    # What registers hold: float32 is multiplied without matrix units, in loops that compilers unroll.
    most_rows, most_keys = (16, 16) if item > 2 else (64, 32) if wide else (128, 64)
    rows = min(max(triton.next_power_of_2(wanted_rows), 16), most_rows)
    few = rows < 64
    warps = 8 if not few or (wide and item > 2) else 4
    # AMD's compiler pipelines differently from 4 stages on, and spills.
    for stages in (4, 3, 2) if few and limits.compiler != "hip" else (3, 2):
        tile = Tile(rows, most_keys, warps, stages)
        # Few rows wait for memory: two programs on a processor hide more of that than one with all the memory.
        roomy = not few or 2 * buffer_bytes(tile, sum(widths), item, limits.compiler) <= limits.shared_bytes
        if roomy and shared_bytes(tile, *widths, item, limits.compiler) <= limits.shared_bytes:
            return tile
    for keys in (32, 16):
        for stages in (2, 1):
            tile = Tile(rows, keys, warps, stages)
            if keys <= most_keys and shared_bytes(tile, *widths, item, limits.compiler) <= limits.shared_bytes:
                return tile
    raise UnsupportedModel(
        f"head sizes {key_dim} and {value_dim} in {dtype} need more shared memory than the device's "
        f"{limits.shared_bytes} bytes"
    )


def choose_splits(programs: int, keys: int, tile: Tile, limits: DeviceLimits) -> int:
    """Over how many programs the keys of a tile are split: a power of two, 1 if the device is full without.

    programs: without splitting. keys: the most that a tile sees.
    """
    # As with shared memory: two programs of few rows are on a processor, and one of many.
    wanted = (2 if tile.rows < 64 else 1) * limits.processors // max(programs, 1)
    worth = keys // (LEAST_TILES * tile.keys)
    most = min(wanted, worth, MOST_SPLITS)
    return 1 << (most.bit_length() - 1) if most > 1 else 1
