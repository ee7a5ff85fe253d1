"""TGI's native routes: /generate, /generate_stream, POST /, /tokenize, /info."""

from __future__ import annotations

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from helpers.live_server import MODEL_ID, LiveServer, live_server, wait_until

INPUTS = "What is the capital of France?"


def generate(client: httpx.Client, **parameters: Any) -> Any:
    answer = client.post("/generate", json={"inputs": INPUTS, "parameters": {"max_new_tokens": 12, **parameters}})
    assert answer.status_code == 200, answer.text
    return answer.json()


def stream(client: httpx.Client, path: str = "/generate_stream", **body: Any) -> list[Any]:
    """Events of a native stream; checks the framing."""
    answer = client.post(path, json={"inputs": INPUTS, **body})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/event-stream")
    *events, end = answer.text.split("\n\n")
    assert end == ""
    assert all(event.startswith("data: {") and "\n" not in event for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_the_bare_answer_is_text_only(client: httpx.Client) -> None:
    assert list(generate(client)) == ["generated_text"]


def test_details_tell_every_token(client: httpx.Client) -> None:
    answer = generate(client, details=True, top_n_tokens=3)
    details = answer["details"]
    assert list(details) == ["finish_reason", "generated_tokens", "seed", "prefill", "tokens", "top_tokens"]
    assert (details["finish_reason"], details["generated_tokens"], details["prefill"]) == ("length", 12, [])
    assert details["seed"] is None, "greedy draws nothing"
    assert "".join(token["text"] for token in details["tokens"]) == answer["generated_text"]
    for token, top in zip(details["tokens"], details["top_tokens"], strict=True):
        assert list(token) == ["id", "text", "logprob", "special"]
        assert len(top) == 3
        assert top[0]["id"] == token["id"], "greedy takes the best"


def test_decoder_input_details_tell_the_prompt(client: httpx.Client) -> None:
    """They turn details on, and cost neither the text nor its logprobs anything."""
    plain = generate(client, details=True)
    answer = generate(client, decoder_input_details=True)
    prefill = answer["details"].pop("prefill")
    assert [token["id"] for token in prefill] == [
        token["id"] for token in client.post("/tokenize", json={"inputs": INPUTS}).json()
    ]
    assert "".join(token["text"] for token in prefill) == INPUTS
    assert all(list(token) == ["id", "text", "logprob"] for token in prefill)
    assert prefill[0]["logprob"] is None
    assert all(token["logprob"] < 0 for token in prefill[1:])
    del plain["details"]["prefill"]
    assert answer == plain


def test_decoder_input_details_of_a_cached_prompt_in_pieces_are_complete(client: httpx.Client) -> None:
    inputs = INPUTS * 100
    body = {"inputs": inputs, "parameters": {"max_new_tokens": 1, "decoder_input_details": True}}
    first, again = (client.post("/generate", json=body).json()["details"]["prefill"] for _ in range(2))
    assert first == again
    assert None not in [token["logprob"] for token in first[1:]]
    assert "".join(token["text"] for token in first) == inputs


def test_every_candidate_tells_the_same_prompt(client: httpx.Client) -> None:
    details = generate(client, best_of=2, do_sample=True, decoder_input_details=True)["details"]
    assert len(details["prefill"]) > 1
    assert details["best_of_sequences"][0]["prefill"] == details["prefill"]


def test_prompt_logprobs_outlive_the_engine(model_folder: Path) -> None:
    """It is killed while it computes the prompt; another computes it from the start."""
    body = {"inputs": INPUTS * 60, "parameters": {"max_new_tokens": 3, "decoder_input_details": True}}
    slow = live_server(model_folder, step_ms=20, engine={"max_step_tokens": 16})
    with slow as live, live.client() as client, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client.post, "/generate", json=body)
        wait_until(lambda: live.service.engine.num_live == 1, 5, "the request to be submitted")
        time.sleep(0.1)  # five of its thirty and more steps
        pid = live.service.engine.engine_pid
        assert pid is not None and not asked.done()
        os.kill(pid, signal.SIGKILL)
        interrupted = asked.result(timeout=30)
        assert live.service.engine.num_restarts == 1
        assert interrupted.status_code == 200
        assert interrupted.json() == client.post("/generate", json=body).json()


def test_a_device_without_prompt_logprobs_refuses_them(model_folder: Path) -> None:
    with live_server(model_folder, backend="simulated-neuron") as live, live.client() as client:
        body = {"inputs": INPUTS, "parameters": {"max_new_tokens": 1, "decoder_input_details": True}}
        answer = client.post("/generate", json=body)
        assert (answer.status_code, answer.json()["error_type"]) == (422, "validation")
        assert "decoder_input_details" in answer.json()["error"] and "simulated-neuron" in answer.json()["error"]
        assert generate(client, details=True)["details"]["prefill"] == []


