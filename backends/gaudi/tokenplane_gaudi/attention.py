"""Attention on Gaudi: FusedSDPA for prompts, flat paged attention for decode steps.

Flat: instead of one padded table per row, one list of all blocks of the batch, each attended by its row's query alone;
then the parts of a row are put together as in online softmax. Work follows the blocks there are, not the longest row
times the rows. The idea is that of the "flat PA" in Intel's vLLM forks (HabanaAI/vllm-fork, vllm-project/vllm-gaudi).

Every shape follows from the step's shape. The cache is only updated as a whole tensor, never through a view: HPU
graphs do not capture that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenplane_torch.attention import AttentionRule
from tokenplane_torch.fixed_kernels import FixedKernels
from tokenplane_torch.kv_cache import LayerCache
from tokenplane_torch.step import Rows

from .bridge import Bridge

LOWEST = -1e30  # stands for a maximum over nothing: far below any score, and exp(x - LOWEST) of x = -inf is still 0


class GaudiKernels:
    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge
        self._plain = FixedKernels()

    def describe(self) -> Mapping[str, str]:
        return {
            "attention": "prefill: FusedSDPA (plain torch for layers with soft caps, sinks or other value sizes);"
            " decode: flat paged attention",
            "write_kv": "torch: index_put",
        }

    def write_kv(self, cache: LayerCache, key: Tensor, value: Tensor, index: Tensor) -> None:
        size = cache.key.shape[1]
        at = (index // size, index % size)
        cache.key.index_put_(at, key)
        cache.value.index_put_(at, value)

    # --- Decode ---------------------------------------------------------------------------------------------

    def attend_decode(self, query: Tensor, cache: LayerCache, rows: Rows, rule: AttentionRule, out: Tensor) -> None:
        blocks = rows.once("gaudi blocks", lambda: flat_list(rows))
        visible = rows.once(("gaudi visible", rule.window), lambda: blocks.visible(rule.window))
        tokens = rows.first_tokens.long()
        out.index_copy_(0, tokens, attend_flat(query.index_select(0, tokens), cache, blocks, visible, rule))

    # --- Prefill --------------------------------------------------------------------------------------------

    def attend_prefill(self, query: Tensor, cache: LayerCache, rows: Rows, rule: AttentionRule, out: Tensor) -> None:
        if rule.softcap is not None or rule.sinks is not None or cache.key.shape[3] != cache.value.shape[3]:
            return self._plain.attend_prefill(query, cache, rows, rule, out)
        width = rows.most_tokens
        queries = _rectangle(query, rows).transpose(1, 2)
        causal = rows.fresh and (rule.window is None or rule.window >= width)
        keys = width if causal else rows.tables.shape[1] * rows.block_tokens
        key, value = (_gathered(blocks, rows, keys).transpose(1, 2) for blocks in (cache.key, cache.value))
        if causal:
            lengths = rows.num_tokens.clamp(min=1)  # a padding row has none, which no kernel promises to bear
            attended = self._bridge.fused_sdpa(queries, key, value, rule.scaling, None, lengths)
        else:
            mask = rows.once(("gaudi mask", rule.window), lambda: _mask(rows, keys, rule.window, query.dtype))
            attended = self._bridge.fused_sdpa(queries, key, value, rule.scaling, mask, None)
        _put_back(attended.transpose(1, 2), rows, out)


# --- Flat paged attention -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FlatBlocks:
    """The blocks of all rows of a decode step, in one list of fixed length."""

    ids: Tensor  # i32 [c]
    rows: Tensor  # i64 [c]
    starts: Tensor  # i32 [c] position of a block's first token
    queries: Tensor  # i32 [c] position of the row's query
    belongs: Tensor  # f32 [n, c] 1 where the block is the row's: moves blocks to rows on the matrix engine
    block_tokens: int

    def visible(self, window: int | None) -> Tensor:
        """bool [c, block_tokens]"""
        keys = self.starts[:, None] + torch.arange(self.block_tokens, device=self.ids.device)
        seen = keys <= self.queries[:, None]
        return seen if window is None else seen & (keys > self.queries[:, None] - window)


def flat_list(rows: Rows) -> FlatBlocks:
    """As the executor has made it; of a step without one, all entries of the tables, needed or not."""
    n, width = rows.tables.shape
    device = rows.tables.device
    if "flat_blocks" in rows.extra:
        ids, owner, starts = (rows.extra[name] for name in ("flat_blocks", "flat_rows", "flat_starts"))
    else:
        ids = rows.tables.reshape(-1)
        owner = torch.arange(n, device=device).repeat_interleave(width, output_size=n * width)
        starts = (torch.arange(width, device=device) * rows.block_tokens).repeat(n)
    owner = owner.long()
    belongs = torch.arange(n, device=device)[:, None] == owner
    return FlatBlocks(
        ids, owner, starts, rows.context_lens.index_select(0, owner), belongs.to(torch.float32), rows.block_tokens
    )


def attend_flat(query: Tensor, cache: LayerCache, blocks: FlatBlocks, visible: Tensor, rule: AttentionRule) -> Tensor:
    """One query per row over the row's blocks; a row without blocks gets zeros.

    Shapes:
        query [n, heads, key_dim] -> [n, heads, value_dim]. Inside, h is [kv_heads, heads / kv_heads].
    """
    n, heads, _ = query.shape
    kv_heads = cache.key.shape[2]
    key = cache.key.index_select(0, blocks.ids).permute(0, 2, 3, 1)  # [c, kv_heads, key_dim, block_tokens]
    value = cache.value.index_select(0, blocks.ids)
    value = torch.where(visible[:, :, None, None], value, 0).transpose(1, 2)  # what nobody wrote may be a NaN

    own = query.index_select(0, blocks.rows).view(len(blocks.rows), kv_heads, heads // kv_heads, -1)
    scores = torch.matmul(own, key).float() * rule.scaling  # [c, h, block_tokens]
    if rule.softcap is not None:
        scores = torch.tanh(scores / rule.softcap) * rule.softcap
    scores = torch.where(visible[:, None, None], scores, -torch.inf)

    # Each block by itself, relative to its own highest score ...
    peak = scores.amax(-1, keepdim=True).clamp(min=LOWEST)
    weights = torch.exp(scores - peak)
    sums = weights.sum(-1).flatten(1)  # [c, heads]
    parts = torch.matmul(weights.to(value.dtype), value).flatten(1, 2)  # [c, heads, value_dim]

    # ... then all relative to the highest score of the row.
    peak = peak.flatten(1)
    owner = blocks.rows[:, None].expand(-1, heads)
    highest = peak.new_full((n, heads), LOWEST).scatter_reduce(0, owner, peak, "amax")
    if rule.sinks is not None:
        highest = torch.maximum(highest, rule.sinks.float())
    share = torch.exp(peak - highest.index_select(0, blocks.rows))  # [c, heads]
    total = torch.matmul(blocks.belongs, sums * share)
    if rule.sinks is not None:
        total = total + torch.exp(rule.sinks.float() - highest)
    summands = (parts * share[..., None].to(parts.dtype)).flatten(1)
    attended = torch.matmul(blocks.belongs.to(parts.dtype), summands).view(n, heads, -1)
    return (attended / total.clamp(min=1e-30)[..., None]).to(query.dtype)


# --- Prompts in a rectangle ---------------------------------------------------------------------------------


def _is_rectangle(rows: Rows, tokens: int) -> bool:
    """Whether the step is laid out as one: always in service, not while a loaded model is checked."""
    return rows.host is None and tokens == len(rows) * rows.most_tokens


def _rectangle(query: Tensor, rows: Rows) -> Tensor:
    """[t, heads, dim] -> [n, width, heads, dim]; any token, where a row has ended."""
    if not _is_rectangle(rows, len(query)):
        offsets = torch.arange(rows.most_tokens, device=query.device)
        places = (rows.first_tokens.long()[:, None] + offsets).clamp(max=len(query) - 1)
        query = query.index_select(0, places.reshape(-1))
    return query.view(len(rows), rows.most_tokens, *query.shape[1:])


def _gathered(blocks: Tensor, rows: Rows, keys: int) -> Tensor:
    """The first `keys` positions of each row [n, keys, kv_heads, dim], zeros where nothing was written."""
    n = len(rows)
    columns = -(-keys // rows.block_tokens)
    ids = rows.tables[:, :columns].reshape(-1)
    found = blocks.index_select(0, ids).view(n, -1, *blocks.shape[2:])[:, :keys]
    written = rows.once(("gaudi written", keys), lambda: _written(rows, keys))
    return torch.where(written[..., None, None], found, 0)


def _written(rows: Rows, keys: int) -> Tensor:
    """bool [n, keys]"""
    return torch.arange(keys, device=rows.tables.device) < (rows.context_lens + rows.num_tokens)[:, None]


def _mask(rows: Rows, keys: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """[n, 1, width, keys] 0 where a query sees a key, else -inf. Behind a row's end like its last token."""
    device = rows.tables.device
    last = (rows.context_lens + rows.num_tokens - 1).clamp(min=0)[:, None]
    position = rows.context_lens[:, None] + torch.arange(rows.most_tokens, device=device)
    position = torch.minimum(position, last)[..., None]
    key = torch.arange(keys, device=device)
    seen = key <= position if window is None else (key <= position) & (key > position - window)
    return torch.where(seen, 0.0, -torch.inf).to(dtype)[:, None]


def _put_back(attended: Tensor, rows: Rows, out: Tensor) -> None:
    """Write the rectangle [n, width, heads, dim] to the tokens [t, heads, dim] of the step; padding gets zeros."""
    width = rows.most_tokens
    owned = torch.arange(width, device=out.device) < rows.num_tokens[:, None]
    total = len(out)
    if _is_rectangle(rows, total):
        out.copy_(torch.where(owned[..., None, None], attended, 0).reshape(out.shape))
        return
    # What no row owns goes to a token behind the last one.
    places = rows.first_tokens.long()[:, None] + torch.arange(width, device=out.device)
    result = torch.cat([out, out.new_zeros((1, *out.shape[1:]))])
    result.index_copy_(0, torch.where(owned, places, total).reshape(-1), attended.flatten(0, 1))
    out.copy_(result[:total])
