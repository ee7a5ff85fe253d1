"""What a device plugin supplies to the kit. Imports no torch, so that a plugin module can import it anywhere."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from .kernels import AttentionKernels


class TorchDevice(ABC):
    """One opened device. Made in `load`, after torch is there; the attributes are facts and never change."""

    block_tokens: int = 32  # tokens in a KV block
    default_sequences: int = 64  # Limits.max_sequences unless the user wishes otherwise ...
    most_sequences: int = 1024  # ... and the most a wish can get
    default_step_tokens: int = 2048  # the same for Limits.max_step_tokens
    most_step_tokens: int = 32768

    @property
    @abstractmethod
    def torch_device(self) -> torch.device:
        """Where weights, cache and activations live."""

    @abstractmethod
    def kernels(self) -> AttentionKernels:
        """The write and attend kernels, called once per loaded model."""

    @abstractmethod
    def free_bytes(self) -> int:
        """Memory that this process could still take on the device, measured now."""

    @abstractmethod
    def kv_budget_bytes(self) -> int:
        """How much of it the KV cache may have, measured now: free memory less what the steps themselves need."""
