"""The engine process: `python -m tokenplane_core.process SOCKET`, an EngineConfig as msgpack on standard input.

Binds the unix socket, takes the supervisor's connection, loads, says Ready (or Fatal), then steps for ever. Further
connections (other API workers) may come and go; when the supervisor's closes, the process ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec

from .backend.errors import TokenplaneError
from .config import EngineConfig
from .engine.engine import Engine
from .engine.grammar import LLGrammars
from .engine.speculation import NgramDrafter
from .engine.startup import start_backend
from .garbage import settle
from .logs import configure
from .messages import (
    AdapterLoaded,
    Events,
    Fatal,
    FrameReader,
    FromEngine,
    Ready,
    Stats,
    ToEngine,
    TokenEvent,
    frame,
    to_engine_decoder,
)

log = logging.getLogger("tokenplane.engine")

HEARTBEAT_S = 1.0
MAX_UNREAD_BYTES = 1 << 26


class Connection:
    """One API process: what it sent so far, what it has not read yet."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.reader = FrameReader()
        self.unread = bytearray()
        self.mask = selectors.EVENT_READ  # what the selector is asked to wake for


class EngineServer:
    """The engine's end of the socket, driven by the engine loop: one thread, no locks."""

    def __init__(self, path: str) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        os.chmod(path, 0o600)
        self._listener.listen()
        self._selector = selectors.DefaultSelector()
        self._connections: dict[int, Connection] = {}
        self._num_accepted = 0
        self._next_beat_s = 0.0
        self._ready: Ready | None = None
        self.engine: Engine | None = None
        self.supervisor_left = False

    def accept_supervisor(self, timeout_s: float) -> None:
        """Wait for the first connection. Raises TimeoutError."""
        self._listener.settimeout(timeout_s)
        self._accept()
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, -1)

    def say_ready(self, ready: Ready) -> None:
        """Tell all connections, and every later one."""
        self._ready = ready
        self._send_all(ready)

    def say_fatal(self, error: Exception) -> None:
        """Tell the supervisor why there will be no engine."""
        for connection in self._connections.values():
            connection.sock.setblocking(True)
            with contextlib.suppress(OSError):
                connection.sock.sendall(frame(Fatal(type(error).__name__, str(error))))

    def receive(self, idle: bool) -> Iterable[tuple[int, ToEngine]]:
        """What has arrived; waits for something (at most until the next heartbeat) if the engine is idle."""
        now_s = time.monotonic()
        if now_s >= self._next_beat_s:
            self._next_beat_s = now_s + HEARTBEAT_S
            self._send_all(self.engine.stats if self.engine else Stats())
        messages: list[tuple[int, ToEngine]] = []
        for key, mask in self._selector.select(self._next_beat_s - now_s if idle else 0):
            if key.data < 0:
                self._accept()
                continue
            if mask & selectors.EVENT_WRITE:
                self._flush(key.data)
            if mask & selectors.EVENT_READ:
                messages += self._read(key.data)
        return messages

    def publish(self, client: int, events: list[TokenEvent]) -> None:
        """Send a step's news to one connection; a connection that has left is passed over."""
        self._send(client, Events(events))

    def answer(self, client: int, answer: AdapterLoaded) -> None:
        """Tell a connection what became of an adapter."""
        self._send(client, answer)

    def close(self) -> None:
        for client in list(self._connections):
            self._drop(client)
        self._listener.close()

    def _accept(self) -> None:
        sock, _ = self._listener.accept()
        client = self._num_accepted
        self._num_accepted += 1
        self._connections[client] = Connection(sock)
        self._selector.register(sock, selectors.EVENT_READ, client)
        if self._ready is not None:
            self._send(client, self._ready)

    def _read(self, client: int) -> Iterable[tuple[int, ToEngine]]:
        connection = self._connections.get(client)
        if connection is None:
            return
        try:
            data = connection.sock.recv(1 << 20)
            bodies = list(connection.reader.feed(data))
            messages = [to_engine_decoder.decode(body) for body in bodies]
        except BlockingIOError:
            return
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            log.warning("connection %d closed: %s", client, error)
            data, messages = b"", []
        if not data:
            self._drop(client)
        for message in messages:
            yield client, message

    def _send_all(self, message: FromEngine) -> None:
        for client in list(self._connections):
            self._send(client, message)

    def _send(self, client: int, message: FromEngine) -> None:
        connection = self._connections.get(client)
        if connection is None:
            return
        connection.unread += frame(message)
        self._flush(client)

    def _flush(self, client: int) -> None:
        """Send what the kernel takes; ask to be woken for the rest. A peer that stops reading is dropped."""
        connection = self._connections.get(client)
        if connection is None:
            return
        try:
            while connection.unread:
                sent = connection.sock.send(connection.unread)
                del connection.unread[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self._drop(client)
            return
        if len(connection.unread) > MAX_UNREAD_BYTES:
            log.warning("connection %d dropped: %d bytes unread", client, len(connection.unread))
            self._drop(client)
            return
        mask = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.unread else 0)
        if mask != connection.mask:
            self._selector.modify(connection.sock, mask, client)
            connection.mask = mask

    def _drop(self, client: int) -> None:
        connection = self._connections.pop(client, None)
        if connection is None:
            return
        self._selector.unregister(connection.sock)
        connection.sock.close()
        if self.engine is not None:
            self.engine.drop_client(client)
        if client == 0:
            self.supervisor_left = True


def serve(path: str, config: EngineConfig) -> int:
    """Run the engine until the supervisor leaves; returns the exit status."""
    server = EngineServer(path)
    server.accept_supervisor(timeout_s=30)
    try:
        started = start_backend(config, own_process=True)
    except TokenplaneError as error:
        server.say_fatal(error)
        return 1
    engine = Engine(
        started.backend,
        started.capabilities,
        started.layout,
        config.model.vocab_size,
        server.receive,
        server.publish,
        prefix_cache=config.prefix_cache,
        ageing_s=config.ageing_s,
        grammars=LLGrammars(Path(config.model.path), config.model.vocab_size),
        answer=server.answer,
        drafter=NgramDrafter() if config.max_drafts else None,
    )
    server.engine = engine
    settle()
    server.say_ready(Ready(started.info))
    try:
        while not server.supervisor_left:
            engine.step()
    except Exception:
        log.exception("a step failed; the engine held the requests %s", " ".join(engine.request_ids) or "(none)")
        return 1
    finally:
        server.close()
        engine.close()
        started.backend.close()
    return 0


def main() -> int:
    """Entry point of the process.

    Ctrl-C and SIGTERM often reach the whole process group, but requests may still be finishing: the supervisor decides
    when the engine goes, by closing its connection.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    config = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=EngineConfig)
    configure(os.environ.get("LOG_LEVEL", "info"), config.json_log)
    return serve(sys.argv[1], config)


if __name__ == "__main__":
    sys.exit(main())
