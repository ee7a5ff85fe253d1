"""One step of a Llama model in float32. Yours: the same mathematics in calls of your library.

Knows tokens, positions and the cache; no hooks, no slots' owners, no sampling.
"""

from __future__ import annotations

import numpy as np

from tokenplane_core.backend.records import F32, I32, I64, ModelSpec

from .attention import KVCache, Row
from .loader import read_weights, rope_settings


class Llama:
    def __init__(self, model: ModelSpec) -> None:
        self._model = model
        self._weights = read_weights(model.path)
        self._epsilon = np.float32(model.config.get("rms_norm_eps", 1e-6))
        theta = float(str(rope_settings(model).get("rope_theta", model.config.get("rope_theta", 10000.0))))
        self._frequencies = theta ** (-np.arange(0, model.head_dim, 2) / model.head_dim)
        self._head = self._weights.get("lm_head.weight", self._weights["model.embed_tokens.weight"])
        self.weights_bytes = sum(tensor.nbytes for tensor in self._weights.values())

    def logits(self, token_ids: I32, rows: list[Row], wanted: I64, cache: KVCache) -> F32:
        """Compute the tokens i32 [t] of a batch; f32 [n, vocab] logits after the tokens `wanted` i64 [n].

        Changes:
            Writes the tokens' keys and values into the cache.
        """
        spec, t = self._model, len(token_ids)
        positions = np.concatenate([np.arange(row.end - row.start) + row.context for row in rows])
        angles = positions[:, None] * self._frequencies
        cos, sin = np.cos(angles).astype(np.float32)[:, None], np.sin(angles).astype(np.float32)[:, None]
        x = self._weights["model.embed_tokens.weight"][token_ids]
        for layer in range(spec.num_layers):
            name = f"model.layers.{layer}."
            h = self._norm(x, name + "input_layernorm")
            q, k, v = (
                self._linear(h, f"{name}self_attn.{part}_proj").reshape(t, heads, spec.head_dim)
                for part, heads in (("q", spec.num_heads), ("k", spec.num_kv_heads), ("v", spec.num_kv_heads))
            )
            attended = cache.attention(layer, _rotated(q, cos, sin), _rotated(k, cos, sin), v, rows)
            x = x + self._linear(attended, name + "self_attn.o_proj")
            h = self._norm(x, name + "post_attention_layernorm")
            gate = self._linear(h, name + "mlp.gate_proj")
            gate = gate / (1 + np.exp(-np.clip(gate, -80, None)))  # exp(80) is the last power float32 holds
            x = x + self._linear(gate * self._linear(h, name + "mlp.up_proj"), name + "mlp.down_proj")
        logits: F32 = self._norm(x[wanted], "model.norm") @ self._head.T
        return logits

    def _linear(self, x: F32, name: str) -> F32:
        out: F32 = x @ self._weights[name + ".weight"].T
        return out

    def _norm(self, x: F32, name: str) -> F32:
        scaled: F32 = x / np.sqrt((x * x).mean(-1, keepdims=True) + self._epsilon)
        return scaled * self._weights[name + ".weight"]


def _rotated(x: F32, cos: F32, sin: F32) -> F32:
    """Rotary position embedding of f32 [t, heads, d]; cos and sin f32 [t, 1, d / 2] (arXiv 2104.09864)."""
    left, right = np.split(x, 2, axis=-1)
    return np.concatenate([left * cos - right * sin, right * cos + left * sin], -1)
