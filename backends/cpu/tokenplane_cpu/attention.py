"""The native attention kernels behind the kit's seam, and their choice; native/attention.h has the laws.

The cache is in the kernels' own layout (native/kernels/attention.h): memory that nobody else reads.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from tokenplane_core.backend.errors import ConfigError, ContractViolation
from tokenplane_torch.attention import AttentionRule
from tokenplane_torch.choice import Unavailable
from tokenplane_torch.device import ONLY
from tokenplane_torch.kernels import AttentionKernels, LayerNeed, TorchKernels
from tokenplane_torch.kv_cache import LayerCache, LayerShape
from tokenplane_torch.step import Rows

from .conditions import NATIVE
from .native import built_library, isa, library
from .structs import BLOCK_TOKENS, AttentionStruct, RowsStruct, TokenRowsStruct

TORCH = "torch"  # as users name the twins
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}  # TP_F32, TP_BF16, TP_INT8


class NativeKernels:
    """Attention and KV writes in one call each. Ragged steps only; not for two threads at once.

    Args:
        cache_dtype: torch.float32, torch.bfloat16 or torch.int8 (with a scale for each token and head).
    """

    def __init__(self, cache_dtype: torch.dtype) -> None:
        self.cache_dtype = cache_dtype
        self._workspace = torch.empty(0, dtype=torch.uint8)

    def describe(self) -> Mapping[str, str]:
        kept = str(self.cache_dtype).removeprefix("torch.")
        return {"attention": f"native ({isa()}), {kept} cache", "write_kv": f"native ({isa()})"}

    # --- The cache ------------------------------------------------------------------------------------------

    def allocate(self, shapes: Sequence[LayerShape], num_blocks: int) -> list[LayerCache]:
        """A cache in the kernels' layout, one entry per layer; not cleared."""

        def blocks(kv_heads: int, size_bytes: int) -> Tensor:
            dtype = torch.uint8 if self.cache_dtype is torch.int8 else self.cache_dtype
            return torch.empty((num_blocks, kv_heads, size_bytes // kv_heads // dtype.itemsize), dtype=dtype)

        sizes = [self.layer_block_bytes(shape) for shape in shapes]
        return [
            LayerCache(blocks(shape.kv_heads, key), blocks(shape.kv_heads, value))
            for shape, (key, value) in zip(shapes, sizes, strict=True)
        ]

    def block_bytes(self, shapes: Sequence[LayerShape]) -> int:
        """Memory of one block over all layers, padding and scales included."""
        return sum(sum(self.layer_block_bytes(shape)) for shape in shapes)

    def layer_block_bytes(self, shape: LayerShape) -> tuple[int, int]:
        """Memory of the keys and of the values of one block."""
        layer = self._layer(shape.kv_heads, shape.kv_heads, shape.key_dim, shape.value_dim)
        found = built_library()
        return found.tp_key_block_bytes(ctypes.byref(layer)), found.tp_value_block_bytes(ctypes.byref(layer))

    # --- A step ---------------------------------------------------------------------------------------------

    def write_kv(self, cache: LayerCache, key: Tensor, value: Tensor, index: Tensor) -> None:
        key, value = key.contiguous(), value.contiguous()
        layer = self._layer(key.shape[1], key.shape[1], key.shape[2], value.shape[2], cache)
        rows = _tokens(key), _tokens(value)
        built_library().tp_write_kv(
            ctypes.byref(layer), ctypes.byref(rows[0]), ctypes.byref(rows[1]), index.data_ptr(), len(index)
        )

    def attend_prefill(self, query: Tensor, cache: LayerCache, rows: Rows, rule: AttentionRule, out: Tensor) -> None:
        self._attend(query, cache, rows, rule, out)

    def attend_decode(self, query: Tensor, cache: LayerCache, rows: Rows, rule: AttentionRule, out: Tensor) -> None:
        self._attend(query, cache, rows, rule, out)

    def _attend(self, query: Tensor, cache: LayerCache, rows: Rows, rule: AttentionRule, out: Tensor) -> None:
        query = query.contiguous()
        layer = self._layer(query.shape[1], cache.key.shape[1], query.shape[2], out.shape[2], cache)
        layer.scaling, layer.softcap, layer.window = rule.scaling, rule.softcap or 0.0, rule.window or 0
        sinks = None if rule.sinks is None else rule.sinks.float().contiguous()
        layer.sinks = None if sinks is None else sinks.data_ptr()
        of_step, _ = rows.once("native", lambda: _rows(rows))
        queries, results = _tokens(query), _tokens(out)
        built_library().tp_attend(
            ctypes.byref(layer),
            ctypes.byref(of_step),
            ctypes.byref(queries),
            ctypes.byref(results),
            self._room(layer, rows.most_keys),
        )

    def _room(self, layer: AttentionStruct, most_keys: int) -> int:
        """The address of memory for one call, 64-byte aligned."""
        wanted = built_library().tp_attention_workspace_bytes(ctypes.byref(layer), most_keys) + 64
        if self._workspace.numel() < wanted:
            self._workspace = torch.empty(wanted, dtype=torch.uint8)
        return (self._workspace.data_ptr() + 63) // 64 * 64

    def _layer(
        self, heads: int, kv_heads: int, key_dim: int, value_dim: int, cache: LayerCache | None = None
    ) -> AttentionStruct:
        layer = AttentionStruct(
            type=TYPES[self.cache_dtype], heads=heads, kv_heads=kv_heads, key_dim=key_dim, value_dim=value_dim
        )
        if cache is not None:
            layer.keys, layer.values = cache.key.data_ptr(), cache.value.data_ptr()
        return layer


def _tokens(tensor: Tensor) -> TokenRowsStruct:
    return TokenRowsStruct(tensor.data_ptr(), tensor.stride(0), TYPES[tensor.dtype])


def _rows(rows: Rows) -> tuple[RowsStruct, tuple[np.ndarray, ...]]:
    """The rows as the library reads them, and what must outlive that."""
    host = rows.host
    if host is None or rows.block_tokens != BLOCK_TOKENS:
        raise ContractViolation(f"the native kernels serve ragged steps over blocks of {BLOCK_TOKENS} tokens only")
    arrays = tuple(
        np.ascontiguousarray(array, np.int32)
        for array in (host.first_tokens, host.num_tokens, host.context_lens, host.tables)
    )
    addresses = [array.ctypes.data for array in arrays]
    return RowsStruct(*addresses, None, arrays[3].shape[1], len(arrays[0])), arrays


def choose(needs: Sequence[LayerNeed], cache_dtype: torch.dtype | None = None) -> AttentionKernels:
    """The native kernels where they serve all layers, else the torch twins, which then say why.

    Args:
        cache_dtype: of the KV cache; None: the layers' own.

    Raises:
        ConfigError: `ONLY` names other kernels, or those that cannot serve; or the torch twins are left, which keep no
            cache of another dtype.
    """
    only = os.environ.get(ONLY, "")
    if only not in ("", NATIVE, TORCH):
        raise ConfigError(f"{ONLY} (--attention) is {only!r}; the kernels for a CPU are {NATIVE!r} and {TORCH!r}")
    try:
        if only == TORCH:
            raise Unavailable(f"{ONLY} is {TORCH!r}")
        return NativeKernels(_cache_dtype(needs, cache_dtype))
    except Unavailable as reason:
        if only == NATIVE:
            raise ConfigError(f"{ONLY} (--attention) is {NATIVE!r}, which cannot serve here: {reason}") from None
        if cache_dtype is not None:
            kept = str(cache_dtype).removeprefix("torch.")
            raise ConfigError(
                f"only native kernels keep a KV cache in {kept}, and they cannot serve: {reason}"
            ) from None
        return ExplainedTorchKernels(str(reason))


def _cache_dtype(needs: Sequence[LayerNeed], wanted: torch.dtype | None) -> torch.dtype:
    """
    Raises:
        Unavailable: there are no native kernels for these layers.
    """
    if library() is None:
        raise Unavailable("this package was built without them")
    dtypes = {need.shape.dtype for need in needs}
    if len(dtypes) != 1 or not dtypes <= {torch.float32, torch.bfloat16}:
        raise Unavailable("they compute in float32 and bfloat16")
    if any(need.heads % need.shape.kv_heads for need in needs):
        raise Unavailable("the heads are no multiple of the KV heads")
    return wanted or dtypes.pop()


class ExplainedTorchKernels(TorchKernels):
    """The torch twins, with the reason why the native kernels do not serve."""

    def __init__(self, reason: str) -> None:
        super().__init__()
        self._reason = reason

    def describe(self) -> Mapping[str, str]:
        own = super().describe()
        return {**own, "attention": f"{own['attention']} (not native: {self._reason})"}
