"""LoRA through the kit equals peft's own output, for adapters that peft has written."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.peft_adapters import peft_greedy, write_peft_adapter
from tokenplane_core.adapter_files import CONFIG, WEIGHTS
from tokenplane_core.backend.errors import UnsupportedAdapter
from tokenplane_core.backend.plugins import load_plugin
from tokenplane_core.backend.records import LoadOptions
from tokenplane_core.kit.runner import LocalEngine
from tokenplane_core.model import describe_model
from tokenplane_torch.choice import Candidate
from tokenplane_torch.fixed_kernels import FixedKernels
from tokenplane_torch.testing.checkpoints import make_checkpoint
from tokenplane_torch.testing.graphs import HostGpuBackend, pinned_memory_is_memory

NUM_TOKENS = 10
ADAPTERS: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "attention": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
        "all": {"r": 8, "lora_alpha": 4, "target_modules": "all-linear", "use_rslora": True},
        "patterns": {
            "r": 2,
            "lora_alpha": 6,
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 5},
            "alpha_pattern": {"down_proj": 2},
            "layers_to_transform": [1, 2],
        },
    },
    "gpt2": {  # fused queries, keys and values, in layers that are no torch.nn.Linear
        "attention": {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn"], "fan_in_fan_out": True},
        "all": {"r": 8, "lora_alpha": 4, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
        "feed_forward": {"r": 3, "lora_alpha": 3, "target_modules": ["mlp.c_proj"], "fan_in_fan_out": True},
    },
    "gemma2": {"all": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}},
}


def write_adapters(base: Path, configs: dict[str, dict[str, Any]], folder: Path) -> dict[str, Path]:
    """Random adapters by name, written by peft."""
    return {
        name: write_peft_adapter(base, folder / name, seed, scale=0.3, **config)
        for seed, (name, config) in enumerate(configs.items())
    }


def prompts() -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(3, 320) for _ in range(length)] for length in (1, 40, 7, 33, 64, 2, 19, 90)]


@pytest.fixture(scope="module", params=ADAPTERS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Checkpoint, adapters, and for each prompt which adapter it has (None: none) and its text by peft."""
    base = make_checkpoint(request.param, tmp_path_factory.mktemp(request.param))
    adapters = write_adapters(base, ADAPTERS[request.param], tmp_path_factory.mktemp("adapters"))
    which = [[None, *adapters][i % (len(adapters) + 1)] for i in range(len(prompts()))]
    expected = [
        peft_greedy(base, adapters[name] if name else None, prompt, NUM_TOKENS)
        for prompt, name in zip(prompts(), which, strict=True)
    ]
    adapted = next(i for i, name in enumerate(which) if name)
    assert expected[adapted] != peft_greedy(base, None, prompts()[adapted], NUM_TOKENS), "it changes nothing"
    return {"base": base, "adapters": adapters, "which": which, "expected": expected}


def on_host_gpu() -> HostGpuBackend:
    """Prompts as they come, decode steps captured and replayed."""
    return HostGpuBackend([Candidate("fixed", lambda needs, device: FixedKernels())])


@pytest.mark.parametrize("make", [partial(load_plugin, "cpu"), on_host_gpu], ids=["ragged", "captured"])
@pytest.mark.parametrize("step_tokens", [None, 16], ids=["whole", "chunked"])
def test_a_batch_of_several_adapters_equals_peft(
    make: Callable[[], object], step_tokens: int | None, case: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned_memory_is_memory(monkeypatch)
    model = describe_model(case["base"], dtype="float32")
    engine = LocalEngine(make, model, max_step_tokens=step_tokens, max_adapters=3, max_adapter_rank=8)
    numbers = {None: 0} | {name: engine.load_adapter(folder) for name, folder in case["adapters"].items()}
    texts = engine.generate(prompts(), NUM_TOKENS, adapters=[numbers[name] for name in case["which"]])
    assert texts == case["expected"]
    assert engine.engine.stats.compiled_shapes == 0
    engine.close()


# --- What is refused ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = make_checkpoint("llama", tmp_path_factory.mktemp("llama"))
    config = {"attention": ADAPTERS["llama"]["attention"]}
    return base, write_adapters(base, config, tmp_path_factory.mktemp("adapters"))["attention"]


def with_config(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | fields))

    return change


