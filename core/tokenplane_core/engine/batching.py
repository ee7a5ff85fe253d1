"""From the scheduler's plan to the records a backend takes: slots, table deltas, padding to buckets, sampling rows."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np

from ..backend.records import (
    I32,
    TOKEN_ON_DEVICE,
    Capabilities,
    DecodeBatch,
    KVLayout,
    PrefillBatch,
    SamplingBatch,
    SlotOpen,
    StepHead,
    TokenMask,
)
from ..backend.sampling import History
from ..backend.tables import draws_of
from ..messages import SamplingParams, Submit
from .logprobs import next_token_ids, num_prompt_top_logprobs
from .masks import GuidedRow
from .scheduler import Plan, Row
from .sequence import Sequence

_FLOAT_FEATURES = (
    # field of SamplingParams and SamplingBatch, neutral value
    ("temperature", 0.0),
    ("top_p", 1.0),
    ("min_p", 0.0),
    ("typical_p", 1.0),
    ("repetition_penalty", 1.0),
    ("presence_penalty", 0.0),
    ("frequency_penalty", 0.0),
)


def features_of(params: SamplingParams) -> frozenset[str]:
    """Names from SAMPLING_FEATURES that these parameters use."""
    used = {name for name, neutral in _FLOAT_FEATURES if getattr(params, name) != neutral}
    if params.temperature == 0:
        used -= {"top_p", "min_p", "typical_p"}  # greedy: nothing to filter
    elif params.top_k > 0:
        used.add("top_k")
    if params.logit_bias or params.min_new_tokens > 0:
        used.add("logit_bias")
    if params.num_logprobs >= 0:
        used.add("processed_logprobs" if params.processed_logprobs else "logprobs")
    return frozenset(used)


def asked_of_sampler(request: Submit) -> frozenset[str]:
    """Names from SAMPLING_FEATURES that a request uses."""
    return features_of(request.sampling) | ({"mask"} if request.grammar else frozenset())


class Batcher:
    """Builds records and remembers what the backend's slots already know.

    Slot parameters live in arrays with one entry per slot, so that a step gathers instead of looping.
    """

    def __init__(self, layout: KVLayout, capabilities: Capabilities, vocab_size: int) -> None:
        self._layout = layout
        self._vocab_size = vocab_size
        self._paged = capabilities.kv.kind == "paged"
        self._pad_rows = capabilities.shapes.pad_rows
        self._step = 0
        self._closed: list[int] = []
        slots = layout.num_slots
        self._floats = np.zeros((len(_FLOAT_FEATURES), slots), np.float32)
        self._top_k = np.zeros(slots, np.int32)
        self._seeds = np.zeros(slots, np.uint64)
        self._num_logprobs = np.full(slots, -1, np.int32)
        self._processed = np.zeros(slots, np.bool_)
        self._features: list[frozenset[str]] = [frozenset()] * slots

    def slot_left(self, slot: int) -> None:
        """The sequence in this slot is gone: the next head says so."""
        self._closed.append(slot)

    def build(
        self, plan: Plan, return_logits: bool, mask: TokenMask | None = None
    ) -> tuple[PrefillBatch | DecodeBatch, SamplingBatch]:
        """Records for a plan that the scheduler has just launched. mask: of its sampled rows (`guided_rows`)."""
        head = self._head(plan.rows)
        if plan.phase == "prefill":
            prompts = self._prefill(plan, head)
            draws, ends = draws_of(prompts)
            rows = [plan.rows[i] for i in draws.tolist()]
            return prompts, self._sampling(rows, prompts.slots[draws], ends, return_logits, mask)
        batch = self._decode(plan, head)
        slots, ends = batch.slots[: batch.num_rows], batch.context_lens[: batch.num_rows] + 1
        return batch, self._sampling(plan.rows, slots, ends, return_logits, mask)

    def _head(self, rows: Rows[Row]) -> StepHead:
        """Everything that changed since the last call."""
        self._step += 1
        opened: list[SlotOpen] = []
        slots: list[int] = []
        positions: list[int] = []
        blocks: list[int] = []
        for row in rows:
            sequence = row.sequence
            known = sequence.num_announced_blocks
            if known == len(sequence.block_ids):
                continue
            if known == 0:
                opened.append(self._open(sequence))
            if self._paged:
                fresh = sequence.block_ids[known:]
                slots += [sequence.slot] * len(fresh)
                positions += range(known, known + len(fresh))
                blocks += fresh
            sequence.num_announced_blocks = len(sequence.block_ids)
        closed, self._closed = self._closed, []
        return StepHead(self._step, _i32(closed), tuple(opened), _i32(slots), _i32(positions), _i32(blocks))

    def _open(self, sequence: Sequence) -> SlotOpen:
        slot, params = sequence.slot, sequence.sampling
        self._floats[:, slot] = [getattr(params, name) for name, _ in _FLOAT_FEATURES]
        self._top_k[slot] = params.top_k
        self._seeds[slot] = params.seed
        self._num_logprobs[slot] = params.num_logprobs
        self._processed[slot] = params.processed_logprobs
        self._features[slot] = features_of(params)
        cached = sequence.token_ids[: sequence.num_cached_tokens]
        return SlotOpen(slot, sequence.num_prompt_tokens, np.array(cached, np.int32), sequence.adapter.index)

    def _prefill(self, plan: Plan, head: StepHead) -> PrefillBatch:
        num_rows = len(plan.rows)
        rows = plan.bucket.rows if plan.bucket else num_rows
        new = np.zeros(rows, np.int32)
        new[:num_rows] = [row.num_tokens + len(row.drafts) for row in plan.rows]
        starts = np.zeros(rows + 1, np.int32)
        if self._pad_rows:
            width = plan.bucket.tokens // plan.bucket.rows if plan.bucket else plan.extent.widest
            starts[:] = np.arange(rows + 1) * width
        else:
            np.cumsum(new, out=starts[1:])
            if plan.bucket:
                starts[-1] = plan.bucket.tokens  # the tail is padding behind the last row
        token_ids = np.zeros(starts[-1], np.int32)
        num_decoding = num_rows - plan.extent.prompts
        prompts, prompt_starts = plan.rows[num_decoding:], starts[num_decoding:]
        token_ids[starts[:num_decoding]] = _newest(plan.rows[:num_decoding])
        for row, start in zip(prompts, prompt_starts.tolist(), strict=False):
            token_ids[start : start + row.num_tokens] = _tokens(row)
        if plan.num_drafts:
            _place_drafts(plan.rows[:num_decoding], starts, token_ids)
        return PrefillBatch(
            head=head,
            num_rows=num_rows,
            slots=self._slots(plan.rows, rows),
            row_starts=starts,
            num_new_tokens=new,
            context_lens=_padded([row.start_tokens for row in plan.rows], rows),
            token_ids=token_ids,
            sample=_padded([row.sample for row in plan.rows], rows).astype(np.bool_),
            bucket=plan.bucket,
            next_token_ids=next_token_ids(prompts, prompt_starts),
            num_prompt_top_logprobs=num_prompt_top_logprobs(prompts),
            num_drafts=_padded([len(row.drafts) for row in plan.rows], rows) if plan.num_drafts else None,
        )

    def _decode(self, plan: Plan, head: StepHead) -> DecodeBatch:
        rows = plan.bucket.rows if plan.bucket else len(plan.rows)
        return DecodeBatch(
            head=head,
            num_rows=len(plan.rows),
            slots=self._slots(plan.rows, rows),
            token_ids=_padded(_newest(plan.rows), rows),
            context_lens=_padded([row.start_tokens for row in plan.rows], rows),
            bucket=plan.bucket,
        )

    def _slots(self, rows: Rows[Row], length: int) -> I32:
        return _padded([row.sequence.slot for row in rows], length, self._layout.pad_slot)

    def _sampling(
        self, rows: Rows[Row], slots: I32, ends: I32, return_logits: bool, mask: TokenMask | None
    ) -> SamplingBatch:
        """How to draw. rows: one for each draw; slots, ends i32 [rows]: where it lives, and the position drawn for."""
        features = frozenset({"mask"} if mask else ()).union(*{self._features[slot] for slot in slots.tolist()})
        biased = rows if "logit_bias" in features else ()
        starts, ids, values = _biases(biased, ends, self._features, self._vocab_size)
        floats = {name: row for (name, _), row in zip(_FLOAT_FEATURES, self._floats[:, slots], strict=True)}
        return SamplingBatch(
            features=features,
            top_k=self._top_k[slots],
            seeds=self._seeds[slots],
            positions=ends.astype(np.int64),
            bias_starts=starts,
            bias_ids=ids,
            bias_values=values,
            num_logprobs=self._num_logprobs[slots],
            processed_logprobs=self._processed[slots],
            return_logits=return_logits,
            mask=mask,
            **floats,
        )


def guided_rows(plan: Plan) -> list[GuidedRow]:
    """Which of the plan's draws follow a grammar. Needs every token of theirs to be known."""
    out, draw = [], 0
    for row in plan.rows:
        if not row.sample:
            continue
        sequence = row.sequence
        if sequence.guidance is not None:
            assert row.start_tokens + row.num_tokens == len(sequence.token_ids), "a guide is behind its tokens"
            out.append((draw, sequence.guidance, row.drafts))
        draw += 1 + len(row.drafts)
    return out


