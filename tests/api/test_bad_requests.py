"""Whatever a client sends: a 4xx that names the field, in the dialect of the route, and a server that goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from helpers.live_server import LiveServer

CHAT, COMPLETIONS, GENERATE = "/v1/chat/completions", "/v1/completions", "/generate"
USER = [{"role": "user", "content": "Hi"}]


@pytest.fixture(autouse=True)
def the_server_still_works(client: httpx.Client) -> Iterator[None]:
    yield
    answer = client.post(COMPLETIONS, json={"prompt": "Hi", "max_tokens": 2})
    assert answer.status_code == 200, answer.text


def assert_openai_error(answer: httpx.Response, status: int, param: str | None, *words: str) -> None:
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert body["error"]["type"] == "invalid_request_error"
    assert body["error"]["param"] == param, body
    for word in words:
        assert word in body["error"]["message"]


def assert_tgi_error(answer: httpx.Response, status: int, error_type: str, *words: str) -> None:
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert list(body) == ["error", "error_type"]
    assert body["error_type"] == error_type
    for word in words:
        assert word in body["error"]


BAD_OPTIONS: list[tuple[str, Any, str]] = [
    ("temperature", -0.1, "0"),
    ("temperature", 2.1, "2"),
    ("temperature", "hot", "a number"),
    ("temperature", True, "a number"),
    ("temperature", [], "a number"),
    ("top_p", 0, "0"),
    ("top_p", 2, "1"),
    ("top_p", "a", "a number"),
    ("presence_penalty", 2.5, "2"),
    ("frequency_penalty", -2.5, "-2"),
    ("repetition_penalty", 0, "0.01"),
    ("repetition_penalty", 1e30, "100"),
    ("min_p", 1.5, "1"),
    ("min_p", -1, "0"),
    ("top_k", -2, "-1"),
    ("top_k", 1.5, "an integer"),
    ("n", 0, "1"),
    ("n", 17, "16"),
    ("n", "two", "an integer"),
    ("n", 10**30, "16"),
    ("max_tokens", 0, "1"),
    ("max_tokens", -5, "1"),
    ("max_tokens", 10**40, "2048"),
    ("max_tokens", 1e3, "an integer"),
    ("max_tokens", 2048, "2048"),
    ("min_tokens", -1, "0"),
    ("min_tokens", 10**30, "at most 2"),
    ("seed", "x", "an integer"),
    ("seed", 2**64, "18446744073709551615"),
    ("seed", -(2**63) - 1, "-9223372036854775808"),
    ("seed", 1.5, "an integer"),
    ("stop", 5, "a string"),
    ("stop", [1], "a string"),
    ("stop", [""], "empty"),
    ("stop", "", "empty"),
    ("stop", ["a", "b", "c", "d", "e"], "4"),
    ("logit_bias", [1], "an object"),
    ("logit_bias", {"x": 1}, "token ids"),
    ("logit_bias", {"-1": 1}, "token ids"),
    ("logit_bias", {"99999": 1}, "511"),
    ("logit_bias", {"5": "a"}, "a number"),
    ("stream", "yes", "true or false"),
    ("stream_options", {"include_usage": True}, "stream"),
    ("stream_options", 5, "an object"),
    ("stream_options", {"include_obfuscation": True}, "stream"),
    ("model", 5, "a string"),
    ("ignore_eos", 1, "true or false"),
    ("response_format", {"type": "yaml"}, "yaml"),
    ("response_format", {"type": "json_schema"}, "object"),
    ("response_format", "json", "object"),
    ("guided_json", 5, "object"),
    ("guided_json", "{", "JSON"),
    ("guided_regex", "", "character"),
    ("guided_choice", "yes", "list"),
    ("guided_grammar", "root ::= a", "::="),
    ("structured_outputs", {"yaml": "x"}, "yaml"),
    ("service_tier", "flex", "not supported"),
    ("store", True, "not supported"),
    ("no_such_option", 1, "unknown"),
]


@pytest.mark.parametrize(("field", "value", "word"), BAD_OPTIONS, ids=lambda value: str(value)[:30])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_bad_option_is_named_with_its_value_and_limit(
    client: httpx.Client, path: str, field: str, value: Any, word: str
) -> None:
    prompt: dict[str, Any] = {"messages": USER} if path == CHAT else {"prompt": "Hi"}
    answer = client.post(path, json={"max_tokens": 2, **prompt, field: value})
    param = answer.json()["error"]["param"]
    assert_openai_error(answer, 400, param, field, word)
    assert param.startswith(field)


@pytest.mark.parametrize(
    ("options", "param", "words"),
    [
        ({"logprobs": 21}, "logprobs", ["20"]),
        ({"logprobs": -1}, "logprobs", ["0"]),
        ({"logprobs": True}, "logprobs", ["an integer"]),
        ({"echo": "yes"}, "echo", ["true or false"]),
        ({"echo": True, "logprobs": 21}, "logprobs", ["20"]),
        ({"suffix": "the end"}, "suffix", ["the end"]),
        ({"best_of": 3}, "best_of", ["3"]),
        ({"prompt": []}, "prompt", ["empty"]),
        ({"prompt": None}, "prompt", ["a string"]),
        ({"prompt": ""}, "prompt", ["empty"]),
        ({"prompt": [[]]}, "prompt", ["empty"]),
        ({"prompt": {"text": "a"}}, "prompt", ["a string"]),
        ({"prompt": ["a", 5]}, "prompt", ["mixes"]),
        ({"prompt": ["a", [5]]}, "prompt", ["mixes"]),
        ({"prompt": [5, [5]]}, "prompt", ["mixes"]),
        ({"prompt": [True]}, "prompt[0]", ["true"]),
        ({"prompt": [[1, "a"]]}, "prompt[0][1]", ["an integer"]),
        ({"prompt": [512]}, "prompt", ["512", "511"]),
        ({"prompt": [-1]}, "prompt", ["-1"]),
        ({"prompt": [10**30]}, "prompt", ["511"]),
        ({"prompt": ["a"] * 5}, "prompt", ["5", "4", "--max-client-batch-size"]),
        ({"prompt": [1] * 3000}, "prompt", ["3000", "2047"]),
        ({"messages": USER}, "messages", ["unknown"]),
    ],
    ids=str,
)
def test_bad_completion_requests(client: httpx.Client, options: dict[str, Any], param: str, words: list[str]) -> None:
    assert_openai_error(client.post(COMPLETIONS, json={"prompt": "Hi", **options}), 400, param, *words)


@pytest.mark.parametrize(
    ("options", "param", "words"),
    [
        ({"messages": []}, "messages", ["empty"]),
        ({"messages": "Hi"}, "messages", ["a list"]),
        ({"messages": [{"content": "Hi"}]}, "messages[0]", ["role"]),
        ({"messages": [{"role": 5, "content": "Hi"}]}, "messages[0].role", ["a string"]),
        ({"messages": [{"role": "user"}]}, "messages[0].content", ["missing"]),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", ["a string"]),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", ["missing"]),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
            "messages[0].content[0].type",
            ["image_url"],
        ),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0]", ["function"]),
        ({"messages": [{"role": "assistant", "function_call": {}}]}, "messages[0].function_call", ["not supported"]),
        ({"logprobs": 1}, "logprobs", ["true or false"]),
        ({"top_logprobs": 3}, "top_logprobs", ["logprobs"]),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", ["20"]),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", ["3", "4"]),
        ({"max_completion_tokens": 0}, "max_tokens", ["1"]),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name", ["1 to 64"]),
        ({"tool_choice": "required"}, "tool_choice", ["required"]),
        ({"functions": [{"name": "f"}]}, "functions", ["not supported"]),
        ({"modalities": ["audio"]}, "modalities", ["audio"]),
        ({"reasoning_effort": "high"}, "reasoning_effort", ["high"]),
        ({"best_of": 2}, "best_of", ["/v1/completions"]),
        ({"chat_template_kwargs": {"bos_token": "x"}}, "chat_template_kwargs", ["bos_token"]),
        ({"chat_template_kwargs": {"self": "x"}}, "chat_template_kwargs", ["self"]),
        ({"continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt", ["exclude"]),
        ({"messages": [{"role": "user", "content": "a " * 4000}]}, "messages", ["2047"]),
    ],
    ids=lambda value: str(value)[:60],
)
def test_bad_chat_requests(client: httpx.Client, options: dict[str, Any], param: str, words: list[str]) -> None:
    assert_openai_error(client.post(CHAT, json={"messages": USER, **options}), 400, param, *words)


def test_a_missing_prompt_is_named(client: httpx.Client) -> None:
    assert_openai_error(client.post(COMPLETIONS, json={}), 400, "prompt", "missing")
    assert_openai_error(client.post(CHAT, json={}), 400, "messages", "missing")


def test_a_prompt_that_is_too_long_is_told_in_tokens(client: httpx.Client) -> None:
    answer = client.post(COMPLETIONS, json={"prompt": [1] * 2000, "max_tokens": 100})
    assert_openai_error(answer, 400, "max_tokens", "2000", "100", "2048")
    assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_openai_errors_come_before_a_stream_starts(client: httpx.Client) -> None:
    assert_openai_error(client.post(COMPLETIONS, json={"prompt": "a", "stream": True, "n": 0}), 400, "n", "1")


BAD_PARAMETERS: list[tuple[str, Any, str]] = [
    ("temperature", 0, "greater than 0"),
    ("temperature", -1.5, "-1.5"),
    ("temperature", "a", "a number"),
    ("repetition_penalty", 0, "0"),
    ("frequency_penalty", 3, "2"),
    ("top_p", 1.0, "less than 1"),
    ("top_p", 0, "greater than 0"),
    ("typical_p", 1.0, "less than 1"),
    ("top_k", 0, "1"),
    ("top_k", -5, "1"),
    ("max_new_tokens", 0, "1"),
    ("max_new_tokens", -1, "1"),
    ("max_new_tokens", 1.5, "an integer"),
    ("stop", ["a"] * 5, "4"),
    ("stop", "a", "a list"),
    ("stop", None, "a list"),
    ("stop", [""], "empty"),
    ("seed", -1, "0"),
    ("seed", 2**64, "18446744073709551615"),
    ("top_n_tokens", 6, "5"),
    ("truncate", 0, "1"),
    ("truncate", 2048, "2047"),
    ("best_of", 3, "2"),
    ("best_of", 0, "1"),
    ("best_of", 2, "sampling"),
    ("do_sample", None, "true or false"),
    ("details", "yes", "true or false"),
    ("watermark", True, "set it to false"),
    ("grammar", "a", "an object"),
    ("grammar", {"type": "xml", "value": "a"}, "xml"),
    ("grammar", {"type": "regex"}, "grammar.value"),
    ("grammar", {"type": "json", "value": "{"}, "not JSON"),
    ("grammar", {"type": "json_schema", "value": {"name": "n"}}, "grammar.value.schema"),
    ("adapter_id", "lora", "lora"),
]


@pytest.mark.parametrize(("field", "value", "word"), BAD_PARAMETERS, ids=lambda value: str(value)[:30])
def test_a_bad_native_parameter_is_a_validation_error(client: httpx.Client, field: str, value: Any, word: str) -> None:
    for path in (GENERATE, "/"):
        answer = client.post(path, json={"inputs": "Hi", "parameters": {field: value}})
        assert_tgi_error(answer, 422, "validation", "Input validation error: ", field, word)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, ["inputs"]),
        ({"inputs": ""}, ["inputs", "empty"]),
        ({"inputs": None}, ["inputs", "a string"]),
        ({"inputs": ["Hi"]}, ["inputs", "a string"]),
        ({"inputs": "Hi", "parameters": None}, ["parameters", "an object"]),
        ({"inputs": "a " * 5000}, ["inputs", "2047"]),
        ({"inputs": "a " * 1100, "parameters": {"max_new_tokens": 2000}}, ["2000", "2048"]),
        ({"inputs": "Hi", "parameters": {"best_of": 2, "do_sample": True, "seed": 1}}, ["seed", "best_of"]),
    ],
    ids=lambda value: str(value)[:60],
)
def test_bad_native_requests(client: httpx.Client, body: Any, words: list[str]) -> None:
    assert_tgi_error(client.post(GENERATE, json=body), 422, "validation", *words)


MALFORMED = {
    "empty": b"",
    "cut": b'{"prompt": "a',
    "text": b"hello",
    "nan": b'{"prompt": "a", "inputs": "a", "messages": [], "temperature": NaN}',
    "infinity": b'{"prompt": "a", "temperature": -Infinity}',
    "raw NUL": b'{"prompt": "a\x00b", "inputs": "a\x00b"}',
    "not UTF-8": b'{"prompt": "\xff\xfe", "inputs": "\xff"}',
    "lone surrogate": b'{"prompt": "\\ud800", "inputs": "\\ud800", "messages": [{"content": "\\udfff"}]}',
    "single quotes": b"{'prompt': 'a'}",
    "trailing comma": b'{"prompt": "a",}',
    "nested lists": b'{"prompt": ' + b"[" * 200_000,
    "nested objects": b'{"metadata": ' + b'{"a":' * 100_000,
    "nested and closed": b'{"metadata": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001,
    "a megabyte of nonsense": bytes(range(256)) * 4096,
}


@pytest.mark.parametrize("raw", MALFORMED.values(), ids=MALFORMED)
def test_malformed_json_is_told_as_such(client: httpx.Client, raw: bytes) -> None:
    headers = {"content-type": "application/json"}
    for path in (CHAT, COMPLETIONS):
        assert_openai_error(client.post(path, content=raw, headers=headers), 400, None, "JSON")
    for path in (GENERATE, "/generate_stream", "/", "/tokenize"):
        assert_tgi_error(client.post(path, content=raw, headers=headers), 400, "bad_request", "JSON")


@pytest.mark.parametrize("raw", [b"[]", b"5", b"null", b'"text"'])
def test_json_of_another_shape_is_refused(client: httpx.Client, raw: bytes) -> None:
    headers = {"content-type": "application/json"}
    assert_openai_error(client.post(CHAT, content=raw, headers=headers), 400, None, "an object")
    assert_tgi_error(client.post(GENERATE, content=raw, headers=headers), 422, "validation", "an object")


@pytest.mark.parametrize("raw", [b'{"prompt": "a", "seed": 1e400}', b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}"])
def test_numbers_beyond_all_range_are_refused(client: httpx.Client, raw: bytes) -> None:
    answer = client.post(COMPLETIONS, content=raw, headers={"content-type": "application/json"})
    assert_openai_error(answer, 400, "seed", "seed")


def test_a_field_name_without_end_is_refused_in_short(client: httpx.Client) -> None:
    answer = client.post(COMPLETIONS, json={"prompt": "a", "k" * 1_000_000: 1})
    assert_openai_error(answer, 400, "k" * 100, "unknown field")
    assert len(answer.content) < 1000


def test_an_escaped_nul_is_ordinary_text(client: httpx.Client) -> None:
    assert client.post(COMPLETIONS, json={"prompt": "a\x00b", "max_tokens": 1}).status_code == 200


def test_a_megabyte_of_text_is_too_long_not_too_much(client: httpx.Client) -> None:
    for text in ("word " * 200_000, "x" * 1_000_000, "👍" * 150_000):
        assert_openai_error(client.post(COMPLETIONS, json={"prompt": text}), 400, "prompt", "2047")


@pytest.mark.parametrize("media_type", [None, "text/plain", "application/x-www-form-urlencoded", "json", "a/b+json"])
def test_only_json_is_taken(client: httpx.Client, media_type: str | None) -> None:
    headers = {} if media_type is None else {"content-type": media_type}
    raw = json.dumps({"prompt": "Hi", "inputs": "Hi"}).encode()
    assert_openai_error(client.post(COMPLETIONS, content=raw, headers=headers), 415, None, "application/json")
    assert_tgi_error(client.post(GENERATE, content=raw, headers=headers), 415, "unsupported_media_type", "json")


@pytest.mark.parametrize("media_type", ["application/json; charset=utf-8", "application/x+json", "Application/JSON"])
def test_json_by_other_names_is_taken(client: httpx.Client, media_type: str) -> None:
    raw = json.dumps({"prompt": "Hi", "max_tokens": 1}).encode()
    assert client.post(COMPLETIONS, content=raw, headers={"content-type": media_type}).status_code == 200


def test_a_body_over_the_limit_is_refused_declared_or_not(client: httpx.Client, server: LiveServer) -> None:
    limit = server.service.settings.payload_limit_bytes
    raw = b'{"prompt": "' + b"a" * limit + b'"}'

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(raw), 65536):
            yield raw[start : start + 65536]

    headers = {"content-type": "application/json"}
    assert_openai_error(client.post(COMPLETIONS, content=raw, headers=headers), 413, None, str(limit))
    assert_openai_error(client.post(COMPLETIONS, content=pieces(), headers=headers), 413, None, str(limit))
    assert_tgi_error(client.post(GENERATE, content=raw, headers=headers), 413, "payload_too_large", str(limit))


def test_unknown_paths_and_methods(client: httpx.Client) -> None:
    assert_openai_error(client.post("/v1/embeddings", json={}), 404, None, "/v1/embeddings")
    assert_openai_error(client.get("/v1"), 404, None)
    assert_tgi_error(client.get("/nope"), 404, "not_found", "/nope")
    assert_openai_error(client.get(CHAT), 405, None, "GET", "POST")
    wrong = client.get(GENERATE)
    assert_tgi_error(wrong, 405, "method_not_allowed", "GET", "POST")
    assert wrong.headers["allow"] == "POST"
    assert client.post("/generate/", json={"inputs": "Hi"}).status_code == 404


def test_every_field_survives_every_type(client: httpx.Client) -> None:
    """No combination of field and JSON type may cost a 5xx."""
    values: list[Any] = [None, True, -1, 0, 10**25, 1e300, "", "x", [], [[]], [None], {}, {"a": {}}]
    fields = {
        CHAT: ["messages", "n", "stop", "logit_bias", "logprobs", "top_logprobs", "chat_template_kwargs", "tools"],
        COMPLETIONS: ["prompt", "seed", "max_tokens", "min_tokens", "echo", "best_of", "suffix", "metadata", "top_k"],
    }
    for path, names in fields.items():
        for name in names:
            for value in values:
                body: dict[str, Any] = {"messages": USER} if path == CHAT else {"prompt": "Hi"}
                answer = client.post(path, json={"max_tokens": 1, **body, name: value})
                assert answer.status_code < 500, (path, name, value, answer.text)
