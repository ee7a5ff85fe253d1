"""TGI's native stream on the wire of a server process: its bytes, text across tokens, clients that leave."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from helpers.live_server import wait_until
from helpers.model_folder import make_text_model
from helpers.server_process import COUNTERS_EVERY_S, ServerProcess, server_process

STEP_MS = 20
LONG = {
    "inputs": "Go on.",
    "parameters": {"max_new_tokens": 1500, "grammar": {"type": "regex", "value": "[a-z]{1500}"}},
}
TEXT = "สวัสดีครับ 👍🏽 👩‍👩‍👧 Zwölf e\u0301 日本 done"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Two sequences at a time, 16 prompt tokens and 20 ms a step: prompts and answers take their time."""
    folder = make_text_model(tmp_path_factory.mktemp("model") / "tiny-chat")
    flags = ("--backend", "simulated-cuda", "--max-batch-size", "2", "--max-batch-prefill-tokens", "16")
    environment = {"TOKENPLANE_SIMULATED_STEP_MS": str(STEP_MS)}
    with server_process(folder, tmp_path_factory.mktemp("log"), *flags, **environment) as running:
        yield running


@pytest.fixture
def client(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client


# --- Bytes --------------------------------------------------------------------------------------------------


def send(server: ServerProcess, path: str, body: Any) -> socket.socket:
    where = urlsplit(server.url)
    raw = json.dumps(body).encode()
    connection = socket.create_connection((where.hostname, where.port), timeout=10)
    head = f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    connection.sendall(head.encode() + raw)
    return connection


def chunks(connection: socket.socket) -> tuple[bytes, list[bytes]]:
    """The head of a chunked answer, and its chunks until the last."""
    received = b""
    while not received.endswith(b"\r\n0\r\n\r\n"):
        more = connection.recv(65536)
        assert more, received
        received += more
    head, _, rest = received.partition(b"\r\n\r\n")
    found = []
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        data, rest = rest[: int(size, 16)], rest[int(size, 16) + 2 :]
        found.append(data)
    assert found.pop() == b""
    return head.lower(), found


def test_a_stream_is_these_bytes(server: ServerProcess) -> None:
    body = {"inputs": "Hi", "parameters": {"max_new_tokens": 2, "details": True}}
    with closing(send(server, "/generate_stream", body)) as connection:
        head, found = chunks(connection)
    for line in (
        b"http/1.1 200 ok",
        b"content-type: text/event-stream",
        b"cache-control: no-cache",
        b"x-accel-buffering: no",
        b"x-compute-type: 1-simulated-cuda",
        b"x-compute-characters: 2",
    ):
        assert line in head.split(b"\r\n")
    number, text = rb"-\d+(?:\.\d+)?(?:e-\d+)?", rb'"(?:[^"\\]|\\.)*"'
    token = rb'{"id":\d+,"text":' + text + rb',"logprob":' + number + rb',"special":false}'
    first = rb'data: {"index":1,"token":' + token + rb',"generated_text":null,"details":null}\n\n'
    details = rb'{"finish_reason":"length","generated_tokens":2,"seed":null,"input_length":2}'
    last = rb'data: {"index":2,"token":' + token + rb',"generated_text":' + text + rb',"details":' + details + rb"}\n\n"
    assert len(found) == 2, "each event is sent when it is there, and nothing follows the last"
    assert re.fullmatch(first, found[0]), found[0]
    assert re.fullmatch(last, found[1]), found[1]


def test_an_error_is_one_event(server: ServerProcess) -> None:
    with closing(send(server, "/generate_stream", {"inputs": "Hi", "parameters": {"top_p": 1.0}})) as connection:
        head, found = chunks(connection)
    assert head.startswith(b"http/1.1 200 ok")
    assert re.fullmatch(rb'data: {"error":"Input validation error: [^"]*","error_type":"validation"}\n\n', found[0])
    assert len(found) == 1


# --- Text across tokens -------------------------------------------------------------------------------------


def spoken(client: httpx.Client, text: str, **parameters: Any) -> list[Any]:
    """The events of a stream that can only say `text`."""
    body = {
        "inputs": "Say it.",
        "parameters": {
            "max_new_tokens": 300,
            "details": True,
            "grammar": {"type": "regex", "value": re.escape(text)},
            **parameters,
        },
    }
    with client.stream("POST", "/generate_stream", json=body) as answer:
        return [json.loads(line.removeprefix("data: ")) for line in answer.iter_lines() if line]


def test_characters_split_over_tokens_arrive_whole(client: httpx.Client) -> None:
    events = spoken(client, TEXT)
    shown = [event["token"]["text"] for event in events if not event["token"]["special"]]
    assert "".join(shown) == events[-1]["generated_text"] == TEXT
    assert shown.count("") >= 10, "most tokens are less than one of these characters"
    assert not any("\ufffd" in text for text in shown)
    assert [event["index"] for event in events] == list(range(1, len(events) + 1))


@pytest.mark.parametrize("stop", ["ครับ", "👍🏽 👩", "ölf e\u0301", "日"])
def test_a_stop_string_across_tokens_ends_text_and_tokens_alike(client: httpx.Client, stop: str) -> None:
    events = spoken(client, TEXT, stop=["nowhere", stop])
    expected = TEXT[: TEXT.index(stop) + len(stop)]
    assert events[-1]["generated_text"] == expected
    assert "".join(event["token"]["text"] for event in events) == expected
    assert events[-1]["details"]["finish_reason"] == "stop_sequence"
    assert events[-1]["details"]["generated_tokens"] == len(events)


# --- Clients that leave -------------------------------------------------------------------------------------


@pytest.fixture
def nothing_stays(server: ServerProcess) -> Iterator[None]:
    with server.nothing_stays():
        yield


@pytest.mark.usefixtures("nothing_stays")
def test_leaving_in_decode(server: ServerProcess) -> None:
    with closing(send(server, "/generate_stream", LONG)) as connection:
        received = b""
        while received.count(b"data: ") < 3:
            received += connection.recv(65536)
        wait_until(lambda: server.gauge("tokenplane_kv_blocks_used") > 0, 5, "blocks to be taken")


@pytest.mark.usefixtures("nothing_stays")
@pytest.mark.parametrize("path", ["/generate_stream", "/generate"])
def test_leaving_in_prefill(server: ServerProcess, path: str) -> None:
    """A prompt of some 1,900 tokens takes 120 steps."""
    generated, steps = "tokenplane_generated_tokens_total", "tokenplane_prefill_steps_total"
    before, started = server.gauge(generated), server.gauge(steps)
    with closing(send(server, path, {"inputs": path + "#" * 1900})):
        wait_until(lambda: server.gauge(steps) > started, 5, "the first step")
    time.sleep(COUNTERS_EVERY_S)
    assert server.gauge(generated) == before, "it left before the prompt was computed"


@pytest.mark.usefixtures("nothing_stays")
def test_leaving_the_queue(server: ServerProcess) -> None:
    both = {"prompt": "Go on and on.", "n": 2, "max_tokens": 1500, "ignore_eos": True}
    with closing(send(server, "/v1/completions", both)):
        wait_until(lambda: server.gauge("tokenplane_requests_running") == 2, 5, "all places to be taken")
        with closing(send(server, "/generate_stream", LONG)):
            wait_until(lambda: server.gauge("tokenplane_requests_waiting") == 1, 5, "the request to wait")
        wait_until(lambda: server.gauge("tokenplane_requests_waiting") == 0, 5, "the queue to be empty")
        assert server.gauge("tokenplane_requests_live") == 2


def test_a_slow_reader_gets_everything_and_holds_up_nobody(server: ServerProcess, client: httpx.Client) -> None:
    parameters = {"max_new_tokens": 150, "top_n_tokens": 5, "details": True}
    where = urlsplit(server.url)
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    slow.settimeout(30)
    slow.connect((where.hostname, where.port))
    raw = json.dumps({"inputs": "Slowly.", "parameters": parameters}).encode()
    head = (
        b"POST /generate_stream HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    )
    with closing(slow):
        slow.sendall(head % len(raw) + raw)
        started_s = time.monotonic()
        other = client.post("/generate", json={"inputs": "Fast.", "parameters": {"max_new_tokens": 10}})
        assert other.status_code == 200
        assert time.monotonic() - started_s < 150 * STEP_MS / 1000, "while the slow one had not ended"
        time.sleep(1)
        _, found = chunks(slow)
    events = [json.loads(line.removeprefix("data: ")) for line in b"".join(found).decode().split("\n\n") if line]
    assert [event["index"] for event in events] == list(range(1, 151))
    assert events[-1]["generated_text"].startswith(events[0]["token"]["text"])
