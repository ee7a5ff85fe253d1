"""One server process for all clients, which have an environment of their own without a server: make test-clients."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

from helpers.model_folder import make_text_model
from helpers.server_process import ServerProcess, server_process

# Before the clients are imported: no price lists, no telemetry, no traces.
os.environ |= {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "LANGSMITH_TRACING": "false",
    "NO_PROXY": "127.0.0.1",
}

LOOPBACK = ("127.0.0.1", "::1", "localhost", b"127.0.0.1", None)


def _only_loopback(event: str, arguments: tuple[object, ...]) -> None:
    """Audit hook: whatever a client wants to look up elsewhere fails, and the test with it."""
    if event == "socket.getaddrinfo" and arguments[0] not in LOOPBACK:
        outside.append(str(arguments[0]))
        raise OSError(f"the tests use loopback only, not {arguments[0]!r}")


outside: list[str] = []
sys.addaudithook(_only_loopback)


@pytest.fixture(autouse=True)
def no_other_network() -> Iterator[None]:
    yield
    asked, outside[:] = list(outside), []
    assert not asked


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A step takes 5 ms, so that an answer can be left in the middle."""
    folder = make_text_model(tmp_path_factory.mktemp("model") / "tiny-chat")
    log = tmp_path_factory.mktemp("log")
    with server_process(folder, log, "--backend", "simulated-cuda", TOKENPLANE_SIMULATED_STEP_MS="5") as running:
        yield running
