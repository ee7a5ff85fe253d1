from __future__ import annotations

import os
from pathlib import Path

import pytest

from tokenplane_torch.testing import make_checkpoint
from tokenplane_tpu import host

# Both are read once, when the first test makes an XLA tensor.
os.environ["PJRT_DEVICE"] = "CPU"
host.compile_fast()


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama"))
