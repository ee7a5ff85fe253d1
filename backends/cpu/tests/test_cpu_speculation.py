"""Drafts change no bit of a text, as a native program and through torch, in every form of the cache."""

from __future__ import annotations

import random
from array import array
from dataclasses import replace
from pathlib import Path

import pytest

from tokenplane_core.kit.runner import LocalEngine
from tokenplane_core.messages import SamplingParams
from tokenplane_core.model import describe_model
from tokenplane_cpu import native
from tokenplane_cpu.plugin import CpuBackend

SAMPLINGS = (
    SamplingParams(),
    SamplingParams(temperature=0.9, top_p=0.9, seed=5),
    SamplingParams(temperature=0.7, repetition_penalty=1.3, frequency_penalty=0.4, seed=6, num_logprobs=2),
)
PROMPTS = [[random.Random(n).randrange(3, 320) for _ in range(n)] for n in (3, 40, 70)]
NUM_TOKENS = 40


class Recalls:
    """Proposes the texts that were seen, with a mistake in every fifth place."""

    def __init__(self, texts: list[list[int]]) -> None:
        self.texts = texts

    def propose(self, token_ids: array[int], most: int) -> list[int]:
        known = token_ids.tolist()
        rest = next((text[len(known) :] for text in self.texts if text[: len(known)] == known), [])
        return [7 if (len(known) + i) % 5 == 0 else token_id for i, token_id in enumerate(rest[:most])]


@pytest.mark.parametrize(
    ("dtype", "kv_dtype"), [("float32", None), ("bfloat16", None), ("bfloat16", "int8")], ids=["f32", "bf16", "int8 kv"]
)
def test_texts_with_drafts_are_those_without(dtype: str, kv_dtype: str | None, way: str, checkpoint: Path) -> None:
    if kv_dtype and not native.is_built():
        pytest.skip("tokenplane-cpu was installed without its native kernels")
    if way == "torch" and dtype != "float32":
        pytest.skip("torch's matrix products round by the size of the batch, so only float32 texts can be compared")
    model = replace(describe_model(checkpoint, dtype=dtype), kv_dtype=kv_dtype)

    def outcomes(max_drafts: int, drafter: Recalls | None) -> tuple[list[object], LocalEngine]:
        engine = LocalEngine(CpuBackend, model, "cpu", max_drafts=max_drafts, drafter=drafter)
        ids = [engine.submit(prompt, NUM_TOKENS, sampling) for prompt in PROMPTS for sampling in SAMPLINGS]
        engine.run()
        engine.close()
        found = [engine.outcomes[i] for i in ids]
        return [(o.token_ids, o.logprobs, o.top_logprobs) if way == "program" else o.token_ids for o in found], engine

    plain, engine = outcomes(0, None)
    asked = [prompt for prompt in PROMPTS for _ in SAMPLINGS]
    texts = [prompt + engine.outcomes[f"r{i + 1}"].token_ids for i, prompt in enumerate(asked)]
    fast, engine = outcomes(4, Recalls(texts))
    assert fast == plain
    stats = engine.engine.stats
    assert 100 < stats.draft_tokens_accepted < stats.draft_tokens
    assert stats.decode_steps < NUM_TOKENS - 1
