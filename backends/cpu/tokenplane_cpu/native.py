"""The native kernels' library, loaded; its C interface is native/tokenplane_cpu.h. Imports no torch."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

from tokenplane_core.backend.errors import ConfigError

ISA = "TOKENPLANE_CPU_ISA"  # names a weaker tier of instruction sets, for tests and for comparing
_FILE = Path(__file__).with_name("libtokenplane_cpu.so")


def is_built() -> bool:
    """Whether this package was built with the library."""
    return _FILE.exists()


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, or None where this package was built without it.

    Raises:
        ConfigError: TOKENPLANE_CPU_ISA names a tier that this machine does not run.
    """
    if not is_built():
        return None
    found = ctypes.CDLL(str(_FILE))
    for name in ("tp_best_isa", "tp_isa"):
        getattr(found, name).restype = ctypes.c_char_p
    wanted = os.environ.get(ISA)
    if wanted and found.tp_set_isa(wanted.encode()) != 0:
        raise ConfigError(f"{ISA} is {wanted!r}; the best this machine runs is {found.tp_best_isa().decode()!r}")
    return found


def isa() -> str:
    """The tier in use: generic, avx2, avx512, avx512_bf16 or amx; "" without the library."""
    found = library()
    return found.tp_isa().decode() if found else ""


def use_threads(count: int) -> None:
    """Compute with that many threads, the caller's included."""
    found = library()
    assert found is not None
    found.tp_set_threads(count, None)
