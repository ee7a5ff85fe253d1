"""Paged attention on the card: where a token's cell is, writing cells, reading them through the block table.

Runs on the card, in rectangles: R rows of W new tokens each, over C cells of context. Padding is whatever a rectangle
holds beyond a row's real tokens; it writes to PAD_BLOCK and is hidden from every real token.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenplane_core.backend.records import F32, I32, PAD_BLOCK, Bool


class Rectangle(NamedTuple):
    """Where the tokens of a step live, worked out once for all layers."""

    positions: I32  # i32 [R, W] in their sequences; 0 for padding
    blocks: I32  # i32 [R, W] block that takes each new token
    offsets: I32  # i32 [R, W] and the cell within it
    context: I32  # i32 [R, C / block_tokens] the blocks each row reads
    hidden: Bool  # bool [R, W, C] cells that a token must not see


def rectangle(
    tables: I32, slots: I32, context_lens: I32, num_new: I32, width: int, context_blocks: int, block_tokens: int
) -> Rectangle:
    """Lay out the rows of a step. tables i32 [slots, blocks]; slots, context_lens, num_new i32 [R]."""
    columns = np.arange(width, dtype=np.int32)
    real = columns < num_new[:, None]
    positions = np.where(real, context_lens[:, None] + columns, 0).astype(np.int32)
    blocks = np.where(real, tables[slots[:, None], positions // block_tokens], PAD_BLOCK).astype(np.int32)
    cells = np.arange(context_blocks * block_tokens)
    hidden = cells > positions[:, :, None]  # a token sees itself and those before it; all else is stale or padding
    return Rectangle(positions, blocks, positions % block_tokens, tables[slots, :context_blocks], hidden)


def attention(keys: F32, values: F32, q: F32, k: F32, v: F32, where: Rectangle) -> F32:
    """Write k, v into the cells of their tokens and let each query attend: f32 [R, W, heads * head_dim].

    keys and values f32 [blocks, block_tokens, kv_heads, head_dim], one layer's cache; q f32 [R, W, heads, head_dim],
    k and v f32 [R, W, kv_heads, head_dim].
    """
    keys[where.blocks, where.offsets] = k
    values[where.blocks, where.offsets] = v
    rows, width, heads, d = q.shape
    kv_heads = k.shape[2]
    grouped = q.reshape(rows, width, kv_heads, -1, d).transpose(0, 2, 3, 1, 4).reshape(rows, kv_heads, -1, d)
    known = _gathered(keys, where.context).transpose(0, 2, 3, 1)  # [R, kv_heads, d, C]
    scores = (grouped @ known).reshape(rows, kv_heads, -1, width, known.shape[-1]) / np.sqrt(np.float32(d))
    scores = np.where(where.hidden[:, None, None], np.float32(-np.inf), scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights = (weights / weights.sum(-1, keepdims=True)).reshape(rows, kv_heads, -1, known.shape[-1])
    mixed = weights @ _gathered(values, where.context).transpose(0, 2, 1, 3)
    out: F32 = mixed.reshape(rows, kv_heads, -1, width, d).transpose(0, 3, 1, 2, 4).reshape(rows, width, heads * d)
    return out


def _gathered(cache: F32, blocks: I32) -> NDArray[np.float32]:
    """The cells of each row's blocks, in order: f32 [R, C, kv_heads, head_dim]."""
    return cache[blocks].reshape(len(blocks), -1, *cache.shape[2:])
