"""When a native program is out of the question, before a model is looked at. Imports no torch."""

from __future__ import annotations

import os

from tokenplane_core.backend.records import ModelSpec
from tokenplane_torch.device import ONLY

from . import native
from .device import COMPUTED_IN

PROGRAM = "TOKENPLANE_CPU_PROGRAM"  # 0: plain decoders go through torch, too
NATIVE = "native"  # as users name the kernels


def is_likely_plain(model: ModelSpec) -> bool:
    """A guess by config.json, for what a wrong guess only makes slower: RMS norms, and no experts."""
    return "rms_norm_eps" in model.config and not any("expert" in key for key, value in model.config.items() if value)


def why_no_program(model: ModelSpec) -> str | None:
    """A few words for the list of kernels; None: there may be one.

    Raises:
        ConfigError: as native.library.
    """
    if os.environ.get(PROGRAM, "1") == "0":
        return f"{PROGRAM}=0"
    if native.library() is None:
        return "this package was built without native kernels"
    if model.dtype == "float16":
        return "float16"
    if model.quantize is not None and model.dtype != COMPUTED_IN:
        return f"{model.quantize} weights are computed in {COMPUTED_IN}; set --dtype {COMPUTED_IN}"
    if os.environ.get(ONLY, NATIVE) != NATIVE:
        return f"{ONLY} is {os.environ[ONLY]}"
    return None
