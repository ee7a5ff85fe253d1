"""Prompt logprobs of the engine equal transformers' own, for every family; some scale or cap their logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from tokenplane_core.backend.plugins import load_plugin
from tokenplane_core.backend.records import F32
from tokenplane_core.kit.runner import LocalEngine
from tokenplane_core.model import describe_model
from tokenplane_cpu import program_runner
from tokenplane_cpu.conditions import PROGRAM
from tokenplane_cpu.program import Program
from tokenplane_torch import module
from tokenplane_torch.testing.checkpoints import FAMILIES, make_checkpoint

PROMPT = [3 + i * 37 % 317 for i in range(150)]


def start(folder: Path, **options: int) -> LocalEngine:
    return LocalEngine(lambda: load_plugin("cpu"), describe_model(folder, dtype="float32"), "cpu", **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_logprobs_equal_transformers(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(family, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    with torch.inference_mode():
        scores = model(torch.tensor([PROMPT])).logits[0].float().log_softmax(-1)
    expected = scores[range(len(PROMPT) - 1), PROMPT[1:]]
    best = scores[:-1].topk(3).values
    engine = start(folder, max_step_tokens=140)
    asked = engine.submit(PROMPT, 1, prompt_logprobs=True, num_prompt_top_logprobs=3)
    engine.submit(PROMPT, 1)
    engine.run()
    got, top = engine.outcomes[asked].prompt_logprobs, engine.outcomes[asked].prompt_top_logprobs
    assert got is not None and top is not None
    torch.testing.assert_close(torch.tensor(got[1:]), expected, atol=2e-3, rtol=1e-3)
    values = torch.tensor([[value for _, value in place] for place in top[1:]])
    torch.testing.assert_close(values, best, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("way", ["program", "torch"])
def test_logits_of_few_tokens_are_held_at_a_time(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PROGRAM, "1" if way == "program" else "0")
    engine = start(make_checkpoint("llama", tmp_path))
    widths: list[int] = []
    log_softmax, logits_of = torch.Tensor.log_softmax, Program.logits

    def noting(logits: torch.Tensor, dim: int) -> torch.Tensor:
        widths.append(logits.shape[0])
        return log_softmax(logits, dim)

    def noting_program(program: Program, first: int, count: int) -> F32:
        widths.append(count)
        return logits_of(program, first, count)

    monkeypatch.setattr(torch.Tensor, "log_softmax", noting)
    monkeypatch.setattr(Program, "logits", noting_program)
    engine.submit(PROMPT, 1, prompt_logprobs=True)
    engine.run()
    assert sum(widths) == len(PROMPT) - 1
    assert max(widths) == (program_runner.SCORED_TOKENS if way == "program" else module.MOST_SCORED_TOKENS)
