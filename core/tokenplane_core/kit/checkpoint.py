"""A tiny random Llama as a model folder, written with numpy alone, so that the kit can test a backend anywhere."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

from ..backend.records import F32

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 211,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "dtype": "float32",
}


def write_tiny_llama(folder: Path, seed: int = 0) -> Path:
    """Write config.json and model.safetensors (float32, about 0.5 MB); returns the folder.

    The weights are large enough that greedy text varies and near-ties are rare.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1))
    _write_safetensors(folder / "model.safetensors", _weights(np.random.default_rng(seed)))
    return folder


def _weights(rng: np.random.Generator) -> dict[str, F32]:
    hidden, inner, heads, kv_heads, head, vocab = 64, 96, 4, 2, 16, 211

    def normal(*shape: int) -> F32:
        return rng.normal(0.0, 0.25, shape).astype(np.float32)

    out = {
        "model.embed_tokens.weight": normal(vocab, hidden) * 4,
        "model.norm.weight": np.ones(hidden, np.float32),
        "lm_head.weight": normal(vocab, hidden),
    }
    for layer in range(3):
        prefix = f"model.layers.{layer}."
        for name, rows in (("q", heads * head), ("k", kv_heads * head), ("v", kv_heads * head)):
            out[f"{prefix}self_attn.{name}_proj.weight"] = normal(rows, hidden)
        out[prefix + "self_attn.o_proj.weight"] = normal(hidden, heads * head)
        out[prefix + "mlp.gate_proj.weight"] = normal(inner, hidden)
        out[prefix + "mlp.up_proj.weight"] = normal(inner, hidden)
        out[prefix + "mlp.down_proj.weight"] = normal(hidden, inner)
        out[prefix + "input_layernorm.weight"] = np.ones(hidden, np.float32)
        out[prefix + "post_attention_layernorm.weight"] = np.ones(hidden, np.float32)
    return out


def _write_safetensors(path: Path, tensors: dict[str, F32]) -> None:
    """The safetensors format: header length (u64), JSON header, then the bytes (see the format's own documentation)."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in tensors.values():
            file.write(tensor.tobytes())
