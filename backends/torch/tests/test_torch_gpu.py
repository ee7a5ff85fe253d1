"""What GPUs share, on a host that records and replays as a GPU's graphs do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tokenplane_core.backend.errors import ConfigError, UnsupportedModel
from tokenplane_core.backend.records import Capabilities, LoadOptions
from tokenplane_core.kit.checkpoint import reference_greedy, write_tiny_llama
from tokenplane_core.kit.laws import LAWS, NotApplicable, Subject
from tokenplane_core.kit.runner import LocalEngine
from tokenplane_core.model import describe_model
from tokenplane_torch.choice import Candidate, Unavailable, choose
from tokenplane_torch.fixed_kernels import FixedKernels
from tokenplane_torch.gpu import decode_sizes
from tokenplane_torch.kernels import LayerNeed, TorchKernels
from tokenplane_torch.kv_cache import LayerShape
from tokenplane_torch.startup import GRAPH_BYTES
from tokenplane_torch.testing.device import PlainDevice
from tokenplane_torch.testing.graphs import HostGpuBackend, pinned_memory_is_memory


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


def test_a_step_that_cannot_be_captured_runs_uncaptured_and_says_why(folder: Path) -> None:
    _, capabilities = load(folder, [candidate("reads values", ReadsValues)])
    assert capabilities.shapes.mode == "ragged"
    assert "not permitted when stream is capturing" in capabilities.kernels["graphs"]
    engine = LocalEngine(lambda: HostGpuBackend([candidate("x", ReadsValues)]), describe_model(folder, dtype="float32"))
    assert engine.generate([[1, 2, 3]], 5) == [reference_greedy(folder, [1, 2, 3], 5)]


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
        from dataclasses import replace

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
