"""Ceilings of this machine, which kernels are measured against: bytes read and operations done in a second.

python benchmarks/cpu_kernels/ceilings.py; needs g++ and AVX-512.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROUNDS = 60
READ_BYTES = 256 << 20  # far more than the caches hold


@dataclass(frozen=True, slots=True)
class Ceilings:
    read_bytes_s: float
    bf16_flops: float  # 0 without AVX512-BF16
    f32_flops: float


@functools.cache
def _library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "ceilings.so"
        source = Path(__file__).with_name("ceilings.cpp")
        subprocess.run(["g++", "-O2", "-shared", "-fPIC", "-pthread", source, "-o", built], check=True)
        found = ctypes.CDLL(str(built))
    for name in ("read_bandwidth", "bf16_peak", "f32_peak"):
        getattr(found, name).restype = ctypes.c_double
    found.read_bandwidth.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return found


def measure(threads: int) -> Ceilings:
    """The best of a few rounds: a ceiling is what nothing got in the way of."""
    lib = _library()
    memory = np.ones(READ_BYTES, dtype=np.uint8)
    return Ceilings(
        max(lib.read_bandwidth(memory.ctypes.data, memory.nbytes, threads) for _ in range(ROUNDS)),
        max(lib.bf16_peak(threads) for _ in range(ROUNDS)),
        max(lib.f32_peak(threads) for _ in range(ROUNDS)),
    )


if __name__ == "__main__":
    for count in (1, 2):
        found = measure(count)
        print(
            f"{count} threads: {found.read_bytes_s / 1e9:.1f} GB/s read,"
            f" {found.bf16_flops / 1e9:.0f} GFLOP/s bf16, {found.f32_flops / 1e9:.0f} GFLOP/s f32"
        )
