"""The attention kernels of a device that Triton compiles for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
from torch import Tensor

from ..attention import AttentionRule
from ..kv_cache import LayerCache
from ..step import Rows
from .attention import attend
from .limits import probe
from .workspace import Workspace
from .write_kv import write_kv


class TritonKernels:
    """`AttentionKernels` in Triton. Never waits for the device, and may run in a captured graph.

    Serves bf16, fp16 and fp32, any grouping of heads, head sizes up to 256 (keys and values may differ), blocks of
    any power of two. Not for two streams at once: see Workspace.
    """

    def __init__(self, device: torch.device) -> None:
        self._limits = probe(device)
        self._workspace = Workspace()

    def describe(self) -> Mapping[str, str]:
        return {
            "attention": f"triton {triton.__version__}: paged, split over keys when rows are few",
            "write_kv": "triton: scatter",
        }

    def write_kv(self, cache: LayerCache, key: Tensor, value: Tensor, index: Tensor) -> None:
        write_kv(cache.key, cache.value, key, value, index)

    def attend_prefill(self, query: Tensor, cache: LayerCache, rows: Rows, rule: AttentionRule, out: Tensor) -> None:
        attend(query, cache, rows, rule, out, self._limits, self._workspace)

    def attend_decode(self, query: Tensor, cache: LayerCache, rows: Rows, rule: AttentionRule, out: Tensor) -> None:
        attend(query, cache, rows, rule, out, self._limits, self._workspace)
