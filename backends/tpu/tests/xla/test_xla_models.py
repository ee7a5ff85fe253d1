"""Greedy tokens of real architectures on XLA equal transformers' own, token for token in float32."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tokenplane_core.kit.runner import LocalEngine
from tokenplane_core.model import describe_model
from tokenplane_torch.testing import make_checkpoint, reference_greedy
from tokenplane_tpu.plugin import TpuBackend

# With biases; sliding window and soft cap; experts; keys wider than values. A plain Llama is the kit's own model.
FAMILIES = ("qwen2", "gemma2", "mixtral", "deepseek_v3")
LENGTHS = (1, 5, 13, 33, 70)  # the last needs three steps of 32 tokens, beside decodes
NEW_TOKENS = 12


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_equals_transformers_and_compiles_nothing(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(family, tmp_path)
    rng = random.Random(family)
    prompts = [[rng.randrange(3, 320) for _ in range(length)] for length in LENGTHS]
    model = describe_model(folder, dtype="float32")
    engine = LocalEngine(TpuBackend, model, "tpu", max_step_tokens=32, max_sequences=8)
    got = engine.generate(prompts, NEW_TOKENS)
    want = [reference_greedy(folder, prompt, NEW_TOKENS) for prompt in prompts]
    assert len({tuple(answer) for answer in want}) == len(want)
    assert got == want
    assert engine.engine.stats.compiled_shapes == 0
    engine.close()


def test_tied_weights_stay_one(tmp_path: Path) -> None:
    """Moving a model to an XLA device makes two of them, with twice the memory."""
    folder = make_checkpoint("llama", tmp_path, tie_word_embeddings=True)
    engine = LocalEngine(TpuBackend, describe_model(folder, dtype="float32"), "tpu", max_step_tokens=16)
    embeddings = 320 * 64 * 4
    untied = 133568 * 4  # what the family's model takes otherwise
    assert engine.capabilities.weights_bytes < untied - embeddings + 1024
    assert engine.generate([[5, 6, 7]], 6) == [reference_greedy(folder, [5, 6, 7], 6)]
    engine.close()
