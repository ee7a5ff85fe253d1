"""The life of one HTTP request: its id, its log line, and the end of everything it started.

Outermost of our layers. Whatever happens inside, when a request is over its engine requests are cancelled (which does
nothing to finished ones), one line is logged, and no exception travels on to the server.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import INTERNAL, NOT_READY, ApiError, as_api_error, error_response
from .metrics import Metrics

if TYPE_CHECKING:
    from .generation import Generation

log = logging.getLogger("tokenplane.request")

_QUIET_PATHS = frozenset({"/", "/health", "/live", "/ping", "/metrics"})
"""Probes ask for these every few seconds; their GETs are logged at debug level."""


@dataclass(slots=True)
class RequestRecord:
    """What the log line and the metrics need to know; the routes fill it in."""

    request_id: str
    arrived_s: float
    num_asked: int = 0  # generations, valid or not
    generations: list[Generation] = field(default_factory=list)
    error: ApiError | None = None
    client_left: bool = False

    def cancel(self) -> None:
        for generation in self.generations:
            generation.cancel()


def record_of(request: Request) -> RequestRecord:
    record: RequestRecord = request.scope["tokenplane.record"]
    return record


class RequestScope:
    """Pure ASGI middleware; adds the x-request-id header."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(secrets.token_hex(12), perf_counter())
        scope["tokenplane.record"] = record
        status = 0

        async def send_noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", record.request_id.encode())]
            await send(message)

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
            record.cancel()
            self._count_failure(record)
            _log(scope, status, record)

    def _count_failure(self, record: RequestRecord) -> None:
        """What was asked for and did not finish: asked = succeeded + failed, once nothing is in flight."""
        num_failed = record.num_asked - sum(g.finish_reason is not None for g in record.generations)
        if record.client_left:
            self._metrics.failed("dropped", num_failed)
        elif record.error is not None:
            self._metrics.failed(record.error.kind.metric, num_failed)


def _log(scope: Scope, status: int, record: RequestRecord) -> None:
    quiet = scope["method"] == "GET" and scope["path"] in _QUIET_PATHS
    level = logging.DEBUG if quiet else logging.INFO
    if log.isEnabledFor(level):
        log.log(level, "%s", log_line(scope["method"], scope["path"], status, record))


def log_line(method: str, path: str, status: int, record: RequestRecord) -> str:
    """key=value pairs on one line; times in milliseconds."""
    total_s = perf_counter() - record.arrived_s
    pairs: dict[str, object] = {"id": record.request_id, "method": method, "path": _one_word(path), "status": status}
    done = record.generations
    if done:
        first_s = min((g.times.first_token_s for g in done if g.times.first_token_s), default=0.0)
        started = [g for g in done if g.times.started_s]
        pairs["prompt_tokens"] = sum(len(g.spec.prompt_ids) for g in done)
        pairs["cached_tokens"] = sum(g.num_cached_tokens for g in done)
        pairs["generated_tokens"] = sum(g.num_tokens for g in done)
        pairs["finish"] = ",".join(g.finish_reason or "none" for g in done)
        if started:
            pairs["queue_ms"] = _ms(max(g.times.started_s - g.times.queued_s for g in started))
        if first_s:
            pairs["first_token_ms"] = _ms(first_s - record.arrived_s)
    pairs["total_ms"] = _ms(total_s)
    if record.client_left:
        pairs["client"] = "left"
    if record.error is not None:
        pairs["error"] = f'"{_one_line(record.error.message)}"'
    return " ".join(f"{key}={value}" for key, value in pairs.items())


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f}"


def _one_word(path: str) -> str:
    return path if path.isascii() and path.isprintable() and " " not in path else repr(path)


def _one_line(text: str) -> str:
    """Client text must not forge log lines."""
    shown = text if len(text) <= 300 else text[:297] + "..."
    return "".join(c if c.isprintable() else " " for c in shown).replace('"', "'")
