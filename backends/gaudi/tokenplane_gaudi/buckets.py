"""Which shapes are captured: rows x new tokens x context blocks, spaced so that warm-up stays short.

A step on Gaudi costs reading the weights plus what its shape asks for, used or not, and a shape that was not captured
costs seconds of compilation. So each dimension is as coarse as its padding is cheap:

* Rows of a decode step grow by 4: up to a few dozen rows the weights decide, not the rows.
* Context blocks of all rows together grow by 2: padding there is memory traffic, at most twice the real one.
* New tokens of a prompt grow by 2, from one block on: below it a prefill costs the weights anyway.
* Several prompts share a prefill in rectangles of 4 rows, whose context grows by 4.

Both phases count blocks in total over the rows, for the decode kernel works on one list of all blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

from tokenplane_core.backend.records import Bucket, ShapePolicy

BLOCK_TOKENS = 128
PREFILL_ROWS = 4
MOST_BLOCKS = 4096
"""Of one step, unless a single sequence has more: a layer's gathered keys and values take about 2 GiB then (8 KV heads
of 128 in bfloat16). The core takes turns with what does not fit."""


def shape_policy(sequences: int, step_tokens: int, max_model_tokens: int) -> ShapePolicy:
    """All buckets. `step_tokens` bounds prompts; a decode step may have more rows than that."""
    per_sequence = blocks_for(max_model_tokens)

    def contexts(rows: int, least: int, factor: int) -> Iterator[int]:
        return spaced(least, max(least, min(rows * per_sequence, max(per_sequence, MOST_BLOCKS))), factor)

    decode = [
        Bucket("decode", rows, rows, blocks) for rows in spaced(1, sequences, 4) for blocks in contexts(rows, rows, 2)
    ]
    prefill = []
    for rows, factor in ((1, 2), (PREFILL_ROWS, 4)):
        widest = min(step_tokens // rows, per_sequence * BLOCK_TOKENS)
        if rows == 1 or (sequences > 1 and widest > 0):
            prefill += [
                Bucket("prefill", rows, rows * width, blocks)
                for width in spaced(min(BLOCK_TOKENS, widest), widest, 2)
                for blocks in contexts(rows, rows * blocks_for(width), factor)
            ]
    return ShapePolicy("hard", tuple(decode + prefill), pad_rows=True, context_rule="total")


def blocks_for(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)


def spaced(first: int, last: int, factor: int) -> Iterator[int]:
    """first, factor * first, ... and `last` at the end; first <= last."""
    while first < last:
        yield first
        first *= factor
    yield last
