"""The TPU backend's hooks. Imports neither torch nor torch-xla: that happens in `load`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from tokenplane_core.backend.hookspecs import hookimpl
from tokenplane_core.backend.records import DetectReport, Device, LoadOptions
from tokenplane_torch.backend import TorchBackend

from . import __version__
from .device import detect
from .host import detect_host

if TYPE_CHECKING:
    from tokenplane_torch.device import TorchDevice


class TpuBackend(TorchBackend):
    name, version = "tpu", __version__

    @hookimpl
    def detect(self) -> DetectReport:
        """TPU chips; with PJRT_DEVICE=CPU in the environment, XLA on the host instead."""
        return detect_host() if os.environ.get("PJRT_DEVICE") == "CPU" else detect()

    def open_device(self, device: Device, options: LoadOptions) -> TorchDevice:
        from .runtime import open_device

        return open_device(device)
