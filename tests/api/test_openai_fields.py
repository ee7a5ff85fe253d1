"""Every field of the OpenAI routes: what it does to the engine's request or the answer, or that it is refused.

The tables are compared with the schemas, so a field cannot be added without saying here what it does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from helpers.scripted_client import MARKS, TOOLS_TEMPLATE, ScriptedClient, make_marked_model, scripted_server
from tokenplane_api.openai.responses_schemas import ResponsesRequest
from tokenplane_api.openai.schemas import ChatRequest, CompletionRequest, Message
from tokenplane_core.messages import Submit

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
USER = [{"role": "user", "content": "Hi"}]
BASE: dict[str, dict[str, Any]] = {
    CHAT: {"messages": USER, "seed": 1},
    COMPLETIONS: {"prompt": "Hi", "seed": 1},
    RESPONSES: {"input": "Hi"},
}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


class Outcome:
    """Of a request with the field, beside the engine's request without it."""

    def __init__(self, engine: ScriptedClient, client: httpx.Client, path: str, options: dict[str, Any]) -> None:
        engine.text = "Hello there"
        client.post(path, json=BASE[path]).raise_for_status()
        self.plain = engine.submitted[-1]
        engine.submitted.clear()
        self.answer = client.post(path, json={**BASE[path], **options})
        self.submitted = list(engine.submitted)
        self.prompt = engine.last_prompt if engine.submitted else ""

    @property
    def submit(self) -> Submit:
        assert self.answer.status_code == 200, self.answer.text
        return self.submitted[-1]

    @property
    def json(self) -> Any:
        assert self.answer.status_code == 200, self.answer.text
        return self.answer.json()


Check = Callable[[Outcome], None]
Case = tuple[dict[str, Any], Check]


def sampling(**expected: Any) -> Check:
    def check(outcome: Outcome) -> None:
        for name, value in expected.items():
            assert getattr(outcome.submit.sampling, name) == value
            assert getattr(outcome.plain.sampling, name) != value

    return check


def limit(tokens: int) -> Check:
    def check(outcome: Outcome) -> None:
        assert outcome.submit.max_new_tokens == tokens != outcome.plain.max_new_tokens

    return check


def no_effect(outcome: Outcome) -> None:
    """The engine is asked for the same."""
    same = {"request_id": "", "sampling": outcome.plain.sampling}
    if outcome.answer.request.url.path == RESPONSES:
        assert msgspec.structs.replace(outcome.submit, **same) == msgspec.structs.replace(outcome.plain, **same)
    else:
        plain = msgspec.structs.replace(outcome.plain, request_id="")
        assert msgspec.structs.replace(outcome.submit, request_id="") == plain


def refused(outcome: Outcome) -> None:
    assert outcome.answer.status_code == 400, outcome.answer.text
    assert not outcome.submitted
    (field,) = set(msgspec.json.decode(outcome.answer.request.content)) - set(BASE[outcome.answer.request.url.path])
    error = outcome.answer.json()["error"]
    assert error["param"].startswith(field) and f"`{field}" in error["message"]


def grammar(kind: str, part: str) -> Check:
    def check(outcome: Outcome) -> None:
        found = outcome.submit.grammar
        assert found is not None and found.kind == kind and part in found.source
        assert outcome.plain.grammar is None

    return check


def prompt_has(text: str) -> Check:
    def check(outcome: Outcome) -> None:
        outcome.submit  # noqa: B018  # it must not have been refused
        assert text in outcome.prompt

    return check


def prompt_ends_with(text: str) -> Check:
    def check(outcome: Outcome) -> None:
        outcome.submit  # noqa: B018  # it must not have been refused
        assert outcome.prompt.endswith(text)

    return check


def has_choices(count: int, submitted: int) -> Check:
    def check(outcome: Outcome) -> None:
        assert len(outcome.json["choices"]) == count
        assert len(outcome.submitted) == submitted
        assert len({submit.sampling.seed for submit in outcome.submitted}) == submitted

    return check


def content_is(text: str) -> Check:
    def check(outcome: Outcome) -> None:
        choice = outcome.json["choices"][0]
        assert (choice["message"]["content"] if "message" in choice else choice["text"]) == text

    return check


