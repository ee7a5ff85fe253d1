"""Attention of padded steps in plain tensor operations: every shape follows from the step's shape.

The twin of what graphs and compilers run, and the reference where a vendor's kernel is missing. It reads whole block
tables, so it is as slow as the longest sequence allowed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .attention import AttentionRule
from .kv_cache import LayerCache
from .step import Rows


class FixedKernels:
    """No host data, no synchronisation, no shape that depends on a value."""

    def describe(self) -> Mapping[str, str]:
        return {"attention": "torch: fixed-shape reference", "write_kv": "torch: index_copy"}

    def write_kv(self, cache: LayerCache, key: Tensor, value: Tensor, index: Tensor) -> None:
        cache.key_tokens.index_copy_(0, index, key.reshape(len(index), -1))
        cache.value_tokens.index_copy_(0, index, value.reshape(len(index), -1))

    def attend_decode(self, query: Tensor, cache: LayerCache, rows: Rows, rule: AttentionRule, out: Tensor) -> None:
        tokens = rows.first_tokens.long()
        attended = _attend(query[tokens][:, None], *_gather(cache, rows), rows, rule)
        out.index_copy_(0, tokens, attended[:, 0])

    def attend_prefill(self, query: Tensor, cache: LayerCache, rows: Rows, rule: AttentionRule, out: Tensor) -> None:
        total = len(query)
        offsets = torch.arange(rows.most_tokens, device=query.device)
        tokens = rows.first_tokens.long()[:, None] + offsets  # [n, w]
        attended = _attend(query[tokens.clamp(max=total - 1)], *_gather(cache, rows), rows, rule)
        # What a row does not own goes to an extra token behind the last one, and is dropped.
        owned = torch.where(offsets < rows.num_tokens[:, None], tokens, total).reshape(-1)
        result = torch.cat([out, out.new_zeros((1, *out.shape[1:]))])
        result.index_copy_(0, owned, attended.reshape(-1, *attended.shape[2:]))
        out.copy_(result[:total])


def _gather(cache: LayerCache, rows: Rows) -> tuple[Tensor, Tensor]:
    """Keys and values [n, length, kv_heads, dim] of every block in the tables."""
    tables = rows.tables.long()
    keys, values = cache.key[tables], cache.value[tables]
    return keys.flatten(1, 2), values.flatten(1, 2)


def _attend(query: Tensor, keys: Tensor, values: Tensor, rows: Rows, rule: AttentionRule) -> Tensor:
    """query [n, w, heads, dim] -> [n, w, heads, value_dim]."""
    n, width, heads, dim = query.shape
    kv_heads = keys.shape[2]
    at = torch.arange(keys.shape[1], device=query.device)  # key positions
    position = rows.context_lens.long()[:, None] + torch.arange(width, device=query.device)  # [n, w]
    visible = at <= position[..., None]  # [n, w, length]
    if rule.window is not None:
        visible &= at > position[..., None] - rule.window
    written = at < (rows.context_lens + rows.num_tokens).long()[:, None]  # [n, length]
    values = torch.where(written[..., None, None], values, 0)
    keys = torch.where(written[..., None, None], keys, 0)
    grouped = query.reshape(n, width, kv_heads, heads // kv_heads, dim)
    scores = torch.einsum("nwkgd,nlkd->nkgwl", grouped, keys).float() * rule.scaling
    if rule.softcap is not None:
        scores = torch.tanh(scores / rule.softcap) * rule.softcap
    scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
    if rule.sinks is not None:
        sinks = rule.sinks.float().reshape(1, kv_heads, -1, 1, 1).expand(n, -1, -1, width, 1)
        weights = torch.softmax(torch.cat([scores, sinks], -1), -1)[..., :-1]
    else:
        weights = torch.softmax(scores, -1)
    out = torch.einsum("nkgwl,nlkd->nwkgd", weights.to(values.dtype), values)
    return out.reshape(n, width, heads, -1)
