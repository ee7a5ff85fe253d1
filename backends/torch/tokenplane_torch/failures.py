"""What went wrong, in the contract's words. Imports no torch: it is asked where none is loaded, too."""

from __future__ import annotations

import contextlib
import errno
import sys
from collections.abc import Iterator

from tokenplane_core.backend.errors import OutOfMemory


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """torch raises its own class on accelerators and a plain RuntimeError on the host; mappings raise an OSError."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(
        sign in str(error) for sign in ("allocate memory", "RESOURCE_EXHAUSTED")
    )


@contextlib.contextmanager
def as_out_of_memory(what: str, advice: str = "") -> Iterator[None]:
    """Inside, the many ways to run out of memory become OutOfMemory: what for, the error's own words, advice."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"{what}: {first_line(error)}{advice}") from error
