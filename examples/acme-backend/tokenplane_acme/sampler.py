"""Sampling on the card: greedy, temperature, top_k, top_p. The core does the rest on the host, from logits.

The meaning, the order and the draw are those of tokenplane_core/backend/sampling.py.
"""

from __future__ import annotations

import numpy as np

from tokenplane_core.backend.records import F32, I32

FEATURES = frozenset({"temperature", "top_k", "top_p"})


def draw(logits: F32, temperature: F32, top_k: I32, top_p: F32, us: F32) -> I32:
    """One id for each row of f32 [R, vocab]. `us` f32 [R] are the published random numbers, made on the host."""
    best: I32 = logits.argmax(-1).astype(np.int32)
    drawn = temperature > 0
    if not drawn.any():
        return best
    scaled = logits / np.where(drawn, temperature, 1)[:, None].astype(np.float32)
    order = np.argsort(-scaled, axis=-1, kind="stable")  # best first, the lower id on a tie
    ranks = np.arange(logits.shape[-1])
    kept = ranks < np.where(top_k > 0, top_k, len(ranks))[:, None]
    probabilities = _softmax(np.where(kept, np.take_along_axis(scaled, order, -1), -np.inf))
    mass_before = np.cumsum(probabilities, -1, dtype=np.float64) - probabilities
    kept &= (mass_before < top_p[:, None]) | (ranks == 0) | (top_p[:, None] >= 1)
    in_order = np.zeros_like(probabilities)
    np.put_along_axis(in_order, order, np.where(kept, probabilities, 0), -1)
    cumulative = np.cumsum(in_order, -1, dtype=np.float64)
    # The first id whose cumulative probability exceeds u, of what the filters left.
    token_ids: I32 = (cumulative <= us[:, None].astype(np.float64) * cumulative[:, -1:]).sum(-1, dtype=np.int32)
    best[drawn] = token_ids[drawn]
    return best


def _softmax(scores: F32) -> F32:
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    probabilities: F32 = weights / weights.sum(-1, keepdims=True)
    return probabilities
