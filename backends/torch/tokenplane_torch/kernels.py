"""The kernel seam, and the plain torch twin that every faster kernel is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tokenplane_core.backend.errors import ContractViolation
from tokenplane_core.backend.records import I32

from .attention import AttentionRule
from .kv_cache import LayerCache, LayerShape
from .step import HostRows, Rows


@dataclass(frozen=True, slots=True)
class LayerNeed:
    """What the attention of one layer needs, as it was seen when the loaded model ran."""

    heads: int
    shape: LayerShape
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    scaling: float | None = None  # of scores; None: key_dim ** -0.5


class AttentionKernels(Protocol):
    """What a device plugin supplies to compute attention over the paged cache.

    Shapes everywhere: query [t, heads, key_dim] and out [t, heads, value_dim] over the t packed tokens of the step,
    of which a call reads and writes only those of its rows. Positions of the cache that nobody wrote may hold anything,
    a NaN too. In a padded step (padded.py) `rows.host` is None and a call may neither look at values on the host nor
    choose shapes by them; it serves decode rows of a prefill batch in `attend_prefill`.
    """

    def describe(self) -> Mapping[str, str]:
        """Which implementation each piece has, and why: Capabilities.kernels."""
        ...

    def write_kv(self, cache: LayerCache, key: Tensor, value: Tensor, index: Tensor) -> None:
        """Write key [t, kv_heads, key_dim] and value [t, kv_heads, value_dim] to the cache rows `index` i64 [t]."""
        ...

    def attend_prefill(self, query: Tensor, cache: LayerCache, rows: Rows, rule: AttentionRule, out: Tensor) -> None:
        """Causal attention for rows of several tokens, whose K and V are in the cache already."""
        ...

    def attend_decode(self, query: Tensor, cache: LayerCache, rows: Rows, rule: AttentionRule, out: Tensor) -> None:
        """The same for rows of one token."""
        ...


@dataclass(frozen=True, slots=True)
class _DecodePart:
    """Decode rows that are attended together, padded to the longest."""

    tokens: Tensor | slice  # their packed tokens
    index: Tensor  # i64 [rows * length] cache rows of their keys
    mask: Tensor | None  # [rows, 1, 1, length] 0 or -inf; None: no row is padded


@dataclass(frozen=True, slots=True)
class _PrefillRow:
    tokens: slice
    index: Tensor  # i64 [length] cache rows of its keys
    mask: Tensor | None  # [tokens, length] 0 or -inf; None: plain causal over the row's own tokens


class TorchKernels:
    """Gather, then torch's attention. Decode rows go together, prompt rows one after the other. Ragged steps only.

    Not for two threads at once: the gathered keys and values live in buffers that all layers and steps share.
    """

    gather_tokens = 1 << 16  # keys gathered at once for decode rows: bounds the buffers, not the batch

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def describe(self) -> Mapping[str, str]:
        return {"attention": "torch: gather and scaled_dot_product_attention", "write_kv": "torch: index_copy"}

    def write_kv(self, cache: LayerCache, key: Tensor, value: Tensor, index: Tensor) -> None:
        cache.key_tokens.index_copy_(0, index, key.reshape(len(index), -1))
        cache.value_tokens.index_copy_(0, index, value.reshape(len(index), -1))

    def attend_prefill(self, query: Tensor, cache: LayerCache, rows: Rows, rule: AttentionRule, out: Tensor) -> None:
        for row in rows.once(("prefill", rule.window), lambda: _prefill_rows(rows, rule.window, query.dtype)):
            keys, values = self._gather(cache, row.index, 1)
            queries = query[row.tokens].transpose(0, 1).unsqueeze(0)
            out[row.tokens] = _attend(queries, keys, values, row.mask, rule, causal=row.mask is None)[0].transpose(0, 1)

    def attend_decode(self, query: Tensor, cache: LayerCache, rows: Rows, rule: AttentionRule, out: Tensor) -> None:
        parts = rows.once(
            ("decode", rule.window), lambda: _decode_parts(rows, rule.window, query.dtype, self.gather_tokens)
        )
        for part in parts:
            queries = query[part.tokens]
            count, heads, _ = queries.shape
            keys, values = self._gather(cache, part.index, count)
            # The heads that share a KV head stand in as its queries: no key is repeated.
            shared = queries.reshape(count, keys.shape[1], -1, queries.shape[2])
            out[part.tokens] = _attend(shared, keys, values, part.mask, rule).reshape(count, heads, -1)

    def _gather(self, cache: LayerCache, index: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Keys and values [rows, kv_heads, length, dim], valid until the next call."""

        def gather(name: str, tokens: Tensor, blocks: Tensor) -> Tensor:
            width = tokens.shape[1]
            wanted = len(index) * width
            buffer = self._buffers.get((name, tokens.dtype, tokens.device))
            if buffer is None or buffer.numel() < wanted:
                # A fresh allocation of this size costs page faults each time, many times the copy itself.
                buffer = self._buffers[name, tokens.dtype, tokens.device] = tokens.new_empty(wanted)
            gathered = torch.index_select(tokens, 0, index, out=buffer[:wanted].view(len(index), width))
            return gathered.view(rows, -1, *blocks.shape[2:]).transpose(1, 2)

        return gather("key", cache.key_tokens, cache.key), gather("value", cache.value_tokens, cache.value)


