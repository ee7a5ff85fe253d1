"""The hooks: what Tokenplane's core calls, in the order it calls it. Knows no mathematics.

What a hook must do: tokenplane_core/backend/hookspecs.py. What its arguments mean: tokenplane_core/backend/records.py.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from tokenplane_core.backend.errors import OutOfMemory
from tokenplane_core.backend.hookspecs import hookimpl
from tokenplane_core.backend.records import (
    I32,
    Bool,
    Capabilities,
    DecodeBatch,
    DetectReport,
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

from . import __version__, device

if TYPE_CHECKING:
    from .attention import KVCache, Row
    from .model import Llama


class AcmeBackend:
    # The contract this code was written for: a literal, not the core's CONTRACT_VERSION, which changes without you.
    contract = "0.2"

    def __init__(self) -> None:
        self._llama: Llama | None = None
        self._cache: KVCache | None = None

    @hookimpl
    def detect(self) -> DetectReport:
        return device.detect()

    @hookimpl
    def load(self, model: ModelSpec, options: LoadOptions) -> Capabilities:
        # Yours: the vendor library is imported from here on, never at the top of this module.
        from .loader import check_supported
        from .model import Llama

        check_supported(model)
        self._model, self._llama = model, Llama(model)
        self._line_bytes = 2 * 4 * model.num_layers * model.max_model_tokens * model.num_kv_heads * model.head_dim
        self._budget_bytes = device.MEMORY_BYTES - self._llama.weights_bytes  # Yours: measured, after loading
        max_sequences = max(1, min(options.max_sequences or 8, 64))
        return Capabilities(
            contract=self.contract,
            backend="acme",
            version=__version__,
            device=device.find(options.device_index),
            dtype="float32",  # computed in float32, whatever the checkpoint was saved in
            limits=Limits(
                max_sequences=max_sequences,
                max_step_tokens=max(1, min(options.max_step_tokens or 1024, 4096)),
                max_model_tokens=model.max_model_tokens,
                max_prefill_rows=max_sequences,
            ),
            # One line of cache per sequence is the simplest thing that works. "paged" comes later.
            kv=KVSpec("slot", model.max_model_tokens, self._line_bytes, self._budget_bytes),
            # Nothing but greedy: for all else the core asks for logits and samples on the host.
            sampling=SamplingCaps(features=frozenset(), returns_logits=True),
            weights_bytes=self._llama.weights_bytes,
            kernels={"attention": "numpy"},
        )

    @hookimpl
    def kv_alloc(self, layout: KVLayout) -> bool:
        from .attention import KVCache

        lines = layout.num_slots + 1  # the last line belongs to padding rows
        if lines * self._line_bytes > self._budget_bytes + self._line_bytes:
            raise OutOfMemory(
                f"a KV cache of {lines} lines takes {lines * self._line_bytes:,} bytes, {self._budget_bytes:,} are free"
            )
        spec = self._model
        self._cache = KVCache(spec.num_layers, lines, layout.block_tokens, spec.num_kv_heads, spec.head_dim)
        return True

    @hookimpl
    def prefill(self, batch: PrefillBatch, sampling: SamplingBatch) -> StepHandle:
        from .attention import Row

        n = batch.num_rows
        starts, contexts = batch.row_starts[:n], batch.context_lens[:n]
        ends = starts + batch.num_new_tokens[:n]
        rows = [Row(*row) for row in np.stack([batch.slots[:n], contexts, starts, ends], 1).tolist()]
        return self._run(batch.head.step, batch.token_ids, rows, batch.sample[:n], sampling)

    @hookimpl
    def decode(self, batch: DecodeBatch, sampling: SamplingBatch) -> StepHandle:
        from .attention import Row

        n = batch.num_rows
        contexts = batch.context_lens[:n].tolist()
        rows = [Row(slot, contexts[i], i, i + 1) for i, slot in enumerate(batch.slots[:n].tolist())]
        return self._run(batch.head.step, batch.token_ids[:n], rows, np.ones(n, np.bool_), sampling)

    @hookimpl
    def close(self) -> bool:
        self._llama = self._cache = None
        return True

    def _run(self, step: int, token_ids: I32, rows: list[Row], sample: Bool, sampling: SamplingBatch) -> StepHandle:
        """Compute the step at once. Yours: launch it, and return a handle that waits (async_depth 1)."""
        assert self._llama is not None and self._cache is not None, "load and kv_alloc come first"
        started_s = time.perf_counter()
        wanted = np.array([row.end - 1 for row in rows], np.int64)[sample]
        logits = self._llama.logits(token_ids, rows, wanted, self._cache)
        device_s = time.perf_counter() - started_s
        if sampling.return_logits:
            return FinishedStep(StepOutput(step, np.zeros(0, np.int32), logits=logits, device_s=device_s))
        return FinishedStep(StepOutput(step, logits.argmax(-1).astype(np.int32), device_s=device_s))
