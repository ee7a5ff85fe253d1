"""The opened Intel GPU."""

from __future__ import annotations

import torch

from tokenplane_core.backend.records import Device
from tokenplane_torch.cards import Card, require_torch, torch_index

from .attention import CANDIDATES


class XpuCard(Card):
    block_tokens = 64  # what every release of vllm-xpu-kernels takes


def open_card(device: Device) -> XpuCard:
    """
    Raises:
        BackendUnavailable: the installed torch has no XPU support or does not find the device.
    """
    require_torch("xpu", "XPU", torch.version.xpu, torch.xpu)
    return XpuCard("xpu", torch_index("xpu", device, torch.xpu), CANDIDATES)
