"""For all tests of every package. Knows nothing of what they test."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def _imports_are_no_garbage() -> None:
    """What lives before a file's first test lives to the end of the process: collections need not walk it again.

    Backends collect when they load and close, several times for each engine of a law, and the libraries imported for
    the suite are 0.8 million objects: 0.4 s a collection. What tests make themselves is collected as ever.
    """
    gc.collect()
    gc.freeze()
