"""The CUDA plugin against stand-ins of FlashInfer and FlashAttention, and without torch's CUDA build."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tokenplane_core.backend.errors import BackendUnavailable
from tokenplane_core.backend.records import Device, LoadOptions
from tokenplane_cuda.attention import CANDIDATES
from tokenplane_cuda.flashinfer import PagedPrefill
from tokenplane_cuda.plugin import CudaBackend
from tokenplane_torch.attention import AttentionRule
from tokenplane_torch.choice import Unavailable, choose
from tokenplane_torch.composed import PlainKernels
from tokenplane_torch.kv_cache import LayerShape, allocate
from tokenplane_torch.step import Rows, plan_step
from tokenplane_torch.testing.graphs import HostGpuDevice
from tokenplane_torch.testing.paged import NEEDS, attend_rows, install

BY_NAME = {candidate.name: candidate for candidate in CANDIDATES}


def device(block_tokens: int = 32) -> HostGpuDevice:
    return HostGpuDevice(CANDIDATES, block_tokens)


# --- FlashInfer ---------------------------------------------------------------------------------------------


class PagedPrefillWrapper:
    """Runs what was planned last, as the library's wrapper does."""

    made: ClassVar[list[PagedPrefillWrapper]] = []

    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD") -> None:
        assert float_workspace_buffer.dtype == torch.uint8 and kv_layout == "NHD"
        self.plans = 0
        self.made.append(self)

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int,
        causal: bool,
        sm_scale: float,
        window_left: int,
        logits_soft_cap: float | None,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        assert causal
        used = paged_kv_indptr.diff()
        assert {t.dtype for t in (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)} == {
            torch.int32
        }
        lengths = ((used - 1) * page_size + paged_kv_last_page_len).to(torch.int32)
        tables = pad_sequence(paged_kv_indices.split(used.tolist()), batch_first=True)
        self._shapes = (num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo, page_size, q_data_type, kv_data_type)
        window = (window_left, 0 if window_left >= 0 else -1)
        self._planned = (qo_indptr, lengths, tables, sm_scale, window, logits_soft_cap or 0.0)
        self.plans += 1

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, out: Tensor) -> Tensor:
        key, value = paged_kv_cache
        shapes = (q.shape[1], key.shape[2], key.shape[3], value.shape[3], key.shape[1], q.dtype, key.dtype)
        assert shapes == self._shapes and out.is_contiguous()
        return out.copy_(attend_rows(q, key, value, *self._planned))


def trtllm_batch_decode_with_kv_cache(
    query: Tensor,
    kv_cache: tuple[Tensor, Tensor],
    workspace_buffer: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    max_seq_len: int,
    bmm1_scale: float,
    bmm2_scale: float,
    window_left: int,
    out: Tensor,
    kv_layout: str,
) -> Tensor:
    assert kv_layout == "NHD" and bmm2_scale == 1 and kv_cache[0].shape[1] in (16, 32, 64, 128)
    assert not workspace_buffer.any() and max_seq_len >= seq_lens.max()
    starts = torch.arange(len(query) + 1, dtype=torch.int32)
    window = (window_left, 0 if window_left >= 0 else -1)
    return out.copy_(attend_rows(query, *kv_cache, starts, seq_lens, block_tables, bmm1_scale, window, 0.0))


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "flashinfer", __version__="0.7.2.post1", __path__=[])
    install(monkeypatch, "flashinfer.prefill", BatchPrefillWithPagedKVCacheWrapper=PagedPrefillWrapper)
    install(monkeypatch, "flashinfer.decode", trtllm_batch_decode_with_kv_cache=trtllm_batch_decode_with_kv_cache)
    monkeypatch.setattr(PagedPrefillWrapper, "made", [])


@pytest.mark.usefixtures("flashinfer")
@pytest.mark.parametrize("need", ["plain", "grouped", "window"])
def test_flashinfers_attention_is_attention(need: str) -> None:
    described = choose(CANDIDATES, [NEEDS[need]], device()).describe()["attention"]
    assert described == "flashinfer 0.7.2.post1: paged prefill, decode"


@pytest.mark.usefixtures("flashinfer")
@pytest.mark.parametrize(
    ("need", "reason"),
    [
        ("softcap", "it has no soft caps"),
        ("window and softcap", "it has no soft caps"),
        ("unlike dims", "keys of 24 and values of 16: it takes one size"),
    ],
)
def test_decode_steps_that_it_lacks_go_elsewhere(need: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenplane_cuda.attention.triton_kernels", lambda device: PlainKernels())
    described = choose(CANDIDATES, [NEEDS[need]], device()).describe()["attention"]
    assert described.startswith("flashinfer 0.7.2.post1: paged prefill; decode: torch:")
    assert f"(not flashinfer: {reason})" in described


@pytest.mark.usefixtures("flashinfer")
@pytest.mark.parametrize(
    ("need", "reason"),
    [
        ("float32", "it computes in bfloat16 and float16, not in float32"),
        ("sinks", "it has no attention sinks"),
        ("large heads", "head size 512: it takes multiples of 8 up to 256"),
    ],
)
def test_layers_it_does_not_serve_go_to_the_next(need: str, reason: str) -> None:
    with pytest.raises(Unavailable, match=reason):
        BY_NAME["flashinfer"].make([NEEDS["plain"], NEEDS[need]], device())


def test_an_old_flashinfer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "flashinfer", __version__="0.6.18")
    with pytest.raises(Unavailable, match=r"version 0\.6\.18 is installed, 0\.7 or newer is needed"):
        BY_NAME["flashinfer"].make([NEEDS["plain"]], device())


