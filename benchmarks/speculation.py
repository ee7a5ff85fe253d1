#!/usr/bin/env python3
"""What speculation gives and what it costs: tokens/s with N guesses over those with none, on texts of three kinds.

One engine for each N in this process, over the CPU backend; they run the same requests in turn, round after round.
`repetitive`: greedy, behind a prompt that says the same thing six times. `random`: drawn at temperature 1.5 behind
random tokens, so that hardly anything occurs twice. `misled`: as random, and a guess in each step, always a wrong one:
the most that speculation can cost. Prints the median tokens/s, the median of each round's ratio to N = 0, and how many
guesses were right.

    python benchmarks/speculation.py --rounds 5
    python benchmarks/speculation.py --model FOLDER --dtype bfloat16

With random weights (`python -m benchmarks.peers.models smol FOLDER`) a greedy text soon repeats itself for ever, which
shows the most that the mechanism can give; models/demo writes words.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from array import array
from pathlib import Path

from tokenplane_core.backend.plugins import load_plugin
from tokenplane_core.engine.speculation import NgramDrafter
from tokenplane_core.kit.runner import LocalEngine
from tokenplane_core.messages import SamplingParams, Stats
from tokenplane_core.model import describe_model

DEMO = Path(__file__).parents[1] / "models" / "demo"
KINDS = ("repetitive", "random", "misled")


class Misleading:
    """Guesses like NgramDrafter, or wrongly all the time."""

    def __init__(self) -> None:
        self.misleads = False
        self._honest = NgramDrafter()

    def propose(self, token_ids: array[int], most: int) -> list[int]:
        return [token_ids[0]] * most if self.misleads else self._honest.propose(token_ids, most)


def prompts_of(kind: str, count: int, vocab_size: int, seed: int) -> list[list[int]]:
    rng = random.Random(f"{kind} {seed}")
    own = [[rng.randrange(vocab_size) for _ in range(20)] for _ in range(count)]
    return [prompt * 6 for prompt in own] if kind == "repetitive" else own


def run(engine: LocalEngine, kind: str, clients: int, tokens: int, seed: int) -> tuple[float, list[list[int]]]:
    """Tokens per second of a batch, prompts not counted, and its texts."""
    heat = 0.0 if kind == "repetitive" else 1.5
    prompts = prompts_of(kind, clients, engine.engine._vocab_size, seed)
    ids = [
        engine.submit(prompt, tokens, SamplingParams(temperature=heat, seed=seed + i))
        for i, prompt in enumerate(prompts)
    ]
    while not all(engine.outcomes[i].token_ids for i in ids):
        engine.step()
    before, start_s = sum(len(engine.outcomes[i].token_ids) for i in ids), time.perf_counter()
    while not engine.is_idle:
        engine.engine.step()
    elapsed_s = time.perf_counter() - start_s
    return (clients * tokens - before) / elapsed_s, [engine.outcomes[i].token_ids for i in ids]


def guesses(before: Stats, after: Stats) -> str:
    """Guessed and right between two readings."""
    drafted = after.draft_tokens - before.draft_tokens
    right = after.draft_tokens_accepted - before.draft_tokens_accepted
    return f"{right} of {drafted}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--guesses", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    model = describe_model(options.model, dtype=options.dtype, max_model_tokens=512)
    drafter = Misleading()
    engines = {
        most: LocalEngine(
            lambda: load_plugin(options.backend),
            model,
            options.backend,
            max_drafts=most,
            drafter=drafter if most else None,
            kv_cache_tokens=8192,
        )
        for most in (0, *options.guesses)
    }
    for kind in KINDS:
        drafter.misleads = kind == "misled"
        for clients in options.clients:
            speeds: dict[int, list[float]] = {most: [] for most in engines}
            before = {most: engine.engine.stats for most, engine in engines.items()}
            differing = 0
            for number in range(options.rounds):
                texts = {}
                for most, engine in engines.items():
                    speed, texts[most] = run(engine, kind, clients, options.tokens, 1000 * number)
                    speeds[most].append(speed)
                differing += sum(texts[most] != texts[0] for most in options.guesses)
            print(f"{kind}, {clients} at once, {differing} of {options.rounds * len(options.guesses)} batches differ")
            for most, found in speeds.items():
                ratio = statistics.median(a / b for a, b in zip(found, speeds[0], strict=True))
                line = f"  N = {most}: {statistics.median(found):8.1f} tokens/s, {ratio:.2f} times N = 0"
                said = guesses(before[most], engines[most].engine.stats) if most else ""
                print(f"{line}, right guesses {said}" if most else line)
    for engine in engines.values():
        engine.close()


if __name__ == "__main__":
    main()