def with_tensors(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        edit(tensors)
        save_file(tensors, folder / WEIGHTS)

    return change


Q = "base_model.model.model.layers.0.self_attn.q_proj"
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "dora": (with_config(use_dora=True), "use_dora is True.*merge_and_unload"),
    "biases": (with_config(bias="all"), "bias is 'all'"),
    "other modules": (with_config(modules_to_save=["lm_head"]), "modules_to_save is"),
    "another method": (with_config(peft_type="IA3"), "peft_type is 'IA3'; only LORA"),
    "changed base": (with_config(init_lora_weights="pissa_niter_4"), "init_lora_weights is 'pissa_niter_4'"),
    "too large": (with_config(r=64), "rank 64, the limit is 8; start with --max-lora-rank 64"),
    "larger than it says": (
        with_tensors(
            lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(9, 64), f"{Q}.lora_B.weight": torch.ones(64, 9)})
        ),
        "q_proj has rank 9, the limit is 8",
    ),
    "embeddings": (
        with_tensors(lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 320)})),
        "holds base_model.model.model.embed_tokens.lora_embedding_A, which is no LoRA matrix",
    ),
    "output layer": (
        with_tensors(
            lambda t: t.update(
                {
                    "base_model.model.lm_head.lora_A.weight": torch.ones(4, 64),
                    "base_model.model.lm_head.lora_B.weight": torch.ones(320, 4),
                }
            )
        ),
        "changes lm_head, which is no linear layer",
    ),
    "half of a pair": (with_tensors(lambda t: t.pop(f"{Q}.lora_B.weight")), "matching pair of matrices for .*q_proj"),
    "another model": (
        with_tensors(lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 32)})),
        "made for another model: its .*q_proj is 32 to 64, the model's 64 to 64",
    ),
    "not numbers": (with_tensors(lambda t: t[f"{Q}.lora_A.weight"].fill_(torch.nan)), "not all finite"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), f"has no {WEIGHTS}"),
    "no config": (lambda folder: (folder / CONFIG).unlink(), f"has no {CONFIG}"),
    "no alpha": (with_config(lora_alpha="x"), "lora_alpha is 'x', which is no number above 0"),
    "too much alpha": (with_config(lora_alpha=10**400), "which is no number above 0 and up to 1000000"),
    "no pattern": (with_config(alpha_pattern={"(": 2}), "which are no patterns of layer names"),
    "a pattern that takes for ever": (
        with_config(rank_pattern={r"(\\w+)+!": 2}),
        "which are no patterns of layer names",
    ),
    "nothing": (with_tensors(lambda t: t.clear()), "holds no LoRA matrix"),
    "broken config": (lambda folder: (folder / CONFIG).write_text("{"), "cannot be read"),
    "broken weights": (lambda folder: (folder / WEIGHTS).write_bytes(b"x" * 20), "cannot be read"),
}


@pytest.fixture(scope="module")
def engine(llama: tuple[Path, Path]) -> Iterator[LocalEngine]:
    """Has room for one adapter."""
    model = describe_model(llama[0], dtype="float32")
    engine = LocalEngine(lambda: load_plugin("cpu"), model, prefix_cache=False, max_adapters=1, max_adapter_rank=8)
    yield engine
    engine.close()


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_plain_lora_for_this_model_is_refused_and_changes_nothing(
    name: str, engine: LocalEngine, llama: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = llama
    change, sentence = REFUSED[name]
    spoilt = Path(shutil.copytree(adapter, tmp_path / "spoilt"))
    change(spoilt)
    with pytest.raises(UnsupportedAdapter, match=sentence):
        engine.load_adapter(spoilt)
    good = engine.load_adapter(adapter)  # its place is still free
    prompt = prompts()[1]
    plain, adapted = engine.generate([prompt, prompt], NUM_TOKENS, adapters=[0, good])
    assert plain == peft_greedy(base, None, prompt, NUM_TOKENS)
    assert adapted == peft_greedy(base, adapter, prompt, NUM_TOKENS)
    engine.unload_adapter(good)


def test_without_adapters_the_model_is_untouched(llama: tuple[Path, Path]) -> None:
    backend: Any = load_plugin("cpu")
    model = describe_model(llama[0], dtype="float32")
    for room in (0, 2):
        capabilities = backend.load(model, LoadOptions(max_adapters=room, max_adapter_rank=4))
        held = capabilities.reserved_bytes.get("adapters", 0)
        if not room:
            assert (capabilities.adapters, held) == (None, 0)
        else:
            # 3 layers: q, k, v, o, gate, up, down, each with room for its width in and out.
            widths = 64 + 64 + 2 * (64 + 32) + 64 + 64 + 3 * (64 + 96)
            assert held == 4 * 3 * 2 * 4 * widths
            assert "21 linear layers, 2 of rank 4" in capabilities.kernels["adapters"]
    backend.close()
