"""FlashInfer's paged prefill: planned on the host once for each kind of layer and step, run by every layer.

Only for ragged steps: a plan cannot be made while a graph is captured or replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tokenplane_torch.attention import AttentionRule
from tokenplane_torch.device import TorchDevice
from tokenplane_torch.gpu import GpuDevice
from tokenplane_torch.kv_cache import LayerCache
from tokenplane_torch.step import Rows
from tokenplane_torch.varlen import pack, page_lists

WORKSPACE_BYTES = 128 << 20  # what FlashInfer's documentation recommends


@dataclass(frozen=True, slots=True)
class Kind:
    """Layers that share a plan."""

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    scaling: float
    window: int | None
    softcap: float | None


class PagedPrefill:
    """The attention of prompt rows. Each kind has a wrapper, which holds one plan at a time: that of the last step.

    `wrapper` makes one, from a workspace that all may share, since they run one after the other.
    """

    def __init__(self, wrapper: Callable[..., Any], device: TorchDevice) -> None:
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device.torch_device)
        self._new_wrapper: Callable[[], Any] = partial(wrapper, workspace, kv_layout="NHD")
        assert isinstance(device, GpuDevice)
        self._new_event: Callable[[], Any] = device.api.Event
        self._wrappers: dict[Kind, tuple[Any, Any]] = {}

    def attend(self, query: Tensor, cache: LayerCache, rows: Rows, rule: AttentionRule, out: Tensor) -> None:
        kind = Kind(
            heads=query.shape[1],
            kv_heads=cache.key.shape[2],
            key_dim=cache.key.shape[3],
            value_dim=cache.value.shape[3],
            dtype=query.dtype,
            scaling=rule.scaling,
            window=rule.window,
            softcap=rule.softcap,
        )
        wrapper = rows.once(kind, lambda: self._planned(kind, rows))
        packed = pack(rows)
        results = packed.place(out)
        wrapper.run(packed.take(query), (cache.key, cache.value), out=results)
        packed.put(out, results)

    def _planned(self, kind: Kind, rows: Rows) -> Any:
        if kind not in self._wrappers:
            self._wrappers[kind] = self._new_wrapper(), self._new_event()
        wrapper, copied = self._wrappers[kind]
        # A plan is copied to the device from a pinned buffer of the wrapper. The copy for the step before may still
        # wait for its turn; this plan is written to the same buffer.
        copied.synchronize()
        lists = rows.once("page lists", lambda: page_lists(rows))
        assert rows.host is not None
        wrapper.plan(
            qo_indptr=torch.from_numpy(lists.query_starts),
            paged_kv_indptr=torch.from_numpy(lists.page_starts),
            paged_kv_indices=rows.host.upload(lists.pages),
            paged_kv_last_page_len=torch.from_numpy(lists.last_page_tokens),
            num_qo_heads=kind.heads,
            num_kv_heads=kind.kv_heads,
            head_dim_qk=kind.key_dim,
            head_dim_vo=kind.value_dim,
            page_size=rows.block_tokens,
            causal=True,
            sm_scale=kind.scaling,
            window_left=-1 if kind.window is None else kind.window - 1,
            logits_soft_cap=kind.softcap,
            q_data_type=kind.dtype,
            kv_data_type=kind.dtype,
        )
        copied.record()
        return wrapper
