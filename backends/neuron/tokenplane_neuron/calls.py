"""From batches to the vendor's two kinds of call. Plain numpy; knows neither torch nor the vendor.

What the compiled graphs do with their inputs (optimum-neuron 0.4.5, modules/decoder/modeling_decoder.py and
decoder_wrappers.py, modules/kvcache/kv_cache_manager.py), and what follows:

* Context encoding takes one right-padded prompt, writes the cache line `seq_ids[0]` from position 0 on, and returns
  the logits behind the *largest* position id. Padding therefore has position 0: then the last token's is the only
  largest.
* Token generation takes all rows at once, and row i reads and writes cache line i whatever `seq_ids` says. The
  wrapper would fill missing rows with copies of the first one, which overwrites cells of other sequences. So every
  call carries all rows in slot order, and idle rows write to the last cell of their line. Nothing ever reads that
  cell: a row at position p reads the cells below p, and no position is above the last.
* A prompt of one token is not taken for a prompt (`input_ids.shape[-1] > 1`). Decoding it at position 0 is the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokenplane_core.backend.records import I32, I64, Bucket, DecodeBatch, PrefillBatch, ShapePolicy

SHORTEST_CONTEXT_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Graphs:
    """What was compiled, or is to be."""

    rows: int  # of token generation, and cache lines
    line_tokens: int  # of a cache line: the longest sequence
    context_tokens: tuple[int, ...]  # lengths of the context graphs, shortest first
    samples: bool = False  # the device draws and returns token ids; otherwise it returns logits

    @property
    def shapes(self) -> ShapePolicy:
        contexts = [Bucket("prefill", 1, tokens) for tokens in self.context_tokens]
        return ShapePolicy("hard", (*contexts, Bucket("decode", self.rows, self.rows)))


def context_buckets(longest_tokens: int) -> tuple[int, ...]:
    """Powers of two from SHORTEST_CONTEXT_TOKENS, and the longest itself."""
    doublings = (SHORTEST_CONTEXT_TOKENS << i for i in range(32))
    return (*(tokens for tokens in doublings if tokens < longest_tokens), longest_tokens)


@dataclass(frozen=True, slots=True)
class Call:
    """The arrays of one forward, and which rows of its output were asked for."""

    input_ids: I64  # i64 [rows, tokens]
    position_ids: I64  # i64 [rows, tokens]
    seq_ids: I64  # i64 [rows] cache lines
    asked: I64  # i64 [n]


def prefill_call(batch: PrefillBatch, graphs: Graphs) -> Call:
    """The one prompt of a prefill batch, as wide as its bucket."""
    num_tokens = int(batch.num_new_tokens[0])
    if num_tokens == 1:
        return _generation(batch.slots[:1], batch.token_ids[:1], batch.context_lens[:1], graphs)
    return context_call(int(batch.slots[0]), batch.token_ids, num_tokens)


def context_call(slot: int, token_ids: I32, num_tokens: int) -> Call:
    """A prompt of `num_tokens` >= 2, the first of i32 [bucket] token ids, for one cache line."""
    positions = np.arange(len(token_ids), dtype=np.int64)
    positions[num_tokens:] = 0
    return Call(
        input_ids=token_ids.astype(np.int64)[None],
        position_ids=positions[None],
        seq_ids=np.array([slot], np.int64),
        asked=np.zeros(1, np.int64),
    )


def decode_call(batch: DecodeBatch, graphs: Graphs) -> Call:
    """The real rows of a decode batch, each in its slot's row."""
    n = batch.num_rows
    return _generation(batch.slots[:n], batch.token_ids[:n], batch.context_lens[:n], graphs)


def idle_call(graphs: Graphs) -> Call:
    """Token generation that changes no cell that is read."""
    none = np.zeros(0, np.int32)
    return _generation(none, none, none, graphs)


def _generation(slots: I32, token_ids: I32, positions: I32, graphs: Graphs) -> Call:
    """One token (i32 [n]) at its position (i32 [n]) for each of these slots (i32 [n])."""
    input_ids = np.zeros((graphs.rows, 1), np.int64)
    position_ids = np.full((graphs.rows, 1), graphs.line_tokens - 1, np.int64)
    input_ids[slots, 0], position_ids[slots, 0] = token_ids, positions
    return Call(input_ids, position_ids, np.arange(graphs.rows, dtype=np.int64), slots.astype(np.int64))
