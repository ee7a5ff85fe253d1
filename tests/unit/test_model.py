"""config.json to ModelSpec: what architectures call the same thing, and what a user did wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tokenplane_core.backend.errors import ConfigError
from tokenplane_core.model import describe_model

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
}


def folder(tmp_path: Path, config: object) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_llama_names(tmp_path: Path) -> None:
    model = describe_model(folder(tmp_path, LLAMA), max_model_tokens=128)
    assert (model.num_layers, model.num_heads, model.num_kv_heads, model.head_dim) == (2, 4, 2, 16)
    assert (model.max_model_tokens, model.dtype, model.architecture) == (128, "bfloat16", "LlamaForCausalLM")


def test_gpt2_names_and_a_nested_text_config(tmp_path: Path) -> None:
    gpt2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 9}
    model = describe_model(folder(tmp_path, {"text_config": gpt2, "architectures": ["X"], "dtype": "float32"}))
    assert (model.num_layers, model.num_kv_heads, model.head_dim, model.max_model_tokens) == (3, 4, 8, 64)
    assert model.dtype == "float32"


@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        ({"hidden_size": None}, {}, "gives no positive hidden_size"),
        ({"vocab_size": -1}, {}, "gives no positive vocab_size"),
        ({"torch_dtype": "int3"}, {}, "dtype is 'int3'; supported: float32"),
        ({}, {"dtype": "float8"}, "dtype is 'float8'"),
        ({}, {"max_model_tokens": 513}, "--max-total-tokens is 513.*lower it to 512"),
    ],
)
def test_refusals_name_the_field(
    tmp_path: Path, change: dict[str, object], options: dict[str, object], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        describe_model(folder(tmp_path, LLAMA | change), **options)  # type: ignore[arg-type]


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        describe_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        describe_model(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="not a JSON object"):
        describe_model(tmp_path)
