"""The plugin as the core meets it: found, loaded, sized, closed, and clear about what does not work."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pluggy
import pytest
import torch

import tokenplane_cpu
from tokenplane_core.backend.errors import (
    BackendUnavailable,
    ConfigError,
    ContractViolation,
    OutOfMemory,
    UnsupportedModel,
)
from tokenplane_core.backend.hookspecs import REQUIRED_HOOKS, BackendHooks
from tokenplane_core.backend.records import (
    CONTRACT_VERSION,
    SAMPLING_FEATURES,
    Capabilities,
    KVLayout,
    LoadOptions,
)
from tokenplane_core.model import describe_model
from tokenplane_cpu.device import read_memory
from tokenplane_cpu.plugin import CpuBackend
from tokenplane_torch.testing import Driver

Loaded = tuple[CpuBackend, Capabilities]

WITHOUT_TORCH = """
import sys
for name in ("torch", "transformers", "safetensors"):
    sys.modules[name] = None  # importing it raises ImportError
from tokenplane_cpu.plugin import CpuBackend
report = CpuBackend().detect()
assert report.status == "found", report
print(report.devices[0].kind, report.devices[0].score)
"""


def test_detection_works_in_an_environment_without_torch() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["cpu", "1"]


def test_pluggy_accepts_the_hooks() -> None:
    manager = pluggy.PluginManager("tokenplane")
    manager.add_hookspecs(BackendHooks)
    plugin = CpuBackend()
    manager.register(plugin)
    manager.check_pending()
    implemented = {caller.name for caller in manager.get_hookcallers(plugin) or ()}
    assert implemented == {*REQUIRED_HOOKS, "warmup", "adapter_load", "adapter_drop", "close"}
    assert manager.hook.detect().status == "found"


def test_capabilities_state_the_facts(backend: Loaded) -> None:
    plugin, facts = backend
    assert (facts.contract, facts.backend, facts.version) == (CONTRACT_VERSION, "cpu", tokenplane_cpu.__version__)
    assert facts.device == replace(plugin.detect().devices[0], memory_free_bytes=facts.device.memory_free_bytes)
    assert (facts.mixed, facts.async_depth, facts.shapes.mode) == (True, 0, "ragged")
    assert (facts.limits.max_sequences, facts.limits.max_step_tokens) == (64, 2048)
    assert (facts.limits.max_model_tokens, facts.limits.chunk_tokens) == (256, 1)
    assert (facts.kv.kind, facts.kv.block_tokens) == ("paged", 32)
    assert facts.kv.block_bytes == 32 * 3 * 2 * 2 * 16 * 4  # tokens, layers, K and V, KV heads, head_dim, float32
    assert facts.sampling.features == SAMPLING_FEATURES and facts.sampling.returns_logits
    assert 133568 * 4 <= facts.weights_bytes < 133568 * 4 * 1.05  # packed weights are padded to whole blocks
    assert set(facts.kernels) >= {"step", "sampling"}


def test_the_cache_budget_leaves_a_reserve(backend: Loaded) -> None:
    memory = read_memory()
    assert 0 < backend[1].kv.budget_bytes <= memory.total_bytes - memory.total_bytes // 8


@pytest.mark.parametrize(
    ("wish", "sequences", "tokens"), [((8, 512), 8, 512), ((0, 0), 1, 1), ((10**6, 10**9), 1024, 32768)]
)
def test_wishes_are_honoured_within_reason(
    checkpoint: Path, wish: tuple[int, int], sequences: int, tokens: int
) -> None:
    options = LoadOptions(num_threads=1, max_sequences=wish[0], max_step_tokens=wish[1])
    limits = CpuBackend().load(describe_model(checkpoint), options).limits
    assert (limits.max_sequences, limits.max_prefill_rows, limits.max_step_tokens) == (sequences, sequences, tokens)


def test_the_threads_asked_for_are_used(checkpoint: Path) -> None:
    try:
        CpuBackend().load(describe_model(checkpoint), LoadOptions(num_threads=2))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_a_cache_that_does_not_fit_is_refused_and_a_smaller_one_works(backend: Loaded) -> None:
    plugin, facts = backend
    blocks = read_memory().total_bytes // facts.kv.block_bytes + 1
    with pytest.raises(OutOfMemory, match=f"KV cache of {blocks} blocks"):
        plugin.kv_alloc(KVLayout(blocks, 32, 4, 8))
    assert Driver(plugin, facts).generate([[5, 6, 7]], 3)


def test_another_block_size_is_a_violation(backend: Loaded) -> None:
    with pytest.raises(ContractViolation, match="block_tokens is 16, declared was 32"):
        backend[0].kv_alloc(KVLayout(8, 16, 4, 8))


def test_kernels_that_a_cpu_does_not_have_are_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENPLANE_ATTENTION", "flashinfer")
    with pytest.raises(ConfigError, match=r"--attention.*'flashinfer'.*'torch'"):
        CpuBackend().load(describe_model(checkpoint), LoadOptions())
    monkeypatch.setenv("TOKENPLANE_ATTENTION", "torch")
    assert CpuBackend().load(describe_model(checkpoint), LoadOptions()).kernels["attention"].startswith("torch")


def test_a_device_that_is_not_there(checkpoint: Path) -> None:
    with pytest.raises(BackendUnavailable, match="no device 3"):
        CpuBackend().load(describe_model(checkpoint), LoadOptions(device_index=3))


def test_nothing_runs_before_load() -> None:
    with pytest.raises(ContractViolation, match="load"):
        CpuBackend().kv_alloc(KVLayout(8, 32, 4, 8))


def test_close_gives_the_memory_back_and_may_be_called_again(checkpoint: Path) -> None:
    plugin = CpuBackend()
    facts = plugin.load(describe_model(checkpoint), LoadOptions(num_threads=1))
    Driver(plugin, facts).generate([[5, 6, 7]], 2)
    parts = [weakref.ref(value) for value in vars(plugin._runner).values() if type(value).__module__ != "builtins"]
    assert len(parts) > 2
    assert plugin.close()
    gc.collect()
    assert [part() for part in parts] == [None] * len(parts)
    assert plugin.close()


def test_a_failed_load_can_be_followed_by_a_good_one(checkpoint: Path, tmp_path: Path) -> None:
    plugin = CpuBackend()
    with pytest.raises(UnsupportedModel):
        plugin.load(replace(describe_model(checkpoint), path=str(tmp_path)), LoadOptions(num_threads=1))
    assert plugin.close()
    facts = plugin.load(describe_model(checkpoint), LoadOptions(num_threads=1))
    assert Driver(plugin, facts).generate([[5, 6, 7]], 2)
