"""The program that runs on the card: one step of a Llama model, from token ids to drawn tokens.

Its inputs have fixed shapes, R rows of W tokens. Beside the weights it owns three things on the card: the KV cache,
the block tables, and the token last drawn for each slot, which the host may not have read yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenplane_core.backend.records import F32, I32, TOKEN_ON_DEVICE, ModelSpec

from .attention import Rectangle, attention, rectangle
from .loader import rope_settings
from .sampler import draw

Arrays = Mapping[str, NDArray[Any]]


def step_inputs(rows: int, width: int, pad_slot: int) -> dict[str, NDArray[Any]]:
    """The inputs of a step, filled with padding: what to compile for, and what to write a batch into."""
    return {
        "token_ids": np.zeros((rows, width), np.int32),
        "num_new": np.zeros(rows, np.int32),
        "context_lens": np.zeros(rows, np.int32),
        "slots": np.full(rows, pad_slot, np.int32),
        "sample": np.zeros(rows, np.bool_),
        "temperature": np.zeros(rows, np.float32),
        "top_k": np.zeros(rows, np.int32),
        "top_p": np.ones(rows, np.float32),
        "us": np.zeros(rows, np.float32),
    }


class LlamaStep:
    """The step for contexts of up to `context_blocks` blocks; a Program of the runtime."""

    def __init__(self, model: ModelSpec, block_tokens: int, context_blocks: int) -> None:
        self._model, self._block_tokens, self._context_blocks = model, block_tokens, context_blocks
        self._epsilon = np.float32(model.config.get("rms_norm_eps", 1e-6))
        theta = float(str(rope_settings(model).get("rope_theta", model.config.get("rope_theta", 10000.0))))
        self._frequencies = theta ** (-np.arange(0, model.head_dim, 2) / model.head_dim)

    def __call__(self, memory: Arrays, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs: token_ids i32 [R] and logits f32 [R, vocab], of each row's last real token."""
        slots, num_new, last_drawn = inputs["slots"], inputs["num_new"], memory["last_drawn"]
        rows, width = inputs["token_ids"].shape
        where = rectangle(
            memory["tables"], slots, inputs["context_lens"], num_new, width, self._context_blocks, self._block_tokens
        )
        # What the previous step drew has never left the card.
        on_card = inputs["token_ids"] == TOKEN_ON_DEVICE
        token_ids = np.where(on_card, last_drawn[slots][:, None], inputs["token_ids"])
        x = self._forward(memory, token_ids, where)
        last = x[np.arange(rows), np.maximum(num_new - 1, 0)]
        logits = self._norm(memory, last, "model.norm") @ memory["head"].T
        drawn = draw(logits, *(inputs[name] for name in ("temperature", "top_k", "top_p", "us")))
        last_drawn[slots[inputs["sample"]]] = drawn[inputs["sample"]]
        return {"token_ids": drawn, "logits": logits}

    def _forward(self, memory: Arrays, token_ids: I32, where: Rectangle) -> F32:
        """i32 [R, W] to hidden states f32 [R, W, hidden]; writes the KV cache."""
        spec, shape = self._model, token_ids.shape
        angles = where.positions[:, :, None, None] * self._frequencies
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        x: F32 = memory["model.embed_tokens.weight"][token_ids]
        for layer in range(spec.num_layers):
            name = f"model.layers.{layer}."
            h = self._norm(memory, x, name + "input_layernorm")
            q, k, v = (
                _linear(memory, h, f"{name}self_attn.{part}_proj").reshape(*shape, heads, spec.head_dim)
                for part, heads in (("q", spec.num_heads), ("k", spec.num_kv_heads), ("v", spec.num_kv_heads))
            )
            cache = memory["keys"][layer], memory["values"][layer]
            attended = attention(*cache, _rotated(q, cos, sin), _rotated(k, cos, sin), v, where)
            x = x + _linear(memory, attended, name + "self_attn.o_proj")
            h = self._norm(memory, x, name + "post_attention_layernorm")
            gate = _linear(memory, h, name + "mlp.gate_proj")
            gate = gate / (1 + np.exp(-np.clip(gate, -80, None)))  # exp(80) is the last power float32 holds
            x = x + _linear(memory, gate * _linear(memory, h, name + "mlp.up_proj"), name + "mlp.down_proj")
        return x

    def _norm(self, memory: Arrays, x: F32, name: str) -> F32:
        scaled: F32 = x / np.sqrt((x * x).mean(-1, keepdims=True) + self._epsilon)
        return scaled * memory[name + ".weight"]


def _linear(memory: Arrays, x: F32, name: str) -> F32:
    out: F32 = x @ memory[name + ".weight"].T
    return out


def _rotated(x: F32, cos: F32, sin: F32) -> F32:
    """Rotary position embedding of f32 [R, W, heads, d]; cos and sin f32 [R, W, 1, d / 2] (arXiv 2104.09864)."""
    left, right = np.split(x, 2, axis=-1)
    return np.concatenate([left * cos - right * sin, right * cos + left * sin], -1)
