"""The Gaudi backend's hooks. Imports neither torch nor Intel's bridge: that happens in `load`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenplane_core.backend.hookspecs import hookimpl
from tokenplane_core.backend.records import DetectReport, Device, LoadOptions
from tokenplane_torch.backend import TorchBackend

from . import __version__
from .device import detect

if TYPE_CHECKING:
    from tokenplane_torch.device import TorchDevice


class GaudiBackend(TorchBackend):
    name, version = "gaudi", __version__

    @hookimpl
    def detect(self) -> DetectReport:
        return detect()

    def open_device(self, device: Device, options: LoadOptions) -> TorchDevice:
        from .bridge import Bridge
        from .card import GaudiCard

        return GaudiCard(Bridge(device.uuid))
