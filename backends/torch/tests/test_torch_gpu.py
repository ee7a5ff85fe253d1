"""What GPUs share, on a host that records and replays as a GPU's graphs do."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tokenplane_core.backend.errors import ConfigError, OutOfMemory, UnsupportedModel
from tokenplane_core.backend.records import Capabilities, KVLayout, LoadOptions
from tokenplane_core.kit.adapters import greedy_with_adapter
from tokenplane_core.kit.checkpoint import reference_greedy, write_tiny_llama
from tokenplane_core.kit.laws import LAWS, NotApplicable, Subject
from tokenplane_core.kit.runner import LocalEngine
from tokenplane_core.model import describe_model
from tokenplane_torch.choice import Candidate, Unavailable, choose
from tokenplane_torch.composed import PlainKernels
from tokenplane_torch.device import decode_sizes
from tokenplane_torch.fixed_kernels import FixedKernels
from tokenplane_torch.gpu import GraphExecutor
from tokenplane_torch.kernels import LayerNeed, TorchKernels
from tokenplane_torch.kv_cache import LayerShape
from tokenplane_torch.padded import PaddedStep, StepShape
from tokenplane_torch.sampler import TorchSampler
from tokenplane_torch.startup import GRAPH_BYTES
from tokenplane_torch.testing.device import PlainDevice
from tokenplane_torch.testing.graphs import HostGpuBackend, HostGpuDevice, HostGraph, pinned_memory_is_memory


def candidate(name: str, make: Callable[..., Any]) -> Candidate:
    return Candidate(name, lambda needs, device: make())


FixedBackend = partial(HostGpuBackend, [candidate("fixed", FixedKernels)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny-llama")
    write_tiny_llama(path)
    return path


@pytest.fixture(autouse=True)
def _pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned_memory_is_memory(monkeypatch)


@pytest.mark.parametrize("law_name", LAWS)
def test_captured_steps_keep_the_law(law_name: str, folder: Path) -> None:
    subject = Subject(
        "host-gpu", FixedBackend, describe_model(folder, dtype="float32"), partial(reference_greedy, folder)
    )
    subject.adapter_reference = partial(greedy_with_adapter, folder)
    try:
        LAWS[law_name](subject)
    except NotApplicable as reason:
        pytest.skip(str(reason))


def load(folder: Path, candidates: Sequence[Candidate]) -> tuple[HostGpuBackend, Capabilities]:
    backend = HostGpuBackend(candidates)
    return backend, backend.load(describe_model(folder, dtype="float32"), LoadOptions())


def test_every_decode_size_is_captured_before_serving(folder: Path) -> None:
    engine = LocalEngine(FixedBackend, describe_model(folder, dtype="float32"))
    engine.generate([[1, 2, 3], [4, 5]], 6)
    assert [bucket.rows for bucket in engine.capabilities.shapes.buckets] == decode_sizes(16) == [1, 2, 4, 8, 16]
    assert engine.engine.stats.compiled_shapes == 0
    assert engine.engine.stats.decode_steps > 0


class ReadsValues(FixedKernels):
    """Looks at a length on the host, as no captured kernel may."""

    def attend_decode(self, query: Any, cache: Any, rows: Any, rule: Any, out: Any) -> None:
        int(rows.context_lens.max())
        super().attend_decode(query, cache, rows, rule, out)


class FailsInCapture(FixedKernels):
    """Does what shows only while a graph is captured."""

    def __init__(self, device: HostGpuDevice) -> None:
        self.api = device.api

    def attend_decode(self, query: Any, cache: Any, rows: Any, rule: Any, out: Any) -> None:
        if self.api.is_capturing:
            raise RuntimeError("operation not permitted when stream is capturing")
        super().attend_decode(query, cache, rows, rule, out)


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (Candidate("reads values", lambda needs, device: ReadsValues()), "called a synchronizing CUDA operation"),
        (Candidate("fails", lambda needs, device: FailsInCapture(device)), "not permitted when stream is capturing"),
    ],
)
def test_a_step_that_cannot_be_captured_runs_uncaptured_and_says_why(made: Candidate, why: str, folder: Path) -> None:
    backend, capabilities = load(folder, [made])
    assert capabilities.shapes.mode == "ragged"
    assert why in capabilities.kernels["graphs"]
    backend.close()
    engine = LocalEngine(lambda: HostGpuBackend([made]), describe_model(folder, dtype="float32"))
    assert engine.generate([[1, 2, 3]], 5) == [reference_greedy(folder, [1, 2, 3], 5)]


def test_a_failed_capture_gives_the_current_stream_back() -> None:
    device = HostGpuDevice()
    before = device.api.current_stream()
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        GraphExecutor(device).run(FailingProgram(device), PaddedStep(SHAPE, {"token_ids": np.zeros(2, np.int32)}))
    assert device.api.current_stream() is before


def test_all_captures_share_one_stream() -> None:
    """cuBLAS keeps a workspace for every stream: 32 MiB each on a large card."""
    device = HostGpuDevice()
    executor = GraphExecutor(device)
    for rows in (8, 4, 2, 1):
        shape = replace(SHAPE, rows=rows, tokens=rows)
        executor.run(EchoProgram(), PaddedStep(shape, {"token_ids": np.zeros(rows, np.int32)}))
    assert len(device.api.streams - {device.api.current_stream()}) == 1


SHAPE = StepShape("decode", rows=2, tokens=2, row_tokens=1, blocks=1)


class EchoProgram:
    def state(self) -> list[torch.Tensor]:
        return []

    def __call__(self, shape: StepShape, inputs: Any) -> torch.Tensor:
        return inputs["token_ids"].float()[:, None] + 1  # type: ignore[no-any-return]


class FailingProgram(EchoProgram):
    def __init__(self, device: HostGpuDevice) -> None:
        self._api = device.api

    def __call__(self, shape: StepShape, inputs: Any) -> torch.Tensor:
        if self._api.is_capturing:
            raise RuntimeError("operation not permitted when stream is capturing")
        return super().__call__(shape, inputs)


class Limited(FixedKernels):
    """Notes the tokens of the steps it serves; finds no memory for more than `most_tokens`."""

    def __init__(self, most_tokens: int = 1 << 30) -> None:
        self.tokens, self.most_tokens = 0, most_tokens

    def write_kv(self, cache: Any, key: Any, value: Any, index: Any) -> None:
        self.tokens = max(self.tokens, len(key))
        if len(key) > self.most_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        super().write_kv(cache, key, value, index)


def test_the_largest_step_is_measured_with_all_its_tokens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several sequences, if none may be so long; and of draws that leave no id out."""
    kernels, drawn_from = Limited(), []
    draw = TorchSampler.draw

    def spy(self: TorchSampler, logits: torch.Tensor, *arguments: Any) -> Any:
        drawn_from.append(logits)
        return draw(self, logits, *arguments)

    monkeypatch.setattr(TorchSampler, "draw", spy)
    model = describe_model(folder, max_model_tokens=48, dtype="float32")
    HostGpuBackend([candidate("limited", lambda: kernels)]).load(model, LoadOptions(max_step_tokens=200))
    assert kernels.tokens == 200
    assert [(len(logits), float(logits.max() - logits.min())) for logits in drawn_from] == [(16, 0)]