def test_grammars_can_be_turned_off(model_folder: Path) -> None:
    with live_server(model_folder, disable_grammar_support=True) as live, live.client() as client:
        body = {"inputs": INPUTS, "parameters": {"grammar": {"type": "regex", "value": "a"}}}
        answer = client.post("/generate", json=body)
        assert (answer.status_code, answer.json()["error_type"]) == (422, "validation")
        assert "--disable-grammar-support" in answer.json()["error"]


def test_absent_parameters_sample_and_empty_ones_do_not(client: httpx.Client) -> None:
    def texts(body: dict[str, Any]) -> set[str]:
        body = {"inputs": INPUTS, **body}
        return {client.post("/generate", json=body).json()["generated_text"][:20] for _ in range(3)}

    assert len(texts({})) == 3
    assert len(texts({"parameters": {}})) == 1


@pytest.mark.parametrize(
    "parameters", [{"do_sample": True}, {"temperature": 0.9}, {"top_k": 40}, {"top_p": 0.9}, {"typical_p": 0.9}]
)
def test_these_turn_sampling_on_and_the_seed_repeats(client: httpx.Client, parameters: dict[str, Any]) -> None:
    first = generate(client, **parameters, details=True)
    assert isinstance(first["details"]["seed"], int)
    again = generate(client, **parameters, details=True, seed=first["details"]["seed"])
    assert again["generated_text"] == first["generated_text"]


def test_temperature_of_one_alone_stays_greedy(client: httpx.Client) -> None:
    assert generate(client, temperature=1.0, details=True)["details"]["seed"] is None


def test_the_whole_range_of_seeds_is_taken(client: httpx.Client) -> None:
    seed = 2**64 - 1
    assert generate(client, do_sample=True, seed=seed, details=True)["details"]["seed"] == seed


def test_logprobs_are_of_the_distribution_drawn_from(client: httpx.Client) -> None:
    answer = generate(client, do_sample=True, top_k=1, details=True, top_n_tokens=2)
    assert all(token["logprob"] == 0 for token in answer["details"]["tokens"]), "the only candidate is certain"
    assert all(top[1]["logprob"] is None for top in answer["details"]["top_tokens"]), "an excluded token has null"


