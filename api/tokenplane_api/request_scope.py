"""The life of one HTTP request: its id, its time limit, its log line, its trace, and the end of everything it started.

Outermost of our layers. Whatever happens inside, when a request is over its engine requests are cancelled (which does
nothing to finished ones), one line is logged, and no exception travels on to the server.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import INTERNAL, NOT_READY, ApiError, RequestTimeout, as_api_error, error_response
from .metrics import Metrics
from .settings import Settings

if TYPE_CHECKING:
    from .generation import Generation
    from .tracing import Tracing

log = logging.getLogger("tokenplane.request")

BODY_SEND = "tokenplane.send"
"""In the scope: sends the body of a stream past all layers, which only look at how a response starts. Hot code."""

_QUIET_PATHS = frozenset({"/", "/health", "/live", "/ping", "/metrics"})
"""Probes ask for these every few seconds; their GETs are logged at debug level and not traced."""

_SANE_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
"""What a client may call its request: no spaces, quotes or line breaks, so that it can stand in a log line."""


@dataclass(slots=True)
class RequestRecord:
    """What the log line, the metrics and the trace need to know; the routes fill it in."""

    request_id: str
    arrived_s: float
    slow_reader_timeout_s: float = 30.0
    key_name: str | None = None  # whose API key it came with
    num_asked: int = 0  # generations, valid or not
    generations: list[Generation] = field(default_factory=list)
    error: ApiError | None = None
    client_left: bool = False
    timeout: RequestTimeout | None = None  # set when the time limit has passed
    on_end: list[Callable[[], None]] = field(default_factory=list)

    def cancel(self) -> None:
        for generation in self.generations:
            generation.cancel()

    def expire(self, limit_s: float) -> None:
        """End what runs with an error; what has not begun yet is refused when it is about to (Service.generate)."""
        self.timeout = RequestTimeout(f"the request took longer than {limit_s:g} s (--request-timeout-s)")
        for generation in self.generations:
            generation.give_up(self.timeout)


def record_of(request: Request) -> RequestRecord:
    record: RequestRecord = request.scope["tokenplane.record"]
    return record


class RequestScope:
    """Pure ASGI middleware; adds the x-request-id header. tracing: None costs nothing."""

    def __init__(self, app: ASGIApp, metrics: Metrics, settings: Settings, tracing: Tracing | None = None) -> None:
        self._app = app
        self._metrics = metrics
        self._tracing = tracing
        self._timeout_s = settings.request_timeout_s
        self._slow_reader_timeout_s = settings.slow_reader_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(_request_id(scope), perf_counter(), self._slow_reader_timeout_s)
        scope["tokenplane.record"] = record
        scope[BODY_SEND] = send
        status = 0

        async def send_noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", record.request_id.encode())]
            await send(message)

        timer = None
        if self._timeout_s is not None:
            timer = asyncio.get_running_loop().call_later(self._timeout_s, record.expire, self._timeout_s)
        try:
            await self._app(scope, receive, send_noting)
        except asyncio.CancelledError:
            # The server cancels what outlives the grace period; passed on, each would be a stack trace in the log.
            record.error = ApiError(NOT_READY, "the server is stopping, and its grace period is over")
            if status == 0:
                await error_response(scope["path"], record.error)(scope, receive, send_noting)
        except Exception as error:
            path = _one_word(scope["path"])
            log.exception("id=%s internal error on %s %s", record.request_id, scope["method"], path)
            record.error = as_api_error(error) if status == 0 else ApiError(INTERNAL, "internal error")
            if status == 0:
                await error_response(scope["path"], record.error)(scope, receive, send_noting)
        finally:
            if timer is not None:
                timer.cancel()
            record.cancel()
            self._end(scope, status, record)

    def _end(self, scope: Scope, status: int, record: RequestRecord) -> None:
        for action in record.on_end:
            action()
        self._count_failure(record)
        is_quiet = scope["method"] in ("GET", "HEAD") and scope["path"] in _QUIET_PATHS
        level = logging.DEBUG if is_quiet else logging.INFO
        if log.isEnabledFor(level):
            fields = request_fields(scope["method"], scope["path"], status, record)
            summary = {"message": f"{scope['method']} {fields['path']} {status}"}
            log.log(level, "%s", log_line(fields), extra={"fields": summary | fields})
        if self._tracing is not None and not is_quiet:
            self._tracing.export(scope, status, record)

    def _count_failure(self, record: RequestRecord) -> None:
        """What was asked for and did not finish: asked = succeeded + failed, once nothing is in flight."""
        num_failed = record.num_asked - sum(g.finish_reason is not None for g in record.generations)
        if record.client_left:
            self._metrics.failed("dropped", num_failed)
        elif record.error is not None:
            self._metrics.failed(record.error.kind.metric, num_failed)


def _request_id(scope: Scope) -> str:
    """The client's own, if it is fit for a log line."""
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _SANE_ID.fullmatch(given) else secrets.token_hex(12)


def request_fields(method: str, path: str, status: int, record: RequestRecord) -> dict[str, Any]:
    """What there is to say about a request that is over; times in milliseconds."""
    total_s = perf_counter() - record.arrived_s
    fields: dict[str, Any] = {"id": record.request_id, "method": method, "path": _one_word(path), "status": status}
    if record.key_name is not None:
        fields["key"] = _one_word(record.key_name)
    done = record.generations
    if done:
        first_s = min((g.times.first_token_s for g in done if g.times.first_token_s), default=0.0)
        started = [g for g in done if g.times.started_s]
        fields["prompt_tokens"] = sum(len(g.spec.prompt_ids) for g in done)
        fields["cached_tokens"] = sum(g.num_cached_tokens for g in done)
        fields["generated_tokens"] = sum(g.num_tokens for g in done)
        fields["finish"] = ",".join(g.finish_reason or "none" for g in done)
        if started:
            fields["queue_ms"] = _ms(max(g.times.started_s - g.times.queued_s for g in started))
        if first_s:
            fields["first_token_ms"] = _ms(first_s - record.arrived_s)
    fields["total_ms"] = _ms(total_s)
    if record.client_left:
        fields["client"] = "left"
    if record.error is not None:
        fields["error"] = _one_line(record.error.message)
    return fields


def log_line(fields: dict[str, Any]) -> str:
    """key=value pairs on one line."""
    return " ".join(f'{key}="{value}"' if key == "error" else f"{key}={value}" for key, value in fields.items())


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)


def _one_word(path: str) -> str:
    return path if path.isascii() and path.isprintable() and " " not in path else repr(path)


def _one_line(text: str) -> str:
    """Client text must not forge log lines."""
    shown = text if len(text) <= 300 else text[:297] + "..."
    return "".join(c if c.isprintable() else " " for c in shown).replace('"', "'")
