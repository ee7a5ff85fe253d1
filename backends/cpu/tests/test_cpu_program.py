"""Which models run as one native program, that the program is proved before it serves, and batch invariance."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from tokenplane_core.backend.records import Capabilities, LoadOptions
from tokenplane_core.messages import SamplingParams
from tokenplane_core.model import describe_model
from tokenplane_cpu import host
from tokenplane_cpu.decoder import read_decoder
from tokenplane_cpu.plugin import CpuBackend
from tokenplane_torch.testing import Driver, make_checkpoint, reference_greedy

NATIVE = "one native call a step"
PLAIN = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3")
OTHERS = {"mixtral": "gated MLP", "gpt_neox": "gated MLP", "gpt2": "list of layers", "opt": "rotary embedding"}


def load(folder: Path, dtype: str = "float32", threads: int = 1) -> tuple[CpuBackend, Capabilities]:
    plugin = CpuBackend()
    return plugin, plugin.load(describe_model(folder, dtype=dtype), LoadOptions(num_threads=threads))


@pytest.mark.parametrize("family", PLAIN)
def test_plain_decoders_run_as_a_program(family: str, tmp_path: Path) -> None:
    assert load(make_checkpoint(family, tmp_path))[1].kernels["step"].startswith(NATIVE)


@pytest.mark.parametrize("family", OTHERS)
def test_other_models_run_through_torch_and_say_why(family: str, tmp_path: Path) -> None:
    step = load(make_checkpoint(family, tmp_path))[1].kernels["step"]
    assert step.startswith("torch") and OTHERS[family] in step


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_without_the_program_the_tokens_are_the_same(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(host.PROGRAM, "0")
    folder = make_checkpoint(family, tmp_path)
    backend = load(folder)
    assert host.PROGRAM in backend[1].kernels["step"]
    prompts = [[random.Random(n).randrange(3, 320) for _ in range(n)] for n in (1, 33, 70)]
    want = [reference_greedy(folder, prompt, 8) for prompt in prompts]
    assert Driver(*backend).generate(prompts, 8, chunk_tokens=32) == want


def test_a_program_that_computes_something_else_does_not_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint("llama", tmp_path)
    monkeypatch.setattr(host, "read_decoder", lambda *args: replace(read_decoder(*args), residual_scale=0.9))
    plugin, facts = load(folder)
    assert "computes something else" in facts.kernels["step"]
    assert Driver(plugin, facts).generate([[5, 6, 7]], 8) == [reference_greedy(folder, [5, 6, 7], 8)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_a_sequence_gets_does_not_depend_on_its_company(dtype: str, tmp_path: Path) -> None:
    """Bit for bit: alone, beside others, in chunks, with one thread or two."""
    folder = make_checkpoint("qwen3", tmp_path)
    rng = random.Random(3)
    prompts = [[rng.randrange(3, 320) for _ in range(n)] for n in (1, 7, 31, 32, 33, 64, 90, 100, 5, 12, 47, 20)]

    def run(
        driver: Driver, prompts: list[list[int]], chunk_tokens: int = 1 << 30
    ) -> list[tuple[list[int], list[float]]]:
        lives = [driver.open(prompt, SamplingParams(num_logprobs=0)) for prompt in prompts]
        while any(len(live.generated) < 8 for live in lives):
            unfinished = [live for live in lives if len(live.generated) < 8]
            driver.step({live: min(chunk_tokens, len(live.token_ids) - live.computed) for live in unfinished})
        for live in lives:
            driver.close(live)
        return [(live.generated, live.logprobs) for live in lives]

    driver = Driver(*load(folder, dtype))
    alone = [run(driver, [prompt])[0] for prompt in prompts]
    assert run(driver, prompts) == alone
    assert run(driver, prompts, chunk_tokens=9) == alone
    assert run(Driver(*load(folder, dtype, threads=2)), prompts) == alone