def test_the_stop_string_stays(client: httpx.Client) -> None:
    text = generate(client, max_new_tokens=60)["generated_text"]
    stop = text[len(text) // 2 :][:3]
    end = text.index(stop) + len(stop)
    answer = generate(client, max_new_tokens=60, stop=[stop], details=True)
    assert answer["generated_text"] == text[:end]
    assert answer["details"]["finish_reason"] == "stop_sequence"
    assert "".join(token["text"] for token in answer["details"]["tokens"]) == text[:end]


def test_return_full_text_puts_the_prompt_in_front(client: httpx.Client) -> None:
    text = generate(client)["generated_text"]
    assert generate(client, return_full_text=True)["generated_text"] == INPUTS + text


def test_the_root_route_answers_a_list_with_the_prompt_in_front(client: httpx.Client) -> None:
    text = generate(client)["generated_text"]
    body: dict[str, Any] = {"inputs": INPUTS, "parameters": {"max_new_tokens": 12}}
    assert client.post("/", json=body).json() == [{"generated_text": INPUTS + text}]
    body["parameters"]["return_full_text"] = False
    assert client.post("/", json={**body, "stream": False}).json() == [{"generated_text": text}]


def test_the_root_route_streams_when_asked(client: httpx.Client) -> None:
    events = stream(client, "/", stream=True, parameters={"max_new_tokens": 3})
    assert len(events) == 3
    assert events[-1]["generated_text"].startswith(INPUTS)


def test_an_event_is_one_line_for_readers_that_know_unicode_line_breaks(client: httpx.Client) -> None:
    body = {"inputs": "a\u0085b\u2028c\u2029d", "stream": True, "parameters": {"max_new_tokens": 1}}
    with client.stream("POST", "/", json=body) as answer:
        (line,) = [line for line in answer.iter_lines() if line]
    assert json.loads(line.removeprefix("data: "))["generated_text"].startswith(body["inputs"])


def test_generate_ignores_a_stream_field(client: httpx.Client) -> None:
    body = {"inputs": INPUTS, "stream": True, "parameters": {"max_new_tokens": 2}}
    assert "generated_text" in client.post("/generate", json=body).json()


def test_a_stream_is_the_answer_token_by_token(client: httpx.Client) -> None:
    whole = generate(client, details=True)
    events = stream(client, parameters={"max_new_tokens": 12, "details": True})
    assert [event["index"] for event in events] == list(range(1, 13))
    assert [event["token"] for event in events] == whole["details"]["tokens"]
    assert all(event["generated_text"] is None and event["details"] is None for event in events[:-1])
    assert events[-1]["generated_text"] == whole["generated_text"]
    assert events[-1]["details"] == {
        "finish_reason": "length",
        "generated_tokens": 12,
        "seed": None,
        "input_length": len(client.post("/tokenize", json={"inputs": INPUTS}).json()),
    }


def test_a_stream_has_details_and_top_tokens_only_when_asked(client: httpx.Client) -> None:
    plain = stream(client, parameters={"max_new_tokens": 2})
    assert plain[-1]["details"] is None
    assert "top_tokens" not in plain[0]
    assert len(stream(client, parameters={"max_new_tokens": 2, "top_n_tokens": 2})[0]["top_tokens"]) == 2


def test_errors_in_a_native_stream_are_events(client: httpx.Client) -> None:
    (event,) = stream(client, parameters={"temperature": 0})
    assert event["error_type"] == "validation"
    assert event["error"].startswith("Input validation error: ") and "temperature" in event["error"]
    (event,) = stream(client, parameters={"best_of": 2, "do_sample": True})
    assert "best_of" in event["error"]
    (event,) = stream(client, parameters={"best_of": 0})
    assert "best_of" in event["error"]
    (event,) = stream(client, parameters={"decoder_input_details": True})
    assert "decoder_input_details" in event["error"]


def test_best_of_gives_the_likelier_and_tells_the_other(client: httpx.Client) -> None:
    details = generate(client, best_of=2, do_sample=True, details=True)["details"]
    (other,) = details["best_of_sequences"]

    def mean(tokens: list[Any]) -> float:
        return float(sum(token["logprob"] for token in tokens)) / len(tokens)

    assert mean(details["tokens"]) >= mean(other["tokens"])
    assert other["seed"] != details["seed"]
    assert "best_of_sequences" not in generate(client, do_sample=True, details=True)["details"]
    assert list(generate(client, best_of=2, do_sample=True)) == ["generated_text"]


def test_truncate_keeps_the_end_of_the_prompt(client: httpx.Client) -> None:
    ids = [token["id"] for token in client.post("/tokenize", json={"inputs": INPUTS}).json()]
    cut = generate(client, truncate=3)["generated_text"]
    same = client.post("/v1/completions", json={"prompt": ids[-3:], "max_tokens": 12, "temperature": 0}).json()
    assert cut == same["choices"][0]["text"]


def test_more_new_tokens_than_fit_end_with_length(client: httpx.Client, server: LiveServer) -> None:
    """TGI admits it if 1024 new tokens fit, and stops when the context is full."""
    limits = server.service.limits
    assert limits is not None
    body = {"inputs": "w", "parameters": {"max_new_tokens": 100_000, "details": True, "stop": []}}
    details = client.post("/generate", json=body).json()["details"]
    assert details["finish_reason"] in ("length", "eos_token")
    assert details["generated_tokens"] < limits.max_total_tokens


def test_tokenize_gives_byte_offsets(client: httpx.Client) -> None:
    text = "Zwölf € 👍"
    tokens = client.post("/tokenize", json={"inputs": text}).json()
    assert all(list(token) == ["id", "text", "start", "stop"] for token in tokens)
    raw = text.encode()
    assert all(raw[token["start"] : token["stop"]].decode(errors="replace") == token["text"] for token in tokens)
    assert tokens[-1]["stop"] == len(raw)


def test_info_has_tgis_fields(client: httpx.Client, server: LiveServer) -> None:
    info = client.get("/info").json()
    assert info["model_id"] == MODEL_ID
    assert info["max_total_tokens"] == 2048
    assert info["max_input_tokens"] == 2047
    assert (info["max_concurrent_requests"], info["max_best_of"], info["max_stop_sequences"]) == (128, 2, 4)
    assert info["max_client_batch_size"] == 4
    for name in ("model_sha", "model_pipeline_tag", "validation_workers", "router", "version", "sha", "docker_label"):
        assert name in info


def test_headers_of_a_native_answer_and_stream(client: httpx.Client) -> None:
    body = {"inputs": INPUTS, "parameters": {"max_new_tokens": 3}}
    answer = client.post("/generate", json=body)
    assert answer.headers["content-type"] == "application/json"
    names = ("x-total-time", "x-validation-time", "x-queue-time", "x-inference-time", "x-time-per-token")
    total, validation, queue, inference, per_token = (int(answer.headers[name]) for name in names)
    assert abs(total - validation - queue - inference) <= 2
    assert per_token == pytest.approx(inference / 3, abs=1)
    assert float(answer.headers["x-compute-time"]) == pytest.approx(total / 1000, abs=0.001)
    assert int(answer.headers["x-prompt-tokens"]) == len(client.post("/tokenize", json={"inputs": INPUTS}).json())
    refused = client.post("/generate", json={"inputs": ""})
    assert not any(name.startswith("x-compute") for name in refused.headers)
    assert answer.headers["x-compute-characters"] == str(len(INPUTS))
    assert answer.headers["x-generated-tokens"] == "3"
    streamed = client.post("/generate_stream", json=body)
    assert streamed.headers["x-accel-buffering"] == "no"
    assert streamed.headers["x-compute-type"] == answer.headers["x-compute-type"] == "1-simulated-cuda"
    assert streamed.headers["x-compute-characters"] == str(len(INPUTS))
    assert "x-generated-tokens" not in streamed.headers


def test_unknown_fields_are_ignored_as_in_tgi(client: httpx.Client) -> None:
    assert generate(client, no_such_parameter=1) == generate(client)
