"""What the API talks to: starts the engine process, submits requests, streams events, and starts it anew when it dies.

The client keeps the prompt and the emitted tokens of every live request. When the engine process dies or falls
silent it is replaced, and the live requests are submitted again as prompt plus emitted tokens: the law of random draws
(backend/sampling.py) makes the stream go on with the tokens it would have had. Only a request that kills the engine
repeatedly is failed, alone: trials.py finds out which.
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
from pathlib import Path

import msgspec

from .backend.errors import ConfigError, EngineFailed, EngineNotReady, QueueFull, TokenplaneError, revived
from .client_adapters import ClientAdapters, LoadedAdapter
from .config import EngineConfig
from .durations import Durations
from .messages import (
    AdapterLoaded,
    Cancel,
    EngineInfo,
    Events,
    FrameReader,
    FromEngine,
    Ready,
    Stats,
    Submit,
    frame,
    from_engine_decoder,
)
from .request_stream import FinishRate, RequestStream
from .trials import Trials
from .validation import check_request

log = logging.getLogger("tokenplane.client")

FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 30.0
HEALTHY_AFTER_S = 60.0
MAX_SOCKET_PATH_BYTES = 100  # Linux allows 107, macOS 103
MAX_RETRY_AFTER_S = 60
UNKNOWN_RETRY_AFTER_S = 5  # nothing has ended yet


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

    def __init__(self, config: EngineConfig, max_requests: int = 128, max_queue_s: float | None = None) -> None:
        self.config = config
        self.max_requests = max_requests
        self.max_queue_s = max_queue_s
        self.num_restarts = 0
        self.stats = Stats()
        self.inter_token = Durations()
        self.adapters = ClientAdapters(
            lambda message: self._send(frame(message)), lambda: (s.request.adapter for s in self._live.values())
        )
        self._info: EngineInfo | None = None
        self._live: dict[str, RequestStream] = {}  # by wire_id
        self._num_submitted = 0
        self._trials = Trials()
        self._ends = FinishRate()
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
    def has_info(self) -> bool:
        """Whether an engine has been ready once."""
        return self._info is not None

    @property
    def is_ready(self) -> bool:
        return self._is_ready

    @property
    def num_live(self) -> int:
        return len(self._live)

    @property
    def retry_after_s(self) -> int:
        """In how many seconds a place in the queue is likely to be worth having, from what has ended lately."""
        return self._ends.wait_s(self.stats.num_waiting + 1, MAX_RETRY_AFTER_S, UNKNOWN_RETRY_AFTER_S)

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
            await self._load_first_adapters()
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
            raise QueueFull(
                f"{len(self._live)} requests are running or waiting, the limit is {self.max_requests}",
                self.retry_after_s,
            )
        check_request(request, self.info)
        self.adapters.require(request.adapter)
        stream = RequestStream(request, self._new_wire_id(request), self._on_ended_early)
        message = frame(stream.as_continued())  # before it is live: what cannot be encoded never was submitted
        self._live[stream.wire_id] = stream
        if self._trials.defendant is None:
            stream.in_engine = True
            self._send(message)
        if self.max_queue_s is not None:
            stream.give_up_after(self.max_queue_s, self._waited_too_long)
        return stream

    async def _load_first_adapters(self) -> None:
        """Those of the configuration; the server starts with all of them or not at all."""
        try:
            async with asyncio.timeout(self.config.ready_timeout_s):
                for name, path in self.config.adapters.items():
                    await self.load_adapter(name, path)
        except TimeoutError:
            limit_s = self.config.ready_timeout_s
            raise EngineFailed(f"the LoRA adapters were not loaded after {limit_s:g} s (--ready-timeout)") from None

    async def load_adapter(self, name: str, path: str) -> LoadedAdapter:
        """Load a LoRA adapter; see ClientAdapters.load. Raises EngineNotReady too."""
        if not self._is_ready:
            raise EngineNotReady("the engine is starting or restarting; try again in a moment")
        return await self.adapters.load(name, path)

    def _waited_too_long(self) -> QueueFull:
        return QueueFull(
            f"waited {self.max_queue_s:g} s in the queue, which is the limit (--queue-timeout-s)", self.retry_after_s
        )

    # --- Messages -------------------------------------------------------------------------------------------

    def _send(self, message: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(message)

    def _new_wire_id(self, request: Submit) -> str:
        """Unique, and with the id that the engine's log is read for."""
        self._num_submitted += 1
        return f"{request.request_id}#{self._num_submitted}"

    def _on_ended_early(self, stream: RequestStream) -> None:
        """The reader has left, or is told to leave."""
        if self._live.pop(stream.wire_id, None) is None:
            return
        self._ends.note()
        if stream.in_engine:
            self._send(frame(Cancel(stream.wire_id)))
        if self.adapters.leaving:
            self.adapters.let_go()
        if self._trials.is_over():
            self._try_next()

    def _on_message(self, message: FromEngine) -> None:
        self._last_word_s = now_s = time.monotonic()
        if isinstance(message, Events):
            for event in message.events:
                stream = self._live.get(event.request_id)
                if stream is None:
                    continue  # cancelled while the event was on its way
                if event.token_ids:
                    if stream.last_token_s:
                        gap_s = now_s - stream.last_token_s
                        self.inter_token.add(gap_s / len(event.token_ids), len(event.token_ids))
                    stream.last_token_s = now_s
                if event.finish_reason is not None:
                    del self._live[event.request_id]
                    self._ends.note()
                stream.push(event)
            if self.adapters.leaving:
                self.adapters.let_go()
            if self._trials.is_over():
                self._try_next()
        elif isinstance(message, Stats):
            self.stats = message
        elif isinstance(message, AdapterLoaded):
            self.adapters.answered(message)
        elif isinstance(message, Ready):
            self._info = message.info
            if self._ready is not None and not self._ready.done():
                self._ready.set_result(None)
        elif self._ready is not None and not self._ready.done():
            self._ready.set_exception(revived(message.kind, message.message, otherwise=EngineFailed))

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
        wire.lost.add_done_callback(self._on_lost)
        self._is_ready = True
        self._last_word_s = time.monotonic()
        return wire.lost

    def _on_lost(self, _: asyncio.Future[None]) -> None:
        """From now on nothing reaches the engine: whoever waits for its answer must hear that, and nobody begin to."""
        self._is_ready = False
        self.adapters.engine_died()

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
            self._count_death()
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
            self.adapters.load_again()
            self._trials.open(self._live.values())
            self._send_waiting()

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

    # --- Requests that outlive an engine --------------------------------------------------------------------

    def _count_death(self) -> None:
        """Remember which requests were in the engine; one that was alone in it at a trial has killed it."""
        for stream in self._live.values():
            stream.num_deaths += stream.in_engine
            stream.in_engine = False
        culprit = self._trials.adjourn()
        if culprit is not None and self._live.pop(culprit.wire_id, None) is not None:
            log.error("request %s killed the engine while it was alone in it: it is failed", culprit.request_id)
            culprit.fail(
                EngineFailed(
                    f"the engine died {culprit.num_deaths} times while it held this request,"
                    " the last time while it held no other"
                )
            )

    def _try_next(self) -> None:
        """The defendant has proved harmless: take it out of the engine, and let in the next, or all."""
        acquitted = self._trials.acquit()
        if acquitted is not None:
            # Late events under its old name would repeat tokens that the engine is going to generate again.
            del self._live[acquitted.wire_id]
            self._send(frame(Cancel(acquitted.wire_id)))
            acquitted.wire_id, acquitted.in_engine = self._new_wire_id(acquitted.request), False
            self._live[acquitted.wire_id] = acquitted
        self._send_waiting()

    def _send_waiting(self) -> None:
        """Give the engine what it may hold now and does not."""
        defendant = self._trials.defendant
        if defendant is not None:
            log.warning(
                "request %s was in the engine at %d deaths: it is tried alone",
                defendant.request_id,
                defendant.num_deaths,
            )
        for stream in self._live.values() if defendant is None else [defendant]:
            if not stream.in_engine:
                stream.in_engine = True
                stream.last_token_s = 0.0  # the pause was not the device's
                self._send(frame(stream.as_continued()))

    def _fail_all(self, error: EngineFailed) -> None:
        for stream in self._live.values():
            stream.fail(error)
        self._live.clear()
