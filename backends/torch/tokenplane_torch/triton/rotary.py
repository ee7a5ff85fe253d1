"""Rotary embedding, halves rotated against each other, as transformers' `apply_rotary_pos_emb` does for most models."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# (Triton compiles kernel bodies itself; their arguments have no Python types.)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, query_out: Tensor, key_out: Tensor) -> None:
    """Rotate the first rotary_dim of each head and copy the rest; the outputs may be the inputs (in place).

    Shapes:
        query [t, heads, dim], key [t, kv_heads, dim] and their outputs, any strides with inner stride 1; cos and sin
        [t, rotary_dim], rotary_dim even and at most dim.
    """
    tokens, heads, dim = query.shape
    rotary_dim = cos.shape[-1]
    _rotate[(tokens,)](
        query,
        key,
        cos,
        sin,
        query_out,
        key_out,
        *query.stride()[:2],
        *key.stride()[:2],
        *query_out.stride()[:2],
        *key_out.stride()[:2],
        cos.stride(0),
        sin.stride(0),
        HEADS=heads,
        KV_HEADS=key.shape[1],
        HALF=rotary_dim // 2,
        REST=dim - rotary_dim,
        HEADS_TILE=triton.next_power_of_2(heads),
        KV_HEADS_TILE=triton.next_power_of_2(key.shape[1]),
        HALF_TILE=triton.next_power_of_2(rotary_dim // 2),
        REST_TILE=triton.next_power_of_2(max(dim - rotary_dim, 1)),
    )


@triton.jit
def _rotate(
    query,
    key,
    cos,
    sin,
    query_out,
    key_out,
    query_token,  # strides in elements
    query_head,
    key_token,
    key_head,
    query_out_token,
    query_out_head,
    key_out_token,
    key_out_head,
    cos_token,
    sin_token,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    HEADS_TILE: tl.constexpr,
    KV_HEADS_TILE: tl.constexpr,
    HALF_TILE: tl.constexpr,
    REST_TILE: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    cos += t * cos_token
    sin += t * sin_token
    _rotate_heads(query + t * query_token, query_out + t * query_out_token, query_head, query_out_head, cos, sin,
                  HEADS, HALF, REST, HEADS_TILE, HALF_TILE, REST_TILE)  # fmt: skip
    _rotate_heads(key + t * key_token, key_out + t * key_out_token, key_head, key_out_head, cos, sin,
                  KV_HEADS, HALF, REST, KV_HEADS_TILE, HALF_TILE, REST_TILE)  # fmt: skip


@triton.jit
def _rotate_heads(
    x,
    out,
    x_head,
    out_head,
    cos,
    sin,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    HEADS_TILE: tl.constexpr,
    HALF_TILE: tl.constexpr,
    REST_TILE: tl.constexpr,
):
    head = tl.arange(0, HEADS_TILE)[:, None]
    dim = tl.arange(0, HALF_TILE)[None, :]
    mask = (head < HEADS) & (dim < HALF)
    left = tl.load(x + head * x_head + dim, mask=mask, other=0.0).to(tl.float32)
    right = tl.load(x + head * x_head + HALF + dim, mask=mask, other=0.0).to(tl.float32)
    # Both halves of cos and sin are read: nobody promises that they are equal.
    left_cos = tl.load(cos + dim, mask=dim < HALF, other=0.0).to(tl.float32)
    right_cos = tl.load(cos + HALF + dim, mask=dim < HALF, other=0.0).to(tl.float32)
    left_sin = tl.load(sin + dim, mask=dim < HALF, other=0.0).to(tl.float32)
    right_sin = tl.load(sin + HALF + dim, mask=dim < HALF, other=0.0).to(tl.float32)
    element = out.dtype.element_ty
    tl.store(out + head * out_head + dim, (left * left_cos - right * left_sin).to(element), mask=mask)
    tl.store(out + head * out_head + HALF + dim, (right * right_cos + left * right_sin).to(element), mask=mask)
    if REST > 0:
        rest = tl.arange(0, REST_TILE)[None, :]
        mask = (head < HEADS) & (rest < REST)
        values = tl.load(x + head * x_head + 2 * HALF + rest, mask=mask)
        tl.store(out + head * out_head + 2 * HALF + rest, values, mask=mask)
