"""Ragged paged attention on XLA: the Pallas kernel that comes with torch-xla on a TPU, its twin elsewhere.

Both read one tensor per layer in which the K and V heads alternate, with heads padded to the width of the TPU's lanes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokenplane_core.backend.errors import UnsupportedModel
from tokenplane_torch.attention import AttentionRule
from tokenplane_torch.kernels import LayerNeed
from tokenplane_torch.kv_cache import LayerShape
from tokenplane_torch.step import Rows

LANES = 128  # width of a TPU's vector registers: the kernel wants the head dimension in multiples of it


@dataclass(frozen=True, slots=True)
class PagedCache:
    """The cache of one layer."""

    pages: Tensor  # [blocks, block_tokens, 2 * kv_heads, dim] K of head 0, V of head 0, K of head 1 ...

    def tensors(self) -> list[Tensor]:
        return [self.pages]


def page_dim(shape: LayerShape, lanes: int) -> int:
    """The widest of K and V, rounded up to whole lanes."""
    return -(-max(shape.key_dim, shape.value_dim) // lanes) * lanes


def token_bytes(shape: LayerShape, lanes: int) -> int:
    return 2 * shape.kv_heads * page_dim(shape, lanes) * shape.dtype.itemsize


class RaggedKernels:
    """Attention for rows of any length at once, decode rows among them."""

    def __init__(self, use_kernel: bool) -> None:
        self._use_kernel = use_kernel

    def describe(self) -> Mapping[str, str]:
        twin = "tensor operations: the reference twin, XLA runs on the host"
        return {
            "attention": "pallas: torch.ops.xla.ragged_paged_attention" if self._use_kernel else twin,
            "write_kv": "xla: scatter into donated pages",
        }

    def write_kv(self, cache: Any, key: Tensor, value: Tensor, index: Tensor) -> None:
        """Into cache.pages, of a PagedCache."""
        tokens, heads, _ = key.shape
        dim = cache.pages.shape[3]
        both = torch.stack([pad(key, (0, dim - key.shape[2])), pad(value, (0, dim - value.shape[2]))], 2)
        cache.pages.view(-1, 2 * heads, dim).index_copy_(0, index, both.reshape(tokens, 2 * heads, dim))

    def attend_prefill(self, query: Tensor, cache: Any, rows: Rows, rule: AttentionRule, out: Tensor) -> None:
        # The kernel takes rows that lie back to back from the first token on. Padded steps are made so; the few
        # ragged steps of the load-time check are not.
        attend = kernel if self._use_kernel and rows.host is None else twin
        out.copy_(attend(query, cache.pages, rows, rule, out))

    attend_decode = attend_prefill


def kernel(query: Tensor, pages: Tensor, rows: Rows, rule: AttentionRule, out: Tensor) -> Tensor:
    """[t, heads, value_dim]; tokens of no row hold anything.

    Softmax scale, window and soft cap are the kernel's. It reads tables, lengths and starts from scalar memory, which
    bounds rows times blocks.
    """
    import torch_xla.experimental.custom_kernel  # noqa: F401  registers the operation

    ends = rows.first_tokens + rows.num_tokens
    attended: Tensor = torch.ops.xla.ragged_paged_attention(
        pad(query, (0, pages.shape[3] - query.shape[2])),
        pages,
        rows.context_lens + rows.num_tokens,
        rows.tables,
        torch.cat([rows.first_tokens[:1], ends]),
        (rows.num_tokens > 0).sum(0, keepdim=True, dtype=torch.int32),
        sm_scale=rule.scaling,
        sliding_window=rule.window,
        soft_cap=rule.softcap,
    )
    return attended[..., : out.shape[2]]


def twin(query: Tensor, pages: Tensor, rows: Rows, rule: AttentionRule, out: Tensor) -> Tensor:
    """The same with tensor operations, for rows anywhere; tokens of other rows keep what `out` holds.

    Gathers the whole table of each token's row: memory grows with tokens times the longest sequence.
    """
    tokens, heads, dim = query.shape
    row, owned = _row_of_token(rows, tokens)
    position = rows.context_lens[row] + torch.arange(tokens, device=query.device) - rows.first_tokens[row]
    gathered = pages[rows.tables[row].long()].flatten(1, 2)  # [t, keys, 2 * kv_heads, dim]
    at = torch.arange(gathered.shape[1], device=query.device)
    visible = at <= position[:, None]
    if rule.window is not None:
        visible = visible & (at > position[:, None] - rule.window)
    gathered = torch.where(visible[..., None, None], gathered, 0)  # what nobody wrote may be a NaN
    keys, values = gathered[:, :, 0::2, :dim], gathered[:, :, 1::2, : out.shape[2]]
    grouped = query.reshape(tokens, keys.shape[2], -1, dim)
    scores = torch.einsum("thgd,tkhd->thgk", grouped, keys).float() * rule.scaling
    if rule.softcap is not None:
        scores = torch.tanh(scores / rule.softcap) * rule.softcap
    scores = scores.masked_fill(~visible[:, None, None], torch.finfo(scores.dtype).min)
    weights = _softmax(scores, rule.sinks).to(values.dtype)
    attended = torch.einsum("thgk,tkhd->thgd", weights, values).reshape(tokens, heads, -1)
    return torch.where(owned[:, None, None], attended, out)


def _row_of_token(rows: Rows, tokens: int) -> tuple[Tensor, Tensor]:
    """i64 [t] which of the rows each token belongs to, and bool [t] whether it belongs to one."""
    at = torch.arange(tokens, device=rows.tables.device)[:, None]
    inside = (at >= rows.first_tokens) & (at < rows.first_tokens + rows.num_tokens)
    return inside.to(torch.int32).argmax(-1), inside.any(-1)


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    if sinks is None:
        return torch.softmax(scores, -1)
    tokens, kv_heads, group, _ = scores.shape
    column = sinks.float().reshape(1, kv_heads, group, 1).expand(tokens, -1, -1, 1)
    return torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1]


def require_kernel_fits(needs: Sequence[LayerNeed]) -> None:
    """Raises UnsupportedModel where the Pallas kernel cannot serve a layer."""
    for layer, need in enumerate(needs):
        packing = 4 // need.shape.dtype.itemsize
        combined, odd = divmod(2 * need.shape.kv_heads, packing)
        if odd or not (combined in (1, 2, 4, 8) or combined % 8 == 0):
            raise UnsupportedModel(
                f"layer {layer} has {need.shape.kv_heads} KV heads of {need.shape.dtype}; the TPU kernel tiles 1, 2, 4"
                " or a multiple of 8"
            )
        if need.sinks:
            raise UnsupportedModel(f"layer {layer} has attention sinks, which the TPU kernel does not compute")
