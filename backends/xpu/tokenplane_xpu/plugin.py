"""The XPU backend's hooks. Imports no torch: that happens in `load`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenplane_core.backend.hookspecs import hookimpl
from tokenplane_core.backend.records import DetectReport, Device, LoadOptions
from tokenplane_torch.backend import TorchBackend

from . import __version__
from .device import detect

if TYPE_CHECKING:
    from tokenplane_torch.device import TorchDevice


class XpuBackend(TorchBackend):
    name, version = "xpu", __version__

    @hookimpl
    def detect(self) -> DetectReport:
        return detect()

    def open_device(self, device: Device, options: LoadOptions) -> TorchDevice:
        from .card import open_card

        return open_card(device)
