"""Attention kernels for AMD GPUs, in the order they are tried.

1. AITER's compiled prompt kernels (Composable Kernel), with its Triton kernel for decode steps.
2. AITER's Triton kernel for both.
3. Our Triton kernels; torch.

AITER comes with AMD's images or from source. The package of that name on the Python index is another one. Call
surfaces: ROCm/aiter of 2026-08 (aiter/ops/mha.py, aiter/ops/triton/attention/unified_attention.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tokenplane_torch.choice import Candidate, Unavailable
from tokenplane_torch.composed import LAST_CANDIDATES, with_writer
from tokenplane_torch.device import TorchDevice
from tokenplane_torch.kernels import AttentionKernels, LayerNeed
from tokenplane_torch.probing import Serves, library
from tokenplane_torch.step import Rows
from tokenplane_torch.varlen import Varlen, VarlenCall, VarlenFunction, page_lists

COMPILED = Serves(unlike_dims=True, block_sizes=(1, 16, 1024))
UNIFIED = Serves(sinks=True)


def _compiled(needs: Sequence[LayerNeed], device: TorchDevice) -> AttentionKernels:
    prefill, decode = _compiled_prefill(), _unified()
    for serves in (COMPILED, UNIFIED):
        serves.require(needs, device.block_tokens)
    description = "aiter: compiled kernels for prompts, unified_attention for decode"
    return with_writer(description, Varlen(prefill).attend, Varlen(decode).attend, device)


def _unified_alone(needs: Sequence[LayerNeed], device: TorchDevice) -> AttentionKernels:
    attend = Varlen(_unified()).attend
    UNIFIED.require(needs, device.block_tokens)
    return with_writer("aiter: unified_attention", attend, attend, device)


def _require_aiter() -> None:
    library("aiter")
    try:
        library("aiter.ops.mha")
    except Unavailable as reason:
        raise Unavailable(f"{reason} (the package aiter of the Python index is not AMD's)") from reason


def _compiled_prefill() -> VarlenFunction:
    _require_aiter()
    function = library("aiter.ops.mha").mha_batch_prefill_func

    def attend(call: VarlenCall) -> None:
        page_starts, pages, last_page_tokens = call.rows.once("pages on the device", lambda: _pages(call.rows))
        function(
            k=call.cache.key,
            v=call.cache.value,
            kv_indptr=page_starts,
            kv_page_indices=pages,
            kv_last_page_lens=last_page_tokens,
            max_seqlen_k=call.rows.most_keys,
            logits_soft_cap=call.softcap,
            out=call.out,
            **call.arguments,
        )

    return attend


def _pages(rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    lists = page_lists(rows)
    assert rows.host is not None
    upload = rows.host.upload
    return upload(lists.page_starts), upload(lists.pages), upload(lists.last_page_tokens)


def _unified() -> VarlenFunction:
    """One Triton kernel for rows of any length; reads nothing on the host, so that it may be captured."""
    _require_aiter()
    function = library("aiter.ops.triton.attention.unified_attention").unified_attention

    def attend(call: VarlenCall) -> None:
        function(
            sinks=call.rule.sinks,
            q_descale=None,
            k_descale=None,
            v_descale=None,
            out=call.out,
            **call.paged_arguments,
        )

    return attend


CANDIDATES = (Candidate("aiter", _compiled), Candidate("aiter unified", _unified_alone), *LAST_CANDIDATES)
