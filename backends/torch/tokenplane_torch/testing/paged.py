"""What the attention functions of vendors' libraries compute, row by row, for stand-ins that take their arguments.

Strict about what a compiled kernel cannot see for itself: dtypes, shapes and memory order.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from ..kernels import LayerNeed
from ..kv_cache import LayerShape

NEEDS = {
    "plain": LayerNeed(4, LayerShape(4, 16, 16, torch.bfloat16)),
    "grouped": LayerNeed(6, LayerShape(2, 32, 32, torch.float16)),
    "window": LayerNeed(4, LayerShape(2, 16, 16, torch.bfloat16), window=9),
    "softcap": LayerNeed(4, LayerShape(2, 16, 16, torch.bfloat16), softcap=3.0),
    "window and softcap": LayerNeed(4, LayerShape(1, 16, 16, torch.float16), window=5, softcap=2.0),
    "sinks": LayerNeed(4, LayerShape(2, 16, 16, torch.bfloat16), sinks=True),
    "unlike dims": LayerNeed(4, LayerShape(4, 24, 16, torch.bfloat16)),
    "float32": LayerNeed(4, LayerShape(4, 16, 16, torch.float32)),
    "large heads": LayerNeed(4, LayerShape(4, 512, 512, torch.bfloat16)),
}
"""Layers that libraries do or do not serve."""


def attend_rows(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    query_starts: Tensor,
    key_lengths: Tensor,
    tables: Tensor,
    scaling: float,
    window: tuple[int, int],
    softcap: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of rows, the last query of each seeing its last key: [t, heads, value_dim].

    Shapes:
        query [t, heads, key_dim], caches [blocks, block_tokens, kv_heads, dim], query_starts i32 [n + 1],
        key_lengths i32 [n], tables i32 [n, blocks]. window: keys seen left and right of the query's own, -1 for all.
    """
    rows = len(key_lengths)
    assert query.is_contiguous() and key_cache.is_contiguous() and value_cache.is_contiguous()
    assert query_starts.shape == (rows + 1,) and tables.shape[0] == rows and query_starts[-1] == len(query)
    assert {query_starts.dtype, key_lengths.dtype, tables.dtype} == {torch.int32} and tables.is_contiguous()
    assert query.dtype == key_cache.dtype == value_cache.dtype and window[1] in (-1, 0)
    out = query.new_empty((*query.shape[:2], value_cache.shape[3]))
    for row in range(rows):
        start, end, length = int(query_starts[row]), int(query_starts[row + 1]), int(key_lengths[row])
        at = torch.arange(length)
        place = tables[row, at // key_cache.shape[1]].long(), at % key_cache.shape[1]
        position = torch.arange(length - (end - start), length)[:, None]
        hidden = at > position
        if window[0] >= 0:
            hidden |= at < position - window[0]
        keys, values = (cache[place].float() for cache in (key_cache, value_cache))
        for head in range(query.shape[1]):
            kv_head = head * key_cache.shape[2] // query.shape[1]
            scores = query[start:end, head].float() @ keys[:, kv_head].T * scaling
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            scores = scores.masked_fill(hidden, -torch.inf)
            if sinks is not None:
                scores = torch.cat([scores, sinks[head].float().expand(len(scores), 1)], -1)
            out[start:end, head] = (scores.softmax(-1)[:, :length] @ values[:, kv_head]).to(out.dtype)
    return out


def install(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> ModuleType:
    """Make a module importable under a name, for one test."""
    module = ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)
    return module
