"""The XPU plugin against a stand-in of vllm-xpu-kernels, and without torch's XPU build."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tokenplane_core.backend.errors import BackendUnavailable
from tokenplane_core.backend.records import Device, LoadOptions
from tokenplane_torch.choice import Unavailable, audition, choose
from tokenplane_torch.testing.graphs import HostGpuDevice
from tokenplane_torch.testing.paged import NEEDS, attend_rows, install
from tokenplane_xpu.attention import CANDIDATES
from tokenplane_xpu.card import XpuCard
from tokenplane_xpu.plugin import XpuBackend

LIBRARY = "vllm_xpu_kernels.flash_attn_interface"
make = CANDIDATES[0].make


def device() -> HostGpuDevice:
    return HostGpuDevice(CANDIDATES, XpuCard.block_tokens)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    max_seqlen_q: int,
    cu_seqlens_q: Tensor,
    max_seqlen_k: int,
    seqused_k: Tensor,
    softmax_scale: float,
    causal: bool,
    window_size: Any,
    softcap: float,
    block_table: Tensor,
    s_aux: Tensor | None,
    out: Tensor,
) -> Tensor:
    assert causal and k.shape[1] % 64 == 0
    assert max_seqlen_q == cu_seqlens_q.diff().max() and max_seqlen_k >= seqused_k.max()
    result = attend_rows(
        q, k, v, cu_seqlens_q, seqused_k, block_table, softmax_scale, tuple(window_size), softcap, s_aux
    )
    return out.copy_(result)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "vllm_xpu_kernels")
    install(monkeypatch, LIBRARY, FA2_AVAILABLE=True, flash_attn_varlen_func=flash_attn_varlen_func)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("need", ["plain", "grouped", "window", "softcap", "window and softcap", "sinks"])
def test_the_librarys_attention_is_attention(need: str) -> None:
    chosen = choose(CANDIDATES, [NEEDS[need]], device())
    assert chosen.describe()["attention"] == "vllm-xpu-kernels: flash attention"


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(("need", "reason"), [("unlike dims", "takes one size"), ("float32", "not in float32")])
def test_layers_it_does_not_serve_go_to_the_next(need: str, reason: str) -> None:
    described = choose(CANDIDATES, [NEEDS[need]], device()).describe()["attention"]
    assert (
        f"not vllm-xpu-kernels: {'keys' if reason.startswith('takes') else 'it'}" in described and reason in described
    )


def test_a_fallback_that_does_not_write_its_result_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the library does for shapes that its build lacks."""

    def fallback(**arguments: Any) -> Tensor:
        return flash_attn_varlen_func(**{**arguments, "out": torch.empty_like(arguments["out"])})

    install(monkeypatch, "vllm_xpu_kernels")
    install(monkeypatch, LIBRARY, FA2_AVAILABLE=True, flash_attn_varlen_func=fallback)
    with pytest.raises(Unavailable, match="wrong on a trial batch"):
        audition(make([NEEDS["plain"]], device()), NEEDS["plain"], device())


def test_a_binary_that_does_not_load_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "vllm_xpu_kernels")
    install(monkeypatch, LIBRARY, FA2_AVAILABLE=False, FA2_UNAVAILABLE_REASON="libze_loader.so.1: not found")
    with pytest.raises(Unavailable, match=r"does not load: libze_loader\.so\.1"):
        make([NEEDS["plain"]], device())


def test_without_an_xpu_build_of_torch_the_card_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "xpu", None)
    card = Device("xpu", 0, "Intel GPU", "xe2", 16 << 30, ("bfloat16",), 100)
    with pytest.raises(BackendUnavailable, match=r"xpu: torch .* not built for XPU; .* install the XPU build"):
        XpuBackend().open_device(card, LoadOptions())
