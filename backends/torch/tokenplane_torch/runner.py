"""One loaded model: takes the core's batches, launches steps, hands back their results.

A batch without a bucket is packed: its padding rows and tokens are dropped, and it is computed as long as it is. A
batch with a bucket is padded to it and goes through the device's executor. Knows nothing of hooks or of how the
model was loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from tokenplane_core.backend.records import (
    I32,
    PAD_BLOCK,
    Bucket,
    DecodeBatch,
    KVLayout,
    ModelSpec,
    PrefillBatch,
    SamplingBatch,
    ShapePolicy,
    StepHandle,
    StepOutput,
)
from tokenplane_core.backend.sampling import needs_history
from tokenplane_core.backend.tables import draws_of

from .checks import check_model
from .device import TorchDevice, powers_of_two
from .kernels import AttentionKernels
from .kv_cache import LayerCache, LayerShape
from .loader import weights_bytes
from .lora import AdaptedStep
from .module import DecoderModule
from .padded import StepProgram, StepShape, empty_batch, pad_batch, step_shape
from .readback import StepClock, TorchStep
from .slots import SlotState
from .step import PagedStep, plan_step

Batch = PrefillBatch | DecodeBatch


class Runner(Protocol):
    """One loaded model as the hooks see it. Steps are as in the contract."""

    def describe(self) -> Mapping[str, str]:
        """Which implementation each piece has, and why: Capabilities.kernels."""
        ...

    def weights_bytes(self) -> int: ...

    def workspace_bytes(self, draws: int) -> int | None:
        """Memory that its largest step and that many draws take while they run; None: it has to be measured."""
        ...

    def block_bytes(self) -> int:
        """Memory of one block of the cache over all layers."""
        ...

    def allocate(self, layout: KVLayout) -> None:
        """Replace the cache and forget all slots. Raises what torch raises when memory is short; then there is none."""
        ...

    def drop_cache(self) -> None: ...

    def warmup(self) -> int:
        """Compile or capture every bucket; how many shapes that were."""
        ...

    def prefill(self, batch: PrefillBatch, sampling: SamplingBatch) -> StepHandle: ...

    def decode(self, batch: DecodeBatch, sampling: SamplingBatch) -> StepHandle: ...


def checked_runner(
    module: PreTrainedModel, model: ModelSpec, device: TorchDevice, policy: ShapePolicy, step_tokens: int
) -> ModelRunner:
    """The runner of a loaded transformers module, which computes as it stands but for its attention.

    Raises:
        UnsupportedModel, OutOfMemory: as `check_model`.
    """
    fused = device.fuse(module)
    needs, kernels = check_model(module, model, device)
    shapes = [need.shape for need in needs]
    decoder = DecoderModule(module)
    return ModelRunner(decoder, model.max_model_tokens, shapes, kernels, device, policy, step_tokens, fused)


class ModelRunner:
    """Owns the module, the cache and the slots."""

    def __init__(
        self,
        module: DecoderModule,
        max_model_tokens: int,
        layer_shapes: list[LayerShape],
        kernels: AttentionKernels,
        device: TorchDevice,
        policy: ShapePolicy,
        step_tokens: int,
        fused: Mapping[str, str],
    ) -> None:
        self.module, self.layer_shapes, self.kernels, self.device = module, layer_shapes, kernels, device
        self.layers: list[LayerCache] = []
        self.policy = policy
        self.step_tokens = step_tokens
        self.max_model_tokens = max_model_tokens
        self.sampler = device.sampler()
        self._fused = fused

    def describe(self) -> Mapping[str, str]:
        adapters = {"adapters": self.module.adapters.describe()} if self.module.adapters is not None else {}
        return {**self.kernels.describe(), **self._fused, **adapters, "sampling": self.sampler.describe()}

    def weights_bytes(self) -> int:
        return weights_bytes(self.module.module)

    def workspace_bytes(self, draws: int) -> None:
        return None

    def block_bytes(self) -> int:
        return self.device.block_bytes(self.layer_shapes)

    def allocate(self, layout: KVLayout) -> None:
        self.drop_cache()
        self.layers = self.device.allocate(self.layer_shapes, layout.num_blocks)
        self._layout = layout
        self._slots = SlotState(layout, self.max_model_tokens, self.device)
        self._executor = self.device.executor()
        self._program = StepProgram(self.module, self.layers, self._slots, self.kernels, layout.block_tokens)

    def drop_cache(self) -> None:
        """Give the cache back, and with it what an executor captured or compiled around it."""
        self.layers = []
        self._executor = self._program = self._slots = None  # type: ignore[assignment]

    @torch.inference_mode()
    def warmup(self) -> int:
        before = self._executor.compiled
        # The largest first: graphs that share a memory pool then fit into what it took.
        for bucket in sorted(self.policy.buckets, key=lambda b: (-b.tokens, -b.rows)):
            for adapted in self.variants:
                self.warm(bucket, adapted)
        if self.device.builds_kernels:
            self._warm_ragged()
        return self._executor.compiled - before

    def _warm_ragged(self) -> None:
        """Run decode rows and prompt chunks of all orders of size behind contexts of all: which kernel runs depends on
        both, and the first request must not wait for a compiler.
        """
        longest = self.max_model_tokens
        for context in [0, *(c for c in powers_of_two(256, longest) if c < longest)]:
            for new in (1, 2, 16, 128, 1024):
                if new <= self.step_tokens and context + new <= longest:
                    logits = self.try_step(self.layers, [new], context)
        self.sampler.warm(logits)
        self.device.clock().read_back([logits]).arrays()

    @property
    def variants(self) -> tuple[bool, ...]:
        """A bucket is compiled or captured for steps with rows that have adapters, and for others."""
        return (False,) if self.module.adapters is None else (True, False)

    def try_step(self, layers: list[LayerCache], new: list[int], context: int) -> Tensor:
        """Compute rows of `new[i]` tokens behind `context`, all in the padding block; logits [rows, vocab].

        What is computed means nothing, what it takes does: where there is room for adapters, every row has one.
        """
        size, rows = self.device.block_tokens, len(new)
        blocks = np.full((rows, -(-(context + max(new)) // size)), PAD_BLOCK, np.int32)
        lengths = (np.array(new, np.int32), np.full(rows, context, np.int32))
        token_ids = np.zeros(sum(new), np.int32)
        plan = plan_step(token_ids, *lengths, blocks, np.ones(rows, np.bool_), size, self.device.upload)
        adapters = self.module.adapters
        adapted = adapters.fullest(lengths[0], self.device.upload) if adapters is not None else None
        step = PagedStep(plan, layers, self.kernels, adapted)
        return self.module.logits(plan.token_ids.long(), plan.positions, plan.logits_index, step)

    @torch.inference_mode()
    def warm(self, bucket: Bucket, adapted: bool = False) -> None:
        """Compile or capture one bucket, with a batch of nothing but padding."""
        shape = replace(self._shape(bucket), adapted=adapted)
        logits = self._executor.run(self._program, empty_batch(shape, self._slots))
        nobody = np.zeros(0, np.int32)
        for drawn in self.sampler.warm(logits):
            clock = self.device.clock()  # first, as in a step: a lazy device compiles what lies between two launches
            self._note_drawn(drawn.token_ids, nobody.astype(np.int64), nobody, nobody)
            clock.read_back(drawn.tensors()).arrays()
        if self.sampler.fixed_shape:
            self.device.clock().read_back([logits.float()]).arrays()

    @torch.inference_mode()
    def prefill(self, batch: PrefillBatch, sampling: SamplingBatch) -> StepHandle:
        clock = self.device.clock()
        self._slots.apply(batch.head)
        drawn, lengths = draws_of(batch)
        if batch.bucket is not None:  # then there are no drafts: no shape of a prefill draws more than once for a row
            return self._run_padded(batch, drawn, sampling, clock)
        new = batch.num_new_tokens[: batch.num_rows]
        packed_starts = np.cumsum(new) - new
        source = np.repeat(batch.row_starts[: batch.num_rows] - packed_starts, new) + np.arange(new.sum())
        following = None if batch.next_token_ids is None else batch.next_token_ids[source]
        top = batch.num_prompt_top_logprobs
        return self._run_packed(batch, batch.token_ids[source], new, drawn, lengths, sampling, clock, following, top)

    @torch.inference_mode()
    def decode(self, batch: DecodeBatch, sampling: SamplingBatch) -> StepHandle:
        clock = self.device.clock()
        self._slots.apply(batch.head)
        rows = batch.num_rows
        if batch.bucket is not None:
            return self._run_padded(batch, np.arange(rows), sampling, clock)
        ones, lengths = np.ones(rows, np.int32), batch.context_lens[:rows] + 1
        return self._run_packed(batch, batch.token_ids[:rows], ones, np.arange(rows), lengths, sampling, clock)

    def _run_packed(
        self,
        batch: Batch,
        token_ids: I32,
        new: I32,
        drawn: NDArray[np.int64],
        lengths: I32,
        sampling: SamplingBatch,
        clock: StepClock,
        following: I32 | None = None,
        num_top: int = 0,
    ) -> StepHandle:
        """Compute the packed tokens i32 [t] of the real rows, of which row i has new[i].

        drawn, lengths: [n] the row of each draw, and how many tokens come before it: see `draws_of`.
        following: i32 [t] tokens whose log-probabilities are wanted, -1 where none is; see PrefillBatch.
        num_top: of how many best ids besides.
        """
        slots, context_lens = batch.slots[: batch.num_rows], batch.context_lens[: batch.num_rows]
        plan = plan_step(
            token_ids,
            new,
            context_lens,
            self._slots.blocks[slots],
            np.bincount(drawn, minlength=batch.num_rows),
            self._layout.block_tokens,
            self.device.upload,
        )
        resolved = self._slots.enter(self.device.upload(np.repeat(slots, new)), plan.positions, plan.token_ids)
        step = PagedStep(plan, self.layers, self.kernels, self._grouped(self._slots.adapters[slots], new))
        arguments = (resolved, plan.positions, plan.logits_index, step)
        logits, scores = (
            (self.module.logits(*arguments), [])
            if following is None
            else self.module.logits_and_scores(*arguments, *self._scored(following), num_top)
        )
        return self._sample(
            batch,
            logits,
            np.arange(len(drawn)),
            slots[drawn],
            lengths,
            sampling,
            clock,
            self._executor.compiled,
            scores,
        )

    def _grouped(self, adapters: I32, new: I32) -> AdaptedStep | None:
        """How the packed tokens of rows, `new[i]` of row i, find the adapters of the rows."""
        layers = self.module.adapters
        if layers is None or not adapters.any():
            return None
        return layers.grouped(np.repeat(adapters, new), self.device.upload)

    def _scored(self, following: I32) -> tuple[Tensor, Tensor]:
        after = np.flatnonzero(following >= 0)
        return self.device.upload(after), self.device.upload(following[after].astype(np.int64))

    def _run_padded(
        self, batch: Batch, sampled: NDArray[np.int64], sampling: SamplingBatch, clock: StepClock
    ) -> StepHandle:
        assert batch.bucket is not None
        adapted = bool(self._slots.adapters[batch.slots[: batch.num_rows]].any())
        shape = replace(self._shape(batch.bucket), adapted=adapted)
        step = pad_batch(batch, shape, self._slots, self._layout.block_tokens)
        compiled_before = self._executor.compiled
        logits = self._executor.run(self._program, step)
        lengths = (batch.context_lens + step.inputs["num_tokens"])[sampled]
        return self._sample(batch, logits, sampled, batch.slots[sampled], lengths, sampling, clock, compiled_before)

    def _shape(self, bucket: Bucket) -> StepShape:
        return step_shape(bucket, self.policy.pad_rows, self._layout.max_blocks_per_sequence, self.policy.context_rule)

    def _sample(
        self,
        batch: Batch,
        logits: Tensor,
        rows: NDArray[np.int64],
        slots: I32,
        lengths: I32,
        sampling: SamplingBatch,
        clock: StepClock,
        compiled_before: int,
        scores: Sequence[Tensor] = (),
    ) -> StepHandle:
        """Draw for the `rows` of the logits, whose sequences sit in `slots` and have `lengths` tokens by now.

        scores: what the step tells of its prompts, to be handed on: see `_of_prompt`.
        """
        number = batch.head.step
        if not self.sampler.fixed_shape:
            logits, rows = self._only(logits, rows), np.arange(len(rows))
        if sampling.return_logits:

            def raw(arrays: list[NDArray[Any]], seconds: float) -> StepOutput:
                return StepOutput(
                    number,
                    np.zeros(0, np.int32),
                    logits=arrays[0][rows],
                    device_s=seconds,
                    compiled=compiled,
                    **_of_prompt(arrays[1:]),
                )

            pending = clock.read_back([logits.float(), *scores])
            compiled = self._executor.compiled - compiled_before
            return TorchStep(pending, raw)
        penalised = np.flatnonzero(needs_history(sampling))
        histories = self._slots.histories(slots[penalised], lengths[penalised]) if len(penalised) else None
        drawn = self.sampler.draw(logits, rows, sampling, histories)
        self._note_drawn(drawn.token_ids, rows, slots, lengths)

        def output(arrays: list[NDArray[Any]], seconds: float) -> StepOutput:
            told = len(arrays) - len(scores)
            token_ids, *logprobs = (array[rows] for array in arrays[:told])
            logprob, top_ids, top_logprobs, *_ = (*logprobs, None, None, None)
            return StepOutput(
                number,
                token_ids,
                logprob,
                top_ids,
                top_logprobs,
                device_s=seconds,
                compiled=compiled,
                **_of_prompt(arrays[told:]),
            )

        pending = clock.read_back([*drawn.tensors(), *scores])
        compiled = self._executor.compiled - compiled_before
        return TorchStep(pending, output)

    def _only(self, logits: Tensor, rows: NDArray[np.int64]) -> Tensor:
        """Those rows of the logits; without a copy if they are the first ones."""
        if len(rows) == 0 or rows[-1] == len(rows) - 1:
            return logits[: len(rows)]
        return logits[self.device.upload(rows)]

    def _note_drawn(self, token_ids: Tensor, rows: NDArray[np.int64], slots: I32, lengths: I32) -> None:
        """Tell the slots what was drawn; what a fixed shape drew besides goes to the padding slot."""
        where = np.zeros((2, len(token_ids)), np.int32)
        where[0] = self._slots.pad_slot
        where[0, rows], where[1, rows] = slots, lengths
        at = self.device.upload(where)
        self._slots.drawn(at[0], at[1], token_ids)


def _of_prompt(scores: list[NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Fields of StepOutput: log-probabilities f32 [p], and perhaps best ids i32 [p, k] and theirs f32 [p, k]."""
    return dict(zip(("prompt_logprobs", "prompt_top_ids", "prompt_top_logprobs"), scores, strict=False))
