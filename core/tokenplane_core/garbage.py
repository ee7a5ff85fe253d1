"""How often Python looks for unreachable cycles in a process that serves. Reference counts free nearly everything."""

from __future__ import annotations

import gc

CONTAINERS_BETWEEN_COLLECTIONS = 50_000
"""More than a step of 4,096 sequences makes; Python's 700 would look through the rows of one step several times."""


def settle() -> None:
    """To be called once a process is ready: what exists now stays and is never looked through again.

    Changes:
        The whole process: its objects are frozen, and new ones are looked through less often.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(CONTAINERS_BETWEEN_COLLECTIONS, 10, 10)
