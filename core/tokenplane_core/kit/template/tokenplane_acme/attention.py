"""The KV cache, one line per slot, and attention over it. Yours: both kernels, `_write` and `_attend`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tokenplane_core.backend.records import F32


class Row(NamedTuple):
    """Tokens start:end of a batch: those at positions context, context + 1, ... of the sequence in `slot`."""

    slot: int
    context: int  # tokens that are in the cache already
    start: int
    end: int


class KVCache:
    """Keys and values, f32 [layers, lines, tokens, kv_heads, head_dim] each. Yours: memory on the card."""

    def __init__(self, layers: int, lines: int, tokens: int, kv_heads: int, head_dim: int) -> None:
        shape = (layers, lines, tokens, kv_heads, head_dim)
        self.keys, self.values = np.zeros(shape, np.float32), np.zeros(shape, np.float32)

    def attention(self, layer: int, q: F32, k: F32, v: F32, rows: list[Row]) -> F32:
        """Write the new keys and values, then let each token attend to all up to itself.

        q f32 [t, heads, head_dim], k and v f32 [t, kv_heads, head_dim]; returns f32 [t, heads * head_dim].
        """
        out = np.empty_like(q)
        for slot, context, start, end in rows:
            known = context + end - start
            self.keys[layer, slot, context:known] = k[start:end]
            self.values[layer, slot, context:known] = v[start:end]
            line = self.keys[layer, slot, :known], self.values[layer, slot, :known]
            out[start:end] = _attend(q[start:end], *line, context)
        return out.reshape(len(q), -1)


def _attend(q: F32, keys: F32, values: F32, context: int) -> F32:
    """q f32 [n, heads, d] at positions context and up, over f32 [c, kv_heads, d]: f32 [n, heads, d]."""
    n, heads, d = q.shape
    c, kv_heads, _ = keys.shape
    grouped = q.reshape(n, kv_heads, -1, d).transpose(1, 2, 0, 3).reshape(kv_heads, -1, d)
    scores = (grouped @ keys.transpose(1, 2, 0)).reshape(kv_heads, -1, n, c) / np.sqrt(np.float32(d))
    scores[..., np.arange(c) > context + np.arange(n)[:, None]] = -np.inf  # no token sees those after it
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed: F32 = weights.reshape(kv_heads, -1, c) @ values.transpose(1, 0, 2)
    return mixed.reshape(kv_heads, -1, n, d).transpose(2, 0, 1, 3).reshape(n, heads, d)
