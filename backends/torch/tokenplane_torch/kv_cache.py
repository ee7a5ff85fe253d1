"""The paged KV cache: one K and one V tensor per layer. Knows no block tables and no attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer caches for a token. Layers may differ, and so may keys and values (DeepSeek's MLA)."""

    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        return self.kv_heads * (self.key_dim + self.value_dim) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class LayerCache:
    """The cache of one layer. Block 0 is PAD_BLOCK."""

    key: Tensor  # [blocks, block_tokens, kv_heads, key_dim]
    value: Tensor  # [blocks, block_tokens, kv_heads, value_dim]

    def tensors(self) -> list[Tensor]:
        """What a step changes."""
        return [self.key, self.value]

    @property
    def key_tokens(self) -> Tensor:
        """The same memory as one row per token: [blocks * block_tokens, kv_heads * key_dim]."""
        return self.key.view(-1, self.key.shape[2] * self.key.shape[3])

    @property
    def value_tokens(self) -> Tensor:
        """[blocks * block_tokens, kv_heads * value_dim]"""
        return self.value.view(-1, self.value.shape[2] * self.value.shape[3])


def block_bytes(shapes: Sequence[LayerShape], block_tokens: int) -> int:
    """Memory of one block over all layers, K and V."""
    return block_tokens * sum(shape.token_bytes for shape in shapes)


def allocate(
    shapes: Sequence[LayerShape], num_blocks: int, block_tokens: int, device: torch.device
) -> list[LayerCache]:
    """Allocate the cache, one entry per layer.

    The memory is not cleared: on a host that commits pages on first use, an unused cache then costs nothing.
    Kernels must therefore never read a position that nobody wrote; not even to multiply it by zero, for it may
    hold a NaN.
    """

    def blocks(shape: LayerShape, dim: int) -> Tensor:
        return torch.empty((num_blocks, block_tokens, shape.kv_heads, dim), dtype=shape.dtype, device=device)

    return [LayerCache(blocks(shape, shape.key_dim), blocks(shape, shape.value_dim)) for shape in shapes]
