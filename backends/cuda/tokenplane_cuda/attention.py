"""Attention kernels for NVIDIA GPUs, in the order they are tried.

1. FlashInfer with its own decode kernels; they exist for some compute capabilities.
2. FlashInfer for prompts, Triton for decode steps.
3. FlashAttention 3 (`flash_attn_interface`), then 2 (`flash_attn`), which is not for blocks of this size.
4. Triton; torch.

Which card it is plays no part: a library refuses by itself, or the trial batches of choice.py find out. Call surfaces:
flashinfer 0.7.2 (prefill.py, decode.py), flash-attention 2.8 (flash_attn_interface.py, hopper/flash_attn_interface.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tokenplane_torch.choice import Candidate, Unavailable
from tokenplane_torch.composed import LAST_CANDIDATES, Attend, Composed, triton_kernels, with_writer
from tokenplane_torch.device import TorchDevice
from tokenplane_torch.kernels import AttentionKernels, LayerNeed
from tokenplane_torch.probing import Serves, library, require_version
from tokenplane_torch.varlen import Varlen, VarlenCall

from .flashinfer import WORKSPACE_BYTES, PagedPrefill

FLASHINFER = Serves(unlike_dims=True)
FLASHINFER_DECODE = Serves(block_sizes=(16, 32, 64), softcap=False)
FLASH_ATTENTION_3 = Serves(unlike_dims=True)
FLASH_ATTENTION_2 = Serves(block_multiple=256)


# --- FlashInfer ---------------------------------------------------------------------------------------------


def _flashinfer(needs: Sequence[LayerNeed], device: TorchDevice) -> AttentionKernels:
    version, prefill = _flashinfer_prefill(needs, device)
    FLASHINFER_DECODE.require(needs, device.block_tokens)
    decode = Varlen(_FlashInferDecode(library("flashinfer.decode"), device)).attend
    return with_writer(f"flashinfer {version}: paged prefill, decode", prefill, decode, device)


def _flashinfer_and_triton(needs: Sequence[LayerNeed], device: TorchDevice) -> AttentionKernels:
    version, prefill = _flashinfer_prefill(needs, device)
    triton = triton_kernels(device)
    described = triton.describe()
    return Composed(
        triton.write_kv,
        prefill,
        triton.attend_decode,
        {**described, "attention": f"flashinfer {version}: paged prefill; decode: {described['attention']}"},
    )


def _flashinfer_prefill(needs: Sequence[LayerNeed], device: TorchDevice) -> tuple[str, Attend]:
    version = require_version(library("flashinfer"), (0, 7))
    FLASHINFER.require(needs, device.block_tokens)
    wrapper = library("flashinfer.prefill").BatchPrefillWithPagedKVCacheWrapper
    return version, PagedPrefill(wrapper, device).attend


class _FlashInferDecode:
    """Reads block tables and lengths on the device, so that it may run in a captured graph."""

    def __init__(self, decode: Any, device: TorchDevice) -> None:
        self._function = decode.trtllm_batch_decode_with_kv_cache
        # The kernels count in it from zero, and leave zero behind.
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device.torch_device)

    def __call__(self, call: VarlenCall) -> None:
        self._function(
            query=call.query,
            kv_cache=(call.cache.key, call.cache.value),
            workspace_buffer=self._workspace,
            block_tables=call.rows.tables,
            seq_lens=call.packed.key_lengths,
            max_seq_len=call.rows.most_keys,
            bmm1_scale=call.rule.scaling,
            bmm2_scale=1.0,
            window_left=call.window[0],
            out=call.out,
            kv_layout="NHD",
        )


# --- FlashAttention -----------------------------------------------------------------------------------------


def _flash_attention_3(needs: Sequence[LayerNeed], device: TorchDevice) -> AttentionKernels:
    function = library("flash_attn_interface").flash_attn_with_kvcache
    FLASH_ATTENTION_3.require(needs, device.block_tokens)
    capability = torch.cuda.get_device_capability(device.torch_device)
    if capability[0] not in (8, 9):
        raise Unavailable(f"it is built for compute capability 8 and 9, this device has {capability[0]}")

    def attend(call: VarlenCall) -> None:
        results = function(
            k_cache=call.cache.key,
            v_cache=call.cache.value,
            cache_seqlens=call.packed.key_lengths,
            page_table=call.rows.tables,
            softcap=call.softcap,
            **call.arguments,
        )
        call.out.copy_(results)

    return with_writer("flash-attention 3: paged", Varlen(attend).attend, Varlen(attend).attend, device)


def _flash_attention_2(needs: Sequence[LayerNeed], device: TorchDevice) -> AttentionKernels:
    module = library("flash_attn")
    version = require_version(module, (2, 6))  # soft caps
    FLASH_ATTENTION_2.require(needs, device.block_tokens)

    def attend(call: VarlenCall) -> None:
        lengths = call.packed.key_lengths
        starts = call.rows.once(
            "key starts", lambda: torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        )
        results = module.flash_attn_varlen_func(
            k=call.cache.key,
            v=call.cache.value,
            cu_seqlens_k=starts,
            max_seqlen_k=call.rows.most_keys,
            softcap=call.softcap,
            block_table=call.rows.tables,
            **call.arguments,
        )
        call.out.copy_(results)

    return with_writer(f"flash-attention {version}: paged", Varlen(attend).attend, Varlen(attend).attend, device)


CANDIDATES = (
    Candidate("flashinfer", _flashinfer),
    Candidate("flashinfer for prompts", _flashinfer_and_triton),
    Candidate("flash-attention 3", _flash_attention_3),
    Candidate("flash-attention 2", _flash_attention_2),
    *LAST_CANDIDATES,
)
