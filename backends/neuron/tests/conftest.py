from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for neuron_stand_in

from neuron_stand_in import Bench, StandInBackend

from tokenplane_core.backend.records import ModelSpec
from tokenplane_core.kit.checkpoint import write_tiny_llama
from tokenplane_core.model import describe_model

torch.set_num_threads(1)  # two OpenMP threads on a busy machine are slower than one


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def model(folder: Path) -> ModelSpec:
    """512 tokens, vocabulary 211, float32."""
    return describe_model(folder)


@pytest.fixture(autouse=True)
def own_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading names cores in the environment, for the runtime: not beyond the test."""
    for name in ("NEURON_RT_VISIBLE_CORES", "NEURON_RT_NUM_CORES"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty artefact cache."""
    monkeypatch.setenv("TOKENPLANE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "neuron"


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.fixture
def plugin(bench: Bench, cache: Path) -> Iterator[StandInBackend]:
    plugin = StandInBackend(bench)
    yield plugin
    plugin.close()
