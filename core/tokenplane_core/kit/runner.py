"""An engine in this process, without socket or clock of its own: what the laws and the property tests drive."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from ..backend.plugins import Backend
from ..backend.records import Capabilities, LoadOptions, ModelSpec
from ..config import EngineConfig
from ..engine.engine import Engine
from ..engine.startup import size_cache
from ..messages import Cancel, SamplingParams, Submit, ToEngine, TokenEvent


@dataclass
class Outcome:
    """What a request got so far."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    finish_reason: str | None = None
    error: str = ""
    num_cached_tokens: int = 0


class LocalEngine:
    """A backend, an engine over it, and the requests of one imaginary client.

    `shuffle_seed` hands blocks out in random order, so that a backend that only works when a sequence's blocks lie
    side by side is found out.
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
        shuffle_seed: int | None = 0,
        adjust: Callable[[Capabilities], Capabilities] = lambda capabilities: capabilities,
    ) -> None:
        self.backend = Backend(name, make_plugin())
        loaded = self.backend.load(model, LoadOptions(max_step_tokens=max_step_tokens, max_sequences=max_sequences))
        if async_depth is not None:
            loaded = replace(loaded, async_depth=min(async_depth, loaded.async_depth))
        self.capabilities = adjust(loaded)
        config = EngineConfig(model=model, backend=name, max_sequences=max_sequences, kv_cache_tokens=kv_cache_tokens)
        layout = size_cache(self.capabilities, config)
        self.backend.kv_alloc(layout)
        self.backend.warmup()
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
        )
        if shuffle_seed is not None:
            self.engine.pool.shuffle(random.Random(shuffle_seed))
        self._num_requests = 0

    def submit(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        sampling: SamplingParams | None = None,
        stop_token_ids: Iterable[int] = (),
        priority: int = 0,
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
            )
        )
        return request_id

    def cancel(self, request_id: str) -> None:
        self._inbox.append(Cancel(request_id))

    def step(self) -> None:
        """One engine step; asserts the engine's invariants after it."""
        self.now_s += 0.01
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
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: SamplingParams | None = None
    ) -> list[list[int]]:
        """Run prompts together to their end; their tokens, in order."""
        ids = [self.submit(prompt, max_new_tokens, sampling) for prompt in prompts]
        self.run()
        for request_id in ids:
            assert not self.outcomes[request_id].error, self.outcomes[request_id].error
        return [self.outcomes[request_id].token_ids for request_id in ids]

    def close(self) -> None:
        self.backend.close()

    def _receive(self, idle: bool) -> Iterable[tuple[int, ToEngine]]:
        while self._inbox:
            yield 0, self._inbox.popleft()

    def _publish(self, client: int, events: list[TokenEvent]) -> None:
        for event in events:
            outcome = self.outcomes[event.request_id]
            assert outcome.finish_reason is None, f"{event.request_id} got news after its end"
            outcome.token_ids += event.token_ids
            outcome.logprobs += event.logprobs or []
            outcome.top_logprobs += event.top_logprobs or []
            outcome.num_cached_tokens = max(outcome.num_cached_tokens, event.num_cached_tokens)
            if event.finish_reason is not None:
                outcome.finish_reason, outcome.error = event.finish_reason, event.error
