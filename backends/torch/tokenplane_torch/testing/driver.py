"""The least that can drive a backend's hooks: sequences, scattered blocks, batches. No scheduler, no policy."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tokenplane_core.backend.records import (
    Capabilities,
    DecodeBatch,
    KVLayout,
    PrefillBatch,
    SamplingBatch,
    SlotOpen,
    StepHead,
    StepOutput,
)
from tokenplane_core.messages import SamplingParams


@dataclass(eq=False)
class Live:
    """A sequence in a slot."""

    slot: int
    token_ids: list[int]  # prompt, then what was drawn
    num_prompt_tokens: int
    sampling: SamplingParams
    computed: int = 0  # tokens whose KV is in the cache
    blocks: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def generated(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]


class Driver:
    """Drives one loaded backend: `backend` has the hooks as methods. Block ids are handed out in random order."""

    def __init__(
        self, backend: Any, capabilities: Capabilities, num_blocks: int = 128, num_slots: int = 20, seed: int = 0
    ) -> None:
        self.backend, self.block_tokens = backend, capabilities.kv.block_tokens
        per_sequence = -(-capabilities.limits.max_model_tokens // self.block_tokens)
        self.layout = KVLayout(num_blocks, self.block_tokens, num_slots, per_sequence)
        assert backend.kv_alloc(self.layout)
        self.rng = random.Random(seed)
        self.free_blocks = self.rng.sample(range(1, num_blocks), num_blocks - 1)
        self.free_slots = self.rng.sample(range(num_slots), num_slots)
        self._closed: list[int] = []
        self._opened: list[SlotOpen] = []
        self._deltas: list[tuple[int, int, int]] = []
        self._step = 0

    def open(
        self,
        prompt_ids: Sequence[int],
        sampling: SamplingParams | None = None,
        share: Live | None = None,
        num_prompt_tokens: int | None = None,
    ) -> Live:
        """A new sequence.

        share: its table begins with the full blocks the two prompts have in common. num_prompt_tokens: tokens from
        there on were generated before (a preempted sequence comes back).
        """
        prompt_tokens = len(prompt_ids) if num_prompt_tokens is None else num_prompt_tokens
        live = Live(self.free_slots.pop(), list(prompt_ids), prompt_tokens, sampling or SamplingParams())
        if share is not None:
            common = 0
            while common < min(share.computed, len(prompt_ids) - 1) and share.token_ids[common] == prompt_ids[common]:
                common += 1
            live.blocks = share.blocks[: common // self.block_tokens]
            live.computed = len(live.blocks) * self.block_tokens
            self._deltas += [(live.slot, i, block) for i, block in enumerate(live.blocks)]
        cached = np.array(live.token_ids[: live.computed], np.int32)
        self._opened.append(SlotOpen(live.slot, live.num_prompt_tokens, cached))
        return live

    def close(self, live: Live, keep: Sequence[int] = ()) -> None:
        """End a sequence; its blocks but those in `keep` can be handed out again."""
        self._closed.append(live.slot)
        self.free_slots.insert(0, live.slot)
        self.free_blocks[:0] = [block for block in live.blocks if block not in keep]

    def step(
        self,
        work: Mapping[Live, int],
        padding: int = 0,
        hook: str | None = None,
        return_logits: bool = False,
    ) -> StepOutput:
        """Compute the next `work[live]` tokens of each sequence; append what is drawn.

        hook: "prefill" or "decode"; None: decode if every row is one sampled token. padding: as many padding rows,
        and in a prefill as many padding tokens behind each row.
        """
        self._step += 1
        for live, count in work.items():
            while len(live.blocks) * self.block_tokens < live.computed + count:
                live.blocks.append(self.free_blocks.pop())
                self._deltas.append((live.slot, len(live.blocks) - 1, live.blocks[-1]))
        sampled = [live for live, count in work.items() if live.computed + count == len(live.token_ids)]
        if hook is None:
            hook = "decode" if len(sampled) == len(work) == sum(work.values()) else "prefill"
        sampling = sampling_batch(
            [live.sampling for live in sampled], [len(live.token_ids) for live in sampled], return_logits
        )
        make = self._decode_batch if hook == "decode" else self._prefill_batch
        output: StepOutput = getattr(self.backend, hook)(batch=make(work, padding), sampling=sampling).result()
        assert output.step == self._step
        for live, count in work.items():
            live.computed += count
        if not return_logits:
            for i, live in enumerate(sampled):
                live.token_ids.append(int(output.token_ids[i]))
                if output.logprobs is not None:
                    live.logprobs.append(float(output.logprobs[i]))
        return output

    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, chunk_tokens: int = 1 << 30, stagger: int = 0, padding: int = 0
    ) -> list[list[int]]:
        """n greedy tokens after each prompt, all in one batch; sequence i joins at step i * stagger."""
        lives: list[Live] = []
        step = 0
        while len(lives) < len(prompts) or any(len(live.generated) < n for live in lives):
            while len(lives) < len(prompts) and step >= len(lives) * stagger:
                lives.append(self.open(prompts[len(lives)]))
            unfinished = [live for live in lives if len(live.generated) < n]
            work = {live: min(chunk_tokens, len(live.token_ids) - live.computed) for live in unfinished}
            if work:
                self.step(work, padding)
            step += 1
        for live in lives:
            self.close(live)
        return [live.generated for live in lives]

    def _head(self) -> StepHead:
        slots, positions, blocks = np.array(self._deltas, np.int32).reshape(-1, 3).T.copy()
        head = StepHead(self._step, np.array(self._closed, np.int32), tuple(self._opened), slots, positions, blocks)
        self._closed, self._opened, self._deltas = [], [], []
        return head

    def _decode_batch(self, work: Mapping[Live, int], padding: int) -> DecodeBatch:
        pads = [self.layout.pad_slot] * padding
        return DecodeBatch(
            head=self._head(),
            num_rows=len(work),
            slots=np.array([live.slot for live in work] + pads, np.int32),
            token_ids=np.array([live.token_ids[live.computed] for live in work] + [0] * padding, np.int32),
            context_lens=np.array([live.computed for live in work] + [0] * padding, np.int32),
            bucket=None,
        )

    def _prefill_batch(self, work: Mapping[Live, int], padding: int) -> PrefillBatch:
        tokens: list[int] = []
        starts = [0]
        for live, count in work.items():
            tokens += live.token_ids[live.computed : live.computed + count] + [7] * padding
            starts.append(len(tokens))
        pads = [self.layout.pad_slot] * padding
        return PrefillBatch(
            head=self._head(),
            num_rows=len(work),
            slots=np.array([live.slot for live in work] + pads, np.int32),
            row_starts=np.array(starts + [starts[-1]] * padding, np.int32),
            num_new_tokens=np.array([*work.values()] + [0] * padding, np.int32),
            context_lens=np.array([live.computed for live in work] + [0] * padding, np.int32),
            token_ids=np.array(tokens, np.int32),
            sample=np.array(
                [live.computed + count == len(live.token_ids) for live, count in work.items()] + [False] * padding
            ),
            bucket=None,
        )


def sampling_batch(
    params: Sequence[SamplingParams], positions: Sequence[int], return_logits: bool = False
) -> SamplingBatch:
    """The record for rows with these parameters; `positions` are those of the tokens being drawn."""
    off = SamplingParams()
    features = {name for name in (*_FLOATS, "top_k") if any(getattr(p, name) != getattr(off, name) for p in params)}
    features |= {"logit_bias"} if any(p.logit_bias for p in params) else set()
    features |= {"logprobs"} if any(p.num_logprobs >= 0 for p in params) else set()
    features |= {"processed_logprobs"} if any(p.processed_logprobs for p in params) else set()
    floats: dict[str, Any] = {name: np.array([getattr(p, name) for p in params], np.float32) for name in _FLOATS}
    biases = [len(p.logit_bias) for p in params]
    return SamplingBatch(
        features=frozenset(features),
        **floats,
        top_k=np.array([p.top_k for p in params], np.int32),
        seeds=np.array([p.seed for p in params], np.uint64),
        positions=np.array(positions, np.int64),
        bias_starts=np.concatenate(([0], np.cumsum(biases))).astype(np.int32),
        bias_ids=np.array([i for p in params for i in p.logit_bias], np.int32),
        bias_values=np.array([v for p in params for v in p.logit_bias.values()], np.float32),
        num_logprobs=np.array([p.num_logprobs for p in params], np.int32),
        processed_logprobs=np.array([p.processed_logprobs for p in params], np.bool_),
        return_logits=return_logits,
    )


_FLOATS = (
    "temperature",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
