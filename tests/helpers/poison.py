"""A prompt that kills the engine process: an observer plugin, as anybody may install one, on the engine's path."""

from __future__ import annotations

import os
from pathlib import Path

OBSERVER = """
import os
import numpy as np
from tokenplane_core.backend.hookspecs import hookimpl

POISON = np.full(3, {poison}, np.int32).tobytes()

class Killer:
    @hookimpl(wrapper=True)
    def prefill(self, batch):
        if POISON in batch.token_ids.tobytes():
            os._exit(66)
        return (yield)
"""


def poison_engines(folder: Path, token_id: int) -> str:
    """Write the plugin; returns the PYTHONPATH with which an engine dies of a prompt with the id thrice in a row."""
    info = folder / "killer-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: killer\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[tokenplane.observers]\nkiller = killer_of_engines:Killer\n")
    (folder / "killer_of_engines.py").write_text(OBSERVER.format(poison=token_id))
    return os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH", ""))))