class NotesRagged(PlainKernels):
    """Counts the ragged decode rows it served."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def attend_decode(self, query: Any, cache: Any, rows: Any, rule: Any, out: Any) -> None:
        self.rows += len(rows) if rows.host else 0
        super().attend_decode(query, cache, rows, rule, out)


def test_warm_up_runs_decode_rows_outside_of_graphs_too(folder: Path) -> None:
    """Steps that mix them with prompts are not captured."""
    kernels = NotesRagged()
    backend, capabilities = load(folder, [candidate("plain", lambda: kernels)])
    backend.kv_alloc(KVLayout(32, capabilities.kv.block_tokens, 16, 16))
    kernels.rows = 0
    backend.warmup()
    assert kernels.rows > 0


def test_a_step_that_finds_no_memory_is_a_sentence(folder: Path) -> None:
    with pytest.raises(OutOfMemory, match=r"a step of 256 tokens of 16 sequences: CUDA out of .*max-batch-prefill"):
        load(folder, [candidate("limited", lambda: Limited(most_tokens=200))])


def test_a_warm_up_that_finds_no_memory_is_a_sentence(folder: Path) -> None:
    kernels = Limited()
    backend, capabilities = load(folder, [candidate("limited", lambda: kernels)])
    backend.kv_alloc(KVLayout(4, capabilities.kv.block_tokens, 16, 16))
    kernels.most_tokens = 8
    with pytest.raises(OutOfMemory, match=r"warm up beside the KV cache: CUDA out of .*max-batch-total-tokens"):
        backend.warmup()


def test_what_was_allocated_to_try_a_capture_is_given_back(folder: Path) -> None:
    """Otherwise slots are taken twice: they grow with the longest sequence."""
    backend, _ = load(folder, [candidate("fixed", FixedKernels)])
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]
    assert backend and tensors and (17, 513) not in {tensor.shape for tensor in tensors}


def test_a_captured_decode_step_clears_nothing_for_its_attention(folder: Path) -> None:
    """Every token of it belongs to a row: one kernel less in every layer."""
    backend, capabilities = load(folder, [candidate("fixed", FixedKernels)])
    backend.kv_alloc(KVLayout(4, capabilities.kv.block_tokens, 16, 16))
    graphs: list[HostGraph] = []
    made = HostGraph.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HostGraph, "__init__", lambda graph: (made(graph), graphs.append(graph))[0])
        assert backend.warmup() == len(graphs) == len(decode_sizes(16))
    assert graphs[0].calls
    assert "new_zeros" not in {function.overloadpacket.__name__ for graph in graphs for function, *_ in graph.calls}


def test_memory_set_aside_is_declared(folder: Path) -> None:
    _, capabilities = load(folder, [candidate("fixed", FixedKernels)])
    assert capabilities.reserved_bytes["headroom"] == 512 << 20
    assert capabilities.reserved_bytes["graphs"] == 4 * GRAPH_BYTES  # beside the first, which took nothing measurable
    assert capabilities.kv.budget_bytes == (8 << 30) - sum(capabilities.reserved_bytes.values())


# --- Choice -------------------------------------------------------------------------------------------------

NEEDS = [
    LayerNeed(4, LayerShape(2, 16, 16, torch.float32)),
    LayerNeed(4, LayerShape(2, 16, 8, torch.float32), window=40, softcap=5.0, sinks=True),
]


class ForgetsTheWindow(TorchKernels):
    def attend_prefill(self, query: Any, cache: Any, rows: Any, rule: Any, out: Any) -> None:
        super().attend_prefill(query, cache, rows, replace(rule, window=None), out)


class ReadsUnwritten(FixedKernels):
    """Multiplies what nobody wrote by zero."""

    def attend_decode(self, query: Any, cache: Any, rows: Any, rule: Any, out: Any) -> None:
        super().attend_decode(query, cache, rows, rule, out)
        out += 0 * cache.value.sum()


def missing(*_: object) -> Any:
    raise Unavailable("not installed")


def broken(*_: object) -> Any:
    raise OSError("libacme.so: cannot open shared object file")


@pytest.mark.parametrize("wrong", [ForgetsTheWindow, ReadsUnwritten, TorchKernels])
def test_kernels_that_compute_something_else_are_passed_over(wrong: type) -> None:
    """TorchKernels is right but cannot serve padded steps."""
    chosen = choose([candidate("wrong", wrong), candidate("right", FixedKernels)], NEEDS, PlainDevice())
    assert "not wrong: " in chosen.describe()["attention"]
    assert chosen.describe()["attention"].startswith("torch: fixed-shape")


def test_every_reason_is_told() -> None:
    chosen = choose(
        [Candidate("absent", missing), Candidate("broken", broken), candidate("right", FixedKernels)],
        NEEDS,
        PlainDevice(),
    )
    text = chosen.describe()["attention"]
    assert "not absent: not installed" in text and "libacme.so: cannot open" in text
    with pytest.raises(UnsupportedModel, match=r"absent: not installed; broken: failed on a trial batch: OSError"):
        choose([Candidate("absent", missing), Candidate("broken", broken)], NEEDS, PlainDevice())


def test_one_candidate_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = [candidate("first", FixedKernels), candidate("second", FixedKernels), Candidate("absent", missing)]
    monkeypatch.setenv("TOKENPLANE_ATTENTION", "second")
    assert "not first" not in choose(candidates, NEEDS, PlainDevice()).describe()["attention"]
    monkeypatch.setenv("TOKENPLANE_ATTENTION", "absent")
    with pytest.raises(UnsupportedModel, match="absent: not installed"):
        choose(candidates, NEEDS, PlainDevice())
    monkeypatch.setenv("TOKENPLANE_ATTENTION", "third")
    with pytest.raises(ConfigError, match="'third'; known here are first, second, absent"):
        choose(candidates, NEEDS, PlainDevice())


def test_decode_sizes_end_with_the_limit() -> None:
    for limit in (1, 2, 3, 7, 64, 100, 256, 1024, 4096):
        sizes = decode_sizes(limit)
        assert sizes == sorted(set(sizes)) and sizes[-1] == min(limit, 1024)
    waste = [
        (size - rows) / size for rows in range(9, 257) for size in [next(s for s in decode_sizes(256) if s >= rows)]
    ]
    assert max(waste) < 0.5 and np.mean(waste) < 0.1
