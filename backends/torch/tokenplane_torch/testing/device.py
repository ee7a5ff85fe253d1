"""The host as a device, with as much memory as a test wants."""

from __future__ import annotations

import torch

from ..device import TorchDevice
from ..kernels import AttentionKernels, TorchKernels


class PlainDevice(TorchDevice):
    def __init__(self, free_bytes: int = 1 << 40) -> None:
        self._free_bytes = free_bytes

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cpu")

    def kernels(self) -> AttentionKernels:
        return TorchKernels()

    def free_bytes(self) -> int:
        return self._free_bytes

    def kv_budget_bytes(self) -> int:
        return self._free_bytes
