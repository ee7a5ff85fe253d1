"""Train the demo model from scratch: tokenizer, weights and configuration, in the layout of a Hugging Face checkpoint.

python train.py                     # less than an hour on two processor cores
python train.py --quick --out quick-model   # a minute, only to see that it works
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from data import END, PAD, START, Encoder, corpus
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM
from wiring import wire_copying

EMBEDDING_RATE = 0.2  # of the rate of the matrices
HERE = Path(__file__).resolve().parent
# Digits stand alone, so that sums are sums of digits; a word takes the space before it.
PIECES = r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') | trim + '<|im_end|>' + '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def train_tokenizer(seed: int, vocab_size: int, chats: int) -> Tokenizer:
    """A byte-level BPE learned from our own chats; any text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=20,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(seed, chats), trainer)
    return tokenizer


def make_model(tokenizer: Tokenizer, hidden: int, layers: int) -> LlamaForCausalLM:
    """A small Llama with heads of 64, because every attention kernel supports that size."""
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 128),
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(END),
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    return LlamaForCausalLM(config)


def write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write the whole checkpoint folder, weights in bfloat16."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {
        k: v.to("cpu", torch.bfloat16).contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"
    }
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    config = model.config.to_dict()
    shape = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads",
             "head_dim", "hidden_act", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings",
             "attention_bias",
             "mlp_bias", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")  # fmt: skip
    write_json(
        out / "config.json",
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}
        | {key: config[key] for key in shape}
        | {"rope_theta": 10000.0, "rope_scaling": None},
    )
    eos, pad = config["eos_token_id"], config["pad_token_id"]
    write_json(out / "generation_config.json", {"do_sample": False, "eos_token_id": eos, "pad_token_id": pad})
    tokenizer.save(str(out / "tokenizer.json"))
    special = {"eos_token": END, "pad_token": PAD, "additional_special_tokens": [START, END]}
    write_json(out / "special_tokens_map.json", special)
    write_json(
        out / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 1024, "clean_up_tokenization_spaces": False}
        | {"add_prefix_space": False, "bos_token": None, "chat_template": CHAT_TEMPLATE}
        | special,
    )


def optimizers(model: LlamaForCausalLM, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, which learns faster per token, and AdamW for embeddings and norms.

    The tied embeddings get a small rate: AdamW gives the gradient of a rare token a full step, and too large ones
    push all rare tokens to the same place, where nothing can be copied any more.
    """
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate * EMBEDDING_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def train(args: argparse.Namespace, model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    """The loop. Ends after `--steps` or `--minutes`, whichever comes first; the rate falls to zero until then."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).train()
    optims = optimizers(model, args.rate)
    batches = Encoder(tokenizer).batches(args.seed, args.batch_tokens)
    start_s = time.monotonic()
    mean_loss, seen_tokens, step = math.log(model.config.vocab_size), 0, 0
    while True:
        elapsed_s = time.monotonic() - start_s
        progress = max(step / args.steps, elapsed_s / (args.minutes * 60) if args.minutes else 0.0)
        if progress >= 1:
            break
        scale = min(1.0, (step + 1) / args.warmup_steps) * min(1.0, (1 - progress) / 0.6)
        for optim in optims:
            for group in optim.param_groups:
                group["lr"] = scale * group.setdefault("full_lr", group["lr"])
        ids_np, mask_np = next(batches)
        ids, mask = torch.from_numpy(ids_np).to(device), torch.from_numpy(mask_np).to(device)
        with torch.autocast(device, torch.bfloat16):
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
            logits = model.lm_head(hidden[mask[:, 1:]])
        loss = functional.cross_entropy(logits.float(), ids[:, 1:][mask[:, 1:]])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optim in optims:
            optim.step()
            optim.zero_grad(set_to_none=True)
        step += 1
        seen_tokens += ids.numel()
        mean_loss += (loss.item() - mean_loss) * min(1.0, 0.03 + 1 / step)
        if step % 20 == 0:
            speed = seen_tokens / (time.monotonic() - start_s)
            print(
                f"step {step}  progress {progress:.3f}  loss {mean_loss:.4f}  rate x {scale:.2f}  {speed:.0f} tokens/s",
                flush=True,
            )
        if args.checkpoints and step % 100 == 0:
            save(model, tokenizer, args.checkpoints)
    minutes = (time.monotonic() - start_s) / 60
    print(
        f"done: {step} steps, {seen_tokens / 1e6:.2f} M tokens, {minutes:.1f} minutes, loss {mean_loss:.4f}", flush=True
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=HERE, help="folder to write the checkpoint to (default: this folder)"
    )
    parser.add_argument("--steps", type=int, default=4000, help="training steps (default: %(default)s)")
    parser.add_argument(
        "--minutes", type=float, default=0, help="end after this time even if steps are left; 0: no limit"
    )
    parser.add_argument("--batch-tokens", type=int, default=4096, help="tokens per step (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate (default: %(default)s)")
    parser.add_argument(
        "--warmup-steps", type=int, default=50, help="steps until that rate is reached (default: %(default)s)"
    )
    parser.add_argument("--hidden", type=int, default=256, help="hidden size, a multiple of 64 (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="number of layers (default: %(default)s)")
    parser.add_argument("--vocab", type=int, default=2048, help="size of the vocabulary (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="processor threads (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of data and weights (default: %(default)s)")
    parser.add_argument("--resume", type=Path, help="go on from the tokenizer and weights in this folder")
    parser.add_argument("--checkpoints", type=Path, help="folder to save to every 100 steps")
    parser.add_argument("--quick", action="store_true", help="a tiny model and 10 steps, to test the script")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.quick:
        args.steps, args.hidden, args.layers, args.batch_tokens = 10, 128, 2, 1024
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    if args.resume:
        tokenizer = Tokenizer.from_file(str(args.resume / "tokenizer.json"))
        model = LlamaForCausalLM.from_pretrained(args.resume, dtype=torch.float32)
    else:
        tokenizer = train_tokenizer(args.seed, args.vocab, 1000 if args.quick else 30000)
        model = make_model(tokenizer, args.hidden, args.layers)
        wire_copying(model, args.seed)
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {tokenizer.get_vocab_size()} tokens",
        flush=True,
    )
    train(args, model, tokenizer)
    save(model, tokenizer, args.out)


if __name__ == "__main__":
    main()