def _planned(rows: Rows) -> HostRows:
    if rows.host is None:
        raise ContractViolation("TorchKernels plans on the host and cannot serve padded steps; FixedKernels can")
    return rows.host


def _decode_parts(rows: Rows, window: int | None, dtype: torch.dtype, gather_tokens: int) -> list[_DecodePart]:
    """Cut decode rows into parts of at most `gather_tokens` gathered keys (but at least one row)."""
    host = _planned(rows)
    lengths = host.context_lens.astype(np.int64) + 1
    visible = lengths if window is None else np.minimum(lengths, window)
    step = max(1, gather_tokens // int(visible.max()))
    parts = []
    for start in range(0, len(lengths), step):
        chosen = slice(start, min(start + step, len(lengths)))
        first = (lengths - visible)[chosen, None]
        offsets = np.arange(visible[chosen].max())
        padding = offsets >= visible[chosen, None]
        # Padding repeats the row's first visible key: masked, but certainly written.
        index = host.cache_index(chosen, first + np.where(padding, 0, offsets), rows.block_tokens)
        mask = host.upload(np.where(padding, np.float32(-np.inf), np.float32(0))).to(dtype)[:, None, None]
        tokens = _token_index(host, host.first_tokens[chosen])
        parts.append(_DecodePart(tokens, host.upload(index.reshape(-1)), mask if padding.any() else None))
    return parts


def _token_index(host: HostRows, first_tokens: I32) -> Tensor | slice:
    """A slice where rows of one token lie side by side: it costs no copy."""
    start, count = int(first_tokens[0]), len(first_tokens)
    if first_tokens[-1] - start == count - 1 and (np.diff(first_tokens) == 1).all():
        return slice(start, start + count)
    return host.upload(first_tokens.astype(np.int64))


def _prefill_rows(rows: Rows, window: int | None, dtype: torch.dtype) -> list[_PrefillRow]:
    host = _planned(rows)
    plans = []
    for i, (start, count, context) in enumerate(
        zip(host.first_tokens.tolist(), host.num_tokens.tolist(), host.context_lens.tolist(), strict=True)
    ):
        end = context + count
        first = 0 if window is None else max(0, context - window + 1)
        keys = np.arange(first, end)
        mask = None
        if context > 0 or (window is not None and end > window):
            distance = np.arange(context, end)[:, None] - keys
            hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
            mask = host.upload(np.where(hidden, np.float32(-np.inf), np.float32(0))).to(dtype)
        index = host.upload(host.cache_index(i, keys, rows.block_tokens))
        plans.append(_PrefillRow(slice(start, start + count), index, mask))
    return plans


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, rule: AttentionRule, causal: bool = False
) -> Tensor:
    """query [n, heads, q, dim], keys and values [n, kv_heads, length, dim], mask [..., q or 1, length] or None.

    In a decode part the queries of a KV head are its heads; sinks, one per head, then run along q.
    """
    grouped = query.shape[1] != keys.shape[1]
    if rule.softcap is None and rule.sinks is None:
        return scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=causal, scale=rule.scaling, enable_gqa=grouped
        )
    if grouped:
        repeats = query.shape[1] // keys.shape[1]
        keys, values = keys.repeat_interleave(repeats, 1), values.repeat_interleave(repeats, 1)
    scores = torch.matmul(query, keys.transpose(2, 3)) * rule.scaling
    if rule.softcap is not None:
        scores = torch.tanh(scores / rule.softcap) * rule.softcap
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    if rule.sinks is not None:
        sinks = rule.sinks.to(scores.dtype).reshape(1, query.shape[1], -1, 1)
        scores = torch.cat([scores, sinks.expand(len(scores), -1, scores.shape[2], 1)], -1)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(values.dtype)
    return torch.matmul(weights[..., : keys.shape[2]], values)
