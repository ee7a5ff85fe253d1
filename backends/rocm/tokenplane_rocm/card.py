"""The opened AMD GPU. torch drives it under the name of torch.cuda."""

from __future__ import annotations

import torch

from tokenplane_core.backend.records import Device
from tokenplane_torch.cards import Card, require_torch, torch_index

from .attention import CANDIDATES


class RocmCard(Card):
    block_tokens = 16  # AITER's prompt kernels are compiled for 1, 16 and 1024


def open_card(device: Device) -> RocmCard:
    """
    Raises:
        BackendUnavailable: the installed torch has no ROCm or does not find the device.
    """
    require_torch("rocm", "ROCm", torch.version.hip, torch.cuda)
    return RocmCard("cuda", torch_index("rocm", device, torch.cuda), CANDIDATES)
