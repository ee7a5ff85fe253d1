"""A request has one name, from the client's header to the engine's log; logs are JSON when asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from helpers.live_server import wait_until
from helpers.server_process import server_process

COMPLETIONS = "/v1/completions"


@pytest.mark.parametrize("given", ["order-66", "a" * 128, "0af7651916cd43dd:1/2.3@x"])
def test_a_clients_own_id_is_kept(client: httpx.Client, given: str) -> None:
    answer = client.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 1}, headers={"x-request-id": given})
    assert answer.headers["x-request-id"] == given
    assert given in answer.json()["id"]


@pytest.mark.parametrize("given", ["two words", 'a"b', "a" * 129, "ünïcode", "", "a,b", "x\tid=forged"])
def test_an_id_unfit_for_a_log_is_replaced(client: httpx.Client, given: str) -> None:
    answer = client.get("/live", headers={"x-request-id": given.encode()})
    assert len(answer.headers["x-request-id"]) == 24


def test_every_answer_has_an_id_and_no_two_the_same(client: httpx.Client) -> None:
    answers = [
        client.get("/health"),
        client.get("/nope"),
        client.post(COMPLETIONS, content=b"{"),
        client.post("/generate_stream", json={"inputs": "a", "parameters": {"max_new_tokens": 1}}),
        client.get("/metrics"),
    ]
    ids = [answer.headers["x-request-id"] for answer in answers]
    assert len(set(ids)) == len(ids)


def test_the_same_id_twice_at_once_disturbs_nobody(client: httpx.Client) -> None:
    headers = {"x-request-id": "twice"}
    body = {"prompt": "Go on.", "max_tokens": 200, "ignore_eos": True, "seed": 1, "n": 2}
    with client.stream("POST", COMPLETIONS, json={**body, "stream": True}, headers=headers) as running:
        events = running.iter_lines()
        next(events)
        answer = client.post(COMPLETIONS, json=body, headers=headers)
        assert answer.json()["usage"]["completion_tokens"] == 400
        assert sum(bool(line) for line in events) > 200


def test_json_logs_follow_a_request_into_the_engine(model_folder: Path, tmp_path: Path) -> None:
    flags = ("--backend", "simulated-cuda", "--json-output")
    with server_process(model_folder, tmp_path, *flags, LOG_LEVEL="debug") as server:
        body: dict[str, Any] = {"prompt": "Go on.", "max_tokens": 5, "ignore_eos": True}
        headers = {"x-request-id": "order-66"}
        assert httpx.post(f"{server.url}{COMPLETIONS}", json=body, headers=headers).status_code == 200
        assert httpx.post(f"{server.url}/generate", json={"inputs": 5}).status_code == 422

        def lines() -> list[dict[str, Any]]:
            return [json.loads(line) for line in server.log.splitlines()]  # all of them, from both processes

        wait_until(lambda: any(line.get("status") == 422 for line in lines()), 5, "the log lines")
        (line,) = [line for line in lines() if line.get("id") == "order-66"]
        assert {"timestamp", "level", "target"} <= set(line)
        assert (line["message"], line["status"], line["finish"]) == (f"POST {COMPLETIONS} 200", 200, "length")
        assert (line["method"], line["path"], line["generated_tokens"]) == ("POST", COMPLETIONS, 5)
        assert 0 <= line["queue_ms"] <= line["first_token_ms"] <= line["total_ms"]
        (refused,) = [line for line in lines() if line.get("status") == 422]
        assert "inputs" in refused["error"]
        in_engine = [
            line for line in lines() if line["process"] != refused["process"] and "order-66" in line["message"]
        ]
        assert in_engine and in_engine[0]["target"] == "tokenplane.engine"
