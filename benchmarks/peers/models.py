"""Random-weight models for benchmarks, in the shapes of published ones: nonsense to read, the real model's arithmetic.

The tokenizer is the demo model's, filled up to the vocabulary with entries that no merge reaches. The row of the
end-of-sequence token is zero, so its logit is 0 and greedy text does not end there, also on servers without
`ignore_eos`.

    python -m benchmarks.peers.models smol FOLDER
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

DEMO = Path(__file__).parents[2] / "models" / "demo"
EOS_ID = 2
STD = 0.02

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": False, "mlp_bias": False}
QWEN = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
SHAPES: dict[str, dict[str, object]] = {
    # Ours: next to no arithmetic, so that all a server does around the model shows.
    "tiny": LLAMA
    | {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "intermediate_size": 128,
        "vocab_size": 4096,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    },
    # SmolLM2-135M
    "smol": LLAMA
    | {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
    },
    # Qwen2.5-0.5B
    "qwen05": QWEN
    | {
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
    },
}
COMMON = {
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "initializer_range": STD,
    "bos_token_id": None,
    "eos_token_id": EOS_ID,
    "pad_token_id": 0,
}


def model_folder(root: Path, name: str) -> Path:
    """The folder root/name with model `name` of SHAPES, written if it is not there yet."""
    folder = root / name
    if not (folder / "model.safetensors").exists():
        write_model(folder, SHAPES[name] | COMMON)
    return folder


def write_model(folder: Path, config: dict[str, object]) -> None:
    """Write config, tokenizer and weights (bfloat16, the same for the same config); the weights last, whole or not."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    generation = {"do_sample": False, "eos_token_id": EOS_ID, "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    tokenizer = json.loads((DEMO / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab.update({f"<unused-{i}>": i for i in range(len(vocab), int(str(config["vocab_size"])))})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    tokenizer_config = json.loads((DEMO / "tokenizer_config.json").read_text())
    tokenizer_config["model_max_length"] = config["max_position_embeddings"]
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    partial = folder / "model.safetensors.partial"
    save_file(weights(config), partial, metadata={"format": "pt"})
    partial.rename(folder / "model.safetensors")


def weights(config: dict[str, object]):  # type: ignore[no-untyped-def]
    """Name to bfloat16 tensor, in the layout of Llama's and Qwen2's checkpoints."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.empty(*shape).normal_(0.0, STD, generator=generator).bfloat16()

    sizes = {key: value for key, value in config.items() if type(value) is int}
    hidden, inner, heads = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_attention_heads"]
    head = sizes.get("head_dim", hidden // heads)
    kv = sizes["num_key_value_heads"] * head
    embedding = normal(sizes["vocab_size"], hidden)
    embedding[EOS_ID] = 0
    ones = torch.ones(hidden, dtype=torch.bfloat16)
    out = {"model.embed_tokens.weight": embedding, "model.norm.weight": ones.clone()}
    for layer in range(sizes["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, rows in (("q", heads * head), ("k", kv), ("v", kv)):
            out[f"{prefix}self_attn.{name}_proj.weight"] = normal(rows, hidden)
            if config["model_type"] == "qwen2":
                out[f"{prefix}self_attn.{name}_proj.bias"] = normal(rows)
        out[prefix + "self_attn.o_proj.weight"] = normal(hidden, heads * head)
        out[prefix + "mlp.gate_proj.weight"] = normal(inner, hidden)
        out[prefix + "mlp.up_proj.weight"] = normal(inner, hidden)
        out[prefix + "mlp.down_proj.weight"] = normal(hidden, inner)
        out[prefix + "input_layernorm.weight"] = ones.clone()
        out[prefix + "post_attention_layernorm.weight"] = ones.clone()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    write_model(args.folder, SHAPES[args.shape] | COMMON)


if __name__ == "__main__":
    main()
