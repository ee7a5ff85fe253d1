"""What every route works with: the engine, the text layer, the operator's settings and the counters."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import TypeVar

from fastapi import Request

from tokenplane_core.client import EngineClient

from .errors import NOT_READY, ApiError, invalid, overloaded
from .generation import Generation, GenerationSpec, Times
from .metrics import Metrics
from .request_scope import RequestRecord, record_of
from .settings import Limits, Settings, limits_for
from .text.answer_format import AnswerFormat
from .text.chat_template import ChatTemplate
from .text.tokenizer import TextTokenizer

T = TypeVar("T")

_INLINE_CHARS = 2000
"""Text up to this length is tokenized at once (well under a millisecond); longer text in a worker thread."""


class Service:
    """One per application. `starting` brings the engine up; until then `limits` is None and requests are refused."""

    def __init__(
        self, engine: EngineClient, tokenizer: TextTokenizer, chat_template: ChatTemplate | None, settings: Settings
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.settings = settings
        self.answer_format = AnswerFormat.of_model(
            tokenizer, chat_template, settings.tool_call_parser, settings.reasoning_parser
        )
        self.limits: Limits | None = None
        self.metrics = Metrics(engine)
        self._num_by_key: Counter[str] = Counter()
        self._starting: asyncio.Task[None] | None = None
        self._workers = ThreadPoolExecutor(settings.validation_workers, thread_name_prefix="tokenize")

    def starting(self) -> asyncio.Task[None]:
        """The task that starts the engine; the first call creates it.

        It ends when the engine serves, or with the TokenplaneError that says why it never will. In both cases `close`
        is still to be called.
        """
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())
        return self._starting

    async def _start(self) -> None:
        await self.engine.start()
        self.limits = limits_for(self.settings, self.engine.info)
        self.metrics.set_limits(self.limits)

    async def close(self) -> None:
        """End the engine, also one that is still starting."""
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        self._workers.shutdown(wait=False, cancel_futures=True)
        await self.engine.close()

    @property
    def is_ready(self) -> bool:
        return self.limits is not None and self.engine.is_ready

    def ask(self, record: RequestRecord, num_generations: int) -> None:
        """Count what the request asks for; called again when it turns out how many."""
        self.metrics.asked(num_generations - record.num_asked)
        record.num_asked = num_generations

    def require_ready(self) -> Limits:
        """The limits of the running engine; raises ApiError (503) while there is none."""
        if self.limits is None:
            raise ApiError(NOT_READY, "the model is still loading; try again later", code="not_ready")
        if not self.engine.is_ready:
            raise ApiError(NOT_READY, "the engine is restarting; try again in a few seconds", code="not_ready")
        return self.limits

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return await self.in_worker(len(text), lambda: self.tokenizer.encode(text, add_special_tokens))

    async def in_worker(self, num_chars: int, work: Callable[[], T]) -> T:
        """Run work whose cost grows with a text; only short texts on the event loop."""
        if num_chars <= _INLINE_CHARS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._workers, work)

    def generate(self, specs: Sequence[GenerationSpec], record: RequestRecord, count_field: str) -> list[Generation]:
        """Submit the sequences of one HTTP request, all or none.

        count_field: the request field that made them so many, for the error message. The record cancels them when the
        HTTP request is over, however it ends.

        Raises:
            RequestError: the engine refuses one of them; those already submitted are cancelled with the record.
            ApiError: the limits of the server or of the client's key do not allow so many.
            RequestTimeout: the request's time was over before it came to this.
        """
        most = self.settings.max_concurrent_requests
        if len(specs) > most:
            raise invalid(
                f"`{count_field}` asks for {len(specs)} sequences, the limit is {most} (--max-concurrent-requests)",
                count_field,
            )
        self.ask(record, len(specs))
        if record.timeout is not None:
            raise record.timeout
        self._admit_key(record, len(specs))
        for i, spec in enumerate(specs):
            self.metrics.received(spec)
            times = Times(record.arrived_s, queued_s=perf_counter())
            stream = self.engine.submit(spec.submit(f"{record.request_id}-{i}", self.tokenizer.stop_token_ids))
            record.generations.append(Generation(spec, stream, self.tokenizer, times, self.metrics.succeeded))
        return record.generations

    def _admit_key(self, record: RequestRecord, num_specs: int) -> None:
        """Count what a key's holder has running or waiting, until the HTTP request is over."""
        most, name = self.settings.max_requests_per_key, record.key_name
        if most is None or name is None:
            return
        if self._num_by_key[name] + num_specs > most:
            raise overloaded(
                f"this API key has {self._num_by_key[name]} requests running or waiting, the limit is {most}"
                " (--max-requests-per-key)",
                self.engine.retry_after_s,
            )
        self._num_by_key[name] += num_specs

        def give_back() -> None:
            self._num_by_key[name] -= num_specs
            if not self._num_by_key[name]:
                del self._num_by_key[name]

        record.on_end.append(give_back)


def begin(request: Request) -> Service:
    """The service, for a request for generations: counted as one until it turns out how many.

    Raises:
        ApiError: as require_ready.
    """
    service: Service = request.app.state.service
    service.require_ready()
    service.ask(record_of(request), 1)
    return service