def histories(rows: Rows[Row]) -> list[History]:
    """The tokens before each draw, for sampling on the host. Needs every token to be known."""
    out = []
    for row in rows:
        if row.sample:
            known = np.array(row.sequence.token_ids[: row.start_tokens + row.num_tokens], np.int32)
            guessed = np.concatenate((known, np.array(row.drafts, np.int32)))
            ends = range(len(known), len(guessed) + 1)
            out += [History(guessed[:end], row.sequence.num_prompt_tokens) for end in ends]
    return out


def _newest(rows: Rows[Row]) -> list[int]:
    """The one token that each decode row computes."""
    return [
        token_ids[row.start_tokens] if row.start_tokens < len(token_ids := row.sequence.token_ids) else TOKEN_ON_DEVICE
        for row in rows
    ]


def _place_drafts(rows: Rows[Row], row_starts: I32, token_ids: I32) -> None:
    """Put the drafts of decode rows behind the token of each, in place."""
    for row, start in zip(rows, row_starts.tolist(), strict=False):
        first = start + row.num_tokens
        token_ids[first : first + len(row.drafts)] = row.drafts


def _tokens(row: Row) -> I32:
    """The row's token ids; a last one that is still on the device is TOKEN_ON_DEVICE."""
    known = row.sequence.token_ids[row.start_tokens : row.start_tokens + row.num_tokens]
    out = np.full(row.num_tokens, TOKEN_ON_DEVICE, np.int32)
    out[: len(known)] = known
    return out


