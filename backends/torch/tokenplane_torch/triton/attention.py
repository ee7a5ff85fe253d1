"""Attention over the paged cache: online softmax over a range of keys, for prefill and decode alike.

One program takes a tile of queries that share a KV head (some tokens of a row, times the heads of a group), so that
each key and value is read once for all of them. A decode row is a tile of one token. Where that gives too few
programs to fill the device, the keys of a tile are split over several programs and `_combine` adds their results up
(the scheme known as flash-decoding); this serves few tokens over a long context as well.

Positions nobody wrote may hold NaN, and NaN times a weight of zero is NaN: they are masked at the load.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# (Triton compiles kernel bodies itself; their arguments have no Python types.)

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from ..attention import AttentionRule
from ..kv_cache import LayerCache
from ..step import Rows
from .limits import DeviceLimits
from .tiles import choose_splits, choose_tile
from .workspace import Workspace

LOG2E = math.log2(math.e)  # scores are kept in base 2: exp2 is the instruction that devices have


def attend(
    query: Tensor,
    cache: LayerCache,
    rows: Rows,
    rule: AttentionRule,
    out: Tensor,
    limits: DeviceLimits,
    workspace: Workspace,
) -> None:
    """Causal attention of the tokens of `rows`; writes those tokens of out and no others.

    Shapes:
        query [t, heads, key_dim], out [t, heads, value_dim] over the tokens of the whole step; out's inner stride is 1.
    """
    if query.stride(2) != 1:
        query = query.contiguous()
    heads, kv_heads = query.shape[1], cache.key.shape[2]
    key_dim, value_dim = cache.key.shape[3], cache.value.shape[3]
    group = heads // kv_heads
    tile = choose_tile(rows.most_tokens * group, key_dim, value_dim, cache.key.dtype, limits)
    packed = min(group, tile.rows)  # heads in a tile
    queries = tile.rows // packed  # tokens in a tile
    parts = triton.cdiv(group, packed)
    tiles = triton.cdiv(rows.most_tokens, queries)
    keys = rows.most_keys if rule.window is None else min(rows.most_keys, rule.window + queries)
    splits = choose_splits(tiles * kv_heads * parts * len(rows), keys, tile, limits)
    partial, stats = out, out  # not read if there is one split
    if splits > 1:
        shape = (len(rows), rows.most_tokens, heads, splits)
        partial = workspace.take("partial", (*shape, value_dim), out.device)
        stats = workspace.take("stats", (*shape, 2), out.device)
    _attend[(tiles, kv_heads * parts, len(rows) * splits)](
        query,
        cache.key,
        cache.value,
        rule.sinks,
        out,
        partial,
        stats,
        rows.first_tokens,
        rows.num_tokens,
        rows.context_lens,
        rows.tables,
        rule.scaling * LOG2E if rule.softcap is None else rule.scaling * 2 * LOG2E / rule.softcap,
        *query.stride()[:2],
        *cache.key.stride()[:3],
        *cache.value.stride()[:3],
        *out.stride()[:2],
        rows.tables.stride(0),
        rows.most_tokens,
        splits,
        HEADS=heads,
        GROUP=group,
        PACKED=packed,
        QUERIES=queries,
        BLOCK_TOKENS=cache.key.shape[1],
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        WINDOW=rule.window or 0,
        SOFTCAP=0.0 if rule.softcap is None else rule.softcap * LOG2E,
        SPLIT=splits > 1,
        ROWS=tile.rows,
        KEYS=tile.keys,
        KEY_TILE=triton.next_power_of_2(key_dim),
        VALUE_TILE=triton.next_power_of_2(value_dim),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if splits > 1:
        _combine[(rows.most_tokens, heads, len(rows))](
            partial,
            stats,
            out,
            rows.first_tokens,
            rows.num_tokens,
            *out.stride()[:2],
            rows.most_tokens,
            HEADS=heads,
            VALUE_DIM=value_dim,
            SPLITS=splits,
            VALUE_TILE=triton.next_power_of_2(value_dim),
        )


# Sizes that change from step to step are not specialised on: each would compile the kernel again.
@triton.jit(do_not_specialize=["table_row", "most_tokens", "splits"])
def _attend(
    query,
    key,
    value,
    sinks,  # None: no sinks
    out,
    partial,  # f32 [rows, most_tokens, HEADS, splits, VALUE_DIM]
    stats,  # f32 [rows, most_tokens, HEADS, splits, 2] highest score and sum of weights
    first_tokens,
    num_tokens,
    context_lens,
    tables,
    scale,
    query_token,  # strides in elements, here and below
    query_head,
    key_block,
    key_token,
    key_head,
    value_block,
    value_token,
    value_head,
    out_token,
    out_head,
    table_row,
    most_tokens,
    splits,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PACKED: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    KEY_TILE: tl.constexpr,
    VALUE_TILE: tl.constexpr,
):
    row = (tl.program_id(2) // splits).to(tl.int64)
    split = tl.program_id(2) % splits
    new = tl.load(num_tokens + row)
    # The last queries see the most keys: they start first, so that the device is busy to the end.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    if first >= new:
        return
    context = tl.load(context_lens + row)

    # Row r of the tile is token r // PACKED and head r % PACKED of the group.
    PARTS: tl.constexpr = (GROUP + PACKED - 1) // PACKED
    kv_head = tl.program_id(1) // PARTS
    r = tl.arange(0, ROWS)
    token = first + r // PACKED
    lane = (tl.program_id(1) % PARTS) * PACKED + r % PACKED
    owned = (r < QUERIES * PACKED) & (token < new) & (lane < GROUP)
    head = kv_head * GROUP + lane
    position = context + token
    packed_token = tl.load(first_tokens + row).to(tl.int64) + token

    key_dim, value_dim = tl.arange(0, KEY_TILE), tl.arange(0, VALUE_TILE)
    q = tl.load(
        query + (packed_token * query_token + head * query_head)[:, None] + key_dim[None, :],
        mask=owned[:, None] & (key_dim < KEY_DIM)[None, :],
        other=0.0,
    )

    # Keys that some query of the tile sees: [start, end), of which this split takes [low, high).
    end = context + tl.minimum(first + QUERIES, new)
    start = 0
    if WINDOW > 0:
        start = tl.maximum(context + first - WINDOW + 1, 0)
    share = tl.cdiv(tl.cdiv(end - start, KEYS), splits) * KEYS
    low = start + split * share
    high = tl.minimum(low + share, end)

    # The lowest number instead of -inf: differences of it with -inf and with itself are no NaN.
    top = tl.full([ROWS], -3.0e38, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + head, mask=owned, other=0.0).to(tl.float32) * 1.4426950408889634
        top = tl.where(split == 0, sink, top)
        total = tl.where(split == 0, 1.0, total)
    acc = tl.zeros([ROWS, VALUE_TILE], tl.float32)

    tables += row * table_row
    key += kv_head * key_head
    value += kv_head * value_head
    n = low + tl.arange(0, KEYS)
    block = tl.load(tables + n // BLOCK_TOKENS, mask=n < high, other=0).to(tl.int64)
    for _ in range(low, high, KEYS):
        real = n < high
        inner = n % BLOCK_TOKENS
        k = tl.load(
            key + (block * key_block + inner * key_token)[None, :] + key_dim[:, None],
            mask=real[None, :] & (key_dim < KEY_DIM)[:, None],
            other=0.0,
        )
        # ieee matters for float32 alone, which would otherwise be rounded to tf32.
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if SOFTCAP > 0:
            # tanh(x) = 1 - 2 / (exp(2 x) + 1), with 2 log2(e) in scale; an exp of inf gives 1 as it should.
            scores = SOFTCAP - 2 * SOFTCAP / (tl.exp2(scores) + 1)
        visible = real[None, :] & (n[None, :] <= position[:, None])
        if WINDOW > 0:
            visible = visible & (n[None, :] > position[:, None] - WINDOW)
        scores = tl.where(visible, scores, float("-inf"))

        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        fade = tl.exp2(top - new_top)
        total = total * fade + tl.sum(weights, 1)
        v = tl.load(
            value + (block * value_block + inner * value_token)[:, None] + value_dim[None, :],
            mask=real[:, None] & (value_dim < VALUE_DIM)[None, :],
            other=0.0,
        )
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
        top = new_top
        # Block ids come an iteration ahead: otherwise compilers spend their pipeline stages on them, not on the keys.
        n += KEYS
        block = tl.load(tables + n // BLOCK_TOKENS, mask=n < high, other=0).to(tl.int64)

    mask = owned[:, None] & (value_dim < VALUE_DIM)[None, :]
    if not SPLIT:
        total = tl.where(total > 0, total, 1.0)  # rows of the tile that nobody owns
        where = (packed_token * out_token + head * out_head)[:, None] + value_dim[None, :]
        tl.store(out + where, (acc / total[:, None]).to(out.dtype.element_ty), mask=mask)
    else:
        slot = ((row * most_tokens + token) * HEADS + head) * splits + split
        tl.store(stats + slot * 2, top, mask=owned)
        tl.store(stats + slot * 2 + 1, total, mask=owned)
        tl.store(partial + slot[:, None] * VALUE_DIM + value_dim[None, :], acc, mask=mask)


@triton.jit(do_not_specialize=["most_tokens"])
def _combine(
    partial,
    stats,
    out,
    first_tokens,
    num_tokens,
    out_token,
    out_head,
    most_tokens,
    HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    VALUE_TILE: tl.constexpr,
):
    """One token and head: weigh what the splits found by their highest scores."""
    token, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if token >= tl.load(num_tokens + row):
        return
    slot = ((row * most_tokens + token) * HEADS + head) * SPLITS + tl.arange(0, SPLITS)
    top, total = tl.load(stats + slot * 2), tl.load(stats + slot * 2 + 1)
    weight = tl.exp2(top - tl.max(top, 0))
    dim = tl.arange(0, VALUE_TILE)
    parts = tl.load(partial + slot[:, None] * VALUE_DIM + dim[None, :], mask=(dim < VALUE_DIM)[None, :], other=0.0)
    result = tl.sum(parts * weight[:, None], 0) / tl.sum(total * weight, 0)
    packed_token = tl.load(first_tokens + row).to(tl.int64) + token
    where = packed_token * out_token + head * out_head + dim
    tl.store(out + where, result.to(out.dtype.element_ty), mask=dim < VALUE_DIM)
