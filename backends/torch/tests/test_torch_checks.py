"""The load-time check catches what would give wrong answers, and knows no architecture by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tokenplane_core.backend.errors import OutOfMemory, UnsupportedModel
from tokenplane_core.backend.records import ModelSpec
from tokenplane_core.model import describe_model
from tokenplane_torch import attention
from tokenplane_torch.checks import check_model, observe
from tokenplane_torch.kv_cache import LayerShape
from tokenplane_torch.loader import load_model
from tokenplane_torch.testing import PlainDevice, make_checkpoint

DEVICE = PlainDevice()


def loaded(family: str, folder: Path, max_model_tokens: int | None = None, **overrides: Any) -> Any:
    model = describe_model(make_checkpoint(family, folder, **overrides), max_model_tokens=max_model_tokens)
    return load_model(model, DEVICE), model


def check(module: Any, model: ModelSpec) -> list[LayerShape]:
    return [need.shape for need in check_model(module, model, DEVICE)[0]]


def test_a_sound_model_passes_and_its_layers_are_measured(tmp_path: Path) -> None:
    module, model = loaded("deepseek_v3", tmp_path)
    assert check(module, model) == [LayerShape(4, 24, 12, torch.float32)] * 3
    assert module.config._attn_implementation == attention.NAME


@pytest.mark.parametrize(
    "fields",
    [
        {"use_bidirectional_attention": True},
        {"is_causal": False},
    ],
)
def test_attention_that_looks_ahead_is_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    module, model = loaded("gemma3", tmp_path, **fields)
    with pytest.raises(UnsupportedModel, match=r"'gemma3_text' .* (masked in a way|not causal)"):
        check(module, model)


def test_chunked_attention_is_refused_though_a_short_run_looks_the_same(tmp_path: Path) -> None:
    model = describe_model(make_checkpoint("llama4", tmp_path, attention_chunk_size=128))
    attention.register()
    module = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention.NAME)
    with pytest.raises(UnsupportedModel, match="neither causal nor a sliding window"):
        observe(module, model)
    observe(module, replace(model, max_model_tokens=128))  # where chunks make no difference, nothing is refused


def test_a_window_that_the_kernels_do_not_hear_of_is_refused(tmp_path: Path) -> None:
    """The model masks a window, but one layer does not pass it on: right for 7 tokens, wrong after."""
    module, model = loaded("mistral", tmp_path, sliding_window=40)
    check(module, model)
    forward = module.model.layers[1].self_attn.forward

    def windowless(*args: Any, **kwargs: Any) -> Any:
        layer = module.model.layers[1].self_attn
        config, layer.config = layer.config, transformers.MistralConfig(sliding_window=None)
        layer.config._attn_implementation = config._attn_implementation
        try:
            return forward(*args, **kwargs)
        finally:
            layer.config = config

    module.model.layers[1].self_attn.forward = windowless
    with pytest.raises(UnsupportedModel, match="layer 1 is masked in a way"):
        check(module, model)


class LooksBack(torch.nn.Module):
    """Mixes each token with the one before it in the batch, as a convolution would."""

    def __init__(self, inner: torch.nn.Module, strength: float) -> None:
        super().__init__()
        self.inner, self.strength = inner, strength

    def forward(self, hidden: Tensor) -> Tensor:
        inner: Tensor = self.inner(hidden)
        return inner + self.strength * hidden.roll(1, dims=1)


class NoAttention(torch.nn.Module):
    """A layer that keeps its memory elsewhere, or has none."""

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        return hidden_states, None


@pytest.mark.parametrize(("dtype", "strength"), [("float32", 0.01), ("bfloat16", 10.0)])
def test_tokens_that_meet_outside_attention_are_noticed(tmp_path: Path, dtype: str, strength: float) -> None:
    model = replace(describe_model(make_checkpoint("llama", tmp_path)), dtype=dtype)
    module = load_model(model, DEVICE)
    check(module, model)
    module.model.layers[1].mlp = LooksBack(module.model.layers[1].mlp, strength)
    with pytest.raises(UnsupportedModel, match=r"'llama' .* other logits than the model's own attention"):
        check(module, model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ignored_positions_are_noticed(tmp_path: Path, dtype: str) -> None:
    model = replace(describe_model(make_checkpoint("llama", tmp_path)), dtype=dtype)
    module = load_model(model, DEVICE)
    rotary = module.model.rotary_emb.forward
    module.model.rotary_emb.forward = lambda x, position_ids: rotary(x, torch.arange(x.shape[1])[None])
    with pytest.raises(UnsupportedModel, match="other logits"):
        check(module, model)


def test_a_layer_without_attention_is_named(tmp_path: Path) -> None:
    module, model = loaded("llama", tmp_path)
    module.model.layers[1].self_attn = NoAttention()
    with pytest.raises(UnsupportedModel, match=r"layers 1 of 3 do not attend"):
        check(module, model)


def test_a_layer_that_attends_twice_is_refused(tmp_path: Path) -> None:
    module, model = loaded("llama", tmp_path)
    module.model.layers[2].self_attn = module.model.layers[1].self_attn
    module.model.layers[1].self_attn.layer_idx = 1
    with pytest.raises(UnsupportedModel, match=r"layers 2 of 3"):
        check(module, model)


def test_positions_beyond_a_learned_table_are_refused_at_load(tmp_path: Path) -> None:
    module, model = loaded("gpt2", tmp_path)
    with pytest.raises(UnsupportedModel, match="'gpt2'"):
        check(module, replace(model, max_model_tokens=257))
    check(module, model)


LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("family", "rope", "limit"),
    [
        ("phi3", LONG_ROPE, 64),
        ("llama", LONG_ROPE | {"factor": 4.0}, 64),
        ("llama", {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}, 256),
        (
            "gemma3",
            {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
            },
            256,
        ),
    ],
)
def test_rope_that_depends_on_the_longest_neighbour_is_refused_beyond_its_original_length(
    tmp_path: Path, family: str, rope: dict[str, Any], limit: int
) -> None:
    fields = {"original_max_position_embeddings": 64} if family == "phi3" else {}
    module, model = loaded(family, tmp_path, rope_parameters=rope, **fields)
    check(module, replace(model, max_model_tokens=limit))
    with pytest.raises(UnsupportedModel, match=rf"set --max-total-tokens to {limit} or less"):
        check(module, replace(model, max_model_tokens=limit + 1))


def test_running_out_of_memory_is_not_the_models_fault(tmp_path: Path) -> None:
    module, model = loaded("llama", tmp_path)
    module.model.layers[1].mlp = Greedy()
    with pytest.raises(OutOfMemory, match="no memory left"):
        check(module, model)


class Greedy(torch.nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return torch.empty(1 << 60, dtype=torch.uint8)
