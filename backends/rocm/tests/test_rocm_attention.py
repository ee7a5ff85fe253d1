"""The ROCm plugin against a stand-in of AITER, and without torch's ROCm build."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tokenplane_core.backend.errors import BackendUnavailable
from tokenplane_core.backend.records import Device, LoadOptions
from tokenplane_rocm.attention import CANDIDATES
from tokenplane_rocm.card import RocmCard
from tokenplane_rocm.plugin import RocmBackend
from tokenplane_torch.choice import Unavailable, choose
from tokenplane_torch.testing.graphs import HostGpuDevice
from tokenplane_torch.testing.paged import NEEDS, attend_rows, install

PREFILL, UNIFIED = "aiter.ops.mha", "aiter.ops.triton.attention.unified_attention"


def device(block_tokens: int = RocmCard.block_tokens) -> HostGpuDevice:
    return HostGpuDevice(CANDIDATES, block_tokens)


def mha_batch_prefill_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    kv_indptr: Tensor,
    kv_page_indices: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    logits_soft_cap: float,
    causal: bool,
    window_size: tuple[int, int],
    out: Tensor,
    kv_last_page_lens: Tensor,
) -> Tensor:
    assert causal and k.shape[1] in (1, 16, 1024)
    assert {t.dtype for t in (kv_indptr, kv_page_indices, kv_last_page_lens)} == {torch.int32}
    used = kv_indptr.diff()
    lengths = (used - 1) * k.shape[1] + kv_last_page_lens
    assert max_seqlen_q == cu_seqlens_q.diff().max() and max_seqlen_k == lengths.max()
    tables = pad_sequence(kv_page_indices.split(used.tolist()), batch_first=True)
    result = attend_rows(
        q, k, v, cu_seqlens_q, lengths.to(torch.int32), tables, softmax_scale, window_size, logits_soft_cap
    )
    return out.copy_(result)


def unified_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    seqused_k: Tensor,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    block_table: Tensor,
    softcap: float,
    q_descale: None,
    k_descale: None,
    v_descale: None,
    sinks: Tensor | None,
) -> None:
    assert causal and max_seqlen_q == cu_seqlens_q.diff().max() and max_seqlen_k >= seqused_k.max()
    # It takes a width of 0 for no window, and computes the width as the keys to the left and the query's own.
    assert window_size[0] >= -1
    out.copy_(attend_rows(q, k, v, cu_seqlens_q, seqused_k, block_table, softmax_scale, window_size, softcap, sinks))


@pytest.fixture
def aiter(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("aiter", "aiter.ops", "aiter.ops.triton", "aiter.ops.triton.attention"):
        install(monkeypatch, package, __path__=[])
    install(monkeypatch, PREFILL, mha_batch_prefill_func=mha_batch_prefill_func)
    install(monkeypatch, UNIFIED, unified_attention=unified_attention)


@pytest.mark.usefixtures("aiter")
@pytest.mark.parametrize("need", ["plain", "grouped", "window", "softcap", "window and softcap"])
def test_aiters_attention_is_attention(need: str) -> None:
    chosen = choose(CANDIDATES, [NEEDS[need]], device())
    assert chosen.describe()["attention"] == "aiter: compiled kernels for prompts, unified_attention for decode"


@pytest.mark.usefixtures("aiter")
@pytest.mark.parametrize(
    ("need", "block_tokens", "reason"),
    [("sinks", 16, "it has no attention sinks"), ("plain", 32, "its blocks have 1, 16, 1024 tokens, these have 32")],
)
def test_what_the_compiled_kernels_lack_the_unified_one_serves(need: str, block_tokens: int, reason: str) -> None:
    described = choose(CANDIDATES, [NEEDS[need]], device(block_tokens)).describe()["attention"]
    assert described == f"aiter: unified_attention (not aiter: {reason})"


@pytest.mark.usefixtures("aiter")
def test_layers_it_does_not_serve_go_to_the_next() -> None:
    described = choose(CANDIDATES, [NEEDS["float32"]], device()).describe()["attention"]
    assert "not aiter unified: it computes in bfloat16 and float16, not in float32" in described


def test_another_package_of_that_name_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one on the Python index is about asyncio."""
    install(monkeypatch, "aiter", __path__=[])
    for candidate in CANDIDATES[:2]:
        with pytest.raises(Unavailable, match=r"has no module aiter\.ops \(the package aiter .* is not AMD's\)"):
            candidate.make([NEEDS["plain"]], device())


def test_without_a_rocm_build_of_torch_the_card_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    card = Device("rocm", 0, "AMD GPU", "gfx942", 192 << 30, ("bfloat16",), 100)
    with pytest.raises(BackendUnavailable, match=r"rocm: torch .* not built for ROCm; .* install the ROCm build"):
        RocmBackend().open_device(card, LoadOptions())
