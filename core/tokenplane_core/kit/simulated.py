"""Simulated devices: the contract without any maths, so that the real scheduler meets every kind of card on any laptop.

A cache cell stores a token id (some bits of it turned by a LoRA adapter). The next token is a hash of the ids of the
whole sequence, read back *through the block table* (or the slot's line), so a wrong table, a stale block or a wrong
length changes the text, and `oracle` says what the text must be. Four profiles imitate the limits of a CUDA-like, a
TPU-like, a Gaudi-like and a Neuron-like card. They are entry points of the core, never chosen unless asked for by
name:

    tokenplane serve --model-id FOLDER --backend simulated-tpu

TOKENPLANE_SIMULATED_STEP_MS makes every step take that long, as a real device would; default 0.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from .. import __version__
from ..adapter_files import WEIGHTS
from ..backend.errors import ContractViolation
from ..backend.hookspecs import hookimpl
from ..backend.records import (
    CONTRACT_VERSION,
    F32,
    I32,
    SAMPLING_FEATURES,
    U64,
    AdapterLimits,
    AdapterSpec,
    Bucket,
    Capabilities,
    DecodeBatch,
    DetectReport,
    Device,
    KVLayout,
    KVSpec,
    Limits,
    LoadOptions,
    ModelSpec,
    PrefillBatch,
    SamplingBatch,
    SamplingCaps,
    ShapePolicy,
    StepHandle,
    StepOutput,
)
from ..backend.sampling import log_softmax, of_prompt, sample
from ..backend.tables import SlotTables, draws_of

CANARY = -7
"""What an unwritten cache cell holds; reading one changes the text like any wrong token would."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: U64) -> U64:
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    return x ^ (x >> np.uint64(29))


def context_hash(token_ids: I32) -> int:
    """A number that depends on every id and its position; token_ids i32 [t]."""
    with np.errstate(over="ignore"):
        cells = token_ids.astype(np.int64).astype(np.uint64) + _GOLDEN * np.arange(
            1, len(token_ids) + 1, dtype=np.uint64
        )
        return int(_mix(np.array([_mix(cells).sum(dtype=np.uint64)], np.uint64))[0])


def simulated_logits(context: int, vocab_size: int) -> F32:
    """f32 [vocab]: pseudo-random in [0, 6), and 8 at the greedy token `context % vocab_size`."""
    with np.errstate(over="ignore"):
        noise = _mix(np.uint64(context) + _GOLDEN * np.arange(vocab_size, dtype=np.uint64))
    logits = ((noise >> np.uint64(40)).astype(np.float32) * np.float32(6 * 2.0**-24)).astype(np.float32)
    logits[context % vocab_size] = 8.0
    return logits


def oracle(prompt: Sequence[int], num_tokens: int, vocab_size: int, salt: int = 0) -> list[int]:
    """The greedy continuation every simulated device must give, computed without any cache; salt: of an adapter."""
    token_ids = list(prompt)
    for _ in range(num_tokens):
        token_ids.append(context_hash(np.array(token_ids, np.int32) ^ np.int32(salt)) % vocab_size)
    return token_ids[len(prompt) :]