def is_stream(*texts: str) -> Check:
    def check(outcome: Outcome) -> None:
        assert outcome.answer.headers["content-type"] == "text/event-stream"
        assert all(text in outcome.answer.text for text in texts)

    return check


def answers_with(**expected: Any) -> Check:
    def check(outcome: Outcome) -> None:
        assert {name: outcome.json[name] for name in expected} == expected

    return check


def ignores_eos(outcome: Outcome) -> None:
    assert outcome.plain.stop_token_ids and not outcome.submit.stop_token_ids


def has_logprobs(outcome: Outcome) -> None:
    assert outcome.submit.sampling.num_logprobs == 0
    logprobs = outcome.json["choices"][0]["logprobs"]
    assert logprobs.get("content") or logprobs["tokens"]


def has_top_logprobs(outcome: Outcome) -> None:
    assert outcome.submit.sampling.num_logprobs == 3


IRRELEVANT: dict[str, list[Case]] = {
    "metadata": [({"metadata": {"team": "a"}}, no_effect)],
    "prompt_cache_key": [({"prompt_cache_key": "k"}, no_effect)],
    "prompt_cache_options": [({"prompt_cache_options": {"mode": "implicit"}}, no_effect)],
    "prompt_cache_retention": [({"prompt_cache_retention": "24h"}, no_effect)],
    "safety_identifier": [({"safety_identifier": "s"}, no_effect)],
    "user": [({"user": "u"}, no_effect)],
    "service_tier": [({"service_tier": "auto"}, no_effect), ({"service_tier": "flex"}, refused)],
    "store": [({"store": False}, no_effect), ({"store": True}, refused)],
}

COMMON: dict[str, list[Case]] = {
    **IRRELEVANT,
    "model": [({"model": "tgi"}, no_effect), ({"model": "acme/tiny-chat"}, answers_with(model="acme/tiny-chat"))],
    "frequency_penalty": [({"frequency_penalty": 0.5}, sampling(frequency_penalty=0.5))],
    "presence_penalty": [({"presence_penalty": -1.5}, sampling(presence_penalty=-1.5))],
    "repetition_penalty": [({"repetition_penalty": 1.2}, sampling(repetition_penalty=1.2))],
    "logit_bias": [({"logit_bias": {"70": -5}}, sampling(logit_bias={70: -5.0}))],
    "max_tokens": [({"max_tokens": 7}, limit(7))],
    "min_tokens": [({"min_tokens": 3}, sampling(min_new_tokens=3))],
    "n": [({"n": 3}, has_choices(3, 3))],
    "seed": [({"seed": 77}, sampling(seed=77))],
    "stop": [({"stop": " the"}, content_is("Hello")), ({"stop": ["x", "lo"]}, content_is("Hel"))],
    "stream": [({"stream": True}, is_stream("data: [DONE]")), ({"stream": False}, no_effect)],
    "stream_options": [
        ({"stream": True, "stream_options": {"include_usage": True}}, is_stream('"usage":{"prompt_tokens":')),
        ({"stream_options": {"include_usage": True}}, refused),
    ],
    "temperature": [({"temperature": 0.3}, sampling(temperature=0.3)), ({"temperature": 0}, sampling(temperature=0.0))],
    "top_p": [({"top_p": 0.5}, sampling(top_p=0.5))],
    "top_k": [({"top_k": 5}, sampling(top_k=5)), ({"top_k": -1}, no_effect)],
    "min_p": [({"min_p": 0.1}, sampling(min_p=0.1))],
    "ignore_eos": [({"ignore_eos": True}, ignores_eos)],
    "response_format": [
        ({"response_format": {"type": "text"}}, no_effect),
        ({"response_format": {"type": "json_object"}}, grammar("json_schema", "object")),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "strict": True, "schema": SCHEMA},
                }
            },
            grammar("json_schema", "integer"),
        ),
        ({"response_format": {"type": "json", "value": SCHEMA}}, grammar("json_schema", "integer")),
        ({"response_format": {"type": "regex", "value": "a+"}}, grammar("regex", "a+")),
        ({"response_format": {"type": "xml"}}, refused),
        ({"response_format": 5}, refused),
    ],
    "guided_json": [({"guided_json": SCHEMA}, grammar("json_schema", "integer")), ({"guided_json": 5}, refused)],
    "guided_regex": [({"guided_regex": "[ab]+"}, grammar("regex", "[ab]+")), ({"guided_regex": ""}, refused)],
    "guided_choice": [({"guided_choice": ["yes", "no"]}, grammar("lark", '"yes"')), ({"guided_choice": []}, refused)],
    "guided_grammar": [({"guided_grammar": 'start: "a"'}, grammar("lark", "start")), ({"guided_grammar": 1}, refused)],
    "structured_outputs": [
        ({"structured_outputs": {"regex": "a|b"}}, grammar("regex", "a|b")),
        ({"structured_outputs": {"xml": "a"}}, refused),
    ],
}

