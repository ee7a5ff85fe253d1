"""What is estimated before loading, against what is measured after; what is refused, and that the advice holds."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from helpers.model_folder import make_text_model
from tokenplane_core.backend.errors import BackendNotFound, ConfigError, OutOfMemory
from tokenplane_core.backend.records import Device, LoadOptions, ModelSpec, Offer
from tokenplane_core.config import EngineConfig
from tokenplane_core.engine.startup import start_backend
from tokenplane_core.memory import (
    MemoryPlan,
    MemoryRow,
    format_bytes,
    format_table,
    kv_token,
    shard_problem,
    workspace_bytes,
)
from tokenplane_core.model import describe_model
from tokenplane_core.weight_files import INDEX, StoredTensor, Weights, count_weights, read_weights
from tokenplane_cpu.plugin import CpuBackend
from tokenplane_torch.device import ONLY
from tokenplane_torch.testing import make_checkpoint

torch.set_num_threads(1)  # two OpenMP threads on a busy machine are slower than one

GIB = 1 << 30
BILLION = Weights(1_000_000_000, 0, "a test")


def model(config: dict[str, Any] | None = None, **fields: Any) -> ModelSpec:
    """Something like Llama 3.2 1B, whose KV cache takes 32 KiB a token in bfloat16."""
    known = {"hidden_size": 2048, "intermediate_size": 8192} | (config or {})
    spec = ModelSpec("acme/1b", "", None, "", known, 16, 32, 8, 64, 128256, 8192, "bfloat16")
    return replace(spec, **fields)


def device(free_bytes: int, kind: str = "cuda", **fields: Any) -> Device:
    fields = {"dtypes": ("bfloat16", "float16", "float32"), "score": 100} | fields
    return Device(kind, 0, "ACME 9", "", 80 * GIB, memory_free_bytes=free_bytes, **fields)


def plan(free_bytes: int, required_tokens: int = 8192, **fields: Any) -> MemoryPlan:
    whole = MemoryPlan(model(), BILLION, device(free_bytes), LoadOptions(), required_tokens)
    return replace(whole, **fields)


# --- Estimated equals measured ------------------------------------------------------------------------------

OWN_KV_HEADS = {"gpt2": 4, "opt": 4, "gpt_neox": 4}  # these know no grouped heads, whatever the config says


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "gemma3", "gpt_oss", "mixtral", "phi3", "gpt2", "opt", "gpt_neox", "deepseek_v3"]
)
def test_weights_and_kv_per_token_of_real_models_are_exact(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, family: str, dtype: str
) -> None:
    monkeypatch.setenv(ONLY, "torch")  # the native kernels pad weights and heads, which shows in such small models
    heads = {"num_key_value_heads": OWN_KV_HEADS[family]} if family in OWN_KV_HEADS else {}
    spec = describe_model(
        make_checkpoint(family, tmp_path, tie_word_embeddings=dtype == "float32", **heads), dtype=dtype
    )
    backend = CpuBackend()
    capabilities = backend.load(spec, LoadOptions(num_threads=1, max_sequences=2))
    backend.close()
    estimated = read_weights(spec).bytes_as(dtype)
    # Buffers are computed, not stored: rotary frequencies in float32, and a scalar or two.
    assert estimated <= capabilities.weights_bytes <= estimated + 256
    kv = kv_token(spec)
    assert kv.num_bytes * capabilities.kv.block_tokens == capabilities.kv.block_bytes
    assert (kv.least_bytes < kv.num_bytes) == (family == "deepseek_v3"), "only MLA leaves a choice"


def test_the_table_of_a_running_engine_holds_both(tmp_path: Path) -> None:
    spec = describe_model(make_checkpoint("llama", tmp_path))
    (found,) = CpuBackend().detect().devices
    started = start_backend(EngineConfig(model=spec, backend="cpu", device=found, num_threads=1, max_sequences=4))
    rows = {row.piece: row for row in started.info.memory}
    started.backend.close()
    kv_token_row, cache, slack = rows["KV per token"], rows["KV cache"], rows["slack"]
    assert kv_token_row.estimated_bytes == kv_token_row.measured_bytes == 3 * 2 * 2 * 16 * 4
    assert cache.measured_bytes == started.layout.num_blocks * started.capabilities.kv.block_bytes
    assert cache.estimated_bytes == 4 * 256 * 768, "all slots at full length; the measured one has a padding block"
    assert cache.measured_bytes == cache.estimated_bytes + 32 * 768
    assert rows["weights"].measured_bytes == started.info.weights_bytes
    assert rows["headroom"].measured_bytes == started.capabilities.reserved_bytes["headroom"]
    assert rows["headroom"].measured_bytes == rows["headroom"].estimated_bytes
    assert set(started.capabilities.reserved_bytes) <= set(rows), "every piece a plugin reports has a row"
    assert slack.measured_bytes == started.capabilities.kv.budget_bytes - cache.measured_bytes


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_room_for_adapters_is_estimated_as_it_is_taken(tmp_path: Path, family: str) -> None:
    spec = describe_model(make_checkpoint(family, tmp_path), dtype="bfloat16")
    (found,) = CpuBackend().detect().devices
    config = EngineConfig(model=spec, backend="cpu", device=found, num_threads=1, max_sequences=2)
    rows = {}
    for count in (0, 3):
        started = start_backend(msgspec.structs.replace(config, max_adapters=count, max_adapter_rank=8))
        rows[count] = {row.piece: row for row in started.info.memory}
        started.backend.close()
    adapters = rows[3]["adapters"]
    assert adapters.estimated_bytes == adapters.measured_bytes != 0
    assert "adapters" not in rows[0]


@pytest.mark.parametrize("backend", ["simulated-cuda", "simulated-tpu", "simulated-gaudi", "simulated-neuron"])
def test_simulated_devices_count_token_ids_and_need_no_weights(tmp_path: Path, backend: str) -> None:
    started = start_backend(EngineConfig(model=describe_model(make_text_model(tmp_path)), backend=backend))
    rows = {row.piece: row for row in started.info.memory}
    assert (rows["weights"].estimated_bytes, rows["weights"].measured_bytes) == (0, 0)
    assert (rows["KV per token"].estimated_bytes, rows["KV per token"].measured_bytes) == (4, 4)


def test_there_is_room_for_the_logits_of_drafts() -> None:
    """Of as many as one row has; a step of many rows has no more."""

    def workspace(max_drafts: int) -> int:
        rows = plan(8 * GIB, options=LoadOptions(max_sequences=8, max_drafts=max_drafts)).rows()
        (size,) = [row.estimated_bytes for row in rows if row.piece == "workspace"]
        assert size is not None
        return size

    assert workspace(4) - workspace(0) == 4 * 128256 * (2 + 8)


def test_the_workspace_is_what_a_step_was_measured_to_take(tmp_path: Path) -> None:
    """Peak of torch's own account of the host's allocations, over one step of a Llama and one of a Mixtral."""
    from torch.profiler import ProfilerActivity, profile
    from transformers import AutoModelForCausalLM

    for family in ("llama", "mixtral"):
        spec = describe_model(make_checkpoint(family, tmp_path / family, hidden_size=128, intermediate_size=448))
        module = AutoModelForCausalLM.from_pretrained(spec.path, attn_implementation="sdpa")
        ids = torch.arange(256)[None]
        with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            module(input_ids=ids, use_cache=False, logits_to_keep=torch.arange(0, 64))
        now = peak = 0
        for event in record.profiler.kineto_results.events():  # type: ignore[union-attr]
            if event.name() == "[memory]":
                now += event.nbytes()
                peak = max(peak, now)
        assert 0.5 < workspace_bytes(spec, 256, 64) / peak < 2, family


# --- KV per token of what cannot be loaded here -------------------------------------------------------------


def test_heads_may_differ_from_layer_to_layer() -> None:
    listed = model({"num_key_value_heads": [8] * 8 + [2] * 8})
    assert kv_token(listed).num_bytes == (8 * 8 + 8 * 2) * 2 * 64 * 2
    types = ["sliding_attention", "full_attention"] * 8
    wide = model({"layer_types": types, "global_head_dim": 128, "sliding_window": 512})
    assert kv_token(wide).num_bytes == 8 * (8 * 2 * 64 + 8 * 2 * 128) * 2
    assert "windows save nothing" in kv_token(wide).why


def test_what_cannot_be_known_is_said() -> None:
    hybrid = model({"layer_types": ["linear_attention", "full_attention"] * 8})
    assert kv_token(hybrid).num_bytes == 8 * 8 * 2 * 64 * 2
    assert "8 layers keep a state of another kind, known after loading" in kv_token(hybrid).why
    latent = kv_token(model({"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}))
    assert latent.num_bytes == 16 * 32 * (192 + 128) * 2
    assert latent.least_bytes == 16 * (512 + 64) * 2
    assert "18.00 KiB" in latent.why
    compiles = replace(device(GIB), offer=Offer(decode_graphs=None))
    compiled = next(row for row in plan(GIB, device=compiles).rows() if row.piece == "graphs")
    assert compiled.estimated_bytes is None and "known after warm-up" in compiled.why


def test_heads_that_do_not_divide_are_kept_twice() -> None:
    spec = model()
    assert [kv_token(spec, shards).num_bytes for shards in (1, 2, 8, 16)] == [32768, 16384, 4096, 4096]
    assert shard_problem(spec, 2) is None and shard_problem(spec, 16) is None
    assert shard_problem(spec, 3) == "its 32 attention heads do not divide by 3"
    assert "12 KV heads" in (shard_problem(model(num_heads=24, num_kv_heads=12), 8) or "")


# --- Weights ------------------------------------------------------------------------------------------------


def test_only_what_gets_loaded_counts() -> None:
    tensors = [
        StoredTensor("model.embed_tokens.weight", "F32", 100, 400),
        StoredTensor("model.layers.15.mlp.weight", "F8_E4M3", 50, 50),
        StoredTensor("model.layers.16.mlp.weight", "BF16", 1000, 2000),  # predicts a second token: not loaded
        StoredTensor("vision.layers.16.weight", "BF16", 7, 14),
        StoredTensor("lm_head.weight", "F32", 100, 400),
    ]
    untied, tied = (count_weights(tensors, model({"tie_word_embeddings": tie}), "") for tie in (False, True))
    assert (untied.num_floats, untied.other_bytes) == (207, 50)
    assert (tied.num_floats, tied.other_bytes) == (107, 50)
    assert tied.bytes_as("bfloat16") == 2 * 107 + 50


@pytest.mark.parametrize(
    ("saved", "dtype", "expected"),
    [("bfloat16", "float32", 2000), ("float32", "bfloat16", 500), (None, "float32", 1000)],
)
def test_without_the_files_the_index_tells(tmp_path: Path, saved: str | None, dtype: str, expected: int) -> None:
    index = {"metadata": {"total_size": 1000}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    weights = read_weights(model({"torch_dtype": saved}, path=str(tmp_path)))
    assert weights.bytes_as(dtype) == expected
    assert "the files are not here" in weights.source


def test_neither_files_nor_index_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"acme/1b: the size of its weights is unknown.*total_size"):
        read_weights(model(path=str(tmp_path)))


# --- Plans and refusals -------------------------------------------------------------------------------------


def test_the_rows_add_up_to_what_is_free() -> None:
    for free_bytes in (3 * GIB, 8 * GIB, 80 * GIB):
        for kind in ("cuda", "rocm", "xpu", "tpu", "gaudi", "neuron", "cpu", "simulated"):
            rows = plan(free_bytes, device=device(free_bytes, kind)).rows()
            assert sum(row.estimated_bytes or 0 for row in rows if row.piece != "KV per token") == free_bytes


def test_more_slots_than_fit_are_no_reason_to_refuse() -> None:
    short = plan(4 * GIB, options=LoadOptions(max_sequences=1000))
    assert short.fits
    short.refuse_the_impossible()
    assert short.cache_tokens == short.cache_capacity_tokens < 1000 * 8192


def test_only_the_impossible_is_refused() -> None:
    """The border is weights plus required tokens: a backend might do without anything else."""
    border = 2_000_000_000 + 8192 * 32768
    plan(border).refuse_the_impossible()
    assert not plan(border).fits, "the estimate says no, but it might run"
    with pytest.raises(OutOfMemory) as refusal:
        plan(border - 1).refuse_the_impossible()
    said = str(refusal.value)
    for words in ("acme/1b", "1.86 GiB as bfloat16", "8192 tokens 256.00 MiB", "2.11 GiB (estimated", "ACME 9 has"):
        assert words in said
    plan(border, required_tokens=1).refuse_the_impossible()
    plan(0).refuse_the_impossible()  # the device does not say what it has


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("free_mib", range(1800, 6000, 200))
def test_the_way_out_fits(dtype: str, free_mib: int) -> None:
    whole = plan(free_mib << 20, model=model(dtype=dtype))
    if whole.fits:
        return
    for way in re.split(r" or (?=--|a smaller)", whole.way_out()):
        if way.startswith("a smaller"):
            size, unit = re.search(r"([\d.]+) (\w+) free", way).groups()  # type: ignore[union-attr]
            assert unit == "GiB"
            assert replace(whole, device=device(int(float(size) * GIB) + (10 << 20))).fits
            continue
        flags = dict(zip(way.split()[::2], way.split()[1::2], strict=True))
        changed = replace(
            whole,
            model=replace(whole.model, dtype=flags.get("--dtype", dtype)),
            options=LoadOptions(
                max_step_tokens=int(flags.get("--max-batch-prefill-tokens", 0)) or None,
                max_sequences=int(flags.get("--max-batch-size", 0)) or None,
            ),
            required_tokens=int(flags.get("--max-total-tokens", 8192)),
        )
        assert changed.fits, way


def test_the_flag_to_change_is_the_one_that_was_given() -> None:
    assert "--max-total-tokens" in plan(3 * GIB, required_tokens=8192 * 8).way_out()
    given = plan(3 * GIB, required_tokens=10**6, cache_tokens_wish=10**6)
    assert "--max-batch-total-tokens" in given.way_out()


def test_the_engine_refuses_before_it_opens_the_backend(tmp_path: Path) -> None:
    spec = describe_model(make_checkpoint("llama", tmp_path))
    config = EngineConfig(model=spec, backend="no-such-backend", device=device(1 << 20), required_tokens=256)
    with pytest.raises(BackendNotFound):
        start_backend(config)
    with pytest.raises(
        OutOfMemory, match=r"weights take .* as float32 .* ACME 9 has 600\.00 KiB free.*or a device with"
    ):
        start_backend(
            EngineConfig(model=spec, backend="no-such-backend", device=device(600 << 10), required_tokens=256)
        )
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(BackendNotFound):  # the plugin may read other files: it decides
        start_backend(EngineConfig(model=spec, backend="no-such-backend", device=device(1)))


# --- For people ---------------------------------------------------------------------------------------------


def test_the_table_is_aligned_and_at_most_100_columns_wide() -> None:
    long = MemoryRow("KV cache", 3 * GIB, 5 << 20, "why " * 60)
    for rows in ([*plan(8 * GIB).rows(), long], plan(8 * GIB).rows(), [long, MemoryRow("odd", None, None, "")]):
        head, *lines = format_table(rows)
        assert max(map(len, (head, *lines))) <= 100
        assert ("MEASURED" in head) == (long in rows)
        column = head.index("WHY")
        assert all(line[column - 2 : column].isspace() or len(line) <= column for line in lines)


def test_sizes_have_binary_units() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1024, -(5 << 20), 80 * GIB)] == [
        "0 B",
        "1023 B",
        "1.00 KiB",
        "-5.00 MiB",
        "80.00 GiB",
    ]
