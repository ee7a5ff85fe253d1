"""The plugin as the core meets it: its facts, its refusals, and that importing it needs nothing of the vendor's."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from neuron_stand_in import Bench, LlamaForCausalLM, NeuronConfig, StandInBackend

import tokenplane_neuron
from tokenplane_core.backend.errors import BackendUnavailable, ContractViolation, OutOfMemory, UnsupportedModel
from tokenplane_core.backend.records import CONTRACT_VERSION, Bucket, KVLayout, LoadOptions, ModelSpec
from tokenplane_core.kit.checkpoint import reference_greedy
from tokenplane_core.kit.runner import LocalEngine
from tokenplane_core.messages import SamplingParams
from tokenplane_core.model import describe_model
from tokenplane_neuron.__main__ import main as compile_ahead
from tokenplane_neuron.plugin import NeuronBackend

WITHOUT_VENDOR = """
import sys
for name in ("torch", "transformers", "optimum", "neuronx_distributed", "torch_neuronx", "safetensors"):
    sys.modules[name] = None  # importing it raises ImportError
from tokenplane_neuron.plugin import NeuronBackend
report = NeuronBackend().detect()
print(report.status, bool(report.devices or report.reason))
"""


def test_detection_works_without_the_vendors_libraries() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_VENDOR], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1] == "True"


def test_capabilities_state_the_facts(plugin: StandInBackend, model: ModelSpec) -> None:
    facts = plugin.load(model, LoadOptions())
    assert (facts.contract, facts.backend, facts.version) == (
        CONTRACT_VERSION,
        "neuron",
        tokenplane_neuron.__version__,
    )
    assert (facts.dtype, facts.mixed, facts.async_depth) == ("float32", False, 0)
    limits = facts.limits
    assert (limits.max_sequences, limits.max_prefill_rows, limits.chunk_tokens) == (8, 1, 0)
    assert (limits.max_step_tokens, limits.max_model_tokens) == (512, 512)
    assert facts.shapes.mode == "hard" and not facts.shapes.pad_rows and facts.shapes.context_rule == "none"
    assert facts.shapes.buckets == (
        Bucket("prefill", 1, 128),
        Bucket("prefill", 1, 256),
        Bucket("prefill", 1, 512),
        Bucket("decode", 8, 8),
    )
    assert (facts.kv.kind, facts.kv.block_tokens) == ("slot", 512)
    assert facts.kv.block_bytes == 512 * 3 * 2 * 2 * 16 * 4  # tokens, layers, K and V, KV heads, head_dim, float32
    assert facts.kv.budget_bytes == 9 * facts.kv.block_bytes
    assert facts.sampling.features == frozenset() and facts.sampling.returns_logits
    assert facts.weights_bytes == (Path(model.path) / "model.safetensors").stat().st_size


def test_more_cores_than_kv_heads_replicate_the_cache(bench: Bench, plugin: StandInBackend, model: ModelSpec) -> None:
    bench.cores = 4
    assert plugin.load(model, LoadOptions()).kv.block_bytes == 512 * 3 * 2 * 4 * 16 * 4


def test_graphs_in_bfloat16_run(plugin: StandInBackend, model: ModelSpec) -> None:
    engine = LocalEngine(lambda: plugin, replace(model, dtype="bfloat16"))
    assert engine.capabilities.dtype == "bfloat16"
    assert all(len(text) == 6 for text in engine.generate([[1], [2, 3], [4] * 200], 6))


# --- Which cores --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("index", "cores"), [(0, "0-1"), (1, "2-3")])
def test_the_runtime_is_given_the_cores_of_the_chosen_chip(
    plugin: StandInBackend, model: ModelSpec, index: int, cores: str
) -> None:
    assert plugin.load(model, LoadOptions(device_index=index)).device.index == index
    assert os.environ["NEURON_RT_VISIBLE_CORES"] == cores


def test_cores_named_by_the_user_stand_and_their_chips_memory_counts_together(
    bench: Bench, plugin: StandInBackend, model: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = replace(model, max_model_tokens=250_000)  # 8 lines take 1.4 GiB
    with pytest.raises(OutOfMemory):
        plugin.load(long, LoadOptions())
    monkeypatch.setenv("NEURON_RT_VISIBLE_CORES", "0-3")
    bench.export_error = RuntimeError("room enough")
    with pytest.raises(UnsupportedModel, match="room enough"):
        plugin.load(long, LoadOptions())
    assert os.environ["NEURON_RT_VISIBLE_CORES"] == "0-3"


# --- Refusals -----------------------------------------------------------------------------------------------


def test_a_model_type_the_vendor_does_not_know(plugin: StandInBackend, cache: Path, model: ModelSpec) -> None:
    other = replace(model, config={**model.config, "model_type": "mamba"})
    with pytest.raises(UnsupportedModel, match=r"mamba is not supported.*\['llama'\]"):
        plugin.load(other, LoadOptions())
    assert not cache.exists()


def test_a_chip_the_vendor_does_not_compile_for(
    bench: Bench, plugin: StandInBackend, cache: Path, model: ModelSpec
) -> None:
    bench.instance = "inf1"
    with pytest.raises(UnsupportedModel, match="inf1 is not a valid instance type"):
        plugin.load(model, LoadOptions())
    assert not cache.exists()


def test_the_text_part_of_a_larger_model_decides(plugin: StandInBackend, model: ModelSpec) -> None:
    other = replace(model, config={"model_type": "mllama", "text_config": dict(model.config)})
    assert plugin.load(other, LoadOptions()).limits.max_sequences == 8


def test_weights_that_could_not_be_loaded_are_refused_before_compiling(
    bench: Bench, plugin: StandInBackend, model: ModelSpec, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModel, match=r"holds no \*.safetensors file"):
        plugin.load(replace(model, path=str(tmp_path)), LoadOptions())
    assert bench.exports == []


def test_a_cache_that_cannot_fit_is_refused_before_compiling(
    bench: Bench, plugin: StandInBackend, model: ModelSpec
) -> None:
    with pytest.raises(OutOfMemory, match=r"8 sequences of 1000000 tokens need 5.7 GiB .* 1.0 GiB .* --max-total-tok"):
        plugin.load(replace(model, max_model_tokens=1_000_000), LoadOptions())
    assert bench.exports == []


def test_what_the_runtime_calls_allocation_failure_is_out_of_memory(
    bench: Bench, plugin: StandInBackend, model: ModelSpec
) -> None:
    bench.load_error = RuntimeError('nrt_tensor_allocate status=4 message="Allocation Failure"\nmore lines')
    with pytest.raises(OutOfMemory, match=r"load it: nrt_tensor_allocate .*; lower --max-total-tokens"):
        plugin.load(model, LoadOptions())
    bench.load_error = None
    assert plugin.load(model, LoadOptions()).limits.max_sequences == 8


def test_no_core_and_no_device(bench: Bench, plugin: StandInBackend, model: ModelSpec) -> None:
    with pytest.raises(BackendUnavailable, match="there is no device 5; device indices: 0, 1"):
        plugin.load(model, LoadOptions(device_index=5))
    bench.cores = 0
    with pytest.raises(BackendUnavailable, match="NEURON_RT_VISIBLE_CORES"):
        plugin.load(model, LoadOptions())


def test_without_optimum_neuron_the_message_says_what_to_install(model: ModelSpec) -> None:
    plugin = StandInBackend()
    plugin._find_vendor = NeuronBackend()._find_vendor
    with pytest.raises(BackendUnavailable, match=r"optimum-neuron is not installed, .* needs 0.4.5: pip install"):
        plugin.load(model, LoadOptions())


def test_a_request_that_is_too_long_is_refused_by_its_numbers(plugin: StandInBackend, model: ModelSpec) -> None:
    engine = LocalEngine(lambda: plugin, model)
    too_long = engine.submit([1] * 510, 3)
    fits = engine.submit([1] * 510, 2)
    engine.run()
    assert "512" in engine.outcomes[too_long].error and len(engine.outcomes[fits].token_ids) == 2


def test_a_layout_with_more_or_longer_lines_is_a_violation(plugin: StandInBackend, model: ModelSpec) -> None:
    plugin.load(model, LoadOptions())
    assert plugin.kv_alloc(KVLayout(9, 512, 8, 1))
    for layout in (KVLayout(10, 512, 9, 1), KVLayout(9, 513, 8, 1)):
        with pytest.raises(ContractViolation, match="declared were 8 of 512"):
            plugin.kv_alloc(layout)


def test_nothing_runs_before_load_or_after_close(plugin: StandInBackend, model: ModelSpec) -> None:
    with pytest.raises(ContractViolation, match="load"):
        plugin.warmup()
    plugin.load(model, LoadOptions())
    assert plugin.close()
    with pytest.raises(ContractViolation, match="load"):
        plugin.kv_alloc(KVLayout(9, 512, 8, 1))
    assert plugin.close()


# --- Folders exported with optimum-cli ----------------------------------------------------------------------


def exported(bench: Bench, model: ModelSpec, to: Path, **changes: object) -> ModelSpec:
    """The model in the shape that optimum-cli leaves it: graphs for 4 rows of 256 tokens beside the weights."""
    config = replace(NeuronConfig(4, 256, 256, 2, 4, continuous_batching=True, torch_dtype=torch.float32), **changes)  # type: ignore[arg-type]
    to.mkdir()
    export = bench.model_class("llama", "text-generation", "inference").export(model.path, config, load_weights=False)
    assert isinstance(export, LlamaForCausalLM)
    export.save(str(to))
    (to / "model.safetensors").symlink_to(Path(model.path) / "model.safetensors")
    return describe_model(to)


def test_an_exported_folder_is_served_in_its_own_shape(
    bench: Bench, plugin: StandInBackend, cache: Path, folder: Path, model: ModelSpec, tmp_path: Path
) -> None:
    spec = exported(bench, model, tmp_path / "exported", on_device_sampling=False)
    engine = LocalEngine(lambda: plugin, spec, max_sequences=64)
    limits = engine.capabilities.limits
    assert (limits.max_sequences, limits.max_model_tokens, limits.max_step_tokens) == (4, 256, 256)
    prompts = [[1], [2, 3], [4] * 100, [5] * 250, [6, 7, 8]]
    assert engine.generate(prompts, 5) == [reference_greedy(folder, prompt, 5) for prompt in prompts]
    assert not cache.exists()


def test_a_device_that_draws_itself_serves_greedy_requests_and_refuses_others(
    bench: Bench, plugin: StandInBackend, folder: Path, model: ModelSpec, tmp_path: Path
) -> None:
    engine = LocalEngine(lambda: plugin, exported(bench, model, tmp_path / "exported"))
    sampling = engine.capabilities.sampling
    assert sampling.features == frozenset() and not sampling.returns_logits
    prompts = [[1], [2, 3], [4] * 100]
    assert engine.generate(prompts, 5) == [reference_greedy(folder, prompt, 5) for prompt in prompts]
    for params in (
        SamplingParams(temperature=0.7),
        SamplingParams(temperature=1.0, top_k=300),
        SamplingParams(repetition_penalty=1.2),
        SamplingParams(num_logprobs=1),
        SamplingParams(logit_bias={3: 1.0}),
    ):
        request_id = engine.submit([1, 2, 3], 2, params)
        engine.run()
        assert engine.outcomes[request_id].error.startswith("neuron cannot sample with")


@pytest.mark.parametrize("changes", [{"continuous_batching": False}, {"speculation_length": 4}])
def test_an_export_that_cannot_serve_is_refused(
    bench: Bench, plugin: StandInBackend, model: ModelSpec, tmp_path: Path, changes: dict[str, object]
) -> None:
    spec = exported(bench, model, tmp_path / "exported", **changes)
    with pytest.raises(UnsupportedModel, match=r"continuous_batching .* speculation_length .* Export it again"):
        plugin.load(spec, LoadOptions())


# --- Compiling ahead ----------------------------------------------------------------------------------------


def test_what_was_compiled_ahead_is_found_by_the_server(
    bench: Bench, plugin: StandInBackend, cache: Path, model: ModelSpec
) -> None:
    compile_ahead([model.path, "--max-total-tokens", "200", "--max-batch-size", "2"], plugin)
    assert len(bench.exports) == 1
    plugin.load(describe_model(model.path, max_model_tokens=200), LoadOptions(max_sequences=2))
    assert len(bench.exports) == 1


def test_compiling_ahead_ends_with_the_reason_when_it_cannot(
    plugin: StandInBackend, model: ModelSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        compile_ahead([model.path, "--device-index", "4"], plugin)
    assert end.value.code == 1
    assert capsys.readouterr().err == "tokenplane: neuron: there is no device 4; device indices: 0, 1\n"
