"""Who runs next, and when blocks move. Plain integers; knows no device, no text and no clock.

Every sequence has tokens known and tokens computed; a step closes some of the gaps within the device's shapes and
a token budget that counts padding. Decode rows come first, then prompts in order of rank, split into chunks where
the device can. Where it can mix, both share a step; where it cannot, prefill and decode take turns.

Rank (sequence.py) is arrival plus priority with ageing, so the waiting queue is a heap with fixed keys, nobody waits
for ever, and the sequence of best rank is never preempted while another runs.

Blocks: a prompt is admitted when blocks for all its known tokens are free, and takes them at once; only decoding needs
more later. When those run out, the running sequence of worst rank goes back to waiting and is recomputed
(its published blocks usually survive in the prefix index). Source: preemption by recompute as in vLLM (arXiv
2309.06180), chunked prefill as in Sarathi-Serve (arXiv 2403.02310).

A prompt of which a running one computes at least half just now waits for it (followers.py), and is overtaken
meanwhile by those behind it.

Drafts (speculation.py) come last: decode rows of a plan that stands take what it leaves of tokens, draws and free
blocks, so they keep nobody out. Their blocks go back after the step unless they were right.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from operator import attrgetter

from ..backend.records import Bucket, Capabilities
from .followers import Followers
from .kv_cache import BlockKey, BlockPool
from .sequence import Sequence, State
from .shapes import Extent, Phase, ShapeTable
from .speculation import Speculation


@dataclass(slots=True)
class Row:
    """A sequence's part in a step: compute `num_tokens` from `start_tokens` on; sample if that reaches the end.

    drafts: guesses to compute behind them. Only the decode rows of an engine that speculates have any.
    """

    sequence: Sequence
    start_tokens: int
    num_tokens: int
    sample: bool
    drafts: Rows[int] = ()


@dataclass(slots=True)
class Plan:
    """What a step will do. Rows that decode stand before rows that prefill."""

    phase: Phase
    rows: list[Row] = field(default_factory=list)
    extent: Extent = field(default_factory=Extent)
    bucket: Bucket | None = None
    cost_tokens: int = 0
    num_drafts: int = 0

    @property
    def counts_as(self) -> Phase:
        """Decode rows with drafts are sent as a prefill, but take in no prompt."""
        return "prefill" if self.extent.prompts else "decode"


class MustDrain(Exception):
    """No plan now: blocks have run out and a victim may have a step in flight. Collect what is in flight first."""


_rank = attrgetter("rank")


class Scheduler:
    """Waiting and running sequences, slots and blocks.

    `on_leave(slot)` is called when a sequence gives its slot back, so that the backend can be told. With `speculation`,
    every step is collected before the next is planned.
    """

    def __init__(
        self,
        capabilities: Capabilities,
        pool: BlockPool,
        num_slots: int,
        on_leave: Callable[[int], None],
        speculation: Speculation | None = None,
    ) -> None:
        self.pool = pool
        self._speculation = speculation
        self.shapes = ShapeTable(capabilities.shapes, capabilities.limits)
        self.mixed = capabilities.mixed
        self.preempts = capabilities.kv.kind == "paged"  # a slot's line is all a sequence ever needs
        self.chunk_tokens = capabilities.limits.chunk_tokens
        self.running: list[Sequence] = []
        self._leaving: list[Sequence] = []  # have ended, but a launched step still names their slot and blocks
        self.num_preemptions = 0
        self._waiting: list[tuple[tuple[float, int], Sequence]] = []
        self._followers = Followers()
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._on_leave = on_leave
        self._decode_turn = False  # the last prefill left decode rows behind
        self._num_steps = 0
        self.num_waiting = 0

    # --- Coming and going -----------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Put a new sequence into the queue."""
        self.pool.extend_keys(sequence.block_keys, sequence.token_ids, sequence.adapter.salt)
        self._enqueue(sequence)

    @property
    def has_work(self) -> bool:
        return bool(self.running) or self.num_waiting > 0

    def finish(self, sequence: Sequence) -> None:
        """End a sequence in any state. What it holds goes back once no launched step names it."""
        before, sequence.state = sequence.state, State.FINISHED
        if before is State.WAITING:
            self.num_waiting -= 1
            self._drop_dead_entries()
        elif before is State.RUNNING:
            self.running.remove(sequence)
            self._leaving.append(sequence)
            self._release_if_done(sequence)

    def collected(self, row: Row, num_right: int = 0) -> None:
        """A launched step with this row is done: publish what it computed, release a sequence that has ended.

        num_right: how many of the row's drafts were, from the first on. Their tokens are known and computed now.
        """
        sequence = row.sequence
        sequence.steps_in_flight -= 1
        end = row.start_tokens + row.num_tokens
        if row.drafts:
            end += num_right
            sequence.num_known_tokens += num_right
            sequence.num_computed_tokens += num_right
            self._give_back_unused_blocks(sequence)
        # A cancelled sequence may have computed one token that it was never told.
        num_full_blocks = min(end, len(sequence.token_ids)) // self.pool.block_tokens
        if num_full_blocks > sequence.num_published_blocks:
            self._publish(sequence, num_full_blocks)
        if sequence.state is State.FINISHED:
            self._release_if_done(sequence)

    def _give_back_unused_blocks(self, sequence: Sequence) -> None:
        """Those taken for drafts that were wrong. The backend's table names them on, but it reads none of them."""
        needed = self.pool.blocks_for(sequence.num_known_tokens)
        self.pool.release(sequence.block_ids[needed:])
        del sequence.block_ids[needed:]
        sequence.num_announced_blocks = min(sequence.num_announced_blocks, needed)

    def _publish(self, sequence: Sequence, num_full_blocks: int) -> None:
        """Put full, computed blocks into the prefix index."""
        self.pool.extend_keys(sequence.block_keys, sequence.token_ids, sequence.adapter.salt)
        for i in range(sequence.num_published_blocks, num_full_blocks):
            self.pool.publish(sequence.block_ids[i], sequence.block_keys[i])
            self._back_to_queue(self._followers.published(sequence.block_keys[i]))
        sequence.num_published_blocks = num_full_blocks

    def refusal(self, num_prompt_tokens: int, num_total_tokens: int) -> str | None:
        """Why a request could never finish on this device, or None. `num_total_tokens` is prompt plus new tokens.

        Looks at the request alone: alone, it always gets its turn.
        """
        blocks = self.pool.blocks_for(num_total_tokens)
        if blocks > self.pool.num_total:
            capacity = self.pool.num_total * self.pool.block_tokens
            return f"needs {num_total_tokens} tokens of KV cache, which holds {capacity}"
        if self.shapes.cost("decode", Extent().plus(1, blocks, False)) is None:
            return f"reaches {num_total_tokens} tokens of context, which no shape of this device holds"
        # A preempted sequence comes back as a longer prompt.
        longest = num_total_tokens if self.preempts else num_prompt_tokens
        step = min(longest, self.chunk_tokens) if self.chunk_tokens else longest
        if self.shapes.cost("prefill", Extent().plus(step, blocks, True)) is None:
            return (
                f"needs a prefill of {step} tokens with {blocks} blocks of context, which no shape of this device holds"
            )
        return None

    # --- The plan -------------------------------------------------------------------------------------------

    def schedule(self, can_preempt: bool) -> Plan | None:
        """Plan the next step and take the blocks it needs; None if there is nothing to do.

        Raises:
            MustDrain: `can_preempt` is False (steps are in flight) and a decode row finds no block.
        """
        decoding, prompts = self._gaps()
        if self._reserve_decode_blocks(decoding, can_preempt):
            decoding, prompts = self._gaps()
        plan = None
        if not (self._decode_turn and decoding):
            plan = self._plan_prefill(decoding, prompts)
        if plan is not None:
            self._decode_turn = len(plan.rows) - plan.extent.prompts < len(decoding)
        else:
            plan = self._plan_decode(decoding)
            self._decode_turn = False
        if self._speculation is not None and self.mixed:
            self._add_drafts(plan, self._speculation)
        return self._launch(plan) if plan.rows else None

    def _gaps(self) -> tuple[list[Sequence], list[Sequence]]:
        """Running sequences that have something to compute: those that decode, and those that prefill.

        Decoding is one token that continues what the slot has already computed. A sequence's first step in a slot is
        always a prefill, even if a prefix hit leaves a single token.
        """
        decoding, prompts = [], []
        for sequence in self.running:
            gap = sequence.num_known_tokens - sequence.num_computed_tokens
            if gap == 1 and sequence.started:
                if sequence.num_known_tokens < sequence.most_tokens:  # else its last token is known or in flight
                    decoding.append(sequence)
            elif gap:
                prompts.append(sequence)
        return decoding, prompts

    def _plan_decode(self, decoding: list[Sequence]) -> Plan:
        plan = Plan("decode")
        self._add_decoding(plan, decoding)
        return plan

    def _plan_prefill(self, decoding: list[Sequence], prompts: list[Sequence]) -> Plan | None:
        """A step with at least one prompt row, or None."""
        plan = Plan("prefill")
        prompts.sort(key=_rank)
        first = self._first_piece(prompts)
        if first is None:
            return None
        if self.mixed:
            self._add_decoding(plan, decoding, first)
        for sequence in prompts:
            self._try_add_chunk(plan, sequence)
        while self._admit_next(plan):
            pass
        return plan if plan.extent.prompts else None

    def _first_piece(self, prompts: list[Sequence]) -> tuple[int, int] | None:
        """Tokens and blocks of the smallest piece that the first prompt row can be; None if no prompt could run."""
        if prompts:
            sequence, computed = prompts[0], prompts[0].num_computed_tokens
        elif (candidate := self._admissible()) is not None:
            sequence, computed = candidate[0], len(candidate[1]) * self.pool.block_tokens
        else:
            return None
        gap = sequence.num_known_tokens - computed
        piece = min(self.chunk_tokens or gap, gap)
        return piece, self.pool.blocks_for(computed + piece)

    def _add_decoding(self, plan: Plan, decoding: list[Sequence], beside: tuple[int, int] = (0, 0)) -> None:
        """Add the decode rows that fit; longest since its last step first, if not all do.

        beside: tokens and blocks of a prompt's piece that must still fit, so that it is not kept out for ever.
        """
        piece, blocks = beside

        def add(rows: list[Sequence]) -> None:
            """All rows if they fit together; else those of the first half that fit, then those of the second."""
            size = self.pool.block_tokens
            extent = plan.extent.plus_decoding([-(-s.num_known_tokens // size) for s in rows])
            cost = self.shapes.cost(plan.phase, extent)
            if cost is not None and piece and self.shapes.cost(plan.phase, extent.plus(piece, blocks, True)) is None:
                cost = None
            if cost is not None:
                plan.extent, plan.cost_tokens = extent, cost
                plan.rows += [Row(s, s.num_computed_tokens, 1, True) for s in rows]
            elif len(rows) > 1:
                if len(rows) == len(decoding):
                    rows = sorted(rows, key=lambda s: (s.last_step, s.rank))
                add(rows[: len(rows) // 2])
                add(rows[len(rows) // 2 :])

        if decoding:
            add(decoding)

    def _try_add(self, plan: Plan, sequence: Sequence, num_tokens: int, prompt: bool) -> bool:
        """Add a row if the device can run the batch with it."""
        end = sequence.num_computed_tokens + num_tokens
        extent = plan.extent.plus(num_tokens, self.pool.blocks_for(end), prompt)
        cost = self.shapes.cost(plan.phase, extent)
        if cost is None:
            return False
        plan.extent, plan.cost_tokens = extent, cost
        plan.rows.append(Row(sequence, sequence.num_computed_tokens, num_tokens, end == sequence.num_known_tokens))
        return True

    def _try_add_chunk(self, plan: Plan, sequence: Sequence) -> bool:
        """Add as much of a prompt as fits, whole or as a chunk the device allows."""
        room = self.shapes.room(plan.phase, plan.extent)
        if sequence.gap_tokens <= room and self._try_add(plan, sequence, sequence.gap_tokens, prompt=True):
            return True
        if self.chunk_tokens == 0:
            return False
        pieces = min(room, sequence.gap_tokens - 1) // self.chunk_tokens
        while pieces > 0:
            if self._try_add(plan, sequence, pieces * self.chunk_tokens, prompt=True):
                return True
            pieces //= 2  # a narrower shape may still hold a shorter chunk
        return False

    def _add_drafts(self, plan: Plan, speculation: Speculation) -> None:
        """Give the plan's decode rows drafts, as far as it leaves room for them."""
        size, limits = self.pool.block_tokens, self.shapes.limits
        draws = limits.max_sequences + speculation.max_drafts - sum(row.sample for row in plan.rows)
        for row in plan.rows[: len(plan.rows) - plan.extent.prompts]:
            sequence, end = row.sequence, row.start_tokens + row.num_tokens
            places = (len(sequence.block_ids) + self.pool.num_free) * size - end
            room = min(draws, limits.max_step_tokens - plan.extent.tokens, places)
            drafts = speculation.drafts(sequence, room)
            if not drafts:
                continue
            blocks = self.pool.blocks_for(end + len(drafts))
            extent = plan.extent.plus_drafts(len(drafts), self.pool.blocks_for(end), blocks)
            cost = self.shapes.cost("prefill", extent)
            if cost is None:
                continue
            fresh = self.pool.allocate(max(0, blocks - len(sequence.block_ids)))
            assert fresh is not None, "there were places for them"
            sequence.block_ids += fresh
            row.drafts = drafts
            draws -= len(drafts)
            plan.phase, plan.extent, plan.cost_tokens = "prefill", extent, cost
            plan.num_drafts += len(drafts)

    def _launch(self, plan: Plan) -> Plan:
        """Count the plan's tokens as computed: from here on they are as of the launched step."""
        self._num_steps += 1
        plan.bucket = self.shapes.bucket(plan.phase, plan.extent)
        for row in plan.rows:
            sequence = row.sequence
            sequence.num_computed_tokens += row.num_tokens
            sequence.num_known_tokens += row.sample
            sequence.steps_in_flight += 1
            sequence.started = True
            sequence.last_step = self._num_steps
        return plan

    # --- Admission and preemption ---------------------------------------------------------------------------

    def _enqueue(self, sequence: Sequence) -> None:
        sequence.state = State.WAITING
        self.num_waiting += 1
        heapq.heappush(self._waiting, (sequence.rank, sequence))

    def _back_to_queue(self, followers: list[Sequence]) -> None:
        for sequence in followers:
            if sequence.state is State.WAITING:
                heapq.heappush(self._waiting, (sequence.rank, sequence))

    def _drop_dead_entries(self) -> None:
        """Rebuild the heap once most of its entries are of cancelled sequences: a blocked head must not keep them."""
        if len(self._waiting) > 2 * self.num_waiting + 16:
            self._waiting = [entry for entry in self._waiting if entry[1].state is State.WAITING]
            heapq.heapify(self._waiting)

    def _next_waiting(self) -> Sequence | None:
        while self._waiting and self._waiting[0][1].state is not State.WAITING:
            heapq.heappop(self._waiting)
        return self._waiting[0][1] if self._waiting else None

    def _admissible(self) -> tuple[Sequence, list[int], int] | None:
        """The head of the queue, the blocks it finds in the prefix index, and how many more it needs.

        None if there is no slot or too few blocks for it: then all behind it wait too, so that a long prompt is
        not overtaken for ever.
        """
        head = self._head() if self._free_slots else None
        if head is None:
            return None
        sequence, hits = head
        needed = self.pool.blocks_for(sequence.num_known_tokens) - len(hits)
        if needed > self.pool.num_free - sum(self.pool.is_free(block) for block in hits):
            return None
        return sequence, hits, needed

    def _head(self) -> tuple[Sequence, list[int]] | None:
        """The head of the queue and the blocks it finds, once those before it that should follow another one do."""
        size = self.pool.block_tokens
        while (sequence := self._next_waiting()) is not None:
            keys = self._keys(sequence)
            hits = self.pool.match(keys)
            missing = keys[len(hits) :]
            # Where a running sequence computes less than half of what this one lacks, a wait is not worth it.
            if 2 * self._followers.num_led(missing) * size < sequence.num_known_tokens - len(hits) * size:
                return sequence, hits
            heapq.heappop(self._waiting)
            self._followers.follow(sequence, missing[0])
        return None

    def _keys(self, sequence: Sequence) -> list[BlockKey]:
        """The blocks it could find computed; none for who wants the log-probabilities of tokens that lie in them."""
        if sequence.prompt_logprobs is not None or not self.pool.prefix_cache:
            return []
        return sequence.block_keys[: (sequence.num_known_tokens - 1) // self.pool.block_tokens]

    def _admit_next(self, plan: Plan) -> bool:
        """Give the head of the queue a row in the plan, and with it slot and blocks; False if it has to wait."""
        candidate = self._admissible()
        if candidate is None:
            return False
        sequence, hits, needed = candidate
        sequence.num_computed_tokens = len(hits) * self.pool.block_tokens
        if not self._try_add_chunk(plan, sequence):
            sequence.num_computed_tokens = 0
            return False
        heapq.heappop(self._waiting)
        self.num_waiting -= 1
        self.pool.share(hits)
        fresh = self.pool.allocate(needed)
        assert fresh is not None
        sequence.block_ids = hits + fresh
        sequence.num_published_blocks = len(hits)
        sequence.num_cached_tokens = len(hits) * self.pool.block_tokens
        self._followers.lead(sequence, self._keys(sequence)[len(hits) :])
        sequence.slot = self._free_slots.pop()
        sequence.state = State.RUNNING
        self.running.append(sequence)
        return True

    def _reserve_decode_blocks(self, decoding: list[Sequence], can_preempt: bool) -> bool:
        """See that every decode row has a block for its new token, best rank first; True if that took a preemption."""
        size, preempted = self.pool.block_tokens, False
        lacking = [s for s in decoding if s.num_known_tokens > len(s.block_ids) * size]
        for sequence in sorted(lacking, key=_rank):
            while sequence.state is State.RUNNING:
                fresh = self.pool.allocate(1)
                if fresh is not None:
                    sequence.block_ids += fresh
                    break
                if not can_preempt:
                    raise MustDrain
                self._preempt(max(self.running, key=_rank))
                preempted = True
        return preempted

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the queue; its tokens stay, its KV is recomputed."""
        self.running.remove(sequence)
        self._release(sequence)
        self.num_preemptions += 1
        self._enqueue(sequence)

    def _release_if_done(self, sequence: Sequence) -> None:
        if sequence.steps_in_flight == 0:
            self._leaving.remove(sequence)
            self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        """Take slot and blocks back. Only without a step in flight that names them."""
        self.pool.release(sequence.block_ids)
        self._back_to_queue(self._followers.left(sequence, sequence.block_keys[sequence.num_published_blocks :]))
        self._free_slots.append(sequence.slot)
        self._on_leave(sequence.slot)
        sequence.leave_device()

    def check(self) -> None:
        """Assert that blocks and slots are where they should be."""
        holders = self.running + self._leaving
        self.pool.check([s.block_ids for s in holders])
        slots = [s.slot for s in holders] + self._free_slots
        assert len(slots) == len(set(slots)), "a slot is held twice"
        queued = [s for _, s in self._waiting] + self._followers.all()
        waiting = sum(s.state is State.WAITING for s in queued)
        assert waiting == self.num_waiting, "the queue lost count"