def _biases(rows: Rows[Row], ends: I32, features: Rows[frozenset[str]], vocab_size: int) -> tuple[I32, I32, np.ndarray]:
    """bias_starts, bias_ids, bias_values: the client's logit bias, and stop tokens banned by min_new_tokens.

    rows: of all draws, or none if nobody asks for a bias. ends: the position that each draws.
    """
    starts = np.zeros(len(ends) + 1, np.int32)
    ids: list[int] = []
    values: list[float] = []
    for i, row in enumerate(rows):
        sequence = row.sequence
        if "logit_bias" in features[sequence.slot]:
            ids += sequence.sampling.logit_bias.keys()
            values += sequence.sampling.logit_bias.values()
            if ends[i] - sequence.num_prompt_tokens < sequence.sampling.min_new_tokens:
                # Stop ids the model has no logit for (a tokenizer larger than the model) cannot be drawn anyway.
                banned = [token_id for token_id in sequence.stop_token_ids if 0 <= token_id < vocab_size]
                ids += banned
                values += [-np.inf] * len(banned)
        starts[i + 1] = len(ids)
    return starts, _i32(ids), np.array(values, np.float32)


def _padded(values: list[int], length: int, fill: int = 0) -> I32:
    out = np.full(length, fill, np.int32)
    out[: len(values)] = values
    return out


def _i32(values: Rows[int]) -> I32:
    return np.array(values, np.int32)
