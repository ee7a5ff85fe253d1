"""LoRA adapters to test with: random ones, written with numpy alone in the files of the peft library."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ..adapter_files import CONFIG, WEIGHTS
from ..backend.records import F32, ModelSpec
from .checkpoint import F64, greedy, read_safetensors, write_safetensors

PREFIX = "base_model.model."
"""Before the name of a module, in peft's files."""

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""Whose layers are called as `write_adapter` calls them."""


def write_adapter(folder: Path, model: ModelSpec, seed: int, rank: int = 4) -> Path:
    """Write a random adapter for a model of MODEL_TYPES; returns the folder.

    It changes four linear layers of every block, attention and feed-forward, enough that greedy text changes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    hidden, inner = int(model.config["hidden_size"]), int(model.config["intermediate_size"])
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    shapes = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.down_proj": (hidden, inner),
    }

    def normal(*shape: int) -> F32:
        return rng.normal(0.0, shape[-1] ** -0.5, shape).astype(np.float32)

    tensors = {}
    for layer in range(model.num_layers):
        for name, (rows, columns) in shapes.items():
            module = f"{PREFIX}model.layers.{layer}.{name}"
            tensors[f"{module}.lora_A.weight"] = normal(rank, columns)
            tensors[f"{module}.lora_B.weight"] = normal(rows, rank)
    targets = [name.rpartition(".")[2] for name in shapes]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets, "bias": "none"}
    (folder / CONFIG).write_text(json.dumps(config, indent=1))
    write_safetensors(folder / WEIGHTS, tensors)
    return folder


def greedy_with_adapter(folder: Path, adapter: Path, prompt: list[int], num_tokens: int) -> list[int]:
    """`checkpoint.reference_greedy` with an adapter merged into the weights."""
    return greedy(_merged(read_safetensors(folder / "model.safetensors"), adapter), prompt, num_tokens)


def _merged(weights: dict[str, F64], adapter: Path) -> dict[str, F64]:
    config = json.loads((adapter / CONFIG).read_text())
    scale = config["lora_alpha"] / config["r"]
    parts = read_safetensors(adapter / WEIGHTS)
    out = dict(weights)
    for name in parts:
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            target = module.removeprefix(PREFIX) + ".weight"
            out[target] = out[target] + scale * parts[f"{module}.lora_B.weight"] @ parts[name]
    return out
