"""Small checkpoints of the real architectures with random weights, and the answers transformers itself gives."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers

_SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MLA = {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12}
_DEEPSEEK_EXPERTS = {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
}
_MIXED_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]

_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 24}),
    "mistral": ("MistralConfig", {"sliding_window": 7}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen3_moe": ("Qwen3MoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "sliding_window": 9, "attn_logit_softcapping": 5.0}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, "sliding_window": 9, "layer_types": _MIXED_LAYERS}),
    "phi3": ("Phi3Config", {}),
    "smollm3": ("SmolLM3Config", {"no_rope_layer_interval": 2}),
    "glm4": ("Glm4Config", {"head_dim": 16}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "starcoder2": ("Starcoder2Config", {"sliding_window": None}),
    "gpt2": ("GPT2Config", {}),
    "opt": ("OPTConfig", {"word_embed_proj_dim": 64, "ffn_dim": 96}),
    "gpt_oss": (
        "GptOssConfig",
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    ),
    "deepseek_v3": ("DeepseekV3Config", _MLA | _DEEPSEEK_EXPERTS | {"num_key_value_heads": 4}),
    # What the kit must refuse, and why, is for its load-time check to find out.
    "falcon": ("FalconConfig", {}),
    "bloom": ("BloomConfig", {}),
    "mpt": ("MptConfig", {"n_heads": 4, "n_layers": 3, "d_model": 64, "max_seq_len": 256}),
    "mamba": ("MambaConfig", {}),
    "qwen3_next": ("Qwen3NextConfig", {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}),
    "t5": ("T5Config", {"d_model": 64, "num_layers": 2, "num_heads": 4, "d_kv": 16, "d_ff": 96}),
    "llama4": ("Llama4TextConfig", {}),
}

REFUSED_FAMILIES = ("falcon", "bloom", "mpt", "mamba", "qwen3_next", "t5", "llama4")
FAMILIES = tuple(family for family in _CONFIGS if family not in REFUSED_FAMILIES)
"""Families whose greedy tokens through the kit equal transformers' own."""


def make_checkpoint(family: str, folder: Path, **overrides: Any) -> Path:
    """Write config.json and model.safetensors of a small random model to the folder; return it.

    Weights are wide enough that greedy output varies and the best two tokens lie well apart; the same family and
    overrides give the same weights. `overrides` are fields of the family's config, and `seed`.
    """
    transformers.logging.disable_progress_bar()
    name, fields = _CONFIGS[family]
    generator = torch.Generator().manual_seed(overrides.pop("seed", 0))
    config = getattr(transformers, name)(**(_SMALL | fields | overrides))
    kind = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    model = kind.from_config(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25, generator=generator)
            elif key.endswith("bias") or key.endswith("sinks"):
                parameter.normal_(0, 0.5, generator=generator)
    model.save_pretrained(folder)
    return folder


def reference_greedy(folder: Path, prompt_ids: Sequence[int], n: int) -> list[int]:
    """The first n greedy tokens after the prompt from transformers' `generate`, in float32; no token stops it."""
    model = _reference_model(str(folder))
    ids = torch.tensor([list(prompt_ids)])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False)
    return [int(token) for token in out[0, len(prompt_ids) :]]


@lru_cache(maxsize=4)
def _reference_model(folder: str) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    return model.eval()
