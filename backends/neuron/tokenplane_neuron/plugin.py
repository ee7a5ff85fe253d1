"""The Neuron backend's hooks. Imports neither torch nor the vendor's libraries: that happens in `load`.

The vendor's runtime owns the weights, the KV cache and the graphs; this plugin says which shapes there are, turns
batches into calls (calls.py) and reads logits back. Sampling is greedy here and the core's for everything else.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import numpy as np

from tokenplane_core.backend.errors import BackendUnavailable, ContractViolation
from tokenplane_core.backend.hookspecs import hookimpl
from tokenplane_core.backend.records import (
    CONTRACT_VERSION,
    F32,
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
    SamplingCaps,
    StepHandle,
    StepOutput,
)

from . import __version__
from .calls import Call, context_call, decode_call, idle_call, prefill_call
from .device import detect
from .loading import Loaded, load_model
from .vendor import Vendor, import_vendor, run


class NeuronBackend:
    """Slot-addressed backend over optimum-neuron."""

    contract = CONTRACT_VERSION

    def __init__(self, find_vendor: Callable[[], Vendor] = import_vendor) -> None:
        self._find_vendor = find_vendor
        self._loaded: Loaded | None = None
        self._vocab_size = 0

    @hookimpl
    def detect(self) -> DetectReport:
        return detect()

    @hookimpl
    def load(self, model: ModelSpec, options: LoadOptions) -> Capabilities:
        """Compile the model or find it compiled, and load it. After an exception nothing is loaded.

        Raises:
            UnsupportedModel, OutOfMemory: as in the contract.
            BackendUnavailable: no such device, no cores, or optimum-neuron is not installed.
            BackendError: the artefact cache is damaged or cannot be written.
        """
        self.close()
        report = self.detect()
        device = _find(report, options.device_index)
        self._loaded = load_model(self._find_vendor(), model, options, device, report)
        self._vocab_size = model.vocab_size
        return _capabilities(model, self._loaded, device)

    @hookimpl
    def kv_alloc(self, layout: KVLayout) -> bool:
        """Nothing to allocate: the lines came with the graphs. Checks that the layout asks for no others."""
        graphs = self._model().graphs
        if layout.block_tokens > graphs.line_tokens or layout.num_slots > graphs.rows:
            raise ContractViolation(
                f"KVLayout asks for {layout.num_slots} lines of {layout.block_tokens} tokens, declared were"
                f" {graphs.rows} of {graphs.line_tokens}"
            )
        return True

    @hookimpl
    def warmup(self) -> int:
        """Run every graph once, as the first run of a program is slower than the rest."""
        graphs = self._model().graphs
        for tokens in graphs.context_tokens:
            self._run(context_call(0, np.zeros(tokens, np.int32), tokens))
        self._run(idle_call(graphs))
        return len(graphs.shapes.buckets)

    @hookimpl
    def prefill(self, batch: PrefillBatch, sampling: SamplingBatch) -> StepHandle:
        return self._step(batch.head.step, prefill_call(batch, self._model().graphs), sampling)

    @hookimpl
    def decode(self, batch: DecodeBatch, sampling: SamplingBatch) -> StepHandle:
        return self._step(batch.head.step, decode_call(batch, self._model().graphs), sampling)

    @hookimpl
    def close(self) -> bool:
        """Drop the model: the vendor has no other call that gives device memory back."""
        self._loaded = None
        gc.collect()
        return True

    def _step(self, step: int, call: Call, sampling: SamplingBatch) -> StepHandle:
        start_s = perf_counter()
        values = self._run(call)[call.asked]
        device_s = perf_counter() - start_s
        if sampling.return_logits:
            return FinishedStep(StepOutput(step, np.zeros(0, np.int32), logits=values, device_s=device_s))
        # argmax takes the first of equal logits: the lowest id.
        token_ids = values[:, 0] if self._model().graphs.samples else values.argmax(axis=1)
        return FinishedStep(StepOutput(step, token_ids.astype(np.int32), device_s=device_s))

    def _run(self, call: Call) -> F32:
        return run(self._model().compiled, call, self._vocab_size)

    def _model(self) -> Loaded:
        if self._loaded is None:
            raise ContractViolation("neuron: load() must come before kv_alloc(), warmup(), prefill() and decode()")
        return self._loaded


def _capabilities(model: ModelSpec, loaded: Loaded, device: Device) -> Capabilities:
    graphs = loaded.graphs
    longest_tokens = min(model.max_model_tokens, graphs.line_tokens)  # an exported folder may hold less, or more
    return Capabilities(
        contract=CONTRACT_VERSION,
        backend="neuron",
        version=__version__,
        device=device,
        dtype=loaded.dtype,
        limits=Limits(
            max_sequences=graphs.rows,
            # A prompt is never split and a step is one graph: a wish for smaller steps could only refuse prompts.
            max_step_tokens=max(graphs.context_tokens[-1], graphs.rows),
            max_model_tokens=longest_tokens,
            max_prefill_rows=1,
            chunk_tokens=0,
        ),
        # The lines are there already; the core sets one more aside for padding, which needs none here.
        kv=KVSpec("slot", longest_tokens, loaded.line_bytes, (graphs.rows + 1) * loaded.line_bytes),
        shapes=graphs.shapes,
        sampling=SamplingCaps(features=frozenset(), returns_logits=not graphs.samples),
        weights_bytes=sum(file.stat().st_size for file in Path(model.path).rglob("*.safetensors")),
        kernels={
            "attention": f"optimum-neuron graphs on {loaded.cores} cores",
            "sampling": "on the device, greedy only" if graphs.samples else "on the host, from logits",
        },
    )


def _find(report: DetectReport, index: int) -> Device:
    for device in report.devices:
        if device.index == index:
            return device
    reason = report.reason or f"device indices: {', '.join(str(d.index) for d in report.devices)}"
    raise BackendUnavailable(f"neuron: there is no device {index}; {reason}")
