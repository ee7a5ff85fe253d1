"""The native kernels' library, loaded; its C interface is native/tokenplane_cpu.h. Imports no torch."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import Any

from tokenplane_core.backend.errors import ConfigError

ISA = "TOKENPLANE_CPU_ISA"  # names a weaker tier of instruction sets, for tests and for comparing
TIERS = ("amx_emulated", "generic", "avx2", "avx512", "avx512_bf16", "amx")  # weakest first; the first is for tests
ABI = 3
"""TP_ABI of the tokenplane_cpu.h that this package's structs and calls were written for."""

_FILE = Path(__file__).with_name("libtokenplane_cpu.so")


def is_built() -> bool:
    """Whether this package was built with the library."""
    return _FILE.exists()


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, or None where this package was built without it.

    Raises:
        ConfigError: TOKENPLANE_CPU_ISA names a tier that this machine does not run; or the library was built from
            another version of the sources than this package (an editable installation, updated).
    """
    if not is_built():
        return None
    found = ctypes.CDLL(str(_FILE))
    built = found.tp_abi() if hasattr(found, "tp_abi") else 0
    if built != ABI:
        raise ConfigError(
            f"{_FILE.name} was built for version {built} of its interface, and this package needs version {ABI};"
            " reinstall tokenplane-cpu, which builds it anew"
        )
    _declare(found)
    wanted = os.environ.get(ISA)
    if wanted and found.tp_set_isa(wanted.encode()) != 0:
        raise ConfigError(f"{ISA} is {wanted!r}; the best this machine runs is {found.tp_best_isa().decode()!r}")
    return found


def built_library() -> ctypes.CDLL:
    """The library, for who computes with it.

    Raises:
        RuntimeError: this package was built without it.
        ConfigError: as `library`.
    """
    found = library()
    if found is None:
        raise RuntimeError("tokenplane-cpu was built without its native kernels")
    return found


def _declare(found: ctypes.CDLL) -> None:
    """What each function takes and gives."""
    pointer, integer, size, text = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t, ctypes.c_char_p
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "tp_best_isa": (text, []),
        "tp_isa": (text, []),
        "tp_set_isa": (integer, [text]),
        "tp_set_threads": (None, [integer]),
        "tp_linear_packed_bytes": (size, [integer] * 5),
        "tp_linear_prepare": (None, [pointer, pointer, *[integer] * 5]),
        "tp_linear_pack": (None, [pointer, integer, integer, pointer, pointer, integer]),
        "tp_linear_workspace_bytes": (size, [pointer, integer]),
        "tp_linear": (None, [pointer, pointer, ctypes.c_int64, integer, pointer, pointer]),
        "tp_key_block_bytes": (size, [pointer]),
        "tp_value_block_bytes": (size, [pointer]),
        "tp_attention_workspace_bytes": (size, [pointer, integer]),
        "tp_write_kv": (None, [pointer, pointer, pointer, pointer, integer]),
        "tp_attend": (None, [pointer] * 5),
        "tp_sampling_workspace_bytes": (size, [integer]),
        "tp_sample": (None, [pointer, pointer]),
        "tp_program_create": (pointer, [pointer]),
        "tp_program_destroy": (None, [pointer]),
        "tp_program_scratch_bytes": (size, [pointer]),
        "tp_program_step": (None, [pointer, pointer]),
        "tp_program_logits": (None, [pointer, integer, integer, pointer]),
    }
    for name, (result, arguments) in signatures.items():
        getattr(found, name).restype = result
        getattr(found, name).argtypes = arguments


def isa() -> str:
    """The tier in use: generic, avx2, avx512, avx512_bf16 or amx; "" without the library."""
    found = library()
    return found.tp_isa().decode() if found else ""


def runnable_tiers() -> list[str]:
    """Those of TIERS that this machine runs. The one in use stays in use."""
    found = library()
    if found is None:
        return []
    before = found.tp_isa()
    try:
        return [tier for tier in TIERS if found.tp_set_isa(tier.encode()) == 0]
    finally:
        found.tp_set_isa(before)


def use_threads(count: int) -> None:
    """Compute with that many threads, the caller's included."""
    built_library().tp_set_threads(count)
