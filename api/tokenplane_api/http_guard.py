"""Connections that cost more than they bring: endless headers, bodies that never come, answers that nobody takes.

uvicorn's HTTP protocol with a limit on the size of the head, a time limit for head and body each, and bounded buffers:
a client that sends a byte per second is told so and closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from http import HTTPStatus

import msgspec
from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .settings import Settings

_ABORT = "tokenplane.abort"

SEND_BUFFER_BYTES = 1 << 18
"""Of the kernel, for each connection. Its own rule would let a client that reads nothing pile up some megabytes."""


def abort(scope: Scope) -> None:
    """Close the request's connection at once: an ordinary close would wait for a client that takes nothing."""
    extension = scope.get("extensions", {}).get(_ABORT)
    if extension is not None:
        extension["abort"]()


class GuardedProtocol(HttpToolsProtocol):
    """Limits are class attributes: uvicorn makes the instances; see `guarded_protocol`."""

    header_timeout_s: float
    body_timeout_s: float
    max_header_bytes: int

    _timer: asyncio.TimerHandle | None = None
    _in_head = False  # from the first byte of a request line to the empty line
    _in_body = False
    _num_new_heads = 0  # that began in the chunk being parsed
    _is_refused = False
    _head_bytes = 0  # complete headers
    _fed_bytes = 0  # whole chunks

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        raw = transport.get_extra_info("socket")
        if raw is not None:
            with contextlib.suppress(OSError):
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        self._start_timer(self.header_timeout_s, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        was_outside = not (self._in_head or self._in_body)
        self._num_new_heads = 0
        super().data_received(data)
        if self._is_refused or self._in_body or self.transport.is_closing():
            return
        # The parser reports a header when it is complete; what is not yet is counted here, in chunks that hold no
        # part of an earlier request.
        if self._in_head and self._num_new_heads == was_outside:
            self._fed_bytes += len(data)
            if self._fed_bytes > self.max_header_bytes:
                self._refuse_head()
        # Empty lines before a request take uvicorn's timer for idle connections away.
        if self._timer is None and (self._in_head or (self._is_idle and self.timeout_keep_alive_task is None)):
            self._start_timer(self.header_timeout_s, self._head_is_late)

    @property
    def _is_idle(self) -> bool:
        """No answer is under way."""
        return not self.pipeline and (self.cycle is None or self.cycle.response_complete)

    # --- What the parser calls ------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {_ABORT: {"abort": self.transport.abort}}
        self._in_head = True
        self._num_new_heads += 1
        self._head_bytes = self._fed_bytes = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._count(len(name) + len(value) + 4)

    def on_headers_complete(self) -> None:
        self._stop_timer()
        self._in_head = False
        if not self._is_refused:
            super().on_headers_complete()
            self._in_body = True
            self._start_timer(self.body_timeout_s, self._body_is_late)

    def on_body(self, body: bytes) -> None:
        if not self._is_refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._stop_timer()
        self._in_body = False
        if not self._is_refused:
            super().on_message_complete()

    # --- Limits ---------------------------------------------------------------------------------------------

    def _count(self, num_bytes: int) -> None:
        self._head_bytes += num_bytes
        if self._head_bytes > self.max_header_bytes:
            self._refuse_head()

    def _refuse_head(self) -> None:
        self._refuse(
            HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
            f"request line and headers have more than {self.max_header_bytes} bytes (--max-header-bytes)",
            self._is_idle,
        )

    def _head_is_late(self) -> None:
        """An idle connection is closed without a word, as clients expect of one."""
        self._refuse(
            HTTPStatus.REQUEST_TIMEOUT,
            f"the headers were not complete after {self.header_timeout_s:g} s (--header-timeout-s)",
            self._is_idle and self._in_head,
        )

    def _body_is_late(self) -> None:
        self._refuse(
            HTTPStatus.REQUEST_TIMEOUT,
            f"the body was not complete after {self.body_timeout_s:g} s (--body-timeout-s)",
            not self.pipeline and not self.cycle.response_started,
        )

    def _refuse(self, status: HTTPStatus, message: str, may_answer: bool) -> None:
        """Close; say why if no other answer is under way. What the application began for it is cancelled by that."""
        self._stop_timer()
        if self._is_refused or self.transport.is_closing():
            return
        self._is_refused = True
        if may_answer:
            error_type = status.phrase.lower().replace(" ", "_")
            body = msgspec.json.encode({"error": message, "error_type": error_type})
            head = (
                f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()

    def _start_timer(self, limit_s: float, action: Callable[[], None]) -> None:
        self._timer = self.loop.call_later(limit_s, action)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def timeout_keep_alive_handler(self) -> None:
        """Idle for long: whoever has not taken the last answer by now never will."""
        self.transport.abort()


def guarded_protocol(settings: Settings) -> type[GuardedProtocol]:
    """The protocol class for `uvicorn.Config(http=...)`."""
    limits = {
        "header_timeout_s": settings.header_timeout_s,
        "body_timeout_s": settings.body_timeout_s,
        "max_header_bytes": settings.max_header_bytes,
    }
    return type("GuardedProtocol", (GuardedProtocol,), limits)
