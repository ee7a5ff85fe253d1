"""/v1/responses as the real OpenAI client sees it; what the model writes is up to the test, where it matters."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pydantic
import pytest

from helpers.live_server import MODEL_ID, LiveServer
from helpers.scripted_client import CALL, MARKS, TOOLS_TEMPLATE, ScriptedClient, make_marked_model, scripted_server
from tokenplane_core.backend.errors import EngineFailed

WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}


class Scripted:
    def __init__(self, url: str, engine: ScriptedClient) -> None:
        self.url = url
        self.engine = engine
        self.openai = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

    def ask(self, text: str, /, **options: Any) -> Any:
        self.engine.text = text
        return self.openai.responses.create(**{"model": MODEL_ID, "input": "Weather in Rome?", **options})


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scripted]:
    folder = make_marked_model(tmp_path_factory.mktemp("m") / "tools", TOOLS_TEMPLATE, MARKS)
    with scripted_server(folder) as (server, engine):
        yield Scripted(server.url, engine)


def test_text_is_a_message(openai_client: openai.OpenAI, server: LiveServer) -> None:
    answer = openai_client.responses.create(
        model=MODEL_ID, input="What is a block?", max_output_tokens=8, temperature=0
    )
    (item,) = answer.output
    assert (item.type, item.status) == ("message", "incomplete")
    assert answer.output_text and answer.output_text == item.content[0].text  # type: ignore[union-attr]
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")  # type: ignore[union-attr]
    assert answer.usage is not None and answer.usage.output_tokens == 8
    assert answer.usage.total_tokens == answer.usage.input_tokens + 8
    assert answer.id.startswith("resp_") and answer.model == MODEL_ID
    assert answer.to_dict()["store"] is False


def test_it_says_what_the_chat_route_says(openai_client: openai.OpenAI) -> None:
    chat = openai_client.chat.completions.create(
        model=MODEL_ID,
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        max_tokens=20,
        temperature=0,
    )
    for given in ("Hi", [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}]):
        options: Any = {"instructions": "Be brief.", "input": given, "max_output_tokens": 20, "temperature": 0}
        answer = openai_client.responses.create(model=MODEL_ID, **options)
        assert answer.output_text == chat.choices[0].message.content


def test_thoughts_text_and_calls_are_items(scripted: Scripted) -> None:
    answer = scripted.ask(f"<think>Look.</think>\nI will look.\n{CALL}", tools=[WEATHER])
    thoughts, message, call = answer.output
    assert (thoughts.type, thoughts.content[0].text) == ("reasoning", "Look.")
    assert (message.type, message.content[0].text) == ("message", "I will look.")
    assert (call.type, call.name, json.loads(call.arguments)["city"]) == ("function_call", "get_weather", "Rome")
    assert answer.status == "completed"
    assert answer.usage.output_tokens_details.reasoning_tokens > 0
    assert len({item.id for item in answer.output}) == 3


@pytest.mark.parametrize("per_event", [1, 4, 100])
def test_a_stream_adds_up_to_the_answer(scripted: Scripted, per_event: int) -> None:
    text = f"<think>Look.</think>\nI will look.\n{CALL}\n{CALL}"
    whole = scripted.ask(text, tools=[WEATHER])
    scripted.engine.tokens_per_event = per_event
    try:
        events = list(scripted.ask(text, tools=[WEATHER], stream=True))
    finally:
        scripted.engine.tokens_per_event = 1
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    final = events[-1].response

    def known(items: Any) -> Any:
        return [{k: v for k, v in item.to_dict().items() if k not in ("id", "call_id")} for item in items]

    assert known(final.output) == known(whole.output)
    assert known(event.item for event in events if event.type == "response.output_item.done") == known(final.output)
    for index, item in enumerate(final.output):
        deltas = [e.delta for e in events if e.type.endswith(".delta") and e.output_index == index]
        expected = item.arguments if item.type == "function_call" else item.content[0].text
        assert "".join(deltas) == expected
    added = [event for event in events if event.type == "response.output_item.added"]
    assert [event.item.id for event in added] == [item.id for item in final.output]


def test_the_clients_own_stream_helper_understands_it(scripted: Scripted) -> None:
    scripted.engine.text = f"Well.\n{CALL}"
    with scripted.openai.responses.stream(model=MODEL_ID, input="Hi", tools=[WEATHER]) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_response()
    assert final.output_text == "Well."
    assert final.output[1].type == "function_call"
    assert {"response.output_text.done", "response.function_call_arguments.done"} <= kinds


def test_stream_framing_names_each_event(scripted: Scripted) -> None:
    scripted.engine.text = "Hi"
    raw = httpx.post(f"{scripted.url}/v1/responses", json={"input": "Hi", "stream": True}).text
    *events, end = raw.split("\n\n")
    assert end == ""
    for event in events:
        first, second = event.split("\n")
        assert json.loads(second.removeprefix("data: "))["type"] == first.removeprefix("event: ")


def test_a_failure_in_a_stream_is_an_event(scripted: Scripted) -> None:
    scripted.engine.failure = EngineFailed("the engine died")
    try:
        scripted.engine.text = "Hello there"
        raw = httpx.post(f"{scripted.url}/v1/responses", json={"input": "Hi", "stream": True}).text
        with pytest.raises(openai.InternalServerError, match="the engine died"):
            scripted.ask("Hello there")
    finally:
        scripted.engine.failure = None
    *before, last = [json.loads(line.removeprefix("data: ")) for line in raw.split("\n") if line.startswith("data: ")]
    assert "".join(event["delta"] for event in before if event["type"].endswith(".delta")) == "Hello there"
    assert (last["type"], last["message"], last["code"]) == ("error", "the engine died", "engine_failed")
    assert last["sequence_number"] == len(before)


def test_a_conversation_goes_back_to_the_model(scripted: Scripted) -> None:
    first = scripted.ask(f"<think>Look.</think>I will look.\n{CALL}", tools=[WEATHER])
    call = first.output[-1]
    conversation = [
        {"role": "user", "content": "Weather in Rome?"},
        *[item.to_dict() for item in first.output],
        {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny"},
    ]
    answer = scripted.ask("Sunny it is.", input=conversation, tools=[WEATHER])
    assert answer.output_text == "Sunny it is."
    prompt = scripted.engine.last_prompt
    assert '<|im_start|>assistant\nI will look.<tool_call>get_weather {"city": "Rome", "days": 2}</tool_call>' in prompt
    assert prompt.endswith("<|im_start|>tool\nSunny<|im_end|>\n<|im_start|>assistant\n")


def test_a_final_assistant_message_is_not_continued(scripted: Scripted) -> None:
    scripted.ask("x", input=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    assert scripted.engine.last_prompt.endswith("b<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    "choice",
    [
        "required",
        {"type": "function", "name": "get_weather"},
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_weather"}]},
    ],
    ids=str,
)
def test_a_forced_call_has_a_grammar(scripted: Scripted, choice: Any) -> None:
    answer = scripted.ask(CALL, tools=[WEATHER], tool_choice=choice)
    assert answer.output[0].type == "function_call"
    assert '"get_weather"' in scripted.engine.submitted[-1].grammar.source  # type: ignore[union-attr]


def test_a_format_is_a_grammar(scripted: Scripted) -> None:
    class City(pydantic.BaseModel):
        name: str

    scripted.engine.text = '{"name": "Rome"}'
    answer = scripted.openai.responses.parse(model=MODEL_ID, input="A city", text_format=City)
    assert answer.output_parsed == City(name="Rome")
    assert '"name"' in scripted.engine.submitted[-1].grammar.source  # type: ignore[union-attr]
    scripted.ask("{}", text={"format": {"type": "json_object"}})
    assert scripted.engine.submitted[-1].grammar is not None
    scripted.ask("Hi", text={"format": {"type": "text"}, "verbosity": "medium"})
    assert scripted.engine.submitted[-1].grammar is None


def test_reasoning_effort_is_for_the_template(scripted: Scripted) -> None:
    scripted.ask("x", reasoning={"effort": "none"})
    assert scripted.engine.last_prompt.endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    ("options", "param", "word"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "whole conversation"),
        ({"store": True}, "store", "keeps no answers"),
        ({"conversation": "c"}, "conversation", "keeps no conversations"),
        ({"input": []}, "input", "empty"),
        ({"input": [{"role": "user"}]}, "input[0].content", "missing"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0].type",
            "input_image",
        ),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "item_reference"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id", "missing"),
        ({"input": [{"type": "function_call_output", "call_id": "1"}]}, "input[0].output", "missing"),
        ({"input": "a " * 4000}, "input", "2047"),
        ({"max_output_tokens": 0}, "max_output_tokens", "`max_output_tokens`"),
        ({"max_output_tokens": 5000}, "max_output_tokens", "2048"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "web_search"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "missing"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name", "'a b'"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice", "'g'"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "xml"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "missing"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "low"),
        ({"reasoning": {"effort": "extreme"}}, "reasoning.effort", "extreme"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary", "leave it out"),
        ({"stream": True, "stream_options": {"include_usage": True}}, "stream_options.include_usage", "usage"),
        ({"model": "gpt-4o"}, "model", "gpt-4o"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_cannot_be_done_is_refused_by_name(
    scripted: Scripted, options: dict[str, Any], param: str, word: str
) -> None:
    answer = httpx.post(f"{scripted.url}/v1/responses", json={"input": "Hi", **options})
    assert answer.status_code in (400, 404), answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert word in error["message"]


def test_an_answer_is_not_kept(openai_client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        openai_client.responses.retrieve("resp_1")


@pytest.mark.parametrize("path", ["embeddings", "rerank", "moderations", "images/generations", "audio/speech"])
def test_services_that_are_not_here_say_so(client: httpx.Client, path: str) -> None:
    answer = client.post(f"/v1/{path}", json={})
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert error["code"] == "unsupported_endpoint"
    assert f"/v1/{path}" in error["message"] and "/v1/chat/completions" in error["message"]