def oracle_with_adapter(vocab_size: int, adapter: Path, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """The same with the LoRA adapter in a folder."""
    return oracle(prompt, num_tokens, vocab_size, adapter_salt(adapter))


def adapter_salt(folder: Path) -> int:
    """What an adapter does to every token it computes: the cell holds the id with these bits turned."""
    digest = hashlib.blake2b((folder / WEIGHTS).read_bytes(), digest_size=4).digest()
    return int.from_bytes(digest, "little") & 0x7FFFFFFF


def oracle_logprobs(prompt: Sequence[int], vocab_size: int) -> list[float]:
    """The log-probability of every prompt token but the first, computed without any cache."""
    token_ids = np.array(prompt, np.int32)
    return [float(_logprobs_after(token_ids[:i], vocab_size)[token_ids[i]]) for i in range(1, len(token_ids))]


def _logprobs_after(token_ids: I32, vocab_size: int) -> F32:
    return log_softmax(simulated_logits(context_hash(token_ids), vocab_size))


@dataclass(frozen=True)
class Profile:
    """What one kind of card is like; `shapes` and limits are for sequences of up to max_model_tokens."""

    name: str
    imitates: str
    kv_kind: str
    block_tokens: int
    max_sequences: int
    max_step_tokens: int
    mixed: bool
    async_depth: int
    mode: str = "ragged"
    pad_rows: bool = False
    context_rule: str = "none"
    decode_rows: tuple[int, ...] = ()
    prefill_rows: tuple[int, ...] = ()
    prefill_tokens: tuple[int, ...] = ()
    max_prefill_rows: int | None = None
    chunk_tokens: int = 1
    max_table_entries: int | None = None
    sampling: SamplingCaps = field(default_factory=lambda: SamplingCaps(SAMPLING_FEATURES))
    prompt_logprobs: bool = True
    adapters: bool = True
    drafts: bool = False  # verifies them: how many tokens a step draws does not depend on its shape

    def shapes(self, max_model_tokens: int) -> ShapePolicy:
        """The bucket list this card would have compiled."""
        per_sequence = -(-max_model_tokens // (self.block_tokens or max_model_tokens))
        contexts = {
            "none": (0,),
            "max_per_row": tuple(sorted({1, -(-per_sequence // 2), per_sequence})),
            "total": tuple(sorted({per_sequence, per_sequence * 2, per_sequence * self.max_sequences})),
        }[self.context_rule]
        prefill_tokens = self.prefill_tokens
        if self.mode == "hard" and self.chunk_tokens == 0:
            prefill_tokens = (*(t for t in prefill_tokens if t < max_model_tokens), max_model_tokens)
        decode = [Bucket("decode", rows, rows, context) for rows in self.decode_rows for context in contexts]
        prefill = [
            Bucket("prefill", rows, tokens * (rows if self.pad_rows else 1), context)
            for rows in self.prefill_rows
            for tokens in prefill_tokens
            for context in contexts
        ]
        return ShapePolicy(self.mode, tuple(decode + prefill), self.pad_rows, self.context_rule)  # type: ignore[arg-type]


PROFILES = {
    profile.name: profile
    for profile in (
        Profile(
            name="simulated-cuda",
            imitates="ragged batches, graphs for some decode sizes, paged KV, one step ahead",
            kv_kind="paged",
            block_tokens=16,
            max_sequences=64,
            max_step_tokens=2048,
            mixed=True,
            async_depth=1,
            mode="soft",
            decode_rows=(1, 2, 4, 8, 16, 32, 64),
            drafts=True,
        ),
        Profile(
            name="simulated-tpu",
            imitates="compiled shapes on total tokens and rows, mixed batches, a bounded page table, one step ahead",
            kv_kind="paged",
            block_tokens=32,
            max_sequences=32,
            max_step_tokens=512,
            mixed=True,
            async_depth=1,
            mode="hard",
            decode_rows=(8, 16, 32),
            prefill_rows=(8, 32),
            prefill_tokens=(16, 32, 64, 128, 256, 512),
            max_table_entries=4096,
        ),
        Profile(
            name="simulated-gaudi",
            imitates="three-dimensional buckets (rows, length, total blocks), prefill and decode apart, blocks of 128",
            kv_kind="paged",
            block_tokens=128,
            max_sequences=16,
            max_step_tokens=1024,
            mixed=False,
            async_depth=1,
            mode="hard",
            pad_rows=True,
            context_rule="total",
            decode_rows=(1, 4, 16),
            prefill_rows=(1, 4),
            prefill_tokens=(32, 128, 256),
            max_prefill_rows=4,
            chunk_tokens=32,
        ),
        Profile(
            name="simulated-neuron",
            imitates="one line of cache per sequence, one whole prompt at a time, three sampling numbers",
            kv_kind="slot",
            block_tokens=0,
            max_sequences=8,
            max_step_tokens=1 << 20,
            mixed=False,
            async_depth=0,
            mode="hard",
            decode_rows=(8,),
            prefill_rows=(1,),
            prefill_tokens=(64, 256, 1024),
            max_prefill_rows=1,
            chunk_tokens=0,
            sampling=SamplingCaps(frozenset({"temperature", "top_k", "top_p"}), max_top_k=256),
            prompt_logprobs=False,
            adapters=False,
        ),
    )
}


class SimulatedBackend:
    """The five hooks over numpy arrays of token ids. Subclasses name their profile."""

    contract = CONTRACT_VERSION
    profile: Profile

    @hookimpl
    def detect(self) -> DetectReport:
        return DetectReport("found", (self._device(),))

    @hookimpl
    def load(self, model: ModelSpec, options: LoadOptions) -> Capabilities:
        profile = self._with_wishes(options)
        slot = profile.kv_kind == "slot"
        block_tokens = model.max_model_tokens if slot else profile.block_tokens
        self._vocab_size = model.vocab_size
        self._max_model_tokens = model.max_model_tokens
        self._step_s = float(os.environ.get("TOKENPLANE_SIMULATED_STEP_MS", "0")) / 1000
        self._shapes = profile.shapes(model.max_model_tokens)
        self._slot_kind = slot
        self._salts = np.zeros(options.max_adapters + 1, np.int32)
        return Capabilities(
            contract=CONTRACT_VERSION,
            backend=profile.name,
            version=__version__,
            device=self._device(),
            dtype=model.dtype,
            limits=Limits(
                max_sequences=profile.max_sequences,
                max_step_tokens=profile.max_step_tokens,
                max_model_tokens=model.max_model_tokens,
                max_prefill_rows=profile.max_prefill_rows or profile.max_sequences,
                chunk_tokens=profile.chunk_tokens,
                max_table_entries=profile.max_table_entries,
            ),
            kv=KVSpec("slot" if slot else "paged", block_tokens, 4 * block_tokens, 1 << 28),
            shapes=self._shapes,
            sampling=profile.sampling,
            mixed=profile.mixed,
            async_depth=profile.async_depth,
            kernels={"attention": "hash of the token ids in the cache"},
            prompt_logprobs=profile.prompt_logprobs,
            prompt_top_logprobs=profile.prompt_logprobs,
            adapters=AdapterLimits(options.max_adapters, options.max_adapter_rank)
            if profile.adapters and options.max_adapters
            else None,
            max_drafts=options.max_drafts if profile.drafts else 0,
        )

    @hookimpl
    def kv_alloc(self, layout: KVLayout) -> bool:
        self._layout = layout
        self.tables = SlotTables(layout, self._max_model_tokens)
        lines = layout.num_slots + 1 if self._slot_kind else layout.num_blocks
        self.cells = np.full((lines, layout.block_tokens), CANARY, np.int32)
        return True

    @hookimpl
    def warmup(self) -> int:
        return len(self._shapes.buckets)

    @hookimpl
    def prefill(self, batch: PrefillBatch, sampling: SamplingBatch) -> StepHandle:
        self._check_shape("prefill", batch.slots, batch.token_ids, batch)
        self.tables.apply(batch.head)
        token_ids = self.tables.enter_prefill(batch)
        scores: list[F32] = []
        for i in range(batch.num_rows):
            slot, context, start = int(batch.slots[i]), int(batch.context_lens[i]), int(batch.row_starts[i])
            end = context + int(batch.num_new_tokens[i])
            self._write(slot, np.arange(context, end, dtype=np.int32), token_ids[start : start + end - context])
            if batch.next_token_ids is not None:
                scores += self._scores(slot, context, batch.next_token_ids[start : start + end - context])
        scored = None if batch.next_token_ids is None else np.array(scores).reshape(-1, self._vocab_size)
        rows, lengths = draws_of(batch)
        return self._finish(batch, batch.slots[rows].tolist(), lengths.tolist(), sampling, scored)

    @hookimpl
    def decode(self, batch: DecodeBatch, sampling: SamplingBatch) -> StepHandle:
        self._check_shape("decode", batch.slots, batch.token_ids, batch)
        self.tables.apply(batch.head)
        token_ids = self.tables.enter_decode(batch)
        for i in range(batch.num_rows):
            self._write(int(batch.slots[i]), batch.context_lens[i : i + 1], token_ids[i : i + 1])
        slots = batch.slots[: batch.num_rows].tolist()
        lengths = (batch.context_lens[: batch.num_rows] + 1).tolist()
        return self._finish(batch, slots, lengths, sampling)

    @hookimpl
    def adapter_load(self, index: int, adapter: AdapterSpec) -> bool:
        self._salts[index] = adapter_salt(Path(adapter.path))
        return True

    @hookimpl
    def adapter_drop(self, index: int) -> bool:
        self._salts[index] = 0
        return True

    @hookimpl
    def close(self) -> bool:
        return True

    # --- The "maths" ----------------------------------------------------------------------------------------

    def _where(self, slot: int, positions: I32) -> tuple[I32, I32]:
        """Line and column of the cells that hold these positions of a slot."""
        size = self._layout.block_tokens
        if self._slot_kind:
            return np.full(len(positions), slot, np.int32), positions
        return self.tables.blocks[slot, positions // size], positions % size

    def _write(self, slot: int, positions: I32, token_ids: I32) -> None:
        self.cells[self._where(slot, positions)] = token_ids ^ self._salts[self.tables.adapters[slot]]

    def _read(self, slot: int, length: int) -> I32:
        return self.cells[self._where(slot, np.arange(length, dtype=np.int32))]

    def _scores(self, slot: int, context: int, next_token_ids: I32) -> list[F32]:
        """All ids' log-probabilities f32 [vocab], after the slot's token before it, wherever i32 [t] is not -1.

        The first follows the token at position `context`.
        """
        known = self._read(slot, context + len(next_token_ids))
        return [
            _logprobs_after(known[: context + i + 1], self._vocab_size)
            for i in np.flatnonzero(next_token_ids >= 0).tolist()
        ]

    def _contexts(self, slots: list[int], lengths: list[int]) -> list[int]:
        return [context_hash(self._read(slot, n)) for slot, n in zip(slots, lengths, strict=True)]

    def _finish(
        self,
        batch: PrefillBatch | DecodeBatch,
        slots: list[int],
        lengths: list[int],
        sampling: SamplingBatch,
        prompt_scores: F32 | None = None,
    ) -> StepHandle:
        """Draw for each of the slots from what the first `lengths` of its cells say.

        prompt_scores: f32 [p, vocab] log-probabilities where the batch wants those of the prompt's tokens.
        """
        step = batch.head.step
        contexts = self._contexts(slots, lengths)
        if not sampling.features and not sampling.return_logits:
            output = StepOutput(step, np.array([c % self._vocab_size for c in contexts], np.int32))
        else:
            logits = np.zeros((len(contexts), self._vocab_size), np.float32)
            for i, context in enumerate(contexts):
                logits[i] = simulated_logits(context, self._vocab_size)
            output = self._sample(step, logits, slots, lengths, sampling)
        if len(output.token_ids):
            self.tables.drawn(np.array(slots, np.int32), np.array(lengths, np.int32), output.token_ids)
        output = replace(output, device_s=self._step_s)
        if isinstance(batch, PrefillBatch) and batch.next_token_ids is not None and prompt_scores is not None:
            wanted = batch.next_token_ids[batch.next_token_ids >= 0]
            chosen, ids, values = of_prompt(prompt_scores, wanted, batch.num_prompt_top_logprobs)
            output = replace(output, prompt_logprobs=chosen, prompt_top_ids=ids, prompt_top_logprobs=values)
        return TimedStep(output, time.perf_counter() + self._step_s)

    def _sample(
        self, step: int, logits: F32, slots: list[int], lengths: list[int], sampling: SamplingBatch
    ) -> StepOutput:
        if sampling.return_logits:
            return StepOutput(step, np.zeros(0, np.int32), logits=logits)
        histories = [self.tables.history(slot, n) for slot, n in zip(slots, lengths, strict=True)]
        drawn = sample(logits, sampling, histories)
        return StepOutput(step, drawn.token_ids, drawn.logprobs, drawn.top_ids, drawn.top_logprobs)

    # --- What a real card would refuse ----------------------------------------------------------------------

    def _check_shape(self, phase: str, slots: I32, token_ids: I32, batch: PrefillBatch | DecodeBatch) -> None:
        bucket = batch.bucket
        if self._shapes.mode == "hard" and bucket is None:
            raise ContractViolation(f"{self.profile.name}: a {phase} batch without a bucket")
        if bucket is None:
            return
        if bucket not in self._shapes.buckets or bucket.phase != phase:
            raise ContractViolation(f"{self.profile.name}: {bucket} was never compiled for {phase}")
        if len(slots) != bucket.rows or len(token_ids) != bucket.tokens:
            raise ContractViolation(
                f"{self.profile.name}: {len(slots)} rows and {len(token_ids)} tokens do not have the shape of {bucket}"
            )

    def _with_wishes(self, options: LoadOptions) -> Profile:
        """The profile with the user's limits, where the card leaves a choice."""
        profile = self.profile
        if options.max_sequences is not None:
            profile = replace(profile, max_sequences=max(1, min(profile.max_sequences, options.max_sequences)))
        if options.max_step_tokens is not None and profile.chunk_tokens:
            floor = max(profile.prefill_rows, default=1) if profile.mode == "hard" else 1
            smallest = min(profile.prefill_tokens, default=1) * (
                1 if not profile.pad_rows else min(profile.prefill_rows)
            )
            least = max(floor, smallest, profile.max_sequences if profile.mode == "hard" else 1)
            profile = replace(
                profile, max_step_tokens=max(least, min(profile.max_step_tokens, options.max_step_tokens))
            )
        return profile

    def _device(self) -> Device:
        return Device(
            kind="simulated",
            index=0,
            name=self.profile.name,
            arch="none",
            memory_total_bytes=1 << 28,
            dtypes=("float32", "bfloat16", "float16"),
            score=0,
            notes=self.profile.imitates,
        )


@dataclass(frozen=True)
class TimedStep:
    """A handle that is done at a given time."""

    output: StepOutput
    ready_at_s: float

    def done(self) -> bool:
        return time.perf_counter() >= self.ready_at_s

    def result(self) -> StepOutput:
        time.sleep(max(0.0, self.ready_at_s - time.perf_counter()))
        return self.output


class SimulatedCuda(SimulatedBackend):
    profile = PROFILES["simulated-cuda"]


class SimulatedTpu(SimulatedBackend):
    profile = PROFILES["simulated-tpu"]


class SimulatedGaudi(SimulatedBackend):
    profile = PROFILES["simulated-gaudi"]


class SimulatedNeuron(SimulatedBackend):
    profile = PROFILES["simulated-neuron"]
