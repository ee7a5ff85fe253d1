"""Scatter the keys and values of a step's tokens into the paged cache."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# (Triton compiles kernel bodies itself; their arguments have no Python types.)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

TILE = 1024  # elements that one program copies


def write_kv(key_cache: Tensor, value_cache: Tensor, key: Tensor, value: Tensor, index: Tensor) -> None:
    """Write key [t, kv_heads, key_dim] and value [t, kv_heads, value_dim] to the caches [blocks, block_tokens, ...].

    index: i64 [t] rows of the cache seen as one row per token. Equal indices (padding tokens all go to PAD_BLOCK) are
    allowed; which of them is kept is open.
    """
    tokens, heads, key_dim = key.shape
    value_dim = value.shape[2]
    _write[(tokens, triton.cdiv(heads * max(key_dim, value_dim), TILE))](
        key_cache,
        value_cache,
        key,
        value,
        index,
        *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        *key.stride(),
        *value.stride(),
        HEADS=heads,
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        BLOCK_TOKENS=key_cache.shape[1],
        TILE=TILE,
    )


@triton.jit
def _write(
    key_cache,
    value_cache,
    key,
    value,
    index,
    key_cache_block,  # strides in elements, here and below
    key_cache_token,
    key_cache_head,
    value_cache_block,
    value_cache_token,
    value_cache_head,
    key_token,
    key_head,
    key_inner,
    value_token,
    value_head,
    value_inner,
    HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TILE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    at = tl.load(index + token)  # i64: caches exceed 2**31 elements
    block, inner = at // BLOCK_TOKENS, at % BLOCK_TOKENS
    key_cache += block * key_cache_block + inner * key_cache_token
    value_cache += block * value_cache_block + inner * value_cache_token
    _copy(key + token * key_token, key_cache, key_head, key_inner, key_cache_head, HEADS, KEY_DIM, TILE)
    _copy(value + token * value_token, value_cache, value_head, value_inner, value_cache_head, HEADS, VALUE_DIM, TILE)


@triton.jit
def _copy(
    source, target, source_head, source_inner, target_head, HEADS: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr
):
    """One token's [HEADS, DIM], of which each program takes a tile."""
    element = tl.program_id(1) * TILE + tl.arange(0, TILE)
    head, dim = element // DIM, element % DIM
    real = element < HEADS * DIM
    tl.store(
        target + head * target_head + dim,
        tl.load(source + head * source_head + dim * source_inner, mask=real),
        mask=real,
    )
