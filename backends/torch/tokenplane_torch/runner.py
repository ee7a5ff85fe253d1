"""One loaded model: takes the core's batches, runs a step, returns its StepOutput.

Batches arrive flat and leave packed: padding rows and padding tokens are dropped here, so nothing behind this file
ever sees one. Knows nothing of hooks, devices or how the model was loaded.
"""

from __future__ import annotations

import inspect
import time

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokenplane_core.backend.records import (
    I32,
    Bool,
    DecodeBatch,
    KVLayout,
    ModelSpec,
    PrefillBatch,
    SamplingBatch,
    StepOutput,
)
from tokenplane_core.backend.tables import SlotTables

from .kernels import AttentionKernels
from .kv_cache import LayerCache, LayerShape, allocate
from .sampler import needs_history, sample
from .step import PagedStep, StepPlan, plan_step


class ModelRunner:
    """Owns the module, the cache and the slot tables. Computes inside the call (async_depth 0)."""

    def __init__(
        self, module: PreTrainedModel, model: ModelSpec, shapes: list[LayerShape], kernels: AttentionKernels
    ) -> None:
        self.module, self.model, self.shapes, self.kernels = module, model, shapes, kernels
        self.layers: list[LayerCache] = []
        self._keeps_logits = "logits_to_keep" in inspect.signature(module.forward).parameters

    def allocate(self, layout: KVLayout) -> None:
        """Replace the cache and forget all slots. Raises what torch raises when memory is short; then there is none."""
        self.layers = []
        self.layers = allocate(self.shapes, layout.num_blocks, layout.block_tokens, self.module.device)
        self._block_tokens = layout.block_tokens
        self._tables = SlotTables(layout, self.model.max_model_tokens)

    def prefill(self, batch: PrefillBatch, sampling: SamplingBatch) -> StepOutput:
        self._tables.apply(batch.head)
        flat = self._tables.enter_prefill(batch)
        new = batch.num_new_tokens[: batch.num_rows]
        packed_starts = np.cumsum(new) - new
        source = np.repeat(batch.row_starts[: batch.num_rows] - packed_starts, new) + np.arange(new.sum())
        return self._run(batch, flat[source], new, batch.sample[: batch.num_rows], sampling)

    def decode(self, batch: DecodeBatch, sampling: SamplingBatch) -> StepOutput:
        self._tables.apply(batch.head)
        flat = self._tables.enter_decode(batch)
        one_each = np.ones(batch.num_rows, np.int32)
        return self._run(batch, flat[: batch.num_rows], one_each, one_each.astype(np.bool_), sampling)

    @torch.inference_mode()
    def _run(
        self, batch: PrefillBatch | DecodeBatch, token_ids: I32, new: I32, sampled: Bool, sampling: SamplingBatch
    ) -> StepOutput:
        """Compute the packed tokens i32 [t] of the real rows, of which row i has new[i]; sample rows as told."""
        started_s = time.perf_counter()
        step, slots, context_lens = batch.head.step, batch.slots[: batch.num_rows], batch.context_lens[: batch.num_rows]
        tables = self._tables.blocks[slots]
        plan = plan_step(token_ids, new, context_lens, tables, sampled, self._block_tokens, self.module.device)
        logits = self._logits(plan)
        if sampling.return_logits:
            host = logits.float().cpu().numpy()
            return StepOutput(step, np.zeros(0, np.int32), logits=host, device_s=time.perf_counter() - started_s)
        slots, lengths = slots[sampled], (context_lens + new)[sampled]
        penalised = needs_history(sampling)
        histories = [
            self._tables.history(int(slots[i]), int(lengths[i])) if penalised[i] else None for i in range(len(slots))
        ]
        drawn = sample(logits, sampling, histories)
        self._tables.drawn(slots, lengths, drawn.token_ids)
        return StepOutput(
            step,
            drawn.token_ids,
            drawn.logprobs,
            drawn.top_ids,
            drawn.top_logprobs,
            device_s=time.perf_counter() - started_s,
        )

    def _logits(self, plan: StepPlan) -> Tensor:
        """Logits [s, vocab] of the sampled tokens; the other tokens' are not computed where the model allows."""
        step = PagedStep(plan, self.layers, self.kernels)
        arguments = {"logits_to_keep": plan.logits_index} if self._keeps_logits else {}
        out = self.module(
            input_ids=plan.token_ids,
            position_ids=plan.position_ids,
            use_cache=False,
            tokenplane_step=step,
            **arguments,
        )
        logits: Tensor = out.logits[0]
        return logits if self._keeps_logits else logits[plan.logits_index]
