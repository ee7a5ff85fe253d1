"""Which models run as one native program, that the program is proved before it serves, and batch invariance."""

from __future__ import annotations

import contextlib
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import linear

from tokenplane_core.backend.errors import ConfigError, OutOfMemory, UnsupportedModel
from tokenplane_core.backend.records import Capabilities, LoadOptions
from tokenplane_core.messages import SamplingParams
from tokenplane_core.model import describe_model
from tokenplane_cpu import host
from tokenplane_cpu.conditions import PROGRAM
from tokenplane_cpu.decoder import Decoder, NoProducts, NotPlain, _require_plain, read_decoder
from tokenplane_cpu.plugin import CpuBackend
from tokenplane_torch.testing import Driver, make_checkpoint, reference_greedy
from tokenplane_torch.testing import checkpoints as checkpoints_of

NATIVE = "one native call a step"
PLAIN = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "smollm3")
OTHERS = {
    "mixtral": "gated MLP",
    "gpt_neox": "gated MLP",
    "gpt2": "list of layers",
    "opt": "rotary embedding",
    "glm4": "the queries of its layer 0 depend on the position in other ways",
}
SCALED_ROPE: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}


def load(folder: Path, dtype: str = "float32", threads: int = 1) -> tuple[CpuBackend, Capabilities]:
    plugin = CpuBackend()
    return plugin, plugin.load(describe_model(folder, dtype=dtype), LoadOptions(num_threads=threads))


