"""The opened device: the host, through torch."""

from __future__ import annotations

import torch

from tokenplane_torch.device import TorchDevice
from tokenplane_torch.kernels import AttentionKernels

from .attention import kernels
from .device import read_memory

RESERVE_BYTES = 256 << 20


class HostDevice(TorchDevice):
    """Computes with `num_threads` threads of this process from the moment it is made."""

    def __init__(self, num_threads: int) -> None:
        torch.set_num_threads(num_threads)

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cpu")

    def kernels(self) -> AttentionKernels:
        return kernels()

    def free_bytes(self) -> int:
        return read_memory().free_bytes

    def kv_budget_bytes(self) -> int:
        """What is free once the weights are loaded, less a reserve of 1/8 of the memory allowed (at least 256 MiB).

        The reserve is for activations, gathered keys, logits, the allocator's slack and the rest of the machine.
        """
        memory = read_memory()
        return max(0, memory.free_bytes - max(RESERVE_BYTES, memory.total_bytes // 8))
