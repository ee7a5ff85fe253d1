"""Loading in a process of its own: what is taken over computes the same, and what goes wrong there is told here."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from helpers.server_process import server_process
from tokenplane_core.backend.errors import BackendError, ConfigError, OutOfMemory, TokenplaneError, UnsupportedModel
from tokenplane_core.backend.records import Capabilities, LoadOptions
from tokenplane_core.messages import SamplingParams
from tokenplane_core.model import describe_model
from tokenplane_cpu import apart, native, packed
from tokenplane_cpu.plugin import CpuBackend
from tokenplane_torch.testing import Driver, make_checkpoint

pytestmark = pytest.mark.skipif(native.library() is None, reason="there are no programs without the native kernels")

DEMO = Path(__file__).parents[3] / "models" / "demo"
HERE = LoadOptions(num_threads=1, max_sequences=8, max_step_tokens=256, max_drafts=2)
APART = replace(HERE, own_process=True)
PROMPTS = [[random.Random(n).randrange(3, 320) for _ in range(n)] for n in (1, 33, 70)]


def load(folder: Path, options: LoadOptions, **wishes: Any) -> tuple[CpuBackend, Capabilities]:
    plugin = CpuBackend()
    dtype = wishes.pop("dtype", "float32")
    return plugin, plugin.load(replace(describe_model(folder, dtype=dtype), **wishes), options)


def texts(backend: CpuBackend, facts: Capabilities) -> list[list[int]]:
    """Drawn, so that the last bits of logits count."""
    driver = Driver(backend, facts)
    lives = [driver.open(prompt, SamplingParams(temperature=1.5, repetition_penalty=1.2, seed=3)) for prompt in PROMPTS]
    for _ in range(12):
        driver.step({live: len(live.token_ids) - live.computed for live in lives})
    return [live.generated for live in lives]


@pytest.mark.parametrize(
    ("family", "wishes"),
    [
        ("llama", {}),
        ("gemma3", {"dtype": "bfloat16"}),
        ("qwen2", {"dtype": "bfloat16", "quantize": "int4", "kv_dtype": "int8"}),
    ],
)
def test_it_computes_and_says_what_it_does_when_loaded_here(
    family: str, wishes: dict[str, Any], tmp_path: Path
) -> None:
    folder = make_checkpoint(family, tmp_path)
    here, there = load(folder, HERE, **wishes), load(folder, APART, **wishes)
    assert texts(*there) == texts(*here)
    assert there[1].kv.budget_bytes > 0
    # What is free changes from one moment to the next.
    facts = [replace(f, kv=replace(f.kv, budget_bytes=0), device=replace(f.device, memory_free_bytes=0)) for f in
             (here[1], there[1])]  # fmt: skip
    assert facts[0] == facts[1]


def test_what_is_no_program_is_loaded_here_after_all(tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path, hidden_act="relu")
    here, there = load(folder, HERE), load(folder, APART)
    assert there[1].kernels == here[1].kernels and "the activation of its MLP" in there[1].kernels["step"]
    assert texts(*there) == texts(*here)


@pytest.mark.parametrize("family", ["mixtral", "gpt2"])
def test_no_process_is_started_for_what_will_be_no_program(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apart, "load_apart", None)
    assert load(make_checkpoint(family, tmp_path), APART)[1].kernels["step"].startswith("torch")


def test_adapters_stay_with_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "load_apart", None)
    options = replace(APART, max_adapters=1, max_adapter_rank=4)
    assert load(make_checkpoint("llama", tmp_path), options)[1].adapters is not None


def refusal(folder: Path, options: LoadOptions, **wishes: Any) -> TokenplaneError:
    with pytest.raises(TokenplaneError) as refused:
        load(folder, options, **wishes)
    return refused.value


@pytest.mark.parametrize(
    ("family", "wishes", "kind"),
    [
        ("t5", {}, UnsupportedModel),
        ("llama", {"dtype": "bfloat16", "quantize": "int8"}, UnsupportedModel),
        ("llama", {"kv_dtype": "int8"}, ConfigError),
    ],
)
def test_a_refusal_is_the_same_as_here(
    family: str, wishes: dict[str, Any], kind: type[TokenplaneError], tmp_path: Path
) -> None:
    overrides = {"hidden_act": "relu"} if "quantize" in wishes else {}
    folder = make_checkpoint(family, tmp_path, **overrides)
    here, there = refusal(folder, HERE, **wishes), refusal(folder, APART, **wishes)
    assert type(there) is type(here) is kind
    assert str(there) == str(here)


@pytest.mark.parametrize(
    ("script", "kind", "words"),
    [
        ("kill -9 $$", OutOfMemory, "was killed, most likely for want of memory"),
        ("echo lost >&2; exit 3", BackendError, "ended with status 3; see the log above"),
    ],
)
def test_a_loader_that_ends_without_a_word_is_an_error(
    script: str, kind: type[TokenplaneError], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    folder = make_checkpoint("llama", tmp_path / "model")
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(kind, match=words):
        load(folder, APART)


def test_a_python_that_cannot_be_started_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint("llama", tmp_path / "model")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nowhere"))
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(BackendError, match="nowhere cannot be started to load the model"):
        load(folder, APART)
    assert set(os.listdir("/proc/self/fd")) == before


def test_weights_that_do_not_fit_here_are_out_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(size_bytes: int) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(packed, "zeroed_memory", full)
    with pytest.raises(OutOfMemory, match=r"its packed weights do not fit: .*Cannot allocate memory"):
        load(make_checkpoint("llama", tmp_path), APART)


_PARENT = """
import os, subprocess, sys, time
command = [sys.executable, "-m", "tokenplane_cpu.load_process", "1", str(os.getpid() + int(sys.argv[1]))]
print(subprocess.Popen(command).pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("lie", [0, 1], ids=["with its parent", "whose parent is another already"])
def test_the_loader_ends(lie: int) -> None:
    """Its standard input stays open here, so nothing else would end it."""
    command = [sys.executable, "-c", _PARENT, str(lie)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        loader = int(parent.stdout.readline())
        if not lie:
            parent.kill()
        end_s = time.monotonic() + 60
        while Path(f"/proc/{loader}").exists() and ") Z " not in Path(f"/proc/{loader}/stat").read_text():
            assert time.monotonic() < end_s
            time.sleep(0.02)
        parent.kill()


def test_the_engine_of_a_server_never_loads_torch(tmp_path: Path) -> None:
    """Not for penalties, log-probabilities, prompts' log-probabilities or grammars either."""
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    wishes: list[dict[str, Any]] = [
        {"details": True, "decoder_input_details": True, "do_sample": True, "typical_p": 0.9, "top_n_tokens": 3},
        {"do_sample": True, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "top_k": 20, "top_p": 0.8},
        {"grammar": {"type": "json", "value": schema}, "max_new_tokens": 60},
    ]
    with server_process(DEMO, tmp_path, "--backend", "cpu", "--speculate", "2", OMP_NUM_THREADS="1") as server:
        for parameters in wishes:
            body = {"inputs": "Hello there", "parameters": {"max_new_tokens": 8, **parameters}}
            answer = httpx.post(f"{server.url}/generate", json=body, timeout=60)
            assert answer.status_code == 200, answer.text
        assert json.loads(answer.json()["generated_text"])["a"] in ("x", "y")
        mapped = Path(f"/proc/{server.engine_pid()}/maps").read_text()
        children = Path(f"/proc/{server.engine_pid()}/task/{server.engine_pid()}/children").read_text()
    assert "libtokenplane_cpu" in mapped and "libtorch" not in mapped
    assert children.split() == [], "the process that has loaded has ended"
    assert "one native call a step" in server.log
