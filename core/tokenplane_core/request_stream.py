"""The events of one request on their way to its reader, and what is needed to go on when the engine is replaced."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from time import monotonic

import msgspec

from .backend.errors import EngineFailed, InvalidRequest, ReaderTooSlow, TokenplaneError
from .messages import Submit, TokenEvent
from .trials import FIRST_TRIAL_TOKENS

MAX_JOINED_EVENTS = 64
"""A reader that has fallen behind the device gets up to so many tokens at once, at little more than the cost of one."""

MAX_UNREAD_EVENTS = 16_384
"""A reader this far behind the engine is given up, and its blocks come back."""


class RequestStream:
    """An async iterator that ends after the event with a finish_reason.

    on_end: called once when the stream ends before the engine says so, with the stream.
    """

    def __init__(self, request: Submit, wire_id: str, on_end: Callable[[RequestStream], None]) -> None:
        self.request_id = request.request_id
        self.request = request
        self.wire_id = wire_id  # unique, so that late events of a cancelled request never meet another
        self.emitted: list[int] = []
        self.has_started = False  # the engine took it out of its queue
        self.has_ended = False
        self.in_engine = False
        self.num_deaths = 0  # of engines that held it; set back when a trial acquits it
        self.trial_tokens = FIRST_TRIAL_TOKENS
        self.last_token_s = 0.0  # monotonic
        self._on_end = on_end
        self._events: deque[TokenEvent] = deque()
        self._error: TokenplaneError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._queue_timer: asyncio.TimerHandle | None = None

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> TokenEvent:
        """The next event: all that is new since the last call, up to MAX_JOINED_EVENTS.

        Raises:
            InvalidRequest: the engine refused the request.
            EngineFailed: the engine died and the request could not be continued.
            RequestError: whatever `give_up` was called with.
        """
        while not self._events:
            if self._error is not None:
                raise self._error
            if self.has_ended:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        event = self._events.popleft()
        if not self._events or not self._events[0].token_ids:
            return event
        joined = [event]
        # An end without tokens stays alone: joined, it would turn the token before it into the stop token.
        while self._events and self._events[0].token_ids and len(joined) < MAX_JOINED_EVENTS:
            joined.append(self._events.popleft())
        return _join(joined)

    def cancel(self) -> None:
        """Give the request up: its blocks come back, no more events follow. Idempotent, never waits."""
        if not self.has_ended:
            self._events.clear()
            self._end(None)
            self._on_end(self)

    def give_up(self, error: TokenplaneError) -> None:
        """As cancel, but the reader gets the error, after the events it already has."""
        if not self.has_ended:
            self._end(error)
            self._on_end(self)

    def give_up_after(self, limit_s: float, make_error: Callable[[], TokenplaneError]) -> None:
        """Give the request up if it is still in the queue by then."""

        def check() -> None:
            if not self.has_started:
                self.give_up(make_error())

        self._queue_timer = asyncio.get_running_loop().call_later(limit_s, check)

    def as_continued(self) -> Submit:
        """The request as a new engine must see it: what was emitted counts as known."""
        return msgspec.structs.replace(
            self.request,
            request_id=self.wire_id,
            token_ids=self.request.token_ids + self.emitted,
            num_prompt_tokens=self.request.num_prompt_tokens or len(self.request.token_ids),
        )

    def push(self, event: TokenEvent) -> None:
        """An event from the engine."""
        if event.finish_reason == "error":
            # What one engine took and the next refuses (a longer prompt now) is not the client's fault.
            refused = bool(event.error_field) and not self.has_started and self.num_deaths == 0
            self.fail(InvalidRequest(event.error, event.error_field) if refused else EngineFailed(event.error))
            return
        self.has_started = True
        if not (event.token_ids or event.finish_reason):
            return  # it only says that the request has left the queue
        self.emitted += event.token_ids
        self._events.append(event)
        if event.finish_reason is not None:
            self._end(None)
        elif len(self._events) > MAX_UNREAD_EVENTS:
            self._events.clear()
            self.give_up(ReaderTooSlow(f"{MAX_UNREAD_EVENTS} tokens were waiting to be read"))
        else:
            self._wake()

    def fail(self, error: TokenplaneError) -> None:
        """End the stream with an error, after the events it already has."""
        self._end(error)

    def _end(self, error: TokenplaneError | None) -> None:
        self.has_ended = True
        self._error = error
        if self._queue_timer is not None:
            self._queue_timer.cancel()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _join(events: list[TokenEvent]) -> TokenEvent:
    """Events of one request, each with tokens, as one. What is told once stands in the first or ends the last."""
    first = events[0]
    return msgspec.structs.replace(
        first,
        token_ids=[token_id for event in events for token_id in event.token_ids],
        logprobs=None if first.logprobs is None else [x for event in events for x in event.logprobs or ()],
        top_logprobs=None if first.top_logprobs is None else [x for event in events for x in event.top_logprobs or ()],
        finish_reason=events[-1].finish_reason,
    )


class FinishRate:
    """How fast requests have been ending lately: what a client that is turned away is told to wait for."""

    KEPT = 64

    def __init__(self) -> None:
        self._ends_s: deque[float] = deque(maxlen=self.KEPT)

    def note(self) -> None:
        self._ends_s.append(monotonic())

    def wait_s(self, num_ahead: int, most_s: int, unknown_s: int) -> int:
        """Whole seconds until `num_ahead` requests will have ended, from 1 to `most_s`; `unknown_s` without history."""
        if len(self._ends_s) < 2:
            return unknown_s
        per_request_s = (monotonic() - self._ends_s[0]) / len(self._ends_s)
        return max(1, min(most_s, round(num_ahead * per_request_s + 0.5)))
