"""XLA on the host, for tests: the same programs, compiled for the processor. Imports nothing but the standard library.

It is offered only where PJRT_DEVICE=CPU asks for it, and never chosen unasked.
"""

from __future__ import annotations

import os
import platform
from collections.abc import MutableMapping
from importlib.util import find_spec
from pathlib import Path

from tokenplane_core.backend.probe import meminfo_bytes
from tokenplane_core.backend.records import DetectReport, Device

ARCH = "host"


def detect_host(root: Path = Path("/")) -> DetectReport:
    if find_spec("torch_xla") is None:
        return DetectReport("broken", reason="PJRT_DEVICE=CPU asks for XLA on the host, but torch-xla is not installed")
    total, free = memory_bytes(root)
    device = Device(
        kind="tpu",
        index=0,
        name="XLA on the host",
        arch=ARCH,
        memory_total_bytes=total,
        dtypes=("float32", "bfloat16"),
        score=0,
        memory_free_bytes=free,
        notes=f"for tests; {platform.machine()} processor",
    )
    return DetectReport("found", (device,))


def memory_bytes(root: Path = Path("/")) -> tuple[int, int]:
    """Total and free."""
    memory = meminfo_bytes(root)
    return memory.get("MemTotal", 0), memory.get("MemAvailable", 0)


def compile_fast(environ: MutableMapping[str, str] = os.environ) -> None:
    """Have XLA optimise nothing: steps on the host are for tests, where compiling takes longer than running."""
    environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