CHAT_FIELDS: dict[str, list[Case]] = {
    **COMMON,
    "messages": [({"messages": [{"role": "user", "content": "Quite different"}]}, prompt_has("Quite different"))],
    "logprobs": [({"logprobs": True}, has_logprobs)],
    "top_logprobs": [({"logprobs": True, "top_logprobs": 3}, has_top_logprobs), ({"top_logprobs": 3}, refused)],
    "max_completion_tokens": [({"max_completion_tokens": 6}, limit(6))],
    "reasoning_effort": [({"reasoning_effort": "none"}, prompt_has("</think>")), ({"reasoning_effort": "x"}, refused)],
    "tools": [({"tools": [TOOL]}, prompt_has('"parameters"'))],
    "tool_choice": [
        ({"tools": [TOOL], "tool_choice": "required"}, grammar("lark", '"f"')),
        ({"tool_choice": "none"}, no_effect),
        ({"tool_choice": "required"}, refused),
    ],
    "tool_prompt": [
        ({"tools": [TOOL], "tool_prompt": "Use it."}, prompt_has("---\nUse it.")),
        ({"tool_prompt": "Use it."}, no_effect),
    ],
    "parallel_tool_calls": [
        ({"parallel_tool_calls": False}, no_effect),
        ({"tools": [TOOL], "parallel_tool_calls": False, "tool_choice": "required"}, grammar("lark", '"f"')),
    ],
    "add_generation_prompt": [
        ({"add_generation_prompt": True}, no_effect),
        ({"add_generation_prompt": False}, prompt_ends_with("Hi<|im_end|>\n")),
    ],
    "continue_final_message": [
        ({"continue_final_message": False}, no_effect),
        ({"continue_final_message": True}, prompt_ends_with("<|im_start|>user\nHi")),
    ],
    "chat_template_kwargs": [({"chat_template_kwargs": {"enable_thinking": False}}, prompt_has("</think>"))],
    "audio": [({"audio": {"voice": "x"}}, refused)],
    "best_of": [({"best_of": 2}, refused), ({"best_of": 1}, no_effect)],
    "function_call": [({"function_call": {"name": "f"}}, refused), ({"function_call": "auto"}, no_effect)],
    "functions": [({"functions": [{"name": "f"}]}, refused), ({"functions": []}, no_effect)],
    "modalities": [({"modalities": ["text", "audio"]}, refused), ({"modalities": ["text"]}, no_effect)],
    "prediction": [({"prediction": {"type": "content", "content": "x"}}, refused)],
    "verbosity": [({"verbosity": "low"}, refused), ({"verbosity": "medium"}, no_effect)],
    "web_search_options": [({"web_search_options": {}}, refused)],
}

COMPLETION_FIELDS: dict[str, list[Case]] = {
    **COMMON,
    "prompt": [({"prompt": "Quite different"}, prompt_has("Quite different"))],
    "logprobs": [({"logprobs": 0}, has_logprobs), ({"logprobs": 3}, has_top_logprobs)],
    "best_of": [({"best_of": 2}, has_choices(1, 2)), ({"best_of": 9}, refused)],
    "echo": [({"echo": True}, content_is("HiHello there")), ({"echo": False}, no_effect)],
    "suffix": [({"suffix": "end"}, refused), ({"suffix": ""}, no_effect)],
}