@pytest.mark.parametrize("family", PLAIN)
def test_plain_decoders_run_as_a_program(family: str, tmp_path: Path) -> None:
    assert load(make_checkpoint(family, tmp_path))[1].kernels["step"].startswith(NATIVE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", SCALED_ROPE)
def test_so_do_those_whose_positions_are_scaled(kind: str, dtype: str, tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path, rope_parameters={"rope_theta": 10000.0, **SCALED_ROPE[kind]})
    assert load(folder, dtype)[1].kernels["step"].startswith(NATIVE)


def test_what_turns_differently_is_seen_where_logits_hide_it(tmp_path: Path) -> None:
    """With small weights attention is nearly even, so a short comparison in bfloat16 sees nothing."""
    folder = make_checkpoint("glm4", tmp_path)
    weights = load_file(folder / "model.safetensors")
    small = {name: weight * (0.08 if weight.dim() > 1 else 1.0) for name, weight in weights.items()}
    save_file(small, folder / "model.safetensors", metadata={"format": "pt"})
    assert OTHERS["glm4"] in load(folder, "bfloat16")[1].kernels["step"]


@pytest.mark.parametrize("max_model_tokens", [1, 4, 6])
def test_so_do_those_whose_sequences_may_be_shorter_than_the_trial(max_model_tokens: int, checkpoint: Path) -> None:
    model = replace(describe_model(checkpoint), max_model_tokens=max_model_tokens)
    assert CpuBackend().load(model, LoadOptions(num_threads=1)).kernels["step"].startswith(NATIVE)


@pytest.mark.parametrize("family", OTHERS)
def test_other_models_run_through_torch_and_say_why(family: str, tmp_path: Path) -> None:
    step = load(make_checkpoint(family, tmp_path))[1].kernels["step"]
    assert step.startswith("torch") and OTHERS[family] in step


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_without_the_program_the_tokens_are_the_same(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PROGRAM, "0")
    folder = make_checkpoint(family, tmp_path)
    backend = load(folder)
    assert PROGRAM in backend[1].kernels["step"]
    prompts = [[random.Random(n).randrange(3, 320) for _ in range(n)] for n in (1, 33, 70)]
    want = [reference_greedy(folder, prompt, 8) for prompt in prompts]
    assert Driver(*backend).generate(prompts, 8, chunk_tokens=32) == want


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_what_steps_compute_in_is_in_the_memory_plan(family: str, tmp_path: Path) -> None:
    model = describe_model(make_checkpoint(family, tmp_path), dtype="bfloat16")

    def workspace(step_tokens: int, sequences: int, drafts: int = 0) -> int:
        options = LoadOptions(num_threads=1, max_step_tokens=step_tokens, max_sequences=sequences, max_drafts=drafts)
        return CpuBackend().load(model, options).reserved_bytes["workspace"]

    hidden, inner = model.config["hidden_size"], model.config["intermediate_size"]
    fewest = 4 * hidden + 2 * inner  # bytes of a token: the residual in f32, what goes into the last product in bf16
    assert workspace(512, 4) - workspace(256, 4) >= 256 * fewest
    assert workspace(256, 12) - workspace(256, 4) >= 8 * model.vocab_size * 4
    assert workspace(256, 4, drafts=8) == workspace(256, 12)


def test_a_program_that_computes_something_else_does_not_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint("llama", tmp_path)
    monkeypatch.setattr(host, "read_decoder", lambda *args: replace(read_decoder(*args), residual_scale=0.9))
    plugin, facts = load(folder)
    assert "computes something else" in facts.kernels["step"]
    assert Driver(plugin, facts).generate([[5, 6, 7]], 8) == [reference_greedy(folder, [5, 6, 7], 8)]


@pytest.mark.parametrize("part", ["survey", "read_decoder", "as_turned", "compare"])
@pytest.mark.parametrize("error", [TypeError("no such part"), UnsupportedModel("no such part")])
def test_whatever_goes_wrong_on_the_way_to_a_program_torch_serves(
    part: str, error: Exception, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(host, part, fails)
    plugin, facts = load(checkpoint)
    assert facts.kernels["step"].startswith("torch") and "no such part" in facts.kernels["step"]
    assert Driver(plugin, facts).generate([[5, 6, 7]], 8) == [reference_greedy(checkpoint, [5, 6, 7], 8)]


@pytest.mark.parametrize("error", [OutOfMemory("full"), ConfigError("contradicts")])
def test_too_little_memory_and_wrong_options_are_no_reason_for_torch(
    error: Exception, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(host, "compare", fails)
    with pytest.raises(type(error)):
        load(checkpoint)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_queries_that_grow_with_their_position_go_through_torch(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ministral 3 scales them beyond a length that no short comparison reaches."""
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    fields = {"head_dim": 16, "sliding_window": None, "rope_parameters": rope | {"llama_4_scaling_beta": 0.5}}
    monkeypatch.setitem(checkpoints_of._CONFIGS, "ministral3", ("Ministral3Config", fields))
    folder = make_checkpoint("ministral3", tmp_path)
    plugin, facts = load(folder, dtype)
    assert "queries of its layer 0 depend on the position" in facts.kernels["step"]
    if dtype == "float32":
        prompt = [random.Random(1).randrange(3, 320) for _ in range(150)]
        assert Driver(plugin, facts).generate([prompt], 8) == [reference_greedy(folder, prompt, 8)]


def test_scaling_is_what_the_layers_gave_to_the_attention_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []

    def reads(*args: Any) -> Decoder:
        for layer in args[0].get_decoder().layers:
            layer.self_attn.scaling = "of another meaning, by the time this is read"
        read.append(read_decoder(*args))
        raise TypeError("enough")

    monkeypatch.setattr(host, "read_decoder", reads)
    with contextlib.suppress(UnsupportedModel):
        load(make_checkpoint("gemma2", tmp_path, query_pre_attn_scalar=9))
    assert [layer.scaling for layer in read[0].layers] == [pytest.approx(1 / 3)] * 3


class OwnLinear(nn.Linear):
    pass


@pytest.mark.parametrize("kind", ["subclass", "float8", "forward"])
def test_linear_layers_of_their_own_kind_are_not_read(kind: str) -> None:
    part: Any = (OwnLinear if kind == "subclass" else nn.Linear)(4, 4)
    _require_plain(nn.Linear(4, 4))
    if kind == "float8":
        part.weight = nn.Parameter(part.weight.to(torch.float8_e4m3fn), requires_grad=False)
    if kind == "forward":
        part.forward = lambda rows: rows
    with pytest.raises(NotPlain, match="float8_e4m3fn" if kind == "float8" else "of its own kind"):
        _require_plain(part)


def test_a_call_of_linear_by_names_is_no_product_either() -> None:
    with NoProducts():
        assert torch.equal(linear(input=torch.ones(2, 4), weight=torch.ones(3, 4)), torch.zeros(2, 3))


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
    for threads in (2, 5):  # five want two cores, say: most come late to most of a step's operations
        assert run(Driver(*load(folder, dtype, threads=threads)), prompts) == alone
