"""A client that leaves stops costing: its request is cancelled and its blocks are free, whatever state it was in."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from helpers.live_server import LiveServer, live_server, wait_until

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LONG = {"max_tokens": 1500, "ignore_eos": True}
PROMPT: dict[str, Any] = {"prompt": "A block of the cache holds sixteen tokens."}
MESSAGES: dict[str, Any] = {"messages": [{"role": "user", "content": "Go on and on."}]}
NATIVE: dict[str, Any] = {"inputs": "Go on and on.", "parameters": {"max_new_tokens": 1500}}


@pytest.fixture(scope="module")
def slow_server(model_folder: Path) -> Iterator[LiveServer]:
    """Two sequences at a time, 20 ms a step: a request of 1500 tokens would run for half a minute."""
    with live_server(model_folder, step_ms=20, engine={"max_sequences": 2}) as live:
        yield live


def send(server: LiveServer, path: str, body: dict[str, Any]) -> socket.socket:
    """A raw connection with the request sent, so that leaving is ours to time."""
    where = urlsplit(server.url)
    raw = json.dumps(body).encode()
    connection = socket.create_connection((where.hostname, where.port), timeout=10)
    head = f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    connection.sendall(head.encode() + raw)
    return connection


@pytest.fixture(autouse=True)
def nothing_is_left_running(slow_server: LiveServer) -> Iterator[None]:
    """Every test leaves its requests unfinished; they must be gone at once, and not because they ran to their ends."""
    finished = slow_server.service.engine.stats.requests_finished
    yield
    slow_server.wait_idle(timeout_s=5)
    stats = slow_server.service.engine.stats
    assert (stats.num_running, stats.num_waiting, stats.blocks_used) == (0, 0, 0)
    assert stats.requests_finished == finished


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {**MESSAGES, **LONG, "stream": True}),
        (COMPLETIONS, {**PROMPT, **LONG, "stream": True}),
        (COMPLETIONS, {**PROMPT, **LONG, "stream": True, "n": 2}),
        ("/generate_stream", NATIVE),
        ("/", {**NATIVE, "stream": True}),
        ("/invocations", {**NATIVE, "stream": True}),
    ],
    ids=["chat", "completions", "two choices", "generate_stream", "root", "invocations"],
)
def test_leaving_in_the_middle_of_a_stream(slow_server: LiveServer, path: str, body: dict[str, Any]) -> None:
    with send(slow_server, path, body) as connection:
        received = b""
        while received.count(b"data: ") < 3:
            received += connection.recv(65536)
        assert slow_server.service.engine.num_live > 0


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {**MESSAGES, **LONG}),
        (COMPLETIONS, {**PROMPT, **LONG, "n": 2}),
        ("/generate", NATIVE),
        ("/invocations", {**MESSAGES, **LONG}),
        ("/vertex", {"instances": [NATIVE, {**MESSAGES, **LONG}]}),
    ],
    ids=["chat", "two choices", "generate", "invocations", "vertex"],
)
def test_leaving_while_waiting_for_a_whole_answer(slow_server: LiveServer, path: str, body: dict[str, Any]) -> None:
    with send(slow_server, path, body):
        wait_until(lambda: slow_server.service.engine.num_live > 0, 5, "the request to be submitted")
        time.sleep(0.1)  # five steps: it runs


def test_leaving_the_queue(slow_server: LiveServer) -> None:
    with send(slow_server, COMPLETIONS, {**PROMPT, **LONG, "n": 2}):
        wait_until(lambda: slow_server.service.engine.stats.num_running == 2, 5, "all places to be taken")
        with send(slow_server, COMPLETIONS, {**PROMPT, **LONG, "stream": True}):
            wait_until(lambda: slow_server.service.engine.stats.num_waiting == 1, 5, "the request to wait")
        wait_until(lambda: slow_server.service.engine.stats.num_waiting == 0, 5, "the queue to be empty")
        assert slow_server.service.engine.num_live == 2


def test_leaving_before_the_body_is_complete(slow_server: LiveServer) -> None:
    where = urlsplit(slow_server.url)
    with socket.create_connection((where.hostname, where.port), timeout=10) as connection:
        connection.sendall(b"POST /generate HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n")
        connection.sendall(b"Content-Length: 99\r\n\r\n{")
    with slow_server.client() as client:
        assert client.get("/health").status_code == 200


def test_leaving_is_counted_as_dropped(slow_server: LiveServer) -> None:
    def dropped(text: str) -> float:
        lines = [line for line in text.splitlines() if line.startswith('tgi_request_failure{err="dropped"}')]
        return float(lines[0].rpartition(" ")[2]) if lines else 0.0

    with slow_server.client() as client:
        before = dropped(client.get("/metrics").text)
        with send(slow_server, COMPLETIONS, {**PROMPT, **LONG, "stream": True}) as connection:
            connection.recv(100)
        wait_until(lambda: dropped(client.get("/metrics").text) == before + 1, 5, "the count")


def test_a_silent_stream_is_kept_alive(slow_server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenplane_api.streaming.KEEP_ALIVE_S", 0.2)
    with send(slow_server, COMPLETIONS, {**PROMPT, **LONG, "n": 2}):
        wait_until(lambda: slow_server.service.engine.stats.num_running == 2, 5, "all places to be taken")
        with send(slow_server, COMPLETIONS, {**PROMPT, "max_tokens": 1, "stream": True}) as waiting:
            received = b""
            while received.count(b":\n\n") < 2:
                received += waiting.recv(65536)
            assert b"data: " not in received