def prompt_rows() -> Rows:
    """A prompt of 40 tokens behind 5 cached ones, and a decode row between it and the next prompt."""
    tables = np.array([[1, 2], [3, 0], [4, 0]], np.int32)
    plan = plan_step(
        np.zeros(50, np.int32),
        np.array([40, 1, 9], np.int32),
        np.array([5, 3, 0], np.int32),
        tables,
        np.ones(3, np.bool_),
        32,
        torch.from_numpy,
    )
    assert plan.prefill is not None
    return plan.prefill


@pytest.mark.usefixtures("flashinfer")
def test_a_step_is_planned_once_for_each_kind_of_layer() -> None:
    """And not before the plan of the step before has left the host."""
    order: list[str] = []

    class Event:
        def synchronize(self) -> None:
            order.append(f"wait after {sum(wrapper.plans for wrapper in PagedPrefillWrapper.made)} plans")

        def record(self) -> None:
            order.append("record")

    card = device()
    card.api.Event = Event  # type: ignore[misc]
    prefill = PagedPrefill(PagedPrefillWrapper, card)
    (cache,) = allocate([LayerShape(2, 16, 16, torch.bfloat16)], 5, 32, torch.device("cpu"))
    cache.key.zero_(), cache.value.zero_()
    query = torch.ones(50, 4, 16, dtype=torch.bfloat16)

    for step in range(2):
        rows = prompt_rows()
        for window in (None, 8, None, 8, None):  # five layers of two kinds
            prefill.attend(query, cache, rows, AttentionRule(0.25, window), torch.zeros_like(query))
        assert [wrapper.plans for wrapper in PagedPrefillWrapper.made] == [step + 1, step + 1]
    assert order == [entry for plans in range(4) for entry in (f"wait after {plans} plans", "record")]


# --- FlashAttention -----------------------------------------------------------------------------------------


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
) -> Tensor:
    assert causal and max_seqlen_q == cu_seqlens_q.diff().max()
    return attend_rows(
        q, k_cache, v_cache, cu_seqlens_q, cache_seqlens, page_table, softmax_scale, window_size, softcap
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    block_table: Tensor,
) -> Tensor:
    assert causal and k.shape[1] % 256 == 0 and cu_seqlens_k.dtype == torch.int32
    lengths = cu_seqlens_k.diff()
    assert max_seqlen_q == cu_seqlens_q.diff().max() and max_seqlen_k >= lengths.max()
    return attend_rows(q, k, v, cu_seqlens_q, lengths, block_table, softmax_scale, window_size, softcap)


@pytest.fixture
def flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "flash_attn_interface", flash_attn_with_kvcache=flash_attn_with_kvcache)
    install(monkeypatch, "flash_attn", __version__="2.8.3", flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.mark.usefixtures("flash_attention")
@pytest.mark.parametrize("need", ["plain", "grouped", "window", "softcap", "window and softcap", "unlike dims"])
def test_flash_attention_3_is_attention(need: str) -> None:
    described = choose(CANDIDATES, [NEEDS[need]], device()).describe()["attention"]
    assert described.startswith("flash-attention 3: paged (not flashinfer: flashinfer is not installed; ")


@pytest.mark.usefixtures("flash_attention")
@pytest.mark.parametrize("need", ["grouped", "window and softcap"])
def test_flash_attention_2_is_attention_over_its_blocks(need: str) -> None:
    choose([BY_NAME["flash-attention 2"]], [NEEDS[need]], device(block_tokens=256))
    with pytest.raises(Unavailable, match="its blocks are multiples of 256 tokens, these have 32"):
        BY_NAME["flash-attention 2"].make([NEEDS[need]], device())


@pytest.mark.usefixtures("flash_attention")
def test_flash_attention_3_is_not_tried_where_it_has_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    with pytest.raises(Unavailable, match="compute capability 8 and 9, this device has 10"):
        BY_NAME["flash-attention 3"].make([NEEDS["plain"]], device())


# --- Without any of them ------------------------------------------------------------------------------------


def test_without_a_library_the_last_resort_serves_and_every_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("flashinfer", "flash_attn", "flash_attn_interface", "triton"):
        monkeypatch.setitem(sys.modules, name, None)
    described: Any = choose(CANDIDATES, list(NEEDS.values()), device()).describe()["attention"]
    assert described.startswith("torch: gather")
    for name in ("flashinfer", "flashinfer for prompts", "flash-attention 3", "flash-attention 2", "triton"):
        assert f"not {name}: " in described


def test_without_a_cuda_build_of_torch_the_card_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    card = Device("cuda", 0, "NVIDIA GPU", "sm_90", 80 << 30, ("bfloat16",), 100)
    with pytest.raises(BackendUnavailable, match=r"cuda: torch .* not built for CUDA; .* install the CUDA build"):
        CudaBackend().open_device(card, LoadOptions())
