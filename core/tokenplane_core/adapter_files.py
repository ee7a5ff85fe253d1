"""From an adapter's folder to an `AdapterSpec`: reads adapter_config.json, refuses what is no plain LoRA.

Files and field names are those that the peft library writes. Knows no framework and no tensor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .backend.errors import UnsupportedAdapter
from .backend.records import AdapterSpec

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {"bias": ("none",)}
"""Values, besides those that are false, with which a field of _UNLIKE_LORA asks for nothing."""

_UNLIKE_LORA: Mapping[str, str] = {
    "use_dora": "DoRA rescales the weights of the model",
    "use_bdlora": "only plain LoRA is computed",
    "use_qalora": "only plain LoRA is computed",
    "bias": "it brings biases of its own",
    "lora_bias": "it brings biases of its own",
    "modules_to_save": "it replaces whole layers of the model",
    "trainable_token_indices": "it replaces embeddings of the model",
    "target_parameters": "it changes parameters that are not linear layers",
    "layer_replication": "it repeats layers of the model",
    "alora_invocation_tokens": "an activated LoRA begins in the middle of a prompt",
    "arrow_config": "it chooses among other adapters",
    "kasa_config": "only plain LoRA is computed",
    "monteclora_config": "only plain LoRA is computed",
}

_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""Ways to begin training that change the model's own weights, on which the adapter then relies."""

_MOST = 1_000_000
"""No rank and no alpha is larger."""

_REPEATED_GROUP = re.compile(r"\)[*+?{]")
"""In a regular expression; matching one may take longer than anybody waits."""


def read_adapter(name: str, path: str) -> AdapterSpec:
    """Describe the adapter in a folder.

    Raises:
        UnsupportedAdapter: its files are not there, or it is not plain LoRA; names field and value.
    """
    folder = Path(path)
    config = _read_config(name, folder)
    if not (folder / WEIGHTS).is_file():
        raise UnsupportedAdapter(f"adapter {name!r}: {folder} has no {WEIGHTS}")
    _require_plain_lora(name, config)
    return AdapterSpec(name, str(folder), _largest_rank(name, config), config)


def _largest_rank(name: str, config: Mapping[str, Any]) -> int:
    """And see that what else the scale depends on is there."""
    _numbers(name, config, "lora_alpha", "alpha_pattern", int | float)
    return int(max(_numbers(name, config, "r", "rank_pattern", int)))


def _numbers(name: str, config: Mapping[str, Any], field: str, pattern_field: str, kind: Any) -> list[Any]:
    """What a field says for all layers (8 is peft's default), and its patterns for some of them: all above 0."""
    patterns = config.get(pattern_field) or {}
    if not isinstance(patterns, dict) or not all(map(_is_pattern, patterns)):
        raise UnsupportedAdapter(
            f"adapter {name!r}: {pattern_field} is {patterns!r}, which are no patterns of layer names"
        )
    values = [config.get(field, 8), *patterns.values()]
    for value in values:
        if not isinstance(value, kind) or not 0 < value <= _MOST:
            raise UnsupportedAdapter(
                f"adapter {name!r}: {field} is {str(value)[:40]!r}, which is no number above 0 and up to {_MOST}"
            )
    return values


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return not _REPEATED_GROUP.search(text)


def _read_config(name: str, folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UnsupportedAdapter(
            f"adapter {name!r}: {folder} has no {CONFIG}: not an adapter as the peft library writes one"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UnsupportedAdapter(f"adapter {name!r}: {file} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise UnsupportedAdapter(f"adapter {name!r}: {file} is not a JSON object")
    return config


def _require_plain_lora(name: str, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedAdapter(f"adapter {name!r}: peft_type is {kind!r}; only LORA is served")
    way_out = "merge it into the weights (peft's merge_and_unload) and serve those"
    for field, why in _UNLIKE_LORA.items():
        value = config.get(field)
        if value and value not in _NEUTRAL.get(field, ()):
            raise UnsupportedAdapter(f"adapter {name!r}: {field} is {value!r}: {why}; {way_out}")
    begun = config.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(_CHANGES_BASE):
        raise UnsupportedAdapter(
            f"adapter {name!r}: init_lora_weights is {begun!r}, which changes the model's own weights; {way_out}"
        )