RESPONSES_FIELDS: dict[str, list[Case]] = {
    **IRRELEVANT,
    "model": [({"model": "tgi"}, answers_with(model="acme/tiny-chat"))],
    "input": [({"input": "Quite different"}, prompt_has("Quite different"))],
    "instructions": [({"instructions": "Be brief."}, prompt_has("<|im_start|>system\nBe brief."))],
    "max_output_tokens": [({"max_output_tokens": 5}, limit(5))],
    "parallel_tool_calls": [({"parallel_tool_calls": False}, answers_with(parallel_tool_calls=False))],
    "reasoning": [({"reasoning": {"effort": "none"}}, prompt_has("</think>"))],
    "stream": [({"stream": True}, is_stream("event: response.created", "event: response.completed"))],
    "stream_options": [({"stream_options": {"include_obfuscation": False}, "stream": True}, is_stream("event: "))],
    "temperature": [({"temperature": 0.3}, sampling(temperature=0.3))],
    "top_p": [({"top_p": 0.5}, sampling(top_p=0.5))],
    "text": [
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "strict": True, "schema": SCHEMA}}},
            grammar("json_schema", "integer"),
        ),
        ({"text": {"verbosity": "high"}}, refused),
    ],
    "tools": [({"tools": [{"type": "function", "name": "f"}]}, prompt_has('"name": "f"'))],
    "tool_choice": [
        ({"tools": [{"type": "function", "name": "f"}], "tool_choice": "required"}, grammar("lark", '"f"')),
        ({"tool_choice": "required"}, refused),
    ],
    "background": [({"background": True}, refused), ({"background": False}, no_effect)],
    "context_management": [({"context_management": [{"type": "compaction"}]}, refused)],
    "conversation": [({"conversation": "c"}, refused)],
    "include": [({"include": ["message.output_text.logprobs"]}, refused), ({"include": []}, no_effect)],
    "max_tool_calls": [({"max_tool_calls": 2}, refused)],
    "previous_response_id": [({"previous_response_id": "resp_1"}, refused)],
    "prompt": [({"prompt": {"id": "p"}}, refused)],
    "top_logprobs": [({"top_logprobs": 2}, refused), ({"top_logprobs": 0}, no_effect)],
    "truncation": [({"truncation": "auto"}, refused), ({"truncation": "disabled"}, no_effect)],
}

ROUTES: dict[str, tuple[type[msgspec.Struct], dict[str, list[Case]]]] = {
    CHAT: (ChatRequest, CHAT_FIELDS),
    COMPLETIONS: (CompletionRequest, COMPLETION_FIELDS),
    RESPONSES: (ResponsesRequest, RESPONSES_FIELDS),
}
CASES = [
    pytest.param(path, options, check, id=f"{path[4:]}-{name}-{i}")
    for path, (_, fields) in ROUTES.items()
    for name, cases in fields.items()
    for i, (options, check) in enumerate(cases)
]


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, ScriptedClient]]:
    folder = make_marked_model(tmp_path_factory.mktemp("m") / "fields", TOOLS_TEMPLATE, MARKS)
    with scripted_server(folder) as (server, engine), server.client() as client:
        yield client, engine


@pytest.mark.parametrize("path", ROUTES)
def test_every_field_has_a_case_and_every_case_a_field(path: str) -> None:
    schema, fields = ROUTES[path]
    assert set(fields) == set(schema.__struct_fields__)
    for name, cases in fields.items():
        assert all(name in options for options, _ in cases)


@pytest.mark.parametrize(("path", "options", "check"), CASES)
def test_a_field_does_what_it_says_or_is_refused(
    scripted: tuple[httpx.Client, ScriptedClient], path: str, options: dict[str, Any], check: Check
) -> None:
    client, engine = scripted
    check(Outcome(engine, client, path, options))


