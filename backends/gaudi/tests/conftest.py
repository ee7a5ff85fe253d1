from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for habana_stand_in

from tokenplane_core.backend.records import ModelSpec
from tokenplane_core.kit.checkpoint import write_tiny_llama
from tokenplane_core.model import describe_model

torch.set_num_threads(1)  # two OpenMP threads on a busy machine are slower than one


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def model(folder: Path) -> ModelSpec:
    """512 tokens (4 blocks), vocabulary 211, float32."""
    return describe_model(folder, dtype="float32")
