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
from typing import TYPE_CHECKING, Protocol

from tokenplane_core.backend.errors import BackendUnavailable, ContractViolation, OutOfMemory, UnsupportedModel
from tokenplane_core.backend.hookspecs import hookimpl
from tokenplane_core.backend.records import (
    CONTRACT_VERSION,
    AdapterSpec,
    Capabilities,
    DecodeBatch,
    DetectReport,
    Device,
    KVLayout,
    LoadOptions,
    ModelSpec,
    PrefillBatch,
    SamplingBatch,
    StepHandle,
)

from .device import TorchDevice
from .failures import as_out_of_memory

if TYPE_CHECKING:
    from .lora import LoraLayers
    from .runner import Runner


class Opened(Protocol):
    """What serving asks of a device; loading takes a TorchDevice."""

    block_tokens: int

    def free_bytes(self) -> int: ...

    def close(self) -> None: ...


class TorchBackend(ABC):
    """Implements all hooks but detect; a subclass adds that and open_device."""

    contract = CONTRACT_VERSION
    name: str  # the entry point's
    version: str  # the distribution's

    def __init__(self) -> None:
        self._device: Opened | None = None
        self._runner: Runner | None = None
        self._adapters: LoraLayers | None = None

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
        self._require_offered(model, found, options)
        self.close()
        from .startup import load_runner

        device = self.open_device(found, options)
        try:
            loaded = load_runner(model, device, options)
        except BaseException:
            device.close()
            raise
        self._device, self._runner, self._adapters = device, loaded.runner, loaded.adapters
        # A padded prefill computes logits of each row's last token alone.
        ragged_prefill = all(bucket.phase == "decode" for bucket in loaded.shapes.buckets)
        return Capabilities(
            contract=CONTRACT_VERSION,
            backend=self.name,
            version=self.version,
            device=found,
            dtype=model.dtype,
            limits=loaded.limits,
            kv=loaded.kv,
            shapes=loaded.shapes,
            sampling=device.sampling,
            mixed=device.mixed,
            async_depth=device.async_depth,
            weights_bytes=loaded.weights_bytes,
            reserved_bytes=loaded.reserved_bytes,
            kernels=loaded.kernels,
            prompt_logprobs=ragged_prefill,
            prompt_top_logprobs=ragged_prefill,
            adapters=loaded.adapters.limits if loaded.adapters is not None else None,
            max_drafts=options.max_drafts if device.mixed and ragged_prefill else 0,
        )

    def _require_offered(self, model: ModelSpec, device: Device, options: LoadOptions) -> None:
        """Raises UnsupportedModel where weights or cache are wanted in a form that the device does not offer."""
        wishes = (
            (
                model.quantize,
                device.offer.quantizes,
                f"quantizing weights to {model.quantize} while they load",
                "leave --quantize out, or serve a checkpoint that is stored quantized",
            ),
            (model.kv_dtype, device.offer.kv_dtypes, f"a KV cache of {model.kv_dtype}", "leave --kv-cache-dtype out"),
        )
        for wish, offered, what, way_out in wishes:
            if wish is None or (wish in offered and not options.max_adapters):
                continue
            where = "beside LoRA adapters" if wish in offered else f"on {device.name} (backend {self.name})"
            raise UnsupportedModel(f"{model.model_id}: {what} is not possible {where}; {way_out}")

    @hookimpl
    def kv_alloc(self, layout: KVLayout) -> bool:
        """Allocate the cache, dropping an earlier one first.

        Raises:
            OutOfMemory: there is no cache then.
        """
        runner, device = self._loaded()
        block_tokens = device.block_tokens
        if layout.block_tokens != block_tokens:
            raise ContractViolation(f"KVLayout.block_tokens is {layout.block_tokens}, declared was {block_tokens}")
        runner.drop_cache()
        wanted, free = layout.num_blocks * runner.block_bytes(), device.free_bytes()
        if wanted > free:
            raise OutOfMemory(f"a KV cache of {layout.num_blocks} blocks needs {wanted} bytes, {free} are free")
        with as_out_of_memory(f"a KV cache of {wanted} bytes does not fit"):
            runner.allocate(layout)
        return True

    @hookimpl
    def warmup(self) -> int:
        """Compile or capture every bucket; how many shapes that were.

        Raises:
            OutOfMemory: they do not fit beside the cache.
        """
        with as_out_of_memory("no memory left to warm up beside the KV cache", "; lower --max-batch-total-tokens"):
            return self._loaded()[0].warmup()

    @hookimpl
    def prefill(self, batch: PrefillBatch, sampling: SamplingBatch) -> StepHandle:
        return self._loaded()[0].prefill(batch, sampling)

    @hookimpl
    def decode(self, batch: DecodeBatch, sampling: SamplingBatch) -> StepHandle:
        return self._loaded()[0].decode(batch, sampling)

    @hookimpl
    def adapter_load(self, index: int, adapter: AdapterSpec) -> bool:
        with as_out_of_memory("no memory to load it"):
            self._lora().load(index, adapter)
        return True

    @hookimpl
    def adapter_drop(self, index: int) -> bool:
        self._lora().drop(index)
        return True

    @hookimpl
    def close(self) -> bool:
        device, self._device, self._runner, self._adapters = self._device, None, None, None
        gc.collect()
        if device is not None:
            device.close()
        return True

    def _found(self, index: int) -> Device:
        report = self.detect()
        for device in report.devices:
            if device.index == index:
                return device
        reason = report.reason or f"device indices: {', '.join(str(d.index) for d in report.devices)}"
        raise BackendUnavailable(f"{self.name}: there is no device {index}; {reason}")

    def _lora(self) -> LoraLayers:
        if self._adapters is None:
            raise ContractViolation(f"{self.name}: load() has declared no room for adapters")
        return self._adapters

    def loaded_runner(self) -> Runner:
        """What runs the loaded model; for who built it.

        Raises:
            ContractViolation: nothing is loaded.
        """
        return self._loaded()[0]

    def _loaded(self) -> tuple[Runner, Opened]:
        if self._runner is None or self._device is None:
            raise ContractViolation(f"{self.name}: load() must come before kv_alloc(), prefill() and decode()")
        return self._runner, self._device
