#!/usr/bin/env python3
"""What a grammar costs: time per token with a mask against without, in a batch of 16.

Two engines in this process, the CPU backend, greedy: one has 16 free requests, the other 16 with as many different
grammars (lists of objects that are long enough for each). They step in turn, and in each round once more with their
parts changed: where its memory lies makes an engine up to a tenth faster than another. Only decode steps with all 16
rows count, so neither prompts nor compilation do. Prints the median time of a step for both and their ratio.

    python benchmarks/guided.py --rounds 5
    python benchmarks/guided.py --vocab 128256 --hidden 2048 --layers 4   # random weights, a large vocabulary

The second form needs no checkpoint: it writes one with random weights whose tokenizer is the demo model's, filled up
with tokens of two and three letters, so that masks have the length they have in large models.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import string
import tempfile
import time
from pathlib import Path

from tokenplane_core.backend.plugins import load_plugin
from tokenplane_core.engine.grammar import LLGrammars
from tokenplane_core.garbage import settle
from tokenplane_core.kit.runner import LocalEngine
from tokenplane_core.messages import Grammar, SamplingParams
from tokenplane_core.model import describe_model

DEMO = Path(__file__).parents[1] / "models" / "demo"
ROWS = 16


def grammar(i: int) -> Grammar:
    """JSON with a list too long to come to its end."""
    item = {"type": "object", "properties": {f"k{i}": {"type": "integer"}, "s": {"type": "string"}}}
    item |= {"required": [f"k{i}", "s"], "additionalProperties": False}
    return Grammar("json_schema", json.dumps({"type": "array", "items": item, "minItems": 1000}))


def start(engine: LocalEngine, tokens: int, guided: bool) -> list[str]:
    """Submit a batch and run its prompts; the requests."""
    ids = [
        engine.submit([5 + i, 7, 9], tokens, SamplingParams(), grammar=grammar(i) if guided else None)
        for i in range(ROWS)
    ]
    while not all(engine.outcomes[i].token_ids for i in ids):
        engine.step()
    return ids


def timed_step_s(engine: LocalEngine) -> float:
    start_s = time.perf_counter()
    engine.step()
    return time.perf_counter() - start_s


def round_s(free: LocalEngine, guided: LocalEngine, tokens: int) -> list[tuple[float, float]]:
    """The times of decode steps with all rows, without masks and with, in turn: a busy machine disturbs both alike."""
    ids = start(free, tokens, False), start(guided, tokens, True)
    times_s = []
    while not any(e.outcomes[i].finish_reason for e, some in zip((free, guided), ids, strict=True) for i in some):
        times_s.append((timed_step_s(free), timed_step_s(guided)))
    for engine, some in zip((free, guided), ids, strict=True):
        engine.run()
        wrong = [engine.outcomes[i] for i in some if engine.outcomes[i].finish_reason != "length"]
        assert not wrong, wrong
    return times_s


def write_large(folder: Path, vocab: int, hidden: int, layers: int) -> Path:
    """A Llama with random weights and a tokenizer of `vocab` tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
        max_position_embeddings=2048,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer = json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))
    known = tokenizer["model"]["vocab"]
    ends = max(known.values()), max(token["id"] for token in tokenizer["added_tokens"])
    words = (
        "".join(letters) for n in itertools.count(2) for letters in itertools.product(string.ascii_letters, repeat=n)
    )
    fresh = (word for word in words if word not in known)
    for token_id in range(max(ends) + 1, vocab):
        known[next(fresh)] = token_id
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vocab", type=int, help="of a model with random weights, instead of --model")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_large(Path(scratch), args.vocab, args.hidden, args.layers) if args.vocab else args.model
        model = describe_model(folder, dtype=args.dtype, max_model_tokens=1024)
        engines = [
            LocalEngine(
                lambda: load_plugin("cpu"),
                model,
                "cpu",
                max_sequences=ROWS,
                prefix_cache=False,
                grammars=LLGrammars(folder, model.vocab_size),
            )
            for _ in range(2)
        ]
        parts = (engines, engines[::-1])
        for free, guided in parts:  # warm: tokenizers, grammars, threads
            round_s(free, guided, 8)
        settle()  # as the engine's process does
        times_s: list[list[tuple[float, float]]] = [[], []]
        for _ in range(args.rounds):
            for of_part, (free, guided) in zip(times_s, parts, strict=True):
                of_part += round_s(free, guided, args.tokens)
        for engine in engines:
            engine.close()
    medians = [[statistics.median(column) for column in zip(*of_part, strict=True)] for of_part in times_s]
    free_s, guided_s = map(statistics.mean, zip(*medians, strict=True))
    ratio = guided_s / free_s
    print(f"{ROWS} rows, vocabulary {model.vocab_size:,}, {args.dtype}: a step takes {free_s * 1000:.2f} ms without")
    print(f"masks and {guided_s * 1000:.2f} ms with masks in all rows: {ratio:.3f} times as long")
    print(json.dumps({"free_step_s": free_s, "guided_step_s": guided_s, "ratio": round(ratio, 3)}))


if __name__ == "__main__":
    main()
