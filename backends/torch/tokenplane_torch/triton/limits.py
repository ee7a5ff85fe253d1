"""What a device lets one kernel use, as its driver says. Knows no card names and no kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton


@dataclass(frozen=True, slots=True)
class DeviceLimits:
    shared_bytes: int  # most shared memory (LDS, SLM) of one program
    processors: int  # multiprocessors or compute units that run programs side by side
    compiler: str  # "cuda", "hip", "xpu": they lay out shared memory differently


# Few processors, so that small tests fill them and smaller ones do not.
INTERPRETER = DeviceLimits(shared_bytes=64 << 10, processors=4, compiler="cuda")


def probe(device: torch.device) -> DeviceLimits:
    """Ask the active driver about a device. The names it answers with are the same for all of Triton's backends.

    Raises:
        RuntimeError: Triton has no driver for the machine.
    """
    if triton.knobs.runtime.interpret:
        return INTERPRETER
    driver = triton.runtime.driver.active
    index = driver.get_current_device() if device.index is None else device.index
    facts = driver.utils.get_device_properties(index)
    compiler = driver.get_current_target().backend
    return DeviceLimits(int(facts["max_shared_mem"]), int(facts["multiprocessor_count"]), compiler)
