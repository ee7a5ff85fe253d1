"""An engine in this process, without socket or clock of its own: what the laws and the property tests drive."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..backend.errors import UnsupportedAdapter
from ..backend.plugins import Backend
from ..backend.records import Bucket, Capabilities, Limits, LoadOptions, ModelSpec, ShapePolicy
from ..config import EngineConfig
from ..engine.engine import Engine
from ..engine.grammar import Grammars
from ..engine.scheduler import Plan
from ..engine.shapes import Extent, Phase, ShapeTable
from ..engine.speculation import Drafter
from ..engine.startup import size_cache
from ..messages import (
    AdapterLoaded,
    Cancel,
    Grammar,
    LoadAdapter,
    SamplingParams,
    Submit,
    ToEngine,
    TokenEvent,
    UnloadAdapter,
)


@dataclass
class Outcome:
    """What a request got so far."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    finish_reason: str | None = None
    error: str = ""
    num_cached_tokens: int = 0
    prompt_logprobs: list[float] | None = None
    prompt_top_logprobs: list[list[tuple[int, float]]] | None = None


class LocalEngine:
    """A backend, an engine over it, and the requests of one imaginary client.

    `shuffle_seed` hands blocks out in random order, so that a backend that only works when a sequence's blocks lie
    side by side is found out. `reshuffle` does so anew for each step, so that no sequence gets an old block back by
    habit of the pool.
    """

    def __init__(
        self,
        make_plugin: Callable[[], object],
        model: ModelSpec,
        name: str = "under-test",
        max_step_tokens: int | None = None,
        max_sequences: int | None = None,
        kv_cache_tokens: int | None = None,
        prefix_cache: bool = True,
        async_depth: int | None = None,
        device_index: int = 0,
        shuffle_seed: int | None = 0,
        reshuffle: bool = False,
        adjust: Callable[[Capabilities], Capabilities] = lambda capabilities: capabilities,
        grammars: Grammars | None = None,
        max_adapters: int = 0,
        max_adapter_rank: int = 0,
        max_drafts: int = 0,
        drafter: Drafter | None = None,
    ) -> None:
        self.backend = Backend(name, make_plugin())
        options = LoadOptions(
            device_index=device_index,
            max_step_tokens=max_step_tokens,
            max_sequences=max_sequences,
            max_adapters=max_adapters,
            max_adapter_rank=max_adapter_rank,
            max_drafts=max_drafts,
        )
        loaded = self.declared = self.backend.load(model, options)
        if async_depth is not None:
            loaded = replace(loaded, async_depth=min(async_depth, loaded.async_depth))
        self.capabilities = adjust(loaded)
        config = EngineConfig(model=model, backend=name, max_sequences=max_sequences, kv_cache_tokens=kv_cache_tokens)
        layout = size_cache(self.capabilities, config)
        self.backend.kv_alloc(layout)
        self.num_warmed_up = self.backend.warmup()
        self._inbox: deque[ToEngine] = deque()
        self.outcomes: dict[str, Outcome] = {}
        self.now_s = 0.0
        self.engine = Engine(
            self.backend,
            self.capabilities,
            layout,
            model.vocab_size,
            self._receive,
            self._publish,
            prefix_cache,
            clock=lambda: self.now_s,
            grammars=grammars,
            answer=self._answer,
            drafter=drafter,
        )
        self._answers: dict[int, str] = {}
        self._num_adapters = 0
        self._rng = random.Random(shuffle_seed)
        self._reshuffle = reshuffle
        if shuffle_seed is not None:
            self.engine.pool.shuffle(self._rng)
        self._num_requests = 0
        self.num_sampled_behind = 0  # batches that put_unsampled_rows_first has really brought about

    def submit(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        sampling: SamplingParams | None = None,
        stop_token_ids: Iterable[int] = (),
        priority: int = 0,
        prompt_logprobs: bool = False,
        num_prompt_top_logprobs: int = 0,
        grammar: Grammar | None = None,
        adapter: int = 0,
    ) -> str:
        """Queue a request; returns its id, a key of `outcomes`."""
        self._num_requests += 1
        request_id = f"r{self._num_requests}"
        self.outcomes[request_id] = Outcome()
        self._inbox.append(
            Submit(
                request_id,
                list(prompt),
                max_new_tokens,
                sampling=sampling or SamplingParams(),
                stop_token_ids=list(stop_token_ids),
                priority=priority,
                prompt_logprobs=prompt_logprobs,
                num_prompt_top_logprobs=num_prompt_top_logprobs,
                grammar=grammar,
                adapter=adapter,
            )
        )
        return request_id

    def load_adapter(self, folder: Path) -> int:
        """Load a LoRA adapter, whatever runs meanwhile; returns its number. Raises UnsupportedAdapter."""
        self._num_adapters += 1
        number = self._num_adapters
        self._inbox.append(LoadAdapter(number, folder.name, str(folder)))
        self.step()
        if self._answers[number]:
            raise UnsupportedAdapter(self._answers[number])
        return number

    def unload_adapter(self, number: int) -> None:
        self._inbox.append(UnloadAdapter(number))

    def cancel(self, request_id: str) -> None:
        self._inbox.append(Cancel(request_id))

    def step(self) -> None:
        """One engine step; asserts the engine's invariants after it."""
        self.now_s += 0.01
        if self._reshuffle:
            self.engine.pool.shuffle(self._rng)
        self.engine.step()
        self.engine.check()

    @property
    def is_idle(self) -> bool:
        return self.engine.is_idle and not self._inbox

    def run(self, max_steps: int = 100_000) -> None:
        """Step until nothing is left to do; AssertionError if that takes more than max_steps."""
        for _ in range(max_steps):
            if self.is_idle:
                return
            self.step()
        raise AssertionError(f"the engine is not done after {max_steps} steps: {self.engine.stats}")

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: SamplingParams | None = None,
        adapters: Sequence[int] = (),
    ) -> list[list[int]]:
        """Run prompts together to their end; their tokens, in order. adapters: one for each prompt, or none at all."""
        numbers = adapters or [0] * len(prompts)
        ids = [
            self.submit(prompt, max_new_tokens, sampling, adapter=number)
            for prompt, number in zip(prompts, numbers, strict=True)
        ]
        self.run()
        for request_id in ids:
            assert not self.outcomes[request_id].error, self.outcomes[request_id].error
        return [self.outcomes[request_id].token_ids for request_id in ids]

    def prefer(self, bucket: Bucket) -> None:
        """From now on, run what `bucket` holds in it, though a smaller one would do: the text must not care."""
        self.engine.scheduler.shapes = _PreferringTable(self.capabilities.shapes, self.capabilities.limits, bucket)

    def put_unsampled_rows_first(self) -> None:
        """From now on, prompt rows that sample stand behind those that do not. Decode rows stay in front."""
        schedule = self.engine.scheduler.schedule

        def reordered(can_preempt: bool) -> Plan | None:
            plan = schedule(can_preempt)
            if plan is not None and plan.phase == "prefill":
                num_decoding = len(plan.rows) - plan.extent.prompts
                plan.rows[num_decoding:] = sorted(plan.rows[num_decoding:], key=lambda row: row.sample)
                samples = [row.sample for row in plan.rows[num_decoding:]]
                self.num_sampled_behind += any(samples) and not samples[0]
            return plan

        self.engine.scheduler.schedule = reordered  # type: ignore[method-assign]

    def close(self) -> None:
        self.engine.close()
        self.backend.close()

    def _receive(self, idle: bool) -> Iterable[tuple[int, ToEngine]]:
        while self._inbox:
            yield 0, self._inbox.popleft()

    def _answer(self, client: int, answer: AdapterLoaded) -> None:
        self._answers[answer.number] = answer.error

    def _publish(self, client: int, events: list[TokenEvent]) -> None:
        for event in events:
            outcome = self.outcomes[event.request_id]
            assert outcome.finish_reason is None, f"{event.request_id} got news after its end"
            outcome.token_ids += event.token_ids
            outcome.logprobs += event.logprobs or []
            outcome.top_logprobs += event.top_logprobs or []
            outcome.num_cached_tokens = max(outcome.num_cached_tokens, event.num_cached_tokens)
            if event.prompt_logprobs is not None:
                assert outcome.prompt_logprobs is None, f"{event.request_id} was told its prompt twice"
                outcome.prompt_logprobs = event.prompt_logprobs
                outcome.prompt_top_logprobs = event.prompt_top_logprobs
            if event.finish_reason is not None:
                outcome.finish_reason, outcome.error = event.finish_reason, event.error


class _PreferringTable(ShapeTable):
    """Prefers one bucket to all others that hold a batch."""

    def __init__(self, policy: ShapePolicy, limits: Limits, bucket: Bucket) -> None:
        super().__init__(policy, limits)
        self._alone = ShapeTable(replace(policy, buckets=(bucket,)), limits)

    def bucket(self, phase: Phase, extent: Extent) -> Bucket | None:
        return self._alone.bucket(phase, extent) or super().bucket(phase, extent)
