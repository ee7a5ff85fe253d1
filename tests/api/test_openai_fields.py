"""Every field of the OpenAI routes: what it does to the engine's request or the answer, or that it is refused.

The tables are compared with the schemas, so a field cannot be added without saying here what it does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import msgspec
import pytest

from helpers.live_server import LiveServer
from helpers.scripted_client import MARKS, TOOLS_TEMPLATE, ScriptedClient, make_marked_model, scripted_server
from tokenplane_api.errors import is_openai_path
from tokenplane_api.openai.responses_schemas import ResponsesRequest
from tokenplane_api.openai.schemas import ChatRequest, CompletionRequest
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
        self.engine, self.client, self.path = engine, client, path
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


def same_as(**options: Any) -> Check:
    """The engine is asked for the same as with these options."""

    def check(outcome: Outcome) -> None:
        other = Outcome(outcome.engine, outcome.client, outcome.path, options).submit
        same = {"request_id": "", "sampling": other.sampling}
        assert msgspec.structs.replace(outcome.submit, **same) == msgspec.structs.replace(other, **same)

    return check


def refused_as(param: str) -> Check:
    def check(outcome: Outcome) -> None:
        assert outcome.answer.status_code == 400, outcome.answer.text
        assert not outcome.submitted
        error = outcome.answer.json()["error"]
        assert error["param"] == param and f"`{param}`" in error["message"]

    return check


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


# --- What is inside of fields -------------------------------------------------------------------------------

PLAIN_TEMPLATE = """\
{% for message in messages %}{{ message | tojson }}{% endfor %}{{ tools | tojson }}
{%- if enable_thinking is defined and not enable_thinking %}</think>{% endif %}"""
"""The prompt shows everything that templates are given."""


def message(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "assistant", "content": "x", **fields}], "continue_final_message": False}


def call(function: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return message(tool_calls=[{"function": {"name": "f", "arguments": "{}", **function}, **fields}])


def tool(**fields: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", **fields}}]}


def item(**fields: Any) -> dict[str, Any]:
    return {"input": [{"role": "user", "content": "Hi"}, fields]}


def said(role: str, **part: Any) -> dict[str, Any]:
    return item(role=role, content=[part])


def response_tool(**fields: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "name": "f", **fields}]}


def text_format(**fields: Any) -> dict[str, Any]:
    return {"text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA, **fields}}}


FUNCTION_CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'}
TOLD = {"input": [FUNCTION_CALL, {"type": "function_call_output", "call_id": "c1", "output": "sunny"}]}
PADDED = {"stream": True, "stream_options": {"include_obfuscation": True}}
COUNTED = {"stream": True, "stream_options": {"include_usage": True}}

OF_CHAT: dict[str, tuple[dict[str, Any], Check]] = {
    "StreamOptions.include_usage": (COUNTED, is_stream('"usage":{"prompt_tokens":')),
    "StreamOptions.include_obfuscation": (PADDED, refused_as("stream_options.include_obfuscation")),
    "Message.role": (message(role="developer"), prompt_has('"role": "system"')),
    "Message.content": (message(content=[{"type": "text", "text": t} for t in "ab"]), prompt_has('"content": "ab"')),
    "Message.name": (message(name="Ann"), prompt_has('"name": "Ann"')),
    "Message.tool_call_id": (message(tool_call_id="c1"), prompt_has('"tool_call_id": "c1"')),
    "Message.refusal": (message(content=None, refusal="No."), prompt_has('"content": "No."')),
    "Message.reasoning_content": (message(reasoning_content="Hm."), prompt_has('"reasoning_content": "Hm."')),
    "Message.tool_calls": (call({}), prompt_has('"tool_calls": [')),
    "Message.function_call": (message(function_call={"name": "f"}), refused_as("messages[0].function_call")),
    "Message.audio": (message(audio={"id": "a"}), refused_as("messages[0].audio")),
    "TextPart.type": (message(content=[{"type": "file"}]), refused_as("messages[0].content[0].type")),
    "TextPart.text": (message(content=[{"type": "text"}]), refused_as("messages[0].content[0].text")),
    "ToolCall.id": (call({}, id="c1"), prompt_has('"id": "c1"')),
    "ToolCall.type": (call({}, type="custom"), refused_as("messages[0].tool_calls[0].type")),
    "ToolCall.function": (call({}), prompt_has('"function": {"name": "f", "arguments": {}}')),
    "CalledFunction.name": (call({"name": "look_up"}), prompt_has('"name": "look_up"')),
    "CalledFunction.arguments": (call({"arguments": '{"a": 1}'}), prompt_has('"arguments": {"a": 1}')),
    "Tool.type": ({"tools": [{"type": "web"}]}, refused_as("tools[0].type")),
    "Tool.function": ({"tools": [{"type": "function"}]}, refused_as("tools[0].function")),
    "Function.name": (tool(name="look_up"), prompt_has('"name": "look_up"')),
    "Function.description": (tool(description="Finds."), prompt_has('"description": "Finds."')),
    "Function.parameters": (tool(parameters=SCHEMA), prompt_has('"properties": {"a": {"type": "integer"}}')),
    "Function.arguments": (tool(arguments=SCHEMA), prompt_has('"properties": {"a": {"type": "integer"}}')),
    "Function.strict": (tool(strict=True), same_as(**tool())),
}
OF_RESPONSES: dict[str, tuple[dict[str, Any], Check]] = {
    "InputItem.type": (item(type="computer_call"), refused_as("input[1].type")),
    "InputItem.role": (item(role="assistant", content="x"), prompt_has('"role": "assistant"')),
    "InputItem.content": (item(role="user", content="Why?"), prompt_has('"content": "Why?"')),
    "InputItem.call_id": (TOLD, prompt_has('"tool_call_id": "c1"')),
    "InputItem.name": (TOLD, prompt_has('"name": "f"')),
    "InputItem.arguments": (TOLD, prompt_has('"arguments": {"a": 1}')),
    "InputItem.output": (TOLD, prompt_has('"content": "sunny"')),
    "ContentPart.type": (said("user", type="input_image"), refused_as("input[1].content[0].type")),
    "ContentPart.text": (said("user", type="input_text", text="Why?"), prompt_has('"content": "Why?"')),
    "ContentPart.refusal": (said("assistant", type="refusal", refusal="No."), prompt_has('"content": "No."')),
    "ResponseTool.type": (response_tool(type="web_search"), refused_as("tools[0].type")),
    "ResponseTool.name": (response_tool(name="look_up"), prompt_has('"name": "look_up"')),
    "ResponseTool.description": (response_tool(description="Finds."), prompt_has('"description": "Finds."')),
    "ResponseTool.parameters": (response_tool(parameters=SCHEMA), prompt_has('{"a": {"type": "integer"}}')),
    "ResponseTool.strict": (response_tool(strict=True), same_as(**response_tool())),
    "TextOptions.format": (text_format(), grammar("json_schema", "integer")),
    "TextOptions.verbosity": ({"text": {"verbosity": "high"}}, refused_as("text.verbosity")),
    "TextFormat.type": (text_format(type="xml"), refused_as("text.format.type")),
    "TextFormat.name": (text_format(name="y"), same_as(**text_format())),
    "TextFormat.description": (text_format(description="y"), same_as(**text_format())),
    "TextFormat.strict": (text_format(strict=True), same_as(**text_format())),
    "TextFormat.schema": (text_format(schema=None), refused_as("text.format.schema")),
    "Reasoning.effort": ({"reasoning": {"effort": "none"}}, prompt_has("</think>")),
    "Reasoning.summary": ({"reasoning": {"summary": "detailed"}}, refused_as("reasoning.summary")),
    "Reasoning.generate_summary": (
        {"reasoning": {"generate_summary": "concise"}},
        refused_as("reasoning.generate_summary"),
    ),
}
OF_ADAPTERS = (
    "LoadLoRAAdapterRequest.lora_name",
    "LoadLoRAAdapterRequest.lora_path",
    "UnloadLoRAAdapterRequest.lora_name",
)
"""test_adapters.py shows what they do."""

INSIDE = {name: (CHAT, *case) for name, case in OF_CHAT.items()} | {
    name: (RESPONSES, *case) for name, case in OF_RESPONSES.items()
}


def test_every_field_of_the_document_is_in_a_table(server: LiveServer) -> None:
    listed = {f"{schema.__name__}.{name}" for schema, fields in ROUTES.values() for name in fields}
    paths = [path for path in server.document.raw["paths"] if is_openai_path(path)]
    assert server.document.request_fields(paths) == listed | set(INSIDE) | set(OF_ADAPTERS)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, ScriptedClient]]:
    folder = make_marked_model(tmp_path_factory.mktemp("m") / "inside", PLAIN_TEMPLATE, MARKS)
    with scripted_server(folder) as (server, engine), server.client() as client:
        yield client, engine


@pytest.mark.parametrize("name", INSIDE)
def test_what_is_inside_of_a_field_acts_or_is_refused(plain: tuple[httpx.Client, ScriptedClient], name: str) -> None:
    client, engine = plain
    path, options, check = INSIDE[name]
    check(Outcome(engine, client, path, options))


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "video_url"])
def test_content_that_is_no_text_is_refused_by_name(scripted: tuple[httpx.Client, ScriptedClient], kind: str) -> None:
    content = [{"type": "text", "text": "What is it?"}, {"type": kind, kind: {"url": "http://localhost/x"}}]
    error = scripted[0].post(CHAT, json={"messages": [{"role": "user", "content": content}]}).json()["error"]
    assert error["param"] == "messages[0].content[1].type"
    assert repr(kind) in error["message"]
