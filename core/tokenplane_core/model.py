"""From a model folder to a `ModelSpec`: reads config.json, nothing else. Knows no framework and no network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .backend.errors import ConfigError
from .backend.records import ModelSpec

DTYPES = ("float32", "bfloat16", "float16")

# What the architectures call the same thing, most usual name first.
_ALIASES = {
    "num_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "num_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "num_kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "max_tokens": ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx"),
}


def describe_model(
    path: Path | str,
    model_id: str | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    max_model_tokens: int | None = None,
    trust_remote_code: bool = False,
) -> ModelSpec:
    """Describe the model in a folder.

    dtype None: the one the checkpoint was saved in (config.json), else float32. max_model_tokens None: what the
    model was trained for.

    Raises:
        ConfigError: config.json is missing or says too little, or max_model_tokens exceeds what the model knows.
    """
    folder = Path(path)
    config = _read_config(folder)
    text = config.get("text_config") or config
    trained_tokens = _find(text, "max_tokens")
    if max_model_tokens is not None and trained_tokens is not None and max_model_tokens > trained_tokens:
        raise ConfigError(
            f"--max-total-tokens is {max_model_tokens}, but {folder / 'config.json'} says that the model was trained"
            f" for {trained_tokens} positions; lower it to {trained_tokens} or less"
        )
    heads, hidden = _required(text, "num_heads", folder), _required(text, "hidden", folder)
    return ModelSpec(
        model_id=model_id or str(path),
        path=str(folder),
        revision=revision,
        architecture=next(iter(config.get("architectures") or ()), ""),
        config=config,
        num_layers=_required(text, "num_layers", folder),
        num_heads=heads,
        num_kv_heads=_find(text, "num_kv_heads") or heads,
        head_dim=text.get("head_dim") or hidden // heads,
        vocab_size=_positive(text.get("vocab_size"), "vocab_size", folder),
        max_model_tokens=max_model_tokens or trained_tokens or 2048,
        dtype=_dtype(dtype or _saved_dtype(text) or _saved_dtype(config)),
        trust_remote_code=trust_remote_code,
    )


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{folder} has no config.json: not a model folder in the Hugging Face layout") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{file} is not a JSON object")
    return config


def _saved_dtype(config: Mapping[str, Any]) -> str | None:
    return config.get("dtype") or config.get("torch_dtype")


def _dtype(name: str | None) -> str:
    name = (name or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(f"dtype is {name!r}; supported: {', '.join(DTYPES)} (choose one with --dtype)")
    return name


def _find(config: Mapping[str, Any], what: str) -> int | None:
    for name in _ALIASES[what]:
        value = config.get(name)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _required(config: Mapping[str, Any], what: str, folder: Path) -> int:
    return _positive(_find(config, what), _ALIASES[what][0], folder)


def _positive(value: Any, name: str, folder: Path) -> int:
    if not isinstance(value, int) or value <= 0:
        raise ConfigError(f"{folder / 'config.json'} gives no positive {name}")
    return value
