"""A tiny random Llama as a model folder, written with numpy alone, so that the kit can test a backend anywhere."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..backend.records import F32, I64

F64 = NDArray[np.float64]

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
    write_safetensors(folder / "model.safetensors", _weights(np.random.default_rng(seed)))
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


def reference_greedy(folder: Path, prompt: list[int], num_tokens: int) -> list[int]:
    """The greedy continuation of the checkpoint in `folder`, computed in float64 without cache, batch or tricks."""
    return greedy(read_safetensors(folder / "model.safetensors"), prompt, num_tokens)


def greedy(weights: dict[str, F64], prompt: list[int], num_tokens: int) -> list[int]:
    """The same for the weights of such a checkpoint, by name."""
    token_ids = list(prompt)
    for _ in range(num_tokens):
        hidden = _hidden(weights, np.array(token_ids))
        token_ids.append(int(np.argmax(weights["lm_head.weight"] @ hidden[-1])))
    return token_ids[len(prompt) :]


def reference_logprobs(folder: Path, prompt: list[int]) -> list[float]:
    """The log-probability of every prompt token but the first, by the checkpoint in `folder`, in float64."""
    weights = read_safetensors(folder / "model.safetensors")
    logits = _hidden(weights, np.array(prompt))[:-1] @ weights["lm_head.weight"].T
    scores = logits - logits.max(-1, keepdims=True)
    scores -= np.log(np.exp(scores).sum(-1, keepdims=True))
    return [float(scores[i, token_id]) for i, token_id in enumerate(prompt[1:])]


def _hidden(weights: dict[str, F64], token_ids: I64) -> F64:
    """Llama forward of i64 [t]: f64 [t, hidden], what the output layer reads."""
    heads, kv_heads, head = 4, 2, 16
    t = len(token_ids)
    x = weights["model.embed_tokens.weight"][token_ids]
    angles = np.arange(t)[:, None] * 10000.0 ** (-np.arange(0, head, 2) / head)
    cos, sin = (np.concatenate([f(angles), f(angles)], 1)[:, None] for f in (np.cos, np.sin))
    hidden_keys = np.triu(np.full((t, t), -np.inf), 1)
    for layer in range(3):
        w = {name.removeprefix(f"model.layers.{layer}."): value for name, value in weights.items()}
        h = _norm(x)  # all norm weights are one
        q = (h @ w["self_attn.q_proj.weight"].T).reshape(t, heads, head)
        k = (h @ w["self_attn.k_proj.weight"].T).reshape(t, kv_heads, head)
        v = (h @ w["self_attn.v_proj.weight"].T).reshape(t, kv_heads, head)
        q, k = (y * cos + np.concatenate([-y[..., head // 2 :], y[..., : head // 2]], -1) * sin for y in (q, k))
        k, v = k.repeat(heads // kv_heads, 1), v.repeat(heads // kv_heads, 1)
        scores = q.transpose(1, 0, 2) @ k.transpose(1, 2, 0) / np.sqrt(head) + hidden_keys
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        attended = (scores / scores.sum(-1, keepdims=True)) @ v.transpose(1, 0, 2)
        attended = attended.transpose(1, 0, 2).reshape(t, heads * head)
        x = x + attended @ w["self_attn.o_proj.weight"].T
        h = _norm(x)
        gate = h @ w["mlp.gate_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["mlp.up_proj.weight"].T)) @ w["mlp.down_proj.weight"].T
    return _norm(x)


def _norm(x: F64) -> F64:
    scaled: F64 = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
    return scaled


def read_safetensors(path: Path) -> dict[str, F64]:
    """The tensors of a file of float32, by name."""
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    out = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            flat = np.frombuffer(data[8 + length + start : 8 + length + end], np.float32)
            out[name] = flat.reshape(entry["shape"]).astype(np.float64)
    return out


def write_safetensors(path: Path, tensors: dict[str, F32]) -> None:
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
