"""Weights quantized while they load: what the model then says, what it takes, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from tokenplane_core.backend.errors import UnsupportedModel
from tokenplane_core.backend.records import Capabilities, LoadOptions, PrefillBatch, SamplingBatch, StepHandle
from tokenplane_core.memory import loaded_bytes
from tokenplane_core.model import describe_model
from tokenplane_core.weight_files import read_weights
from tokenplane_cpu import native
from tokenplane_cpu.conditions import PROGRAM
from tokenplane_cpu.device import QUANTIZES
from tokenplane_cpu.plugin import CpuBackend
from tokenplane_torch.testing import Driver, make_checkpoint

DEMO = Path(__file__).parents[3] / "models" / "demo"
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
QUESTIONS = ("What is a KV cache?", "What is 17 plus 25?", "What is Tokenplane?", "Why is continuous batching useful?")
ANSWER_TOKENS = 24

pytestmark = pytest.mark.skipif(
    not native.is_built(), reason="tokenplane-cpu was installed without its native kernels, which quantize"
)


class Scoring(CpuBackend):
    """Asks for the log-probability of every token of a prompt, given those before it."""

    def prefill(self, batch: PrefillBatch, sampling: SamplingBatch) -> StepHandle:
        following = np.append(batch.token_ids[1:], -1).astype(np.int32)
        return super().prefill(replace(batch, next_token_ids=following), sampling)


@cache
def loaded(quantize: str | None) -> tuple[Scoring, Capabilities]:
    plugin = Scoring()
    return plugin, plugin.load(replace(describe_model(DEMO), quantize=quantize), LoadOptions(num_threads=1))


@cache
def dialogues() -> list[tuple[list[int], list[int]]]:
    """Questions, and what the model as it is stored answers."""
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    questions = [tokenizer.encode(CHAT.format(question)).ids for question in QUESTIONS]
    answers = Driver(*loaded(None)).generate(questions, ANSWER_TOKENS)
    return list(zip(questions, answers, strict=True))


def scored(quantize: str | None) -> tuple[float, np.ndarray]:
    """Perplexity of the answers, and the logits f32 [questions, vocab] after them."""
    logprobs, logits = [], []
    for question, answer in dialogues():
        driver = Driver(*loaded(quantize))
        text = driver.open(question + answer)
        output = driver.step({text: len(text.token_ids)}, hook="prefill", return_logits=True)
        assert output.prompt_logprobs is not None and output.logits is not None
        logprobs.append(output.prompt_logprobs[len(question) - 1 :])
        logits.append(output.logits[0])
    return float(np.exp(-np.concatenate(logprobs).mean())), np.stack(logits)


@pytest.mark.parametrize(("quantize", "most_worse", "most_off"), [("int8", 1.01, 0.05), ("int4", 1.25, 0.3)])
def test_perplexity_and_logits_barely_change(quantize: str, most_worse: float, most_off: float) -> None:
    perplexity, logits = scored(None)
    quantized, near = scored(quantize)
    assert 1 < perplexity < 2, "the model must know what it says"
    assert quantized <= most_worse * perplexity
    assert np.linalg.norm(near - logits) <= most_off * np.linalg.norm(logits - logits.mean())


@pytest.mark.parametrize("quantize", [None, *QUANTIZES])
def test_the_memory_plan_knows_the_size(quantize: str | None) -> None:
    model = replace(describe_model(DEMO), quantize=quantize)
    _, capabilities = loaded(quantize)
    assert loaded_bytes(model, read_weights(model)) == pytest.approx(capabilities.weights_bytes, rel=0.15)


def test_smaller_weights_are_reported() -> None:
    plain, int8, int4 = (loaded(quantize)[1] for quantize in (None, "int8", "int4"))
    assert int4.weights_bytes < int8.weights_bytes < plain.weights_bytes
    assert "int8 weights" in int8.kernels["step"] and "int4 (groups of 32) weights" in int4.kernels["step"]


@pytest.fixture
def plugin() -> Iterator[CpuBackend]:
    plugin = CpuBackend()
    yield plugin
    plugin.close()


@pytest.mark.parametrize("quantize", QUANTIZES)
def test_texts_do_not_depend_on_the_batch(plugin: CpuBackend, quantize: str, tmp_path: Path) -> None:
    model = describe_model(make_checkpoint("qwen2", tmp_path), dtype="bfloat16")
    capabilities = plugin.load(replace(model, quantize=quantize), LoadOptions(num_threads=1))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 320, n).tolist() for n in (3, 33, 50, 7, 64, 18)]
    alone = [Driver(plugin, capabilities).generate([prompt], 8)[0] for prompt in prompts]
    assert Driver(plugin, capabilities).generate(prompts, 8, chunk_tokens=20, stagger=1) == alone


def test_other_dtypes_are_refused_with_the_way_out(plugin: CpuBackend) -> None:
    model = replace(describe_model(DEMO, dtype="float32"), quantize="int8")
    with pytest.raises(UnsupportedModel, match="int8 weights are computed in bfloat16; set --dtype bfloat16"):
        plugin.load(model, LoadOptions(num_threads=1))


def test_what_no_native_program_runs_is_refused(plugin: CpuBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PROGRAM, "0")
    with pytest.raises(UnsupportedModel, match=f"cannot be quantized while they load.*{PROGRAM}=0"):
        plugin.load(replace(describe_model(DEMO), quantize="int8"), LoadOptions(num_threads=1))


def test_adapters_are_refused(plugin: CpuBackend) -> None:
    with pytest.raises(UnsupportedModel, match="LoRA adapters"):
        plugin.load(
            replace(describe_model(DEMO), quantize="int8"),
            LoadOptions(num_threads=1, max_adapters=1, max_adapter_rank=8),
        )


def test_a_kind_that_is_not_offered_is_refused(plugin: CpuBackend) -> None:
    with pytest.raises(UnsupportedModel, match=r"quantizing weights to int3 while they load is not possible on"):
        plugin.load(replace(describe_model(DEMO), quantize="int3"), LoadOptions(num_threads=1))
