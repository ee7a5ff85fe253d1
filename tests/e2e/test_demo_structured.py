"""Prescribed answers and forced tool calls from a real model, through the clients people use."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import jsonschema
import openai
import pydantic
import pytest

from helpers.server_process import ServerProcess, server_process

DEMO = Path(__file__).parents[2] / "models" / "demo"

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 7},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}
WEATHER: Any = {
    "type": "function",
    "function": {"name": "get_weather", "description": "The weather of a city", "parameters": SCHEMA, "strict": True},
}
TIME: Any = {
    "type": "function",
    "function": {
        "name": "get_time",
        "parameters": {
            "type": "object",
            "properties": {"zone": {"$ref": "#/$defs/zone"}},
            "required": ["zone"],
            "$defs": {"zone": {"enum": ["CET", "UTC"]}},
        },
    },
}
SCHEMAS = {"get_weather": SCHEMA, "get_time": TIME["function"]["parameters"]}
MESSAGES: Any = [{"role": "user", "content": "What is the weather in Paris?"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("demo")
    with server_process(DEMO, folder, "--backend", "cpu", "--dtype", "float32") as running:
        yield running


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(**{"model": "tgi", "messages": MESSAGES, "max_tokens": 300, **options})


def assert_valid(name: str, arguments: str) -> None:
    jsonschema.validate(json.loads(arguments), SCHEMAS[name])


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_time"}}], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_a_forced_call_fits_its_schema(client: openai.OpenAI, choice: Any, seed: int) -> None:
    options = {"tools": [WEATHER, TIME], "tool_choice": choice, "parallel_tool_calls": False, "seed": seed}
    answer = ask(client, **options).choices[0]
    (call,) = answer.message.tool_calls
    assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
    assert choice == "required" or call.function.name == "get_time"
    assert_valid(call.function.name, call.function.arguments)
    arguments = name = ""
    for chunk in ask(client, **options, stream=True):
        for piece in chunk.choices[0].delta.tool_calls or []:
            name += piece.function.name or ""
            arguments += piece.function.arguments or ""
    assert (name, arguments) == (call.function.name, call.function.arguments)


def test_several_calls_may_be_forced_at_once(client: openai.OpenAI) -> None:
    for seed in range(4):
        answer = ask(client, tools=[WEATHER, TIME], tool_choice="required", seed=seed, max_tokens=600).choices[0]
        calls = answer.message.tool_calls
        if answer.finish_reason == "length":
            calls = calls[:-1]
        for call in calls:
            assert_valid(call.function.name, call.function.arguments)


FORMAT = {"type": "json_schema", "json_schema": {"name": "time", "schema": SCHEMAS["get_time"], "strict": True}}


@pytest.mark.parametrize(
    ("form", "pattern"),
    [({"response_format": FORMAT}, None), ({"extra_body": {"guided_regex": "(yes|no)/[0-9]{2}"}}, "(yes|no)/[0-9]{2}")],
    ids=["schema", "regex"],
)
def test_with_tools_and_a_form_the_answer_is_a_call_or_fits(client: openai.OpenAI, form: Any, pattern: Any) -> None:
    answers = ask(
        client, tools=[WEATHER], parallel_tool_calls=False, n=12, temperature=2, seed=1, max_tokens=200, **form
    )
    contents = 0
    for choice in answers.choices:
        if choice.message.tool_calls:
            assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
            assert_valid("get_weather", choice.message.tool_calls[0].function.arguments)
            continue
        contents += 1
        assert choice.finish_reason == "stop"
        if pattern is None:
            assert_valid("get_time", choice.message.content)
        else:
            assert re.fullmatch(pattern, choice.message.content)
    assert contents


class City(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=20)
    rank: int = pydantic.Field(ge=0, le=9)
    kind: Literal["big", "small"]


def test_pydantic_models_are_filled_in(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="tgi", messages=MESSAGES, response_format=City, max_tokens=200, temperature=0
    )
    assert isinstance(answer.choices[0].message.parsed, City)
    with client.chat.completions.stream(
        model="tgi", messages=MESSAGES, response_format=City, max_tokens=200, temperature=0
    ) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == answer.choices[0].message.parsed
    response = client.responses.parse(model="tgi", input="A city", text_format=City, max_output_tokens=200)
    assert isinstance(response.output_parsed, City)


def test_pydantic_tools_are_called_with_what_they_take(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="tgi", messages=MESSAGES, tools=[openai.pydantic_function_tool(City)], tool_choice="required",
        parallel_tool_calls=False, max_tokens=200, seed=1,
    )  # fmt: skip
    (call,) = answer.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, City)


def test_completions_can_be_prescribed_too(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tgi", prompt="Answer:", n=4, temperature=1.5, seed=1, extra_body={"guided_choice": ["yes", "no"]}
    )
    assert {choice.text for choice in answer.choices} <= {"yes", "no"}
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}


# --- huggingface_hub ----------------------------------------------------------------------------------------


@pytest.fixture
def hub_client(server: ServerProcess) -> huggingface_hub.InferenceClient:
    return huggingface_hub.InferenceClient(base_url=f"{server.url}/v1", api_key="none")


def test_the_hub_client_chats_and_streams(hub_client: huggingface_hub.InferenceClient) -> None:
    options: Any = {"messages": [{"role": "user", "content": "Hello!"}], "temperature": 0, "max_tokens": 30}
    whole = hub_client.chat_completion(**options, logprobs=True, top_logprobs=2)
    assert whole.choices[0].message.content
    assert whole.choices[0].logprobs is not None
    chunks = list(hub_client.chat_completion(**options, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_the_hub_client_calls_tools(hub_client: huggingface_hub.InferenceClient) -> None:
    for choice in ("required", {"function": {"name": "get_time"}}):
        answer = hub_client.chat_completion(
            messages=MESSAGES, tools=[WEATHER, TIME], tool_choice=choice, max_tokens=600, seed=1
        )
        calls = answer.choices[0].message.tool_calls
        assert calls and calls[0].function.name in SCHEMAS
        assert_valid(calls[0].function.name, calls[0].function.arguments)


@pytest.mark.parametrize(
    "response_format",
    [
        {"type": "json", "value": SCHEMA},
        {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA, "strict": True}},
    ],
    ids=["TGI's shape", "OpenAI's shape"],
)
def test_the_hub_client_prescribes_answers(hub_client: huggingface_hub.InferenceClient, response_format: Any) -> None:
    answer = hub_client.chat_completion(messages=MESSAGES, response_format=response_format, max_tokens=200, seed=2)
    jsonschema.validate(json.loads(answer.choices[0].message.content or ""), SCHEMA)


def test_the_hub_client_sees_errors(hub_client: huggingface_hub.InferenceClient) -> None:
    with pytest.raises(huggingface_hub.errors.BadRequestError, match="temperature"):
        hub_client.chat_completion(messages=MESSAGES, temperature=9)
