"""What operators meet: readiness, engine restarts, overload, keys, metrics, log lines."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from helpers.live_server import MODEL_ID, LiveServer, live_server, wait_until
from helpers.model_folder import make_text_model
from tokenplane_core.client import EngineClient
from tokenplane_core.trials import SUSPECT_AFTER

COMPLETIONS = "/v1/completions"


def metric(text: str, name: str) -> float:
    (line,) = [line for line in text.splitlines() if line.startswith(f"{name} ")]
    return float(line.rpartition(" ")[2])


# --- Readiness ----------------------------------------------------------------------------------------------


def test_a_ready_server_is_healthy_on_every_probe(client: httpx.Client) -> None:
    for path in ("/health", "/ping", "/", "/live"):
        answer = client.get(path)
        assert (answer.status_code, answer.content) == (200, b"")
        assert client.head(path).status_code == 200


def test_while_the_engine_starts_it_lives_but_is_not_ready(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    async def start_later(engine: EngineClient) -> None:
        await asyncio.to_thread(released.wait)
        await start(engine)

    start = EngineClient.start
    monkeypatch.setattr(EngineClient, "start", start_later)
    with live_server(model_folder, wait_ready=False) as live, live.client() as client:
        try:
            assert client.get("/live").status_code == 200
            for path in ("/health", "/ping", "/"):
                answer = client.get(path)
                assert answer.status_code == 503
                assert answer.json() == {"error": "unhealthy", "error_type": "healthcheck"}
            answer = client.post(COMPLETIONS, json={"prompt": "a"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
            assert int(answer.headers["retry-after"]) > 0
            for path in ("/generate", "/generate_stream"):
                answer = client.post(path, json={"inputs": "a"})
                assert (answer.status_code, answer.json()["error_type"]) == (503, "not_ready")
            assert client.get("/info").status_code == 503
            assert metric(client.get("/metrics").text, "tokenplane_engine_ready") == 0
        finally:
            released.set()
        live.wait_ready()
        assert client.get("/health").status_code == 200


def test_a_stream_outlives_its_engine(model_folder: Path) -> None:
    """The engine is killed in the middle: the text goes on as if nothing had happened; new requests get 503."""
    body: dict[str, Any] = {"prompt": "Go on.", "max_tokens": 60, "ignore_eos": True, "temperature": 1, "seed": 4}
    with live_server(model_folder, step_ms=20) as live, live.client() as client:
        expected = client.post(COMPLETIONS, json=body).json()["choices"][0]["text"]
        sdk = openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)
        options = {key: value for key, value in body.items() if key != "ignore_eos"}
        text = ""
        more = {"ignore_eos": True}
        with sdk, sdk.completions.create(model="tgi", stream=True, extra_body=more, **options) as stream:
            for number, chunk in enumerate(stream):
                text += chunk.choices[0].text
                if number == 10:
                    pid = live.service.engine.engine_pid
                    assert pid is not None
                    os.kill(pid, signal.SIGKILL)
                    wait_until(lambda: not live.service.is_ready, 5, "the loss to be noticed")
                    assert client.get("/health").status_code == 503
                    refused = client.post("/generate", json={"inputs": "a"})
                    assert (refused.status_code, refused.json()["error_type"]) == (503, "not_ready")
                    assert client.get("/live").status_code == 200
        assert text == expected
        assert metric(client.get("/metrics").text, "tokenplane_engine_restarts_total") == 1


def test_a_request_that_loses_engine_after_engine_is_failed_in_its_dialect(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenplane_core.client.MAX_BACKOFF_S", 0.05)
    openai_body: dict[str, Any] = {"prompt": "Go on.", "max_tokens": 500, "ignore_eos": True}
    native_body: dict[str, Any] = {"inputs": "Go on.", "parameters": {"max_new_tokens": 500}}
    with live_server(model_folder, step_ms=100) as live, live.client() as client, ThreadPoolExecutor(4) as pool:
        answers = [
            pool.submit(client.post, path, json=body)
            for path, body in (
                (COMPLETIONS, openai_body),
                (COMPLETIONS, {**openai_body, "stream": True}),
                ("/generate", native_body),
                ("/generate_stream", native_body),
            )
        ]
        wait_until(lambda: live.service.engine.num_live == 4, 10, "all four to run")
        for _ in range(SUSPECT_AFTER + 4):  # from then on each is alone in its engine
            live.wait_ready()
            pid = live.service.engine.engine_pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: not live.service.is_ready, 5, "the loss to be noticed")
        whole, streamed, native, native_streamed = [answer.result(timeout=30) for answer in answers]
        assert (whole.status_code, whole.json()["error"]["type"]) == (503, "server_error")
        assert streamed.status_code == 200
        *_, failure, done, end = streamed.text.split("\n\n")
        assert json.loads(failure.removeprefix("data: "))["error"]["type"] == "server_error"
        assert (done, end) == ("data: [DONE]", "")
        assert (native.status_code, native.json()["error_type"]) == (424, "generation")
        *_, failure, end = native_streamed.text.split("\n\n")
        assert json.loads(failure.removeprefix("data: "))["error_type"] == "generation"
        live.wait_ready()
        live.wait_idle()
        assert 'tgi_request_failure{err="generation"} 4.0' in client.get("/metrics").text
        assert client.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 1}).status_code == 200


# --- Overload -----------------------------------------------------------------------------------------------


def test_beyond_the_limit_requests_are_refused_at_once(model_folder: Path) -> None:
    long: dict[str, Any] = {"prompt": "Go on.", "max_tokens": 500, "ignore_eos": True, "n": 2}
    with live_server(model_folder, step_ms=10, max_concurrent_requests=2) as live, live.client() as client:
        with client.stream("POST", COMPLETIONS, json={**long, "stream": True}) as running:
            events = running.iter_bytes()
            next(events)
            answer = client.post(COMPLETIONS, json={"prompt": "a"})
            assert answer.status_code == 429
            assert (answer.json()["error"]["type"], answer.json()["error"]["code"]) == (
                "rate_limit_error",
                "rate_limit_exceeded",
            )
            assert int(answer.headers["retry-after"]) > 0
            answer = client.post("/generate", json={"inputs": "a"})
            assert (answer.status_code, answer.json()["error_type"]) == (429, "overloaded")
            assert answer.json()["error"].startswith("Model is overloaded")
            streamed = client.post("/generate_stream", json={"inputs": "a"})
            assert streamed.status_code == 200
            assert '"error_type":"overloaded"' in streamed.text
        live.wait_idle()
        assert client.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 1}).status_code == 200
        never = client.post(COMPLETIONS, json={"prompt": "a", "n": 3})
        assert (never.status_code, never.json()["error"]["param"]) == (400, "n")
        too_many = client.post(COMPLETIONS, json={"prompt": ["a", "b", "c"]})
        assert (too_many.status_code, too_many.json()["error"]["param"]) == (400, "prompt")


def test_half_admitted_choices_leave_nothing_behind(model_folder: Path) -> None:
    long: dict[str, Any] = {"prompt": "Go on.", "max_tokens": 300, "ignore_eos": True}
    with live_server(model_folder, step_ms=10, max_concurrent_requests=2) as live, live.client() as client:
        with client.stream("POST", COMPLETIONS, json={**long, "stream": True}) as running:
            events = running.iter_bytes()
            next(events)
            assert client.post(COMPLETIONS, json={**long, "n": 2}).status_code == 429
            assert live.service.engine.num_live == 1
        live.wait_idle()


def test_a_long_text_does_not_hold_up_the_others(client: httpx.Client, server: LiveServer) -> None:
    """It takes most of a second to tokenize; meanwhile the event loop goes on."""
    num_answers = 0
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(client.post, COMPLETIONS, json={"prompt": "word " * 300_000})
        with server.client() as other:
            while not long.done():
                assert other.get("/live").status_code == 200
                num_answers += 1
        assert long.result().status_code == 400
    assert num_answers >= 10


# --- Keys ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked_server(model_folder: Path) -> Iterator[LiveServer]:
    with live_server(model_folder, api_key="Open-Sesame", served_model_name="sesame") as live:
        yield live


def test_without_the_key_only_probes_and_facts_are_open(locked_server: LiveServer) -> None:
    with locked_server.client() as client:
        for path in ("/health", "/live", "/ping", "/", "/metrics", "/info"):
            assert client.get(path).status_code == 200
        for path in ("/v1/chat/completions", COMPLETIONS):
            answer = client.post(path, json={})
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        for path in ("/", "/generate", "/generate_stream", "/tokenize", "/nope"):
            answer = client.post(path, json={"inputs": "a"})
            assert (answer.status_code, answer.json()["error_type"]) == (401, "unauthorized")
        assert client.get("/v1/models").status_code == 401


@pytest.mark.parametrize(
    "value", ["Bearer open-sesame", "Bearer Open-Sesam", "Open-Sesame", "Basic Open-Sesame", "Bearer", "Bearer é"]
)
def test_a_wrong_key_is_refused(locked_server: LiveServer, value: str) -> None:
    with locked_server.client() as client:
        answer = client.post(COMPLETIONS, json={"prompt": "a"}, headers={"authorization": value.encode()})
        assert answer.status_code == 401


def test_the_right_key_opens(locked_server: LiveServer) -> None:
    with openai.OpenAI(base_url=f"{locked_server.url}/v1", api_key="Open-Sesame", max_retries=0) as sdk:
        answer = sdk.completions.create(model="sesame", prompt="a", max_tokens=1)
        assert answer.model == "sesame"
        assert [model.id for model in sdk.models.list()] == ["sesame"]
        assert sdk.completions.create(model=MODEL_ID, prompt="a", max_tokens=1).model == "sesame"
    with (
        openai.OpenAI(base_url=f"{locked_server.url}/v1", api_key="wrong", max_retries=0) as sdk,
        pytest.raises(openai.AuthenticationError),
    ):
        sdk.models.list()


def test_a_browser_may_ask_before_it_has_a_key(locked_server: LiveServer) -> None:
    with locked_server.client() as client:
        headers = {
            "origin": "http://localhost:8080",
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type,x-stainless-os",
        }
        answer = client.options("/v1/chat/completions", headers=headers)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "*"
        assert "authorization" in answer.headers["access-control-allow-headers"]
        assert "x-stainless-os" in answer.headers["access-control-allow-headers"]
        answer = client.get("/health", headers={"origin": "http://localhost:8080"})
        assert {"x-request-id", "retry-after"} <= set(answer.headers["access-control-expose-headers"].split(", "))


# --- What the server says about itself ----------------------------------------------------------------------


def test_metrics_have_tgis_names_and_count(client: httpx.Client, server: LiveServer) -> None:
    server.wait_idle()
    before = client.get("/metrics").text
    client.post("/generate", json={"inputs": "a", "parameters": {"max_new_tokens": 3}})
    client.post("/v1/completions", json={"prompt": "a", "max_tokens": 3, "n": 2, "ignore_eos": True})
    client.post("/generate", json={"inputs": "a", "parameters": {"temperature": 0}})
    after = client.get("/metrics")
    assert after.headers["content-type"] == "text/plain; charset=utf-8"

    def grown(name: str) -> float:
        return metric(after.text, name) - metric(before, name)

    assert grown("tgi_request_count") == 4
    assert grown("tgi_request_success") == 3
    assert grown("tgi_request_generated_tokens_sum") == 9
    assert grown("tgi_request_max_new_tokens_sum") == 9
    for name in ("", "_validation", "_queue", "_inference", "_mean_time_per_token"):
        assert grown(f"tgi_request{name}_duration_count") == 3
    assert re.search(r'^tgi_request_failure\{err="validation"\} [1-9]', after.text, re.MULTILINE)
    assert "# TYPE tgi_request_count counter" in after.text
    assert not re.search(r"^tgi_\w+(_total|_created)[ {]", after.text, re.MULTILINE)


def test_every_generation_asked_for_is_counted_as_finished_or_failed(client: httpx.Client, server: LiveServer) -> None:
    def counts() -> tuple[float, float]:
        text = client.get("/metrics").text
        failed = [line for line in text.splitlines() if line.startswith("tgi_request_failure{")]
        ended = metric(text, "tgi_request_success") + sum(float(line.rpartition(" ")[2]) for line in failed)
        return metric(text, "tgi_request_count"), ended

    server.wait_idle()
    asked_before, ended_before = counts()
    client.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 3, "n": 2})
    client.post(COMPLETIONS, json={"prompt": "a", "model": "another"})
    client.post(COMPLETIONS, json={"prompt": "a", "n": 2, "logit_bias": {str(id): -100 for id in range(512)}})
    client.post("/generate", content=b"{", headers={"content-type": "application/json"})
    client.post("/generate", json={"inputs": 5})
    client.post("/generate_stream", json={"inputs": "a", "parameters": {"temperature": 0}})
    client.post("/tokenize", json={"inputs": 5})
    # A failure is counted behind its answer's last byte.
    wait_until(lambda: counts()[1] - ended_before == 8, timeout_s=5, what="8 generations to have ended")
    assert counts() == (asked_before + 8, ended_before + 8)


def test_metric_buckets_are_tgis(client: httpx.Client) -> None:
    text = client.get("/metrics").text
    bounds = [float(b) for b in re.findall(r'^tgi_request_duration_bucket\{le="([^"]+)"\}', text, re.MULTILINE)]
    assert len(bounds) == 36
    assert bounds[0] == pytest.approx(0.00015)
    assert bounds[-2] == pytest.approx(0.0001 * 1.5**35)
    tokens = [float(b) for b in re.findall(r'^tgi_request_input_length_bucket\{le="([^"]+)"\}', text, re.MULTILINE)]
    assert (len(tokens), tokens[99]) == (101, 2047)


def test_engine_gauges_follow_the_engine(client: httpx.Client, server: LiveServer) -> None:
    server.wait_idle()
    text = client.get("/metrics").text
    for name in ("running", "waiting", "live"):
        assert metric(text, f"tokenplane_requests_{name}") == 0
    assert metric(text, "tokenplane_kv_blocks") > 0
    for name in ("padded_tokens", "requests_preempted", "engine_restarts", "prefix_cache_hit_tokens"):
        assert metric(text, f"tokenplane_{name}_total") >= 0


def test_each_request_is_one_log_line(client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="tokenplane.request"):
        answer = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 3, "ignore_eos": True})
        client.post("/v1/completions", json={"prompt": "a", "temperature": 9})
        client.post("/generate", content=b"{", headers={"content-type": "application/json"})
        client.get("/health")
        wait_until(lambda: len(caplog.records) >= 3, 5, "the log lines")
    good, bad, worse = [record.getMessage() for record in caplog.records]
    assert f"id={answer.headers['x-request-id']} method=POST path=/v1/completions status=200" in good
    assert "prompt_tokens=1" in good and "generated_tokens=3 finish=length" in good
    assert re.search(r"queue_ms=[\d.]+ first_token_ms=[\d.]+ total_ms=[\d.]+$", good)
    assert "status=400" in bad and "temperature" in bad
    assert "status=400" in worse
    assert all(record.exc_info is None for record in caplog.records)


def test_our_own_mistakes_are_logged_and_not_told(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client = httpx.Client(base_url=server.url)  # the document promises no 500

    def fail(*_: Any) -> Any:
        raise RuntimeError("the secret plan")

    monkeypatch.setattr(server.service.tokenizer, "encode", fail)
    answer = client.post(COMPLETIONS, json={"prompt": "a"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    native = client.post("/generate", json={"inputs": "a"})
    assert (native.status_code, native.json()["error_type"]) == (500, "internal")
    streamed = client.post("/generate_stream", json={"inputs": "a"})
    assert '"error_type":"internal"' in streamed.text
    assert "secret" not in answer.text + native.text + streamed.text
    monkeypatch.undo()
    assert client.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 1}).status_code == 200
    client.close()
    assert sum(record.exc_info is not None for record in caplog.records) == 3


def test_a_client_cannot_forge_log_lines(client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="tokenplane.request"):
        client.post("/v1/completions", json={"prompt": "a", "model": "x\nid=forged"})
        client.get("/nope%0Aid=forged")
        wait_until(lambda: len(caplog.records) >= 2, 5, "the log lines")
    assert all("\n" not in record.getMessage() for record in caplog.records)


# --- Models without a template ------------------------------------------------------------------------------


def test_without_a_chat_template_chat_says_so(tmp_path: Path) -> None:
    folder = make_text_model(tmp_path / "plain", chat_template=None)
    with live_server(folder) as live, live.client() as client:
        answer = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}]})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "template_error")
        assert "--tokenizer-config-path" in answer.json()["error"]["message"]


def test_a_template_that_refuses_is_a_client_error(tmp_path: Path) -> None:
    folder = make_text_model(tmp_path / "strict", chat_template="{{ raise_exception('only poems, please') }}")
    with live_server(folder) as live, live.client() as client:
        answer = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}]})
        assert answer.status_code == 400
        assert "only poems, please" in answer.json()["error"]["message"]


@pytest.mark.parametrize("backend", ["simulated-tpu", "simulated-gaudi", "simulated-neuron"])
def test_other_devices_serve_the_same_api(model_folder: Path, backend: str) -> None:
    with live_server(model_folder, backend=backend) as live, live.client() as client:
        answer = client.post(COMPLETIONS, json={"prompt": "The scheduler", "max_tokens": 5, "n": 2, "ignore_eos": True})
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 10
        assert live.service.limits is not None
        over = live.service.limits.max_total_tokens
        assert client.post(COMPLETIONS, json={"prompt": "The scheduler", "max_tokens": over}).status_code == 400
        live.wait_idle()