@pytest.mark.parametrize("path", ROUTES)
def test_null_is_the_same_as_absent(scripted: tuple[httpx.Client, ScriptedClient], path: str) -> None:
    schema, fields = ROUTES[path]
    client, engine = scripted
    nulls = {name: None for name in fields if name not in BASE[path]}
    no_effect(Outcome(engine, client, path, nulls))
    assert set(nulls) | set(BASE[path]) == set(schema.__struct_fields__)


ANYTHING: list[Any] = [
    None, True, -1, 0, 1, 10**25, 1e300, "", "x", "\x00", [], [[]], [None], [1], ["x"], {}, {"a": {}}, {"type": "x"},
    {"type": "function"}, [{"type": "function"}], [{}], [{"role": "user"}], {"type": "json_schema", "value": {}},
]  # fmt: skip


@pytest.mark.parametrize("path", ROUTES)
def test_no_value_of_any_field_costs_a_server_error(scripted: tuple[httpx.Client, ScriptedClient], path: str) -> None:
    client, engine = scripted
    engine.text = "Hello"
    for name in ROUTES[path][1]:
        for value in ANYTHING:
            answer = client.post(path, json={**BASE[path], name: value})
            assert answer.status_code < 500, (name, value, answer.text)


def nested(depth: int) -> Any:
    value: Any = {}
    for _ in range(depth):
        value = {"type": "object", "properties": {"a": value}}
    return value


@pytest.mark.parametrize("depth", [90, 400])
def test_deeply_nested_schemas_cost_no_server_error(scripted: tuple[httpx.Client, ScriptedClient], depth: int) -> None:
    client, _ = scripted
    tool = {"type": "function", "function": {"name": "f", "parameters": nested(depth)}}
    for choice in ("auto", "required"):
        answer = client.post(CHAT, json={**BASE[CHAT], "tools": [tool], "tool_choice": choice, "max_tokens": 1})
        assert answer.status_code == 400, answer.text
        assert "error" in answer.json()
    answer = client.post(COMPLETIONS, json={**BASE[COMPLETIONS], "guided_json": nested(depth)})
    assert answer.status_code == 400


# --- Messages -----------------------------------------------------------------------------------------------

MESSAGE_TEMPLATE = "{% for m in messages %}{{ m | tojson }}{% endfor %}{{ tools }}"
MESSAGE_FIELDS: dict[str, tuple[Any, str | None]] = {
    "role": ("developer", '"role": "system"'),
    "content": ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], '"content": "ab"'),
    "name": ("Ann", '"name": "Ann"'),
    "tool_call_id": ("c1", '"tool_call_id": "c1"'),
    "refusal": ("No.", '"content": "No."'),
    "reasoning_content": ("Hm.", '"reasoning_content": "Hm."'),
    "tool_calls": (
        [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}],
        '"tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]',
    ),
    "function_call": ({"name": "f"}, None),
    "audio": ({"id": "a"}, None),
}


def test_every_field_of_a_message_reaches_the_template_or_is_refused(tmp_path: Path) -> None:
    assert set(MESSAGE_FIELDS) == set(Message.__struct_fields__)
    folder = make_marked_model(tmp_path / "messages", MESSAGE_TEMPLATE)
    with scripted_server(folder) as (server, engine), server.client() as client:
        for name, (value, shown) in MESSAGE_FIELDS.items():
            message = {"role": "assistant", "content": None if name == "refusal" else "x", name: value}
            body = {"messages": [message], "continue_final_message": False}
            answer = client.post(CHAT, json=body)
            if shown is None:
                assert answer.json()["error"]["param"] == f"messages[0].{name}"
            else:
                assert answer.status_code == 200, answer.text
                assert shown in engine.last_prompt


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "video_url"])
def test_content_that_is_no_text_is_refused_by_name(scripted: tuple[httpx.Client, ScriptedClient], kind: str) -> None:
    content = [{"type": "text", "text": "What is it?"}, {"type": kind, kind: {"url": "http://localhost/x"}}]
    error = scripted[0].post(CHAT, json={"messages": [{"role": "user", "content": content}]}).json()["error"]
    assert error["param"] == "messages[0].content[1].type"
    assert repr(kind) in error["message"]
