"""The fused norm, rotary and activation kernels, in Triton's interpreter, and their way into real models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen3Config,
)
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from tokenplane_torch.triton.activation import ACTIVATIONS, gated
from tokenplane_torch.triton.fusions import fuse
from tokenplane_torch.triton.norm import MOST_WIDTH, rms_norm
from tokenplane_torch.triton.rotary import rotate

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=TOLERANCE[want.dtype], atol=TOLERANCE[want.dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [96, 1000, 5120])
@pytest.mark.parametrize("plus_one", [False, True], ids=["llama", "gemma"])
def test_the_norm_is_the_model_s(dtype: torch.dtype, width: int, plus_one: bool) -> None:
    norm = (Gemma2RMSNorm if plus_one else LlamaRMSNorm)(width, eps=1e-5).to(dtype)
    norm.weight.data.normal_()
    x = torch.randn(2, 5, width).to(dtype)
    close(rms_norm(x, norm.weight, 1e-5, plus_one), norm(x))


def test_a_norm_reads_rows_through_their_stride() -> None:
    wide, weight = torch.randn(6, 300), torch.randn(100)
    close(rms_norm(wide[:, 100:200], weight, 1e-6), rms_norm(wide[:, 100:200].clone(), weight, 1e-6))


def test_rows_too_wide_for_a_norm_are_refused_with_the_limit() -> None:
    with pytest.raises(ValueError, match=f"40000.*{MOST_WIDTH}"):
        rms_norm(torch.zeros(1, 40000), torch.zeros(40000), 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotary_dim", [64, 48, 10])
def test_rotation_is_the_model_s(dtype: torch.dtype, rotary_dim: int) -> None:
    """In place, on views as a fused projection leaves them."""
    fused = torch.randn(5, 8, 64).to(dtype)
    query, key = fused[:, :5], fused[:, 5:7]
    cos, sin = torch.randn(5, rotary_dim).to(dtype), torch.randn(5, rotary_dim).to(dtype)
    want = [t.clone() for t in (query, key)]
    rotated = apply_rotary_pos_emb(
        *(t[..., :rotary_dim].transpose(0, 1)[None].float() for t in want), cos[None].float(), sin[None].float()
    )
    for whole, part in zip(want, rotated, strict=True):
        whole[..., :rotary_dim] = part[0].transpose(0, 1).to(dtype)
    rest = fused[:, 7].clone()
    rotate(query, key, cos, sin, query, key)
    close(query, want[0])
    close(key, want[1])
    assert torch.equal(fused[:, 7], rest)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # inf is meant: 1 / (1 + inf) = 0
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_gate_is_the_model_s(dtype: torch.dtype, activation: str) -> None:
    both = (torch.randn(3, 2 * 1500) * 3).to(dtype)
    gate, up = both.chunk(2, -1)
    act = F.silu if activation == "silu" else lambda x: F.gelu(x, approximate="tanh")
    close(gated(gate, up, activation), act(gate) * up)


SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}
ALL = {"norm": "triton", "gated_mlp": "triton", "rotary": "triton"}
MODELS: dict[str, tuple[PreTrainedConfig, dict[str, str]]] = {
    "llama": (LlamaConfig(**SMALL), ALL),
    "qwen3": (Qwen3Config(**SMALL), ALL),  # norms of heads
    "gemma2": (Gemma2Config(**SMALL), ALL),  # 1 + weight, gelu
    "phi3": (Phi3Config(**SMALL), ALL),  # one projection for gate and up
    "cohere2": (Cohere2Config(**SMALL), {"norm": "torch", "gated_mlp": "triton", "rotary": "torch"}),
    "gpt2": (GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=50), dict.fromkeys(ALL, "torch")),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_fused_model_computes_the_same(name: str) -> None:
    config, want = MODELS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.02  # norms start as ones or zeros
    ids = torch.randint(0, 50, (1, 7))
    with torch.inference_mode():
        before = model(ids).logits
        report = fuse(model)
        after = model(ids).logits
    assert {piece: said.split(":")[0] for piece, said in report.items()} == want, report
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


class ClippedNorm(nn.Module):
    """Looks like an RMSNorm and is none."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(32)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps).clamp(max=0.5)


def test_what_computes_something_else_stays_and_says_why() -> None:
    model = nn.Sequential(ClippedNorm(), LlamaRMSNorm(32))
    report = fuse(model)
    assert report["norm"].startswith("triton; 1 by torch: it differs by")
    assert "forward" not in vars(model[0]) and "forward" in vars(model[1])
    assert model(torch.randn(2, 32)).max() <= 1.0
    assert fuse(nn.Sequential(ClippedNorm()))["norm"].startswith("torch: it differs by")
