"""What the API talks to: starts the engine process, submits requests, streams events, and starts it anew when it dies.

The client keeps the prompt and the emitted tokens of every live request. When the engine process dies or falls
silent it is replaced, and the live requests are submitted again as prompt plus emitted tokens: the law of random draws
(backend/sampling.py) makes the stream go on with the tokens it would have had. A request that has lived through
MAX_ENGINES engines is failed instead: it may be what kills them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

import msgspec

from .backend import errors
from .backend.errors import ConfigError, EngineFailed, EngineNotReady, InvalidRequest, QueueFull, TokenplaneError
from .config import EngineConfig
from .messages import (
    Cancel,
    EngineInfo,
    Events,
    Fatal,
    FrameReader,
    FromEngine,
    Ready,
    Stats,
    Submit,
    TokenEvent,
    frame,
    from_engine_decoder,
)
from .validation import check_request

log = logging.getLogger("tokenplane.client")

MAX_ENGINES = 3
FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 30.0
HEALTHY_AFTER_S = 60.0
MAX_SOCKET_PATH_BYTES = 100  # Linux allows 107, macOS 103


class RequestStream:
    """The events of one request: an async iterator that ends after the event with a finish_reason."""

    def __init__(self, client: EngineClient, request: Submit, wire_id: str) -> None:
        self.request_id = request.request_id
        self.request = request
        self.wire_id = wire_id  # unique, so that late events of a cancelled request never meet another
        self.emitted: list[int] = []
        self.num_engines = 1  # that have held this request
        self._client = client
        self._events: deque[TokenEvent] = deque()
        self._error: TokenplaneError | None = None
        self._ended = False
        self._waiter: asyncio.Future[None] | None = None

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> TokenEvent:
        """The next event.

        Raises:
            InvalidRequest: the engine refused the request.
            EngineFailed: the engine died and the request could not be continued.
        """
        while not self._events:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._events.popleft()

    def cancel(self) -> None:
        """Give the request up: its blocks come back, no more events follow. Idempotent, never waits."""
        if not self._ended:
            self._ended = True
            self._events.clear()
            self._client._cancel(self.wire_id)
            self._wake()

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
            refused = bool(event.error_field) and self.num_engines == 1
            self.fail(InvalidRequest(event.error, event.error_field) if refused else EngineFailed(event.error))
            return
        self.emitted += event.token_ids
        self._events.append(event)
        self._ended = event.finish_reason is not None
        self._wake()

    def fail(self, error: TokenplaneError) -> None:
        """End the stream with an error, after the events it already has."""
        self._ended = True
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _Wire(asyncio.Protocol):
    """Frames from the engine, decoded and handed to the client as they arrive."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        self._reader = FrameReader()
        self.lost = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        for body in self._reader.feed(data):
            self._client._on_message(from_engine_decoder.decode(body))

    def connection_lost(self, error: Exception | None) -> None:
        if not self.lost.done():
            self.lost.set_result(None)


