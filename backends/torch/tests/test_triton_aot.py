"""Every Triton kernel compiles for every kind of card without one, within the card's limits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CUDA = ["sm_80", "sm_90", "sm_100"]
HIP = ["gfx90a", "gfx942", "gfx950"]


@pytest.mark.parametrize("targets", [CUDA, HIP], ids=["cuda", "hip"])
def test_all_kernels_compile_within_the_limits(targets: list[str], tmp_path: Path) -> None:
    # A process of its own: in this one Triton interprets. An empty cache: what is cached was not compiled.
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tokenplane_torch.triton.aot", *(f"--target={name}" for name in targets)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in targets:
        kernels = {line.split()[0] for line in done.stdout.splitlines() if f" {name} " in line}
        assert kernels == {"attend", "combine", "write", "norm", "rotate", "gated", "draw"}
