"""What clients cannot do to the server: hold it up, fill it, or get in without a key."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from helpers.live_server import LiveServer, live_server, wait_until
from helpers.server_process import server_process
from tokenplane_api import auth
from tokenplane_api.auth import ApiKeys
from tokenplane_core.backend.errors import ConfigError

COMPLETIONS = "/v1/completions"
LONG: dict[str, Any] = {"prompt": "Go on.", "max_tokens": 1500, "ignore_eos": True}
NATIVE: dict[str, Any] = {"inputs": "Go on.", "parameters": {"max_new_tokens": 1500}}


def connect(server: LiveServer, receive_buffer_bytes: int | None = None) -> socket.socket:
    where = urlsplit(server.url)
    connection = socket.socket()
    if receive_buffer_bytes:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
    connection.settimeout(10)
    connection.connect((where.hostname, where.port))
    return connection


def post(path: str, body: dict[str, Any]) -> bytes:
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    return head.encode() + raw


def read_to_end(connection: socket.socket) -> bytes:
    received = b""
    while data := connection.recv(65536):
        received += data
    return received


# --- Slow and endless senders -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded(model_folder: Path) -> Iterator[LiveServer]:
    with live_server(model_folder, header_timeout_s=0.6, body_timeout_s=0.6, max_header_bytes=4096) as live:
        yield live


def drip(connection: socket.socket, data: bytes) -> bytes:
    """A byte every 50 ms until the server has had enough; returns what it says."""
    connection.setblocking(False)
    for byte in data:
        try:
            connection.send(bytes([byte]))
            answer = connection.recv(65536)
        except BlockingIOError:
            time.sleep(0.05)
        except OSError:
            return b""
        else:
            return answer
    raise AssertionError("the server took it all")


def test_headers_that_never_end_are_cut_off(guarded: LiveServer) -> None:
    with connect(guarded) as connection:
        answer = drip(connection, b"GET /live HTTP/1.1\r\nHost: test\r\n" + b"X-Slow: 1\r\n" * 20)
    assert answer.startswith(b"HTTP/1.1 408 ") and b"--header-timeout-s" in answer


def test_a_body_that_never_comes_is_cut_off(guarded: LiveServer) -> None:
    with connect(guarded) as connection:
        connection.sendall(b"POST /generate HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n")
        connection.sendall(b"Content-Length: 1000\r\n\r\n")
        answer = drip(connection, b"{" * 100)
    assert answer.startswith(b"HTTP/1.1 408 ") and b"--body-timeout-s" in answer


@pytest.mark.parametrize("first", [b"", b"GET /live HTTP/1.1\r\nHost: t\r\n\r\n"], ids=["new", "used"])
@pytest.mark.parametrize("then", [b"", b"\r\n"], ids=["silence", "empty line"])
def test_a_connection_that_says_nothing_is_closed(guarded: LiveServer, first: bytes, then: bytes) -> None:
    with connect(guarded) as connection:
        if first:
            connection.sendall(first)
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        connection.sendall(then)
        assert read_to_end(connection) == b""  # within the socket's ten seconds


@pytest.mark.parametrize(
    "head",
    [
        b"GET /live HTTP/1.1\r\nHost: t\r\nX-Long: " + b"a" * 5000,
        b"GET /live HTTP/1.1\r\nHost: t\r\n" + b"X-Many: 1\r\n" * 500 + b"\r\n",
        b"GET /live?" + b"a" * 5000 + b" HTTP/1.1\r\nHost: t\r\n\r\n",
        b"GET /live HTTP/1.1\r\nHost: t\r\n" + b"X" * 5000,
    ],
    ids=["long header", "many headers", "long path", "long name"],
)
def test_a_head_over_the_limit_is_refused(guarded: LiveServer, head: bytes) -> None:
    with connect(guarded) as connection:
        connection.sendall(head[:3000])
        time.sleep(0.1)
        connection.sendall(head[3000:])
        answer = read_to_end(connection)
    assert answer.startswith(b"HTTP/1.1 431 ") and b"--max-header-bytes" in answer


def test_many_requests_on_one_connection_are_not_one_long_head(guarded: LiveServer) -> None:
    with guarded.client() as client:
        for _ in range(20):
            answer = client.post("/tokenize", json={"inputs": "a " * 4000})
            assert answer.status_code == 200


def test_an_answer_may_take_longer_than_its_headers_and_body(model_folder: Path) -> None:
    with (
        live_server(model_folder, step_ms=20, header_timeout_s=0.3, body_timeout_s=0.3) as live,
        live.client() as client,
    ):
        answer = client.post(COMPLETIONS, json={**LONG, "max_tokens": 40})
        assert answer.status_code == 200
        assert client.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 1}).status_code == 200


# --- Slow readers -------------------------------------------------------------------------------------------


def test_a_client_that_takes_nothing_of_its_stream_is_dropped(model_folder: Path) -> None:
    """Its request is cancelled, its blocks come back, and others are served."""
    wordy = {"messages": [{"role": "user", "content": "Go on."}], "logprobs": True, "top_logprobs": 20, "n": 2}
    body = {**wordy, "max_tokens": 1500, "ignore_eos": True, "stream": True}
    with live_server(model_folder, step_ms=1, slow_reader_timeout_s=0.5) as live, live.client() as client:
        with connect(live, receive_buffer_bytes=4096) as connection:
            connection.sendall(post("/v1/chat/completions", body))
            wait_until(lambda: live.service.engine.num_live == 2, 5, "the request to run")
            wait_until(lambda: live.service.engine.num_live == 0, 20, "it to be cancelled")
            wait_until(lambda: 'tgi_request_failure{err="dropped"} 2.0' in client.get("/metrics").text, 5, "the count")
            live.wait_idle()
            assert live.service.engine.stats.requests_finished == 0
        assert client.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 1}).status_code == 200


def test_a_client_that_pauses_gets_its_whole_stream(model_folder: Path) -> None:
    body = {**LONG, "max_tokens": 300, "logprobs": 5, "stream": True}
    with live_server(model_folder, slow_reader_timeout_s=5) as live:
        with connect(live, receive_buffer_bytes=4096) as connection:
            connection.sendall(post(COMPLETIONS, body))
            time.sleep(1)
            received = b""
            while b"data: [DONE]" not in received:
                received += connection.recv(65536)
        assert b'"finish_reason":"length"' in received


# --- Time limits --------------------------------------------------------------------------------------------


def test_a_request_that_takes_too_long_ends_in_its_dialect(model_folder: Path) -> None:
    with live_server(model_folder, step_ms=20, request_timeout_s=0.5) as live, live.client() as client:
        whole = client.post(COMPLETIONS, json=LONG)
        assert (whole.status_code, whole.json()["error"]["code"]) == (504, "request_timeout")
        assert "0.5 s (--request-timeout-s)" in whole.json()["error"]["message"]
        assert whole.headers["x-should-retry"] == "false"
        streamed = client.post(COMPLETIONS, json={**LONG, "stream": True})
        assert streamed.status_code == 200
        *_, failure, done, end = streamed.text.split("\n\n")
        assert json.loads(failure.removeprefix("data: "))["error"]["code"] == "request_timeout"
        assert (done, end) == ("data: [DONE]", "")
        native = client.post("/generate", json=NATIVE)
        assert (native.status_code, native.json()["error_type"]) == (504, "timeout")
        native_streamed = client.post("/generate_stream", json=NATIVE)
        *_, failure, end = native_streamed.text.split("\n\n")
        assert json.loads(failure.removeprefix("data: ").removeprefix("data:"))["error_type"] == "timeout"
        live.wait_idle()
        assert 'tgi_request_failure{err="timeout"} 4.0' in client.get("/metrics").text
        assert client.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 3}).status_code == 200


def test_who_waits_too_long_in_the_queue_gets_429(model_folder: Path) -> None:
    with (
        live_server(model_folder, step_ms=20, queue_timeout_s=0.4, engine={"max_sequences": 1}) as live,
        live.client() as client,
        ThreadPoolExecutor(3) as pool,
    ):
        running = pool.submit(client.post, COMPLETIONS, json={**LONG, "max_tokens": 250})
        wait_until(lambda: live.service.engine.stats.num_running == 1, 5, "the first to run")
        openai_answer = pool.submit(client.post, COMPLETIONS, json={"prompt": "b"})
        native_answer = pool.submit(client.post, "/generate", json={"inputs": "b"})
        for answer in (openai_answer.result(timeout=10), native_answer.result(timeout=10)):
            assert answer.status_code == 429
            assert 1 <= int(answer.headers["retry-after"]) <= 60
            assert "--queue-timeout-s" in answer.text
        assert running.result(timeout=10).status_code == 200


# --- Keys ---------------------------------------------------------------------------------------------------


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_keys_of_a_file_open_and_the_file_may_change(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(auth, "LOOK_EVERY_S", 0.0)
    file = tmp_path / "keys"
    file.write_text("# of the team\nsesame alice\n\nmellon\n")
    with live_server(model_folder, api_key="own", api_key_file=file) as live, live.client() as client:

        def status(key: str) -> int:
            return client.get("/v1/models", headers=bearer(key)).status_code

        assert [status(key) for key in ("own", "sesame", "mellon", "alice", "sesam")] == [200] * 3 + [401] * 2
        with caplog.at_level("INFO", logger="tokenplane.request"):
            client.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 1}, headers=bearer("sesame"))
            wait_until(lambda: any(" key=alice " in r.getMessage() for r in caplog.records), 5, "the log line")
        file.write_text("friend bob\n")
        assert [status(key) for key in ("own", "friend", "sesame")] == [200, 200, 401]
        file.write_text("# nobody\n")
        assert [status(key) for key in ("own", "friend")] == [200, 200]
        assert "holds no key" in caplog.text and "stay valid" in caplog.text
        os.unlink(file)
        assert status("friend") == 200


def test_sighup_reads_the_keys_again(model_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("sesame\n")
    flags = ("--backend", "simulated-cuda", "--api-key-file", str(file))
    with server_process(model_folder, tmp_path, *flags) as server:

        def status(key: str) -> int:
            return httpx.get(f"{server.url}/v1/models", headers=bearer(key)).status_code

        assert (status("sesame"), status("mellon")) == (200, 401)
        file.write_text("mellon\n")
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "1 API keys read" in server.log, 5, "the keys")
        assert (status("sesame"), status("mellon")) == (401, 200)


def test_an_empty_key_stops_the_start() -> None:
    with pytest.raises(ConfigError, match=r"--api-key .* is empty"):
        ApiKeys(" ")


@pytest.mark.parametrize(
    ("content", "reason"),
    [("", "holds no key"), ("a\nb\na\n", "key of line 3 twice"), (None, "cannot be read")],
)
def test_an_unusable_key_file_stops_the_start(tmp_path: Path, content: str | None, reason: str) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=rf"--api-key-file .*{reason}"):
        ApiKeys(None, file)


def test_one_key_cannot_take_the_whole_server(model_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("one alice\ntwo bob\n")
    with (
        live_server(model_folder, step_ms=10, api_key_file=file, max_requests_per_key=2) as live,
        live.client() as client,
    ):
        body = {**LONG, "n": 2, "stream": True}
        with client.stream("POST", COMPLETIONS, json=body, headers=bearer("one")) as running:
            events = running.iter_bytes()
            next(events)
            refused = client.post(COMPLETIONS, json={"prompt": "a"}, headers=bearer("one"))
            assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limit_error")
            assert "--max-requests-per-key" in refused.text and int(refused.headers["retry-after"]) >= 1
            native = client.post("/generate", json={"inputs": "a"}, headers=bearer("one"))
            assert (native.status_code, native.json()["error_type"]) == (429, "overloaded")
            short = {"prompt": "a", "max_tokens": 2}
            assert client.post(COMPLETIONS, json=short, headers=bearer("two")).status_code == 200
        live.wait_idle()
        assert client.post(COMPLETIONS, json=short, headers=bearer("one")).status_code == 200


def test_a_limit_for_each_key_needs_keys(model_folder: Path) -> None:
    with (
        pytest.raises(ConfigError, match="--max-requests-per-key needs API keys"),
        live_server(model_folder, max_requests_per_key=2),
    ):
        raise AssertionError("it started")


# --- Retry-After --------------------------------------------------------------------------------------------


def test_retry_after_follows_the_queue(model_folder: Path) -> None:
    """Requests have taken half a second each, so somebody behind six of them is told some seconds."""
    with (
        live_server(model_folder, step_ms=20, max_concurrent_requests=7, engine={"max_sequences": 1}) as live,
        live.client() as client,
        contextlib.ExitStack() as connections,
    ):
        for _ in range(2):
            client.post(COMPLETIONS, json={**LONG, "max_tokens": 50})
        for _ in range(7):
            connections.enter_context(connect(live)).sendall(post(COMPLETIONS, LONG))
        wait_until(lambda: live.service.engine.stats.num_waiting == 6, 5, "six to wait")
        refused = client.post(COMPLETIONS, json=LONG)
        assert refused.status_code == 429
        assert 2 <= int(refused.headers["retry-after"]) <= 20
