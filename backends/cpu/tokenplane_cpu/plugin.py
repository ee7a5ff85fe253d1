"""The CPU backend's hooks. Imports no torch: that happens in `load`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenplane_core.backend.hookspecs import hookimpl
from tokenplane_core.backend.records import Capabilities, DetectReport, Device, LoadOptions, ModelSpec
from tokenplane_torch.backend import TorchBackend

from . import __version__
from .device import default_threads, detect

if TYPE_CHECKING:
    from tokenplane_torch.device import TorchDevice


class CpuBackend(TorchBackend):
    name, version = "cpu", __version__

    def __init__(self, programs_only: bool = False) -> None:
        """programs_only: `load` raises decoder.NotPlain where there is no native program for a model."""
        super().__init__()
        self._programs_only = programs_only
        self._no_program: str | None = None  # why the model at hand runs through torch

    @hookimpl
    def detect(self) -> DetectReport:
        return detect()

    @hookimpl
    def load(self, model: ModelSpec, options: LoadOptions) -> Capabilities:
        """As in the contract; in an engine's own process, all that needs torch happens in another where it can."""
        self._no_program = None
        if options.own_process and not options.max_adapters:
            from .conditions import is_likely_plain, why_no_program

            if why_no_program(model) is None and is_likely_plain(model):
                return self._load_apart(model, options)
        return super().load(model, options)

    def _load_apart(self, model: ModelSpec, options: LoadOptions) -> Capabilities:
        from .apart import Host, NoProgram, load_apart

        self.close()
        loaded = load_apart(model, options)
        if isinstance(loaded, NoProgram):
            self._no_program = loaded.reason
            return super().load(model, options)
        self._device, self._runner = Host(), loaded.runner
        return loaded.capabilities

    def open_device(self, device: Device, options: LoadOptions) -> TorchDevice:
        from .host import HostDevice

        threads = options.num_threads or default_threads()
        return HostDevice(threads, programs_only=self._programs_only, no_program=self._no_program)
