"""Server-sent events, and noticing that a client has left.

Framing is TGI's and OpenAI's: `data: `, one line of JSON, a blank line; a comment (`:`) after 15 s of silence so that
proxies keep the connection open.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing
from time import monotonic
from typing import Any, TypeVar

import msgspec
from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from .errors import INTERNAL, SLOW_READER, ApiError, ClientGone, as_api_error
from .http_guard import abort
from .request_scope import BODY_SEND, RequestRecord, log

T = TypeVar("T")

KEEP_ALIVE_S = 15.0

_encode = msgspec.json.Encoder().encode

_LINE_BREAKS = {c.encode(): b"\\u%04x" % ord(c) for c in "\x85\u2028\u2029"}
"""What some clients take for the end of a line besides \\r and \\n (Python's str.splitlines, as in httpx)."""


def encode_line(value: Any) -> bytes:
    """JSON that is one line for every reader of the stream."""
    data = _encode(value)
    if not data.isascii():
        for character, escape in _LINE_BREAKS.items():
            data = data.replace(character, escape)
    return data


def event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: %b\n\n" % encode_line(value)


class EventStream(Response):
    """Sends events until they end, the client leaves, or an error ends them with an event of its own.

    events: yields encoded events; closed in every case. error_event: how the dialect says an error in a stream.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        error_event: Callable[[ApiError], bytes],
        record: RequestRecord,
        headers: Mapping[str, str],
    ) -> None:
        self.status_code = 200
        self.background = None
        self.body = b""
        self._events = events
        self._error_event = error_event
        self._record = record
        self._last_sent_s = monotonic()
        self._is_sending = False
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no", **headers})
        del self.headers["content-length"]
        self.headers["content-type"] = self.media_type

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        send = scope.get(BODY_SEND, send)
        pump = asyncio.create_task(self._pump(send))
        watch = asyncio.create_task(self._watch(scope, receive, send))
        try:
            await asyncio.wait((pump, watch), return_when=asyncio.FIRST_COMPLETED)
            if pump.done():
                pump.result()
            else:
                self._record.client_left = True
        finally:
            await _end(pump, watch)

    async def _pump(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            try:
                async for data in events:
                    self._last_sent_s = monotonic()
                    self._is_sending = True  # waits while the connection's buffers are full
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                    self._is_sending = False
            except Exception as error:
                self._record.error = found = as_api_error(error)
                if found.kind is INTERNAL:
                    log.exception("id=%s internal error in a stream", self._record.request_id)
                await send({"type": "http.response.body", "body": self._error_event(found), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _watch(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Keep the connection alive; return when the client has left, or has taken nothing for too long."""
        limit_s = self._record.slow_reader_timeout_s
        while True:
            quiet_s = monotonic() - self._last_sent_s
            if self._is_sending and quiet_s >= limit_s:
                return await self._drop(scope, receive)
            if not self._is_sending and quiet_s >= KEEP_ALIVE_S:
                self._last_sent_s = monotonic()
                try:
                    await asyncio.wait_for(
                        send({"type": "http.response.body", "body": b":\n\n", "more_body": True}), limit_s
                    )
                except TimeoutError:
                    return await self._drop(scope, receive)
                continue
            wait_s = limit_s - quiet_s if self._is_sending else min(KEEP_ALIVE_S - quiet_s, limit_s)
            try:
                message = await asyncio.wait_for(receive(), wait_s)
            except TimeoutError:
                continue
            if message["type"] == "http.disconnect":
                return

    async def _drop(self, scope: Scope, receive: Receive) -> None:
        """Close the connection without waiting for the client to take what is still buffered."""
        limit_s = self._record.slow_reader_timeout_s
        why = f"the client took nothing of the stream for {limit_s:g} s (--slow-reader-timeout-s)"
        self._record.error = ApiError(SLOW_READER, why)
        abort(scope)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(receive(), 1.0)  # the server has noticed that the connection is gone


async def unless_client_leaves(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await the work, or give it up as soon as the client closes the connection.

    Raises:
        ClientGone: the work was cancelled; nobody waits for an answer.
    """
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_disconnected(request.receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        await _end(task, watch)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
