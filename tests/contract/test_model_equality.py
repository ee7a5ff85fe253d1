"""Greedy tokens through the whole engine equal transformers' own `generate`, token for token, in float32.

A batch of 16 prompts of mixed length, some sharing a prefix, in four circumstances: plenty of room, prompts split into
chunks, prefix hits, and a cache so small that sequences are preempted.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tokenplane_core.backend.errors import UnsupportedModel
from tokenplane_core.backend.plugins import load_plugin
from tokenplane_core.kit.runner import LocalEngine
from tokenplane_core.model import describe_model
from tokenplane_torch.testing.checkpoints import FAMILIES, REFUSED_FAMILIES, make_checkpoint, reference_greedy

NUM_TOKENS = 12
PROMISED = {
    "llama", "qwen2", "qwen3", "mistral", "mixtral", "gemma2", "gemma3", "phi3", "gpt_neox", "starcoder2",
}  # fmt: skip


def prompts() -> list[list[int]]:
    """16 prompts of 1 to 90 tokens; the last four begin with the same 64."""
    rng = random.Random(16)
    lengths = [1, 2, 31, 32, 33, 64, 90] + [rng.randint(3, 60) for _ in range(5)]
    shared = [rng.randrange(3, 320) for _ in range(64)]
    own = [[rng.randrange(3, 320) for _ in range(length)] for length in lengths]
    return own + [shared + [rng.randrange(3, 320) for _ in range(length)] for length in (1, 3, 7, 20)]


PROMPTS = prompts()


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[list[int]]:
    return [reference_greedy(checkpoint, prompt, NUM_TOKENS) for prompt in PROMPTS]


def engine(folder: Path, **options: object) -> LocalEngine:
    return LocalEngine(lambda: load_plugin("cpu"), describe_model(folder, dtype="float32"), "cpu", **options)  # type: ignore[arg-type]


def test_the_promised_families_are_among_the_equal_ones() -> None:
    assert set(FAMILIES) >= PROMISED


def test_a_mixed_batch(checkpoint: Path, expected: list[list[int]]) -> None:
    assert engine(checkpoint, prefix_cache=False).generate(PROMPTS, NUM_TOKENS) == expected


@pytest.mark.parametrize("max_step_tokens", [17, 50])
def test_prompts_split_into_chunks(checkpoint: Path, expected: list[list[int]], max_step_tokens: int) -> None:
    small = engine(checkpoint, max_step_tokens=max_step_tokens)
    assert small.capabilities.limits.max_step_tokens == max_step_tokens
    assert small.generate(PROMPTS, NUM_TOKENS) == expected


def test_prefix_hits(checkpoint: Path, expected: list[list[int]]) -> None:
    caching = engine(checkpoint)
    caching.generate(PROMPTS[-1:], NUM_TOKENS)
    ids = [caching.submit(prompt, NUM_TOKENS) for prompt in PROMPTS]
    caching.run()
    assert [caching.outcomes[i].token_ids for i in ids] == expected
    assert all(caching.outcomes[i].num_cached_tokens >= 64 for i in ids[-4:])


def test_a_cache_so_small_that_sequences_are_preempted(checkpoint: Path, expected: list[list[int]]) -> None:
    probe = engine(checkpoint).engine.layout.block_tokens
    tight = engine(checkpoint, kv_cache_tokens=6 * probe, prefix_cache=False)
    assert tight.generate(PROMPTS, NUM_TOKENS) == expected
    assert tight.engine.stats.requests_preempted > 0


@pytest.mark.parametrize("family", REFUSED_FAMILIES)
def test_what_cannot_be_equal_is_refused_with_a_sentence(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(family, tmp_path)
    with pytest.raises(UnsupportedModel) as caught:
        engine(folder)
    assert len(str(caught.value)) > 40
