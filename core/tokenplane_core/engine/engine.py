"""The engine: requests in, tokens out, one step at a time. `Engine.step` is the whole loop.

Knows the scheduler, the backend's hooks and token ids. It does not know sockets, text or hardware: `receive` and
`publish` are handed in.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass

from msgspec.structs import replace

from ..backend.errors import ContractViolation
from ..backend.plugins import Backend
from ..backend.records import Capabilities, DecodeBatch, KVLayout, SamplingBatch, SamplingCaps, StepHandle, StepOutput
from ..backend.sampling import sample
from ..messages import (
    AdapterLoaded,
    Cancel,
    FinishReason,
    LoadAdapter,
    Stats,
    Submit,
    ToEngine,
    TokenEvent,
    UnloadAdapter,
)
from ..validation import GREEDY_BELOW, prompt_logprobs_refusal, request_refusal
from .adapters import REFUSALS, Adapters
from .batching import Batcher, asked_of_sampler, guided_rows, histories
from .grammar import Grammars, Guide
from .grammar_check import GrammarError
from .kv_cache import BlockPool
from .logprobs import drawn_logprobs, keep_prompt_logprobs, with_prompt_logprobs
from .masks import NO_MASKS, Guidance, PendingMasks, StepMasks, edits_for
from .scheduler import MustDrain, Plan, Row, Scheduler
from .sequence import Sequence, State
from .speculation import Drafter, Speculation
from .step_times import StepTimes

log = logging.getLogger("tokenplane.engine")

COMPILE_POLL_S = 0.002
"""An engine that has nothing to do but wait for a grammar looks for messages this often."""

Receive = Callable[[bool], Iterable[tuple[int, ToEngine]]]
"""Called with True when the engine is idle and may wait a while; yields (client, message)."""
Publish = Callable[[int, list[TokenEvent]], None]
Answer = Callable[[int, AdapterLoaded], None]


@dataclass(slots=True)
class InFlight:
    """A launched step and what was asked of it."""

    number: int
    plan: Plan
    handle: StepHandle
    sampling: SamplingBatch
    padded_tokens: int
    launched_s: float
    masks: PendingMasks | None

    @property
    def on_host(self) -> bool:
        return self.sampling.return_logits

    @property
    def decides_the_next(self) -> bool:
        """True if the next step cannot be launched before this one is read back."""
        return self.on_host or self.masks is not None


class Engine:
    """Runs sequences on one backend until told otherwise."""

    def __init__(
        self,
        backend: Backend,
        capabilities: Capabilities,
        layout: KVLayout,
        vocab_size: int,
        receive: Receive,
        publish: Publish,
        prefix_cache: bool = True,
        ageing_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
        grammars: Grammars | None = None,
        answer: Answer = lambda client, answer: None,
        drafter: Drafter | None = None,
    ) -> None:
        self.capabilities = capabilities
        self.layout = layout
        self._backend = backend
        self._vocab_size = vocab_size
        self._receive = receive
        self._publish = publish
        self._answer = answer
        self._ageing_s = ageing_s
        self._clock = clock
        paged = capabilities.kv.kind == "paged"
        self.pool = BlockPool(layout.num_blocks, layout.block_tokens, prefix_cache and paged)
        self._batcher = Batcher(layout, capabilities, vocab_size)
        self._speculation: Speculation | None = None
        if drafter is not None and capabilities.max_drafts:
            self._speculation = Speculation(drafter, capabilities.max_drafts)
        leave = self._batcher.slot_left
        self.scheduler = Scheduler(capabilities, self.pool, layout.num_slots, leave, self._speculation)
        # What a step drafts depends on what the step before it has drawn.
        self._async_depth = capabilities.async_depth if self._speculation is None else 0
        self._adapters = Adapters(backend, capabilities.adapters)
        self._grammars = grammars
        self._compiling: list[tuple[Sequence, Future[Guide]]] = []
        self._sequences: dict[tuple[int, str], Sequence] = {}
        self._in_flight: deque[InFlight] = deque()
        self._events: defaultdict[int, list[TokenEvent]] = defaultdict(list)
        self._count: defaultdict[str, int] = defaultdict(int)
        self._accepted: Counter[int] = Counter()
        self._times = StepTimes()
        self._device_s = 0.0
        self._num_arrived = 0

    # --- The loop -------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Receive, schedule, submit, collect, publish.

        At async depth 1 the next step is launched before the previous one is read back. A step that samples on the
        host or under a grammar is read back at once, as are all of an engine that speculates, and a scheduler that must
        preempt waits for what is in flight.
        """
        for client, message in self._receive(self.is_idle):
            self._take(client, message)
        if self._adapters.leaving:
            self._drop_adapters()
        if self._compiling:
            self._admit_compiled()
        launched = self._launch()
        depth = self._async_depth if launched and not self._in_flight[-1].decides_the_next else 0
        while len(self._in_flight) > depth:
            self._collect()
        if self._events:
            self._times.publishing()
            for client, events in self._events.items():
                self._publish(client, events)
            self._events.clear()
            self._times.published()

    @property
    def is_idle(self) -> bool:
        return not self._sequences and not self._in_flight

    @property
    def request_ids(self) -> list[str]:
        """Of all requests held, for the log."""
        return [request_id for _, request_id in self._sequences]

    def drop_client(self, client: int) -> None:
        """A connection is gone: cancel all it asked for."""
        for owner, request_id in [key for key in self._sequences if key[0] == client]:
            self._cancel(owner, request_id)

    @property
    def stats(self) -> Stats:
        return Stats(
            num_running=len(self.scheduler.running),
            num_waiting=self.scheduler.num_waiting,
            blocks_used=self.pool.num_used,
            blocks_total=self.pool.num_total,
            requests_preempted=self.scheduler.num_preemptions,
            device_s=self._device_s,
            adapters_loaded=len(self._adapters),
            max_batch_tokens=sum(s.num_prompt_tokens + s.max_new_tokens for s in self.scheduler.running),
            inference=self._times.inference,
            forward=self._times.forward,
            commit=self._times.commit,
            publish=self._times.publish,
            admitted=self._times.admitted,
            steps_joined=self._times.num_joined,
            accepted=self._accepted,
            **self._count,
        )

    def close(self) -> None:
        """End the threads and processes that work for grammars."""
        if self._grammars is not None:
            self._grammars.close()

    def check(self) -> None:
        """Assert the invariants that hold between steps."""
        self.scheduler.check()

    # --- Receive --------------------------------------------------------------------------------------------

    def _take(self, client: int, message: ToEngine) -> None:
        if isinstance(message, Cancel):
            self._cancel(client, message.request_id)
            return
        if isinstance(message, LoadAdapter):
            self._load_adapter(client, message)
            return
        if isinstance(message, UnloadAdapter):
            self._adapters.unload(message.number)
            return
        refusal = self.refusal(message)
        if refusal is None and (client, message.request_id) in self._sequences:
            refusal = ("request_id", f"request_id {message.request_id!r} is already in use")
        if refusal is not None:
            self._events[client].append(_error_event(message.request_id, *refusal))
            return
        self._num_arrived += 1
        if 0 < message.sampling.temperature < GREEDY_BELOW:
            message = replace(message, sampling=replace(message.sampling, temperature=0.0))
        sequence = Sequence(message, client, self._num_arrived, self._clock(), self._ageing_s)
        sequence.adapter = self._adapters[message.adapter]
        sequence.samples_on_host = not samples_on_device(message, self.capabilities.sampling)
        self._sequences[client, message.request_id] = sequence
        if message.grammar is not None and self._grammars is not None:
            sequence.state = State.COMPILING
            self._compiling.append((sequence, self._grammars.compile(message.grammar)))
        else:
            self.scheduler.add(sequence)

    def _load_adapter(self, client: int, wanted: LoadAdapter) -> None:
        self._drop_adapters()
        self._drain()
        error = ""
        try:
            self._adapters.load(wanted)
        except REFUSALS as refusal:
            log.warning("%s", refusal)
            error = str(refusal)
        self._answer(client, AdapterLoaded(wanted.number, error))

    def _drop_adapters(self) -> None:
        """Let go of the adapters that are leaving and that no sequence needs."""
        in_use = {sequence.adapter for sequence in self._sequences.values()}
        if not in_use.issuperset(self._adapters.leaving):
            self._drain()
            self._adapters.drop_unused(in_use)

    def _drain(self) -> None:
        """Read back every launched step."""
        while self._in_flight:
            self._collect()

    def _admit_compiled(self) -> None:
        """Let the sequences into the queue whose grammar has become ready; end those whose grammar is none."""
        if not self._in_flight and not self.scheduler.has_work:
            wait([guide for _, guide in self._compiling], COMPILE_POLL_S, FIRST_COMPLETED)
        compiling = [(s, guide) for s, guide in self._compiling if s.state is State.COMPILING]
        self._compiling = [(s, guide) for s, guide in compiling if not guide.done()]
        for sequence, compiled in compiling:
            if compiled.done():
                self._guide(sequence, compiled)

    def _guide(self, sequence: Sequence, compiled: Future[Guide]) -> None:
        """Tell the client that its grammar is accepted, or why not."""
        try:
            guide = compiled.result()
        except GrammarError as error:
            self._fail(sequence, "grammar", str(error))
            return
        # What a request that outlived its engine has generated so far.
        if not all(map(guide.consume, sequence.token_ids[sequence.num_prompt_tokens :])):
            self._fail(sequence, "grammar", f"the tokens so far do not follow the grammar {guide.error}".rstrip())
            return
        edits = edits_for(sequence.sampling, sequence.stop_token_ids, self._vocab_size)
        to_come = sequence.sampling.min_new_tokens - sequence.num_generated_tokens
        sequence.guidance = Guidance(guide, edits, to_come)
        self._events[sequence.client].append(TokenEvent(sequence.request_id))
        self.scheduler.add(sequence)

    def _fail(self, sequence: Sequence, field: str, why: str) -> None:
        """End one sequence with an error; field: of its request, "" if the request is not at fault."""
        self._events[sequence.client].append(_error_event(sequence.request_id, field, why))
        self._cancel(sequence.client, sequence.request_id)

    def _cancel(self, client: int, request_id: str) -> None:
        sequence = self._sequences.pop((client, request_id), None)
        if sequence is not None:
            self.scheduler.finish(sequence)

    def refusal(self, request: Submit) -> tuple[str, str] | None:
        """(field, sentence) if the request can never be served here, else None."""
        refusal = request_refusal(request, self._vocab_size, self.capabilities.limits.max_model_tokens)
        if refusal is not None:
            return refusal
        refusal = prompt_logprobs_refusal(request, self.capabilities.backend, self.capabilities)
        if refusal is not None:
            return refusal
        if request.grammar is not None and self._grammars is None:
            return "grammar", "this engine was started without support for grammars; leave the option out"
        refusal = self._adapters.refusal(request.adapter)
        if refusal is not None:
            return refusal
        caps = self.capabilities.sampling
        if not caps.returns_logits and not samples_on_device(request, caps):
            field = "sampling" if request.grammar is None else "grammar"
            return field, f"{self.capabilities.backend} cannot sample with {sorted(asked_of_sampler(request))}"
        total = (request.num_prompt_tokens or len(request.token_ids)) + request.max_new_tokens
        why = self.scheduler.refusal(len(request.token_ids), total)
        return ("max_new_tokens", f"the request {why}") if why else None

    # --- Schedule and submit --------------------------------------------------------------------------------

    def _launch(self) -> bool:
        """Plan and launch a step; False if there is nothing to launch now."""
        try:
            plan = self.scheduler.schedule(can_preempt=not self._in_flight)
        except MustDrain:
            return False
        if plan is None:
            return False
        on_host = any(row.sample and row.sequence.samples_on_host for row in plan.rows)
        launched_s = self._times.planned(plan, len(self.scheduler.running))
        if plan.phase == "prefill":
            for row in plan.rows:
                if row.sequence.queue_s is None:
                    self._started(row.sequence)
        masks = self._masks_of(plan)
        mask = masks.token_mask() if masks is not None else None
        batch, sampling = self._batcher.build(plan, return_logits=on_host, mask=mask)
        if isinstance(batch, DecodeBatch):
            handle = self._backend.decode(batch, sampling)
        else:
            handle = self._backend.prefill(batch, sampling)
        self._in_flight.append(
            InFlight(
                batch.head.step,
                plan,
                handle,
                sampling,
                len(batch.token_ids) - plan.extent.tokens,
                launched_s,
                masks,
            )
        )
        return True

    def _masks_of(self, plan: Plan) -> PendingMasks | None:
        rows = guided_rows(plan) if self._grammars is not None else []
        return PendingMasks(self._grammars, rows) if self._grammars is not None and rows else None

    def _started(self, sequence: Sequence) -> None:
        sequence.queue_s = self._clock() - sequence.arrival_s
        self._count["prompt_tokens"] += sequence.num_prompt_tokens
        self._count["cached_tokens"] += sequence.num_cached_tokens
        self._events[sequence.client].append(TokenEvent(sequence.request_id, queue_s=sequence.queue_s))
        log.debug(
            "request %s leaves the queue after %.1f ms; %d of %d prompt tokens are cached",
            sequence.request_id,
            sequence.queue_s * 1000,
            sequence.num_cached_tokens,
            sequence.num_prompt_tokens,
        )

    # --- Collect --------------------------------------------------------------------------------------------

    def _collect(self) -> None:
        """Read the oldest step back and commit its tokens."""
        step = self._in_flight.popleft()
        masks = step.masks.result() if step.masks is not None else NO_MASKS
        output = step.handle.result()
        if output.step != step.number:
            raise ContractViolation(
                f"step {step.number} came back as step {output.step}: handles must keep their order"
            )
        if step.on_host:
            output = self._sample_on_host(step, output)
        self._note(step, output)
        self._times.read_back(step.plan.counts_as, step.launched_s, output.device_s)
        keep_prompt_logprobs(step.plan, output)
        token_ids = output.token_ids.tolist()
        index = 0
        for row in step.plan.rows:
            num_right = 0
            if row.sample:
                sequence = row.sequence
                if sequence.state is not State.FINISHED:
                    self._commit(sequence, token_ids[index], output, index, masks)
                if self._speculation is not None:
                    num_right = self._commit_behind(row, token_ids, output, index, masks, self._speculation)
                index += 1 + len(row.drafts)
            self.scheduler.collected(row, num_right)
        self._times.committed()

    def _commit_behind(
        self,
        row: Row,
        token_ids: list[int],
        output: StepOutput,
        index: int,
        masks: StepMasks,
        speculation: Speculation,
    ) -> int:
        """Commit what was drawn behind drafts that were right; how many were.

        The row's first draw, of `index`, is committed. A draft is right if it is what was drawn in its place; then the
        draw behind it counts, too, unless the sequence has ended.
        """
        sequence, num_right = row.sequence, 0
        for draft in row.drafts:
            if sequence.state is State.FINISHED or token_ids[index] != draft:
                break
            num_right += 1
            index += 1
            self._commit(sequence, token_ids[index], output, index, masks)
        self._accepted[num_right] += 1
        if row.drafts:
            self._count["draft_tokens"] += len(row.drafts)
            self._count["draft_tokens_accepted"] += num_right
            speculation.verified(sequence, row.drafts, num_right)
        return num_right

    def _sample_on_host(self, step: InFlight, output: StepOutput) -> StepOutput:
        """The core's own sampler on the logits the device returned."""
        assert output.logits is not None, "the step was asked for logits"
        drawn = sample(output.logits, step.sampling, histories(step.plan.rows))
        return StepOutput(
            output.step,
            drawn.token_ids,
            drawn.logprobs,
            drawn.top_ids,
            drawn.top_logprobs,
            device_s=output.device_s,
            prompt_logprobs=output.prompt_logprobs,
            prompt_top_ids=output.prompt_top_ids,
            prompt_top_logprobs=output.prompt_top_logprobs,
        )

    def _may_commit(self, sequence: Sequence, token_id: int, index: int, masks: StepMasks) -> bool:
        """False, and the sequence is ended, if its grammar does not allow what was drawn for row `index`, or anything.

        Changes:
            Else the token is among those that the sequence's guide is to consume.
        """
        guidance = sequence.guidance
        assert guidance is not None
        if index in masks.finished:
            self._count["requests_finished"] += 1
            self._events[sequence.client].append(
                with_prompt_logprobs(TokenEvent(sequence.request_id, finish_reason="stop_token"), sequence)
            )
            self._cancel(sequence.client, sequence.request_id)
        elif index in masks.stuck:
            why = guidance.guide.error or "no token of the vocabulary leads on from here, or logit_bias bans them all"
            self._fail(sequence, "grammar", f"the text cannot follow the grammar any further: {why}")
        elif not masks.allows(index, token_id):
            why = f"{self.capabilities.backend} drew the token {token_id}"
            self._fail(sequence, "", f"a token outside the grammar was drawn: {why}")
        else:
            guidance.behind.append(token_id)
            return True
        return False

    def _commit(self, sequence: Sequence, token_id: int, output: StepOutput, index: int, masks: StepMasks) -> None:
        """Append a live sequence's drawn token if its grammar allows it, decide whether it ends, tell the client."""
        if sequence.guidance is not None and not self._may_commit(sequence, token_id, index, masks):
            return
        sequence.token_ids.append(token_id)
        self._count["generated_tokens"] += 1
        num_generated = len(sequence.token_ids) - sequence.num_prompt_tokens
        reason: FinishReason | None = "length" if num_generated >= sequence.max_new_tokens else None
        if token_id in sequence.stop_token_ids:
            reason = "stop_token"
        logprobs = top = None
        if sequence.sampling.num_logprobs >= 0:
            logprobs, top = drawn_logprobs(sequence.sampling, output, index)
        event = TokenEvent(sequence.request_id, [token_id], logprobs, top, reason)
        if num_generated == 1:
            event = replace(event, queue_s=sequence.queue_s, num_cached_tokens=sequence.num_cached_tokens)
        self._events[sequence.client].append(with_prompt_logprobs(event, sequence))
        if reason is not None:
            self._count["requests_finished"] += 1
            del self._sequences[sequence.client, sequence.request_id]
            self.scheduler.finish(sequence)

    def _note(self, step: InFlight, output: StepOutput) -> None:
        self._count[f"{step.plan.counts_as}_steps"] += 1
        self._count["step_tokens"] += step.plan.extent.tokens
        self._count["padded_tokens"] += step.padded_tokens
        self._count["compiled_shapes"] += output.compiled
        self._device_s += output.device_s


def samples_on_device(request: Submit, caps: SamplingCaps) -> bool:
    """True if the device's own sampler can do all that the request asks for."""
    if not asked_of_sampler(request) <= caps.features:
        return False
    params = request.sampling
    if caps.max_top_k is not None and params.temperature > 0 and params.top_k > caps.max_top_k:
        return False
    return caps.max_top_logprobs is None or params.num_logprobs <= caps.max_top_logprobs


def _error_event(request_id: str, field: str, why: str) -> TokenEvent:
    return TokenEvent(request_id, finish_reason="error", error=why, error_field=field)
