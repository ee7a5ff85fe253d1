"""`tokenplane serve` as a user starts it: a process of its own, a real port, a log."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

COUNTERS_EVERY_S = 1.2
"""No metric of the engine is older."""


@dataclass
class ServerProcess:
    process: subprocess.Popen[bytes]
    url: str
    log_file: Path

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def is_ready(self) -> bool:
        try:
            # A client that verifies reads all certificates first: 20 ms each time, of cores on which the server starts.
            return httpx.get(f"{self.url}/health", timeout=5, verify=False).status_code == 200
        except httpx.TransportError:
            return False

    def wait_until(self, ready: bool, limit_s: float = 120) -> None:
        """Until /health says so."""
        end_s = time.monotonic() + limit_s
        while self.is_ready() is not ready:
            assert self.process.poll() is None, self.log
            assert time.monotonic() < end_s, (
                f"still not {'ready' if ready else 'unready'} after {limit_s} s\n{self.log}"
            )
            time.sleep(0.02)

    def gauge(self, name: str) -> float:
        """A metric without labels; the engine's are a second old at most."""
        found = re.search(rf"^{name} (\S+)$", httpx.get(f"{self.url}/metrics", verify=False).text, re.MULTILINE)
        assert found, name
        return float(found[1])

    @contextlib.contextmanager
    def nothing_stays(self) -> Iterator[None]:
        """Who leaves within the block gives up its KV blocks at once, not because its answer ran to the end."""
        time.sleep(COUNTERS_EVERY_S)
        finished = self.gauge("tokenplane_requests_finished_total")
        yield
        for name in ("requests_running", "requests_waiting", "requests_live", "kv_blocks_used"):
            end_s = time.monotonic() + 5
            while held := self.gauge(f"tokenplane_{name}"):
                assert time.monotonic() < end_s, f"{name} is still {held}"
                time.sleep(0.02)
        assert self.gauge("tokenplane_requests_finished_total") == finished

    def engine_pid(self) -> int:
        """The child process that runs the engine."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for child in map(int, children):
            if b"tokenplane_core.process" in Path(f"/proc/{child}/cmdline").read_bytes():
                return child
        raise AssertionError(f"no engine among the children {children}")


@contextlib.contextmanager
def server_process(model: Path, folder: Path, *flags: str, **environment: str) -> Iterator[ServerProcess]:
    """Start `tokenplane serve` on a free loopback port, wait until it is ready, and end it with SIGTERM.

    Its Python is this one, or what TOKENPLANE_PYTHON names: clients have environments without a server.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log_file = folder / "server.log"
    command = [
        os.environ.get("TOKENPLANE_PYTHON", sys.executable), "-m", "tokenplane_api.cli", "serve",
        "--model-id", str(model), "--hostname", "127.0.0.1", "--port", str(port), *flags,
    ]  # fmt: skip
    with log_file.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **environment})
    server = ServerProcess(process, f"http://127.0.0.1:{port}", log_file)
    try:
        server.wait_until(ready=True)
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