class EngineClient:
    """Supervisor of one engine process and the way to it. One event loop, no threads."""

    def __init__(self, config: EngineConfig, max_requests: int = 128) -> None:
        self.config = config
        self.max_requests = max_requests
        self.num_restarts = 0
        self.stats = Stats()
        self._info: EngineInfo | None = None
        self._live: dict[str, RequestStream] = {}  # by wire_id
        self._num_submitted = 0
        self._process: asyncio.subprocess.Process | None = None
        self._transport: asyncio.Transport | None = None
        self._ready: asyncio.Future[None] | None = None
        self._is_ready = False
        self._last_word_s = 0.0
        self._folder: Path | None = None
        self._supervisor: asyncio.Task[None] | None = None

    # --- What the API uses ----------------------------------------------------------------------------------

    @property
    def info(self) -> EngineInfo:
        """What the engine turned out to be. Raises EngineNotReady before the first start."""
        if self._info is None:
            raise EngineNotReady("the engine has not started yet")
        return self._info

    @property
    def is_ready(self) -> bool:
        return self._is_ready

    @property
    def num_live(self) -> int:
        return len(self._live)

    @property
    def engine_pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def start(self) -> None:
        """Start the engine process and wait until it is ready.

        Raises:
            TokenplaneError: the engine's own reason; nothing is left running.
        """
        self._folder = Path(tempfile.mkdtemp(prefix="tokenplane-"))
        try:
            lost = await self._launch()
        except BaseException:
            await self.close()
            raise
        self._supervisor = asyncio.create_task(self._supervise(lost))

    async def close(self) -> None:
        """End the engine process; live requests fail with EngineFailed. May be called twice."""
        try:
            if self._supervisor is not None:
                self._supervisor.cancel()
                await asyncio.wait([self._supervisor])
                self._supervisor = None
            await self._stop_process()
        finally:
            self._fail_all(EngineFailed("the server is shutting down"))
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)
                self._folder = None

    def submit(self, request: Submit) -> RequestStream:
        """Hand a request to the engine.

        Raises:
            EngineNotReady: it is starting or restarting.
            QueueFull: max_requests are live.
            InvalidRequest: the request breaks a limit of EngineInfo.
        """
        if not self._is_ready:
            raise EngineNotReady("the engine is starting or restarting; try again in a moment")
        if len(self._live) >= self.max_requests:
            raise QueueFull(f"{len(self._live)} requests are running or waiting, the limit is {self.max_requests}")
        check_request(request, self.info)
        self._num_submitted += 1
        stream = RequestStream(self, request, wire_id=str(self._num_submitted))
        message = frame(stream.as_continued())  # before it is live: what cannot be encoded never was submitted
        self._live[stream.wire_id] = stream
        self._send(message)
        return stream

    # --- Messages -------------------------------------------------------------------------------------------

    def _send(self, message: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(message)

    def _cancel(self, wire_id: str) -> None:
        if self._live.pop(wire_id, None) is not None:
            self._send(frame(Cancel(wire_id)))

    def _on_message(self, message: FromEngine) -> None:
        self._last_word_s = time.monotonic()
        if isinstance(message, Events):
            for event in message.events:
                stream = self._live.get(event.request_id)
                if stream is None:
                    continue  # cancelled while the event was on its way
                if event.finish_reason is not None:
                    del self._live[event.request_id]
                stream.push(event)
        elif isinstance(message, Stats):
            self.stats = message
        elif isinstance(message, Ready):
            self._info = message.info
            if self._ready is not None and not self._ready.done():
                self._ready.set_result(None)
        elif self._ready is not None and not self._ready.done():
            self._ready.set_exception(_as_exception(message))

    # --- The process ----------------------------------------------------------------------------------------

    async def _launch(self) -> asyncio.Future[None]:
        """Start a process and wait until it is ready; returns the future that fires when its connection is lost."""
        assert self._folder is not None
        path = self._folder / f"{self.num_restarts}.sock"
        if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
            raise ConfigError(
                f"the engine's socket {path} has a path of over {MAX_SOCKET_PATH_BYTES} bytes;"
                " set TMPDIR to a shorter one"
            )
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tokenplane_core.process", str(path), stdin=asyncio.subprocess.PIPE
        )
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.msgpack.encode(self.config))
        self._process.stdin.close()
        self._ready = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(self.config.ready_timeout_s):
                wire = await self._connect(path)
                await asyncio.wait([self._ready, wire.lost], return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            limit_s = self.config.ready_timeout_s
            raise EngineFailed(
                f"the engine was not ready after {limit_s:g} s (--ready-timeout); see its log above"
            ) from None
        if not self._ready.done():
            status = await self._process.wait()
            raise EngineFailed(f"the engine process ended with status {status} while starting; see its log above")
        self._ready.result()
        self._is_ready = True
        self._last_word_s = time.monotonic()
        return wire.lost

    async def _connect(self, path: Path) -> _Wire:
        """Connect as soon as the process has bound its socket."""
        assert self._process is not None
        loop = asyncio.get_running_loop()
        while True:
            try:
                transport, wire = await loop.create_unix_connection(lambda: _Wire(self), str(path))
            except (FileNotFoundError, ConnectionRefusedError):
                if self._process.returncode is not None:
                    status = self._process.returncode
                    raise EngineFailed(
                        f"the engine process ended with status {status} at once; see its log above"
                    ) from None
                await asyncio.sleep(0.02)
            else:
                self._transport = transport
                return wire

    async def _supervise(self, lost: asyncio.Future[None]) -> None:
        """Replace the engine whenever it dies or hangs."""
        backoff_s = FIRST_BACKOFF_S
        while True:
            ready_since_s = time.monotonic()
            await self._wait_for_end(lost)
            self._is_ready = False
            await self._stop_process(grace_s=0)
            if time.monotonic() - ready_since_s > HEALTHY_AFTER_S:
                backoff_s = FIRST_BACKOFF_S
            self._fail_repeat_offenders()
            while True:
                self.num_restarts += 1
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
                try:
                    lost = await self._launch()
                    break
                except (TokenplaneError, OSError) as error:
                    log.error("the engine did not come back (next try in %.1f s): %s", backoff_s, error)
                    await self._stop_process(grace_s=0)
                    self._fail_all(EngineFailed(f"the engine did not come back: {error}"))
            log.info("the engine is back, continuing %d requests", len(self._live))
            for stream in self._live.values():
                self._send(frame(stream.as_continued()))

    async def _wait_for_end(self, lost: asyncio.Future[None]) -> None:
        """Returns when the engine has died, or has been silent for so long that it counts as hung."""
        while True:
            silent_s = time.monotonic() - self._last_word_s
            left_s = self.config.hang_timeout_s - silent_s
            if left_s <= 0:
                log.error("the engine has been silent for %.0f s: it is killed and replaced", silent_s)
                return
            await asyncio.wait([lost], timeout=left_s)
            if lost.done():
                log.error("the engine process died with %d requests in flight: it is replaced", len(self._live))
                return

    async def _stop_process(self, grace_s: float = 5.0) -> None:
        """Close the connection, which asks the process to end; kill it if it does not within the grace."""
        self._is_ready = False
        if self._transport is not None:
            self._transport.abort()
            self._transport = None
        if self._process is None:
            return
        try:
            async with asyncio.timeout(grace_s):
                await self._process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
        self._process = None

    def _fail_repeat_offenders(self) -> None:
        for stream in list(self._live.values()):
            if stream.num_engines >= MAX_ENGINES:
                del self._live[stream.wire_id]
                stream.fail(EngineFailed(f"the engine died {stream.num_engines} times while it held this request"))
            stream.num_engines += 1

    def _fail_all(self, error: EngineFailed) -> None:
        for stream in self._live.values():
            stream.fail(error)
        self._live.clear()


def _as_exception(message: Fatal) -> TokenplaneError:
    """The engine's start-up error as the class it was."""
    kind = getattr(errors, message.kind, EngineFailed)
    if not (isinstance(kind, type) and issubclass(kind, TokenplaneError)) or kind is InvalidRequest:
        kind = EngineFailed
    return kind(message.message)
