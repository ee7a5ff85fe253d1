"""The opened NVIDIA GPU."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from tokenplane_core.backend.records import Device
from tokenplane_torch.cards import Card, only_visible, require_torch, torch_index

from .attention import CANDIDATES

MIG = "MIG-"


def open_card(device: Device) -> Card:
    """
    Raises:
        BackendUnavailable: the installed torch has no CUDA or does not find the device.
    """
    is_instance = device.uuid.startswith(MIG)
    # CUDA shows one MIG instance at most, the first unless one is named before it starts.
    with only_visible("CUDA_VISIBLE_DEVICES", device.uuid) if is_instance else nullcontext():
        require_torch("cuda", "CUDA", torch.version.cuda, torch.cuda)
        torch.cuda.init()  # type: ignore[no-untyped-call]
    return Card("cuda", 0 if is_instance else torch_index("cuda", device, torch.cuda), CANDIDATES)
