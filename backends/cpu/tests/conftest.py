from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tokenplane_core.backend.records import Capabilities, LoadOptions
from tokenplane_core.model import describe_model
from tokenplane_cpu.plugin import CpuBackend
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


@pytest.fixture
def backend(checkpoint: Path) -> Iterator[tuple[CpuBackend, Capabilities]]:
    """The backend with that checkpoint loaded in float32."""
    plugin = CpuBackend()
    yield plugin, plugin.load(describe_model(checkpoint), LoadOptions(num_threads=1))
    plugin.close()
