"""The opened device: the host, through torch."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from tokenplane_core.backend.errors import ConfigError
from tokenplane_torch.choice import ONLY
from tokenplane_torch.device import TorchDevice
from tokenplane_torch.kernels import AttentionKernels, LayerNeed

from .attention import kernels
from .device import headroom_bytes, read_memory

NAME = "torch"  # as users name the kernels


class HostDevice(TorchDevice):
    """Computes with `num_threads` threads of this process from the moment it is made."""

    def __init__(self, num_threads: int) -> None:
        torch.set_num_threads(num_threads)

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cpu")

    def kernels(self, needs: Sequence[LayerNeed]) -> AttentionKernels:
        if os.environ.get(ONLY, NAME) != NAME:
            raise ConfigError(f"{ONLY} (--attention) is {os.environ[ONLY]!r}; the only kernels for a CPU are {NAME!r}")
        return kernels()

    def free_bytes(self) -> int:
        return read_memory().free_bytes

    def total_bytes(self) -> int:
        return read_memory().total_bytes

    def headroom_bytes(self) -> int:
        return headroom_bytes(self.total_bytes())
