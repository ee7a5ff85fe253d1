"""Greedy tokens through the plugin equal transformers' own, token for token in float32, however they are batched."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tokenplane_core.backend.errors import UnsupportedModel
from tokenplane_core.backend.records import LoadOptions, ModelSpec
from tokenplane_core.model import describe_model
from tokenplane_cpu.plugin import CpuBackend
from tokenplane_torch.testing import FAMILIES, REFUSED_FAMILIES, Driver, make_checkpoint, reference_greedy

CacheBlocks = Callable[[CpuBackend], list[NDArray[np.uint8]]]

LENGTHS = (1, 2, 5, 9, 16, 31, 32, 33, 40, 48, 63, 64, 65, 80, 100, 130)  # around blocks of 32 tokens
NEW_TOKENS = 10


class Served:
    """A family loaded in float32, with prompts and the answers transformers gives."""

    def __init__(self, family: str, folder: Path) -> None:
        rng = random.Random(family)
        self.folder = make_checkpoint(family, folder)
        self.plugin = CpuBackend()
        self.capabilities = self.plugin.load(describe_model(self.folder), LoadOptions(num_threads=1))
        self.prompts = [[rng.randrange(3, 320) for _ in range(length)] for length in LENGTHS]
        self.answers = [self.answer(prompt) for prompt in self.prompts]

    def answer(self, prompt: list[int]) -> list[int]:
        return reference_greedy(self.folder, prompt, NEW_TOKENS)

    def driver(self) -> Driver:
        return Driver(self.plugin, self.capabilities)


@pytest.fixture(scope="module", params=FAMILIES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    family = Served(request.param, tmp_path_factory.mktemp(request.param))
    yield family
    family.plugin.close()


def test_the_answers_are_worth_comparing(served: Served) -> None:
    """Random weights may repeat one token for ever, which any model could."""
    assert len({token for answer in served.answers for token in answer}) >= 12
    assert len({tuple(answer) for answer in served.answers}) >= len(LENGTHS) - 2


def test_a_batch_of_mixed_lengths_equals_transformers(served: Served) -> None:
    assert served.driver().generate(served.prompts, NEW_TOKENS) == served.answers


@pytest.mark.parametrize(("chunk_tokens", "stagger", "padding"), [(7, 2, 0), (32, 1, 3)])
def test_chunked_prompts_beside_decodes_equal_transformers(
    served: Served, chunk_tokens: int, stagger: int, padding: int
) -> None:
    got = served.driver().generate(served.prompts, NEW_TOKENS, chunk_tokens, stagger, padding)
    assert got == served.answers


def test_prompts_that_share_full_blocks_equal_transformers(served: Served) -> None:
    driver = served.driver()
    first = driver.open(served.prompts[-1])
    driver.step({first: len(first.token_ids)})
    prompt = served.prompts[-1][:100] + served.prompts[3]
    second = driver.open(prompt, share=first)
    assert second.computed == 96 and second.blocks == first.blocks[:3]
    driver.step({second: len(prompt) - 96, first: 1})
    for _ in range(NEW_TOKENS - 1):
        driver.step({first: 1, second: 1})
    assert first.generated[:NEW_TOKENS] == served.answers[-1]
    assert second.generated == served.answer(prompt)


def test_blocks_full_of_another_sequences_leftovers_change_nothing(served: Served, cache_blocks: CacheBlocks) -> None:
    """A freed block may hold anything, even NaN."""
    driver = served.driver()
    for piece in cache_blocks(served.plugin):
        piece.fill(0xFF)  # the bytes of a NaN, in any float
    assert driver.generate(served.prompts, NEW_TOKENS, chunk_tokens=24) == served.answers


SCALED = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.5] * 8, "long_factor": [4.0] * 8}
VARIANTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "linear": ("llama", 256, {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "yarn": ("qwen2", 256, {"rope_parameters": SCALED | {"rope_type": "yarn"}}),
    "llama3": (
        "llama",
        256,
        {"rope_parameters": SCALED | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    ),
    "longrope": ("phi3", 64, {"rope_parameters": LONG, "original_max_position_embeddings": 64}),
    "windows_in_upper_layers": (
        "qwen2",
        256,
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "tied_embeddings": ("qwen3", 256, {"tie_word_embeddings": True}),
    "one_kv_head": ("starcoder2", 256, {"num_key_value_heads": 1, "sliding_window": 5}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_within_a_family_equal_transformers(variant: str, tmp_path: Path) -> None:
    family, longest, fields = VARIANTS[variant]
    folder = make_checkpoint(family, tmp_path, **fields)
    plugin = CpuBackend()
    capabilities = plugin.load(describe_model(folder, max_model_tokens=longest), LoadOptions(num_threads=1))
    rng = random.Random(variant)
    prompts = [[rng.randrange(3, 320) for _ in range(n)] for n in (3, 20, 33, longest - NEW_TOKENS)]
    want = [reference_greedy(folder, prompt, NEW_TOKENS) for prompt in prompts]
    assert Driver(plugin, capabilities).generate(prompts, NEW_TOKENS, chunk_tokens=17, stagger=1) == want


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma3", "gpt_oss"])
def test_bfloat16_stays_close_to_float32(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(family, tmp_path)
    prompt = [random.Random(0).randrange(3, 320) for _ in range(50)]
    logits = []
    for dtype in ("float32", "bfloat16"):
        plugin = CpuBackend()
        capabilities = plugin.load(describe_model(folder, dtype=dtype), LoadOptions(num_threads=1))
        assert capabilities.dtype == dtype
        driver = Driver(plugin, capabilities)
        output = driver.step({driver.open(prompt): len(prompt)}, return_logits=True)
        assert output.logits is not None and output.logits.dtype == np.float32
        logits.append(output.logits[0])
    assert np.linalg.norm(logits[1] - logits[0]) < 0.1 * np.linalg.norm(logits[0])


REASONS = {
    "falcon": "does not go through transformers' attention interface",
    "bloom": "does not go through transformers' attention interface",
    "mpt": "does not run on a packed batch without a mask",
    "mamba": "layers of type linear_attention",
    "qwen3_next": "layers of type linear_attention",
    "t5": "encoder-decoder",
    "llama4": "layers of type chunked_attention",
}


@pytest.mark.parametrize("family", REFUSED_FAMILIES)
def test_what_cannot_be_served_is_refused_by_type_and_reason(family: str, tmp_path: Path) -> None:
    model = _describe(make_checkpoint(family, tmp_path))
    plugin = CpuBackend()
    with pytest.raises(UnsupportedModel) as refusal:
        plugin.load(model, LoadOptions(num_threads=1))
    assert f"model type {model.config['model_type']!r} is not supported: " in str(refusal.value)
    assert REASONS[family] in str(refusal.value)
    assert plugin._runner is None


def _describe(folder: Path) -> ModelSpec:
    """Some config.json lack what describe_model wants to know; the backend must not rely on that."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    plain = config | {
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "hidden_size": 64,
        "max_position_embeddings": 256,
    }
    (folder / "config.json").write_text(json.dumps(plain))
    try:
        return replace(describe_model(folder), config=config)
    finally:
        (folder / "config.json").write_text(json.dumps(config))
