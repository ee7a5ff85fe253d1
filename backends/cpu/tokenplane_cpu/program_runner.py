"""Serves a model with a native program: the counterpart of the kit's ModelRunner, without torch on the way of a step.

Keeps the cache and the slots, and turns the core's batches into calls of the program. Drawing is the sampler's.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tokenplane_core.backend.records import (
    F32,
    I32,
    DecodeBatch,
    KVLayout,
    PrefillBatch,
    SamplingBatch,
    StepHandle,
    StepOutput,
)
from tokenplane_core.backend.sampling import PENALTIES, log_softmax, needs_history, of_prompt
from tokenplane_core.backend.tables import SlotTables, draws_of

from .cache import Cache
from .program import Program
from .sampler import Drawn, Histories, HostSampler

SCORED_TOKENS = 64  # of a prompt at a time: their logits are as wide as the vocabulary


@dataclass(frozen=True, slots=True)
class ComputedStep:
    """The handle of a step that was computed inside the call."""

    output: StepOutput

    def done(self) -> bool:
        return True

    def result(self) -> StepOutput:
        return self.output


class ProgramRunner:
    """Owns the program, the cache and the slots."""

    def __init__(self, program: Program, cache: Cache, sampler: HostSampler, max_model_tokens: int) -> None:
        self.program, self.cache, self.sampler = program, cache, sampler
        self.max_model_tokens = max_model_tokens

    def describe(self) -> Mapping[str, str]:
        return {"step": self.program.describe(), "sampling": self.sampler.describe()}

    def weights_bytes(self) -> int:
        return self.program.weights_bytes

    def workspace_bytes(self, draws: int) -> int:
        return self.program.workspace_bytes(draws)

    def block_bytes(self) -> int:
        return self.cache.block_bytes

    def allocate(self, layout: KVLayout) -> None:
        self.drop_cache()
        self.cache.allocate(layout.num_blocks)
        self._slots = SlotTables(layout, self.max_model_tokens)
        self.program.attach(self.cache.addresses(), self._slots.blocks)

    def drop_cache(self) -> None:
        self.cache.drop()

    def warmup(self) -> int:
        return 0

    def prefill(self, batch: PrefillBatch, sampling: SamplingBatch) -> StepHandle:
        started_s = time.perf_counter()
        self._slots.apply(batch.head)
        rows = batch.num_rows
        slots, new, context = batch.slots[:rows], batch.num_new_tokens[:rows], batch.context_lens[:rows]
        ends = np.cumsum(new)
        starts = ends - new
        own = np.arange(ends[-1] if rows else 0) - np.repeat(starts, new)  # a token's place in its row
        source = np.repeat(batch.row_starts[:rows], new) + own
        token_ids = batch.token_ids[source]
        self._slots.token_ids[np.repeat(slots, new), np.repeat(context, new) + own] = token_ids
        drawn, lengths = draws_of(batch)
        wanted, scored = starts[drawn] + lengths - context[drawn] - 1, None
        if batch.next_token_ids is not None:
            following = batch.next_token_ids[source]
            after = np.flatnonzero(following >= 0)
            wanted, scored = np.concatenate((wanted, after)), following[after]
        logits = self.program.step(token_ids, slots, context, new, wanted, len(drawn))
        num_top = batch.num_prompt_top_logprobs
        return self._drawn(batch, logits, slots[drawn], lengths, sampling, started_s, scored, num_top)

    def decode(self, batch: DecodeBatch, sampling: SamplingBatch) -> StepHandle:
        started_s = time.perf_counter()
        self._slots.apply(batch.head)
        rows = batch.num_rows
        slots, context, token_ids = batch.slots[:rows], batch.context_lens[:rows], batch.token_ids[:rows]
        self._slots.token_ids[slots, context] = token_ids
        logits = self.program.step(token_ids, slots, context, 1, np.arange(rows), rows)
        return self._drawn(batch, logits, slots, context + 1, sampling, started_s)

    def _drawn(
        self,
        batch: PrefillBatch | DecodeBatch,
        logits: F32,
        slots: I32,
        lengths: I32,
        sampling: SamplingBatch,
        started_s: float,
        scored: I32 | None = None,
        num_top: int = 0,
    ) -> StepHandle:
        """Draw from the logits of the sequences in `slots`, which have `lengths` tokens by now.

        scored: tokens i32 [p] whose log-probabilities are wanted, after those that the step wanted behind the sampled.
        num_top: of how many best ids besides.
        """
        logprobs = top_ids = top_logprobs = None
        if sampling.return_logits:
            drawn, raw = Drawn(np.zeros(0, np.int32)), logits.copy()
        else:
            drawn, raw = self.sampler.draw(logits, sampling, self._histories(slots, lengths, sampling)), None
            self._slots.drawn(slots, lengths, drawn.token_ids)
        if scored is not None:
            logprobs, top_ids, top_logprobs = self._of_prompt(len(logits), scored, num_top)
        output = StepOutput(
            batch.head.step,
            drawn.token_ids,
            drawn.logprobs,
            drawn.top_ids,
            drawn.top_logprobs,
            logits=raw,
            device_s=time.perf_counter() - started_s,
            prompt_logprobs=logprobs,
            prompt_top_ids=top_ids,
            prompt_top_logprobs=top_logprobs,
        )
        return ComputedStep(output)

    def _histories(self, slots: I32, lengths: I32, sampling: SamplingBatch) -> Histories | None:
        """The tokens of the rows that are penalised, if there are any."""
        penalised = np.flatnonzero(needs_history(sampling)) if sampling.features & PENALTIES else ()
        if len(penalised) == 0:
            return None
        slots, lengths = slots[penalised], lengths[penalised]
        return Histories(self._slots.token_ids[slots, : lengths.max()], lengths, self._slots.num_prompt_tokens[slots])

    def _of_prompt(self, first: int, token_ids: I32, k: int) -> tuple[F32, I32 | None, F32 | None]:
        """`of_prompt`: token_ids[i], i32 [p], comes after the step's wanted token first + i."""
        pieces = []
        for start in range(0, len(token_ids), SCORED_TOKENS):
            some = token_ids[start : start + SCORED_TOKENS]
            scores = np.stack([log_softmax(row) for row in self.program.logits(first + start, len(some))])
            pieces.append(of_prompt(scores, some, k))
        chosen, ids, values = zip(*pieces, strict=True)
        return np.concatenate(chosen), *((np.concatenate(ids), np.concatenate(values)) if k else (None, None))
