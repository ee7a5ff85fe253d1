"""The hooks of the contract for torch devices. Imports torch when `load` is called, never earlier.

A device plugin subclasses `TorchBackend`, names itself, says what `detect` finds and opens a device:

    class CpuBackend(TorchBackend):
        name, version = "cpu", __version__

        @hookimpl
        def detect(self) -> DetectReport: ...

        def open_device(self, device: Device, options: LoadOptions) -> TorchDevice: ...

It knows no kernels, no vendor and no scheduler.
"""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from tokenplane_core.backend.errors import BackendUnavailable, ContractViolation, OutOfMemory
from tokenplane_core.backend.hookspecs import hookimpl
from tokenplane_core.backend.records import (
    CONTRACT_VERSION,
    Capabilities,
    DecodeBatch,
    DetectReport,
    Device,
    FinishedStep,
    KVLayout,
    KVSpec,
    Limits,
    LoadOptions,
    ModelSpec,
    PrefillBatch,
    SamplingBatch,
    StepHandle,
)

from .device import TorchDevice

if TYPE_CHECKING:
    from .runner import ModelRunner


class TorchBackend(ABC):
    """Implements load, kv_alloc, prefill, decode and close; a subclass adds detect and open_device."""

    contract = CONTRACT_VERSION
    name: str  # the entry point's
    version: str  # the distribution's

    def __init__(self) -> None:
        self._device: TorchDevice | None = None
        self._runner: ModelRunner | None = None

    @abstractmethod
    def detect(self) -> DetectReport:
        """The hook of the contract; the override needs the `hookimpl` mark."""

    @abstractmethod
    def open_device(self, device: Device, options: LoadOptions) -> TorchDevice:
        """Take the device into use. Called once, at the start of `load`."""

    @hookimpl
    def load(self, model: ModelSpec, options: LoadOptions) -> Capabilities:
        """Load and check the model. After an exception nothing is loaded, and `load` may be called again.

        Raises:
            UnsupportedModel, OutOfMemory: as in the contract.
            BackendUnavailable: there is no device of that index.
        """
        found = self._found(options.device_index)
        self.close()
        from .checks import check_model
        from .kv_cache import block_bytes
        from .loader import load_model, weights_bytes
        from .runner import ModelRunner

        device = self.open_device(found, options)
        kernels = device.kernels()
        module = load_model(model, device)
        shapes = check_model(module, model, device, kernels)
        self._device, self._runner = device, ModelRunner(module, model, shapes, kernels)
        gc.collect()  # what loading left behind would count as taken
        sequences = _wish(options.max_sequences, device.default_sequences, device.most_sequences)
        return Capabilities(
            contract=CONTRACT_VERSION,
            backend=self.name,
            version=self.version,
            device=found,
            dtype=model.dtype,
            limits=Limits(
                max_sequences=sequences,
                max_step_tokens=_wish(options.max_step_tokens, device.default_step_tokens, device.most_step_tokens),
                max_model_tokens=model.max_model_tokens,
                max_prefill_rows=sequences,
            ),
            kv=KVSpec(
                kind="paged",
                block_tokens=device.block_tokens,
                block_bytes=block_bytes(shapes, device.block_tokens),
                budget_bytes=device.kv_budget_bytes(),
            ),
            mixed=True,
            weights_bytes=weights_bytes(module),
            kernels={**kernels.describe(), "sampling": "torch"},
        )

    @hookimpl
    def kv_alloc(self, layout: KVLayout) -> bool:
        """Allocate the cache, dropping an earlier one first."""
        from .kv_cache import block_bytes
        from .loader import is_out_of_memory

        runner, device = self._loaded()
        if layout.block_tokens != device.block_tokens:
            raise ContractViolation(
                f"KVLayout.block_tokens is {layout.block_tokens}, declared was {device.block_tokens}"
            )
        runner.layers = []
        wanted, free = layout.num_blocks * block_bytes(runner.shapes, layout.block_tokens), device.free_bytes()
        if wanted > free:
            raise OutOfMemory(f"a KV cache of {layout.num_blocks} blocks needs {wanted} bytes, {free} are free")
        try:
            runner.allocate(layout)
        except Exception as error:
            if is_out_of_memory(error):
                raise OutOfMemory(f"a KV cache of {wanted} bytes does not fit: {error}") from error
            raise
        return True

    @hookimpl
    def prefill(self, batch: PrefillBatch, sampling: SamplingBatch) -> StepHandle:
        return FinishedStep(self._loaded()[0].prefill(batch, sampling))

    @hookimpl
    def decode(self, batch: DecodeBatch, sampling: SamplingBatch) -> StepHandle:
        return FinishedStep(self._loaded()[0].decode(batch, sampling))

    @hookimpl
    def close(self) -> bool:
        self._device = self._runner = None
        gc.collect()
        return True

    def _found(self, index: int) -> Device:
        report = self.detect()
        for device in report.devices:
            if device.index == index:
                return device
        reason = report.reason or f"device indices: {', '.join(str(d.index) for d in report.devices)}"
        raise BackendUnavailable(f"{self.name}: there is no device {index}; {reason}")

    def _loaded(self) -> tuple[ModelRunner, TorchDevice]:
        if self._runner is None or self._device is None:
            raise ContractViolation(f"{self.name}: load() must come before kv_alloc(), prefill() and decode()")
        return self._runner, self._device


def _wish(wish: int | None, default: int, most: int) -> int:
    """What a plugin offers for a user's wish: at least 1, at most what the device is good for."""
    return default if wish is None else max(1, min(wish, most))
