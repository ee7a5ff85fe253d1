from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tokenplane_core.backend.records import Capabilities, LoadOptions
from tokenplane_core.model import describe_model
from tokenplane_cpu.conditions import PROGRAM
from tokenplane_cpu.native import library, runnable_tiers, use_threads
from tokenplane_cpu.plugin import CpuBackend
from tokenplane_cpu.program_runner import ProgramRunner
from tokenplane_torch.testing import make_checkpoint

torch.set_num_threads(1)  # two OpenMP threads on a busy machine are slower than one


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> folder, written when a test first asks (see `checkpoint`)."""
    return {"": tmp_path_factory.mktemp("checkpoints")}


@pytest.fixture
def checkpoint(checkpoints: dict[str, Path], request: pytest.FixtureRequest) -> Path:
    """The checkpoint of the family that parametrises the test; a Llama otherwise."""
    family = getattr(request, "param", "llama")
    if family not in checkpoints:
        checkpoints[family] = make_checkpoint(family, checkpoints[""] / family)
    return checkpoints[family]


@pytest.fixture(params=["program", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The two ways through a step: as one native program, and as transformers' module."""
    monkeypatch.setenv(PROGRAM, "1" if request.param == "program" else "0")
    return str(request.param)


@pytest.fixture(scope="session")
def cache_blocks() -> Callable[[CpuBackend], list[NDArray[np.uint8]]]:
    """Gives the cache's memory u8 [blocks, bytes], piece by piece, in whatever layout."""

    def blocks(plugin: CpuBackend) -> list[NDArray[np.uint8]]:
        runner: Any = plugin._runner
        if isinstance(runner, ProgramRunner):
            return runner.cache.blocks()
        tensors = [tensor for layer in runner.layers for tensor in layer.tensors()]
        return [tensor.view(torch.uint8).flatten(1).numpy() for tensor in tensors]

    return blocks


@pytest.fixture
def backend(checkpoint: Path, way: str) -> Iterator[tuple[CpuBackend, Capabilities]]:
    """The backend with that checkpoint loaded in float32."""
    plugin = CpuBackend()
    yield plugin, plugin.load(describe_model(checkpoint), LoadOptions(num_threads=1))
    plugin.close()


@pytest.fixture(params=runnable_tiers())
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each tier of native kernels that this machine runs, on one thread; the one in use comes back afterwards."""
    native = library()
    assert native is not None
    before = native.tp_isa()
    use_threads(1)
    assert native.tp_set_isa(request.param.encode()) == 0
    yield request.param
    native.tp_set_isa(before)
    use_threads(1)
