"""A recorded step: the same as tracing it each time, in place, and honest about what was compiled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch_xla
from torch import Tensor

from tokenplane_core.backend.records import Bucket, KVLayout, LoadOptions
from tokenplane_core.kit.runner import LocalEngine
from tokenplane_core.model import describe_model
from tokenplane_torch.testing import reference_greedy
from tokenplane_tpu.executor import RecordedStep, compiled_graphs
from tokenplane_tpu.plugin import TpuBackend

DEVICE = torch_xla.device()


def up(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).to(DEVICE)


class Accumulate:
    """Adds to rows of a table, and returns what stands there times a weight. Given i32 [2, 8]: rows, what to add."""

    def __init__(self, rows: int) -> None:
        self.table = torch.zeros(rows, 64, device=DEVICE)
        self.untouched = torch.ones(3, device=DEVICE)
        self.weight = torch.full((64, 2), 0.5, device=DEVICE)
        torch_xla.sync(wait=True)

    def __call__(self, given: Tensor) -> Tensor:
        at = given[0].long()
        self.table.index_add_(0, at, given[1].float()[:, None].expand(-1, 64))
        return self.table[at] @ self.weight + self.untouched[0]

    def state(self) -> list[Tensor]:
        return [self.untouched, self.table]


def given_of(seed: int, rows: int) -> Tensor:
    rng = np.random.default_rng(seed)
    return up(np.stack([rng.choice(rows, 8, replace=False), rng.integers(1, 100, 8)]).astype(np.int32))


def test_a_recorded_step_computes_what_tracing_computes() -> None:
    traced, recorded = Accumulate(50), Accumulate(50)
    with torch.no_grad():
        step = RecordedStep(recorded, given_of(0, 50), recorded.state())
        assert not recorded.table.cpu().any(), "recording must leave the state as it is"
        for seed in range(5):
            want, got = traced(given_of(seed, 50)), step(given_of(seed, 50))
            torch.testing.assert_close(got.cpu(), want.cpu())
            torch.testing.assert_close(recorded.table.cpu(), traced.table.cpu())


def test_a_step_may_follow_before_the_last_is_read() -> None:
    accumulate = Accumulate(50)
    with torch.no_grad():
        step = RecordedStep(accumulate, given_of(0, 50), accumulate.state())
        results = [step(given_of(7, 50)) for _ in range(4)]
        first, *later = [result.cpu() - 1 for result in results]
    for times, result in enumerate(later, 2):
        torch.testing.assert_close(result, times * first)


def test_state_is_written_in_place() -> None:
    """A copy of it would take as much memory again."""
    rows = 1 << 20  # 256 MiB
    accumulate = Accumulate(rows)
    with torch.no_grad():
        step = RecordedStep(accumulate, given_of(0, rows), accumulate.state())
        step(given_of(1, rows)).cpu()
        _reset_peak()
        before = _memory_bytes("VmRSS")
        for seed in range(5):
            step(given_of(seed, rows)).cpu()
    assert _memory_bytes("VmHWM") - before < 64 << 20


def test_the_served_cache_is_written_in_place(llama: Path) -> None:
    """The same for a whole served step: its cache keeps its memory, and stays the step's own."""
    plugin = TpuBackend()
    facts = plugin.load(describe_model(llama, dtype="float32"), LoadOptions(max_sequences=8, max_step_tokens=16))
    blocks = (256 << 20) // facts.kv.block_bytes
    assert plugin.kv_alloc(KVLayout(blocks, facts.kv.block_tokens, 8, 8)) and plugin.warmup() > 0
    _reset_peak()
    before = _memory_bytes("VmRSS")
    bucket = Bucket("decode", 8, 8)
    for _ in range(3):
        plugin._runner.warm(bucket)  # type: ignore[union-attr]
    assert _memory_bytes("VmHWM") - before < 64 << 20
    plugin.close()


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _memory_bytes(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def test_every_compilation_is_counted(llama: Path) -> None:
    """A bucket that was not warmed up compiles when it is first used, and the step says so; the second time not."""
    plugin = TpuBackend()
    facts = plugin.load(describe_model(llama, dtype="float32"), LoadOptions(max_sequences=8, max_step_tokens=16))
    buckets = facts.shapes.buckets
    assert plugin.kv_alloc(KVLayout(65, facts.kv.block_tokens, 8, 8))
    executor = plugin._runner._executor  # type: ignore[union-attr]
    assert executor.compiled == 0
    assert plugin.warmup() >= len(buckets)
    after = executor.compiled
    plugin._runner.warm(buckets[0])  # type: ignore[union-attr]
    assert executor.compiled == after
    plugin._runner.warm(Bucket("decode", 12, 12))  # type: ignore[union-attr]
    assert executor.compiled > after
    plugin.close()


def test_graphs_compiled_elsewhere_are_noticed() -> None:
    before = compiled_graphs()
    (torch.ones(7, 13, device=DEVICE) * 3).sum(0).cpu()
    assert compiled_graphs() == before + 1


def test_two_engines_of_one_model_share_no_state(llama: Path) -> None:
    """The second one finds its programs compiled already; its cache and its tokens must be its own."""
    model = describe_model(llama, dtype="float32")
    engines = [LocalEngine(TpuBackend, model, max_sequences=8, max_step_tokens=16) for _ in range(2)]
    prompts = [[5, 6, 7, 8], [100, 90, 80, 70, 60]]
    for engine, prompt in zip(engines, prompts, strict=True):
        engine.submit(prompt, 10)
    while not all(engine.is_idle for engine in engines):
        for engine in engines:
            engine.step()
    for engine, prompt in zip(engines, prompts, strict=True):
        assert engine.outcomes["r1"].token_ids == reference_greedy(llama, prompt, 10)
        assert engine.engine.stats.compiled_shapes == 0
        engine.close()
