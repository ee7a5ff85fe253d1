"""Device memory that kernels of all layers and steps share."""

from __future__ import annotations

from math import prod

import torch
import triton
from torch import Tensor


class Workspace:
    """Buffers by name and size, allocated at first use and never given back.

    A captured graph keeps the address of the buffer it saw, so a buffer is never replaced by a larger one. Sizes are
    rounded up to powers of two, which bounds how many there can be. Not for two streams at once.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int, torch.device], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """An f32 tensor of the shape with arbitrary contents, valid until the next call with that name."""
        wanted = prod(shape)
        key = (name, triton.next_power_of_2(wanted), device)
        if key not in self._buffers:
            self._buffers[key] = torch.empty(key[1], dtype=torch.float32, device=device)
        return self._buffers[key][:wanted].view(shape)
