"""Tools on /v1/chat/completions, in the notations of the model families; what the model writes is up to the test."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from helpers.live_server import MODEL_ID, live_server
from helpers.scripted_client import (
    CALL,
    DEEPSEEK_MARKS,
    HARMONY_MARKS,
    MARKS,
    SPECIAL_MARKS,
    TOOLS_TEMPLATE,
    ScriptedClient,
    make_marked_model,
    scripted_server,
)
from tokenplane_api.text.tool_formats import TOOL_FORMATS

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
TIME: Any = {"type": "function", "function": {"name": "get_time", "description": "The time"}}
MESSAGES: Any = [{"role": "user", "content": "Weather in Rome?"}]


class Scripted:
    def __init__(self, url: str, engine: ScriptedClient) -> None:
        self.url = url
        self.engine = engine
        self.openai = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

    def ask(self, text: str, **options: Any) -> Any:
        self.engine.text = text
        defaults: dict[str, Any] = {"model": MODEL_ID, "messages": MESSAGES, "tools": [WEATHER, TIME]}
        return self.openai.chat.completions.create(**{**defaults, **options})

    def refused(self, **options: Any) -> Any:
        with pytest.raises(openai.BadRequestError) as failure:
            self.ask("", **options)
        return failure.value


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scripted]:
    folder = make_marked_model(tmp_path_factory.mktemp("m") / "tools", TOOLS_TEMPLATE, MARKS)
    with scripted_server(folder) as (server, engine):
        yield Scripted(server.url, engine)


def calls_of(choice: Any) -> list[tuple[str, Any]]:
    return [(c.function.name, json.loads(c.function.arguments)) for c in choice.message.tool_calls or []]


def streamed(chunks: Any) -> tuple[str, str, list[list[str]], str | None, list[str]]:
    """(content, thoughts, [name, arguments] of each call, finish reason, ids), put together as clients do."""
    content = thoughts = ""
    calls: list[list[str]] = []
    ids: list[str] = []
    finish = None
    for chunk in chunks:
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        thoughts += getattr(choice.delta, "reasoning_content", None) or ""
        for call in choice.delta.tool_calls or []:
            if call.id:
                assert call.index == len(calls) and call.type == "function"
                calls.append([call.function.name, ""])
                ids.append(call.id)
            calls[call.index][1] += call.function.arguments
        finish = choice.finish_reason or finish
    return content, thoughts, calls, finish, ids


def test_a_call_is_an_answer_without_content(scripted: Scripted) -> None:
    answer = scripted.ask(CALL)
    choice = answer.choices[0]
    assert choice.message.content is None
    assert choice.finish_reason == "tool_calls"
    assert calls_of(choice) == [("get_weather", {"city": "Rome", "days": 2})]
    assert choice.message.tool_calls[0].type == "function"
    assert choice.message.tool_calls[0].id.startswith("call_")


def test_text_and_several_calls_come_together(scripted: Scripted) -> None:
    second = '\n<tool_call>{"name": "get_time", "arguments": {}}</tool_call>'
    choice = scripted.ask(f"<think>Two.</think>\nI will look.\n{CALL}{second}").choices[0]
    assert choice.message.content == "I will look."
    assert choice.message.reasoning_content == "Two."
    assert calls_of(choice) == [("get_weather", {"city": "Rome", "days": 2}), ("get_time", {})]
    assert len({call.id for call in choice.message.tool_calls}) == 2


@pytest.mark.parametrize("per_event", [1, 3, 50])
def test_a_stream_gives_the_same_in_pieces(scripted: Scripted, per_event: int) -> None:
    text = f'<think>Hm.</think>Well.\n{CALL}\n<tool_call>{{"name": "get_time"}}</tool_call>'
    scripted.engine.tokens_per_event = per_event
    try:
        chunks = list(scripted.ask(text, stream=True))
    finally:
        scripted.engine.tokens_per_event = 1
    content, thoughts, calls, finish, ids = streamed(chunks)
    assert (content, thoughts, finish) == ("Well.", "Hm.", "tool_calls")
    assert calls == [["get_weather", '{"city": "Rome", "days": 2}'], ["get_time", "{}"]]
    assert len(set(ids)) == 2
    pieces = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or []]
    assert len(pieces) > 6 or per_event > 1, "arguments are streamed as they are written"
    assert chunks[0].choices[0].delta.role == "assistant"


def test_the_clients_own_stream_helper_understands_it(scripted: Scripted) -> None:
    scripted.engine.text = CALL
    with scripted.openai.chat.completions.stream(model=MODEL_ID, messages=MESSAGES, tools=[WEATHER]) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.done" in kinds
    assert calls_of(final.choices[0]) == [("get_weather", {"city": "Rome", "days": 2})]


def test_without_a_call_the_answer_is_text(scripted: Scripted) -> None:
    choice = scripted.ask("Ask <me> about {something} else.").choices[0]
    assert (choice.message.content, choice.message.tool_calls) == ("Ask <me> about {something} else.", None)
    assert choice.finish_reason == "stop"


def test_a_call_cut_by_the_length_says_length(scripted: Scripted) -> None:
    scripted.engine.finish_reason = "length"
    try:
        whole = scripted.ask(CALL[:60]).choices[0]
        *_, finish, _ids = streamed(scripted.ask(CALL[:60], stream=True))
    finally:
        scripted.engine.finish_reason = "stop_token"
    assert (whole.finish_reason, finish) == ("length", "length")
    assert whole.message.tool_calls[0].function.name == "get_weather"


def test_parallel_calls_can_be_forbidden(scripted: Scripted) -> None:
    choice = scripted.ask(CALL + CALL, parallel_tool_calls=False).choices[0]
    assert len(choice.message.tool_calls) == 1
    assert len(scripted.ask(CALL + CALL).choices[0].message.tool_calls) == 2


def test_with_none_the_model_sees_no_tools_and_calls_none(scripted: Scripted) -> None:
    choice = scripted.ask(CALL, tool_choice="none").choices[0]
    assert (choice.message.tool_calls, choice.finish_reason) == (None, "stop")
    assert "get_weather" in choice.message.content
    assert "get_weather" not in scripted.engine.last_prompt


def test_the_template_gets_the_tools(scripted: Scripted) -> None:
    scripted.ask(
        "Hi", tools=[WEATHER, {"type": "function", "function": {"name": "f", "arguments": {"type": "object"}}}]
    )
    first, second = scripted.engine.last_prompt.split("\n")[1:3]
    assert json.loads(first) == WEATHER
    assert json.loads(second)["function"] == {"name": "f", "description": "", "parameters": {"type": "object"}}


def test_calls_and_results_go_back_to_the_model(scripted: Scripted) -> None:
    first = scripted.ask(CALL).choices[0].message
    call = first.tool_calls[0]
    result = {"role": "tool", "tool_call_id": call.id, "content": "Sunny"}
    answer = scripted.ask("It is sunny.", messages=[*MESSAGES, first, result])
    assert answer.choices[0].message.content == "It is sunny."
    prompt = scripted.engine.last_prompt
    assert '<|im_start|>assistant\n<tool_call>get_weather {"city": "Rome", "days": 2}</tool_call><|im_end|>' in prompt
    assert prompt.endswith("<|im_start|>tool\nSunny<|im_end|>\n<|im_start|>assistant\n")


def test_a_final_message_of_calls_is_not_continued(scripted: Scripted) -> None:
    calls = [{"id": "1", "type": "function", "function": {"name": "get_time", "arguments": ""}}]
    scripted.ask("x", messages=[*MESSAGES, {"role": "assistant", "content": None, "tool_calls": calls}])
    assert scripted.engine.last_prompt.endswith("<|im_start|>assistant\n")


def test_tool_prompt_is_put_behind_the_last_message(scripted: Scripted) -> None:
    scripted.ask("x", extra_body={"tool_prompt": "Use them well."})
    assert "Weather in Rome?\n---\nUse them well.<|im_end|>" in scripted.engine.last_prompt


FORCED = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"get_weather", "get_time"}),
        ({"type": "function", "function": {"name": "get_time"}}, {"get_time"}),
        ("get_time", {"get_time"}),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "required",
                    "tools": [{"type": "function", "function": {"name": "get_time"}}],
                },
            },
            {"get_time"},
        ),
    ],
    ids=["required", "named", "TGI's bare name", "allowed"],
)
def test_a_forced_call_has_a_grammar(scripted: Scripted, choice: Any, names: set[str]) -> None:
    answer = scripted.ask(FORCED, tool_choice=choice)
    assert calls_of(answer.choices[0]) == [("get_time", {})]
    assert answer.choices[0].finish_reason == "tool_calls"
    grammar = scripted.engine.submitted[-1].grammar
    assert grammar is not None
    assert {name for name in ("get_weather", "get_time") if f'"{name}"' in grammar.source} == names


def test_auto_has_no_grammar(scripted: Scripted) -> None:
    scripted.ask("Hi")
    assert scripted.engine.submitted[-1].grammar is None


@pytest.mark.parametrize(
    ("options", "param", "word"),
    [
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "no `tools`"),
        ({"tools": [WEATHER, WEATHER]}, "tools", "taken"),
        ({"tools": [WEATHER] * 129}, "tools", "128"),
        ({"tools": [{"type": "custom"}]}, "tools[0].type", "'custom'"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "missing"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "'a b'"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 5}}]},
         "tools[0].function.parameters", "an object"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {}, "arguments": {}}}]},
         "tools[0].function.arguments", "send one"),
        ({"tool_choice": "get_tide"}, "tool_choice", "'get_tide'"),
        ({"tool_choice": {"type": "custom"}}, "tool_choice", "'required'"),
        ({"tool_choice": {"type": "function", "function": {}}}, "tool_choice", "name"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools", "tools"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "never", "tools": [WEATHER]}}},
         "tool_choice.allowed_tools.mode", "'never'"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}]},
         "messages[0].tool_calls[0].function.arguments", "JSON object"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
         "messages[0].tool_calls[0].function.arguments", "JSON object"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"type": "x", "function": {"name": "f"}}]}]},
         "messages[0].tool_calls[0].type", "'x'"),
        ({"messages": [{"role": "user", "tool_calls": [{"function": {"name": "f"}}]}]},
         "messages[0].tool_calls", "assistant"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0]", "function"),
    ],
    ids=lambda value: str(value)[:50],
)  # fmt: skip
def test_tools_that_make_no_sense_are_refused(
    scripted: Scripted, options: dict[str, Any], param: str, word: str
) -> None:
    error = scripted.refused(**options)
    assert error.param == param
    assert word in error.message


def test_response_format_is_fine_where_tools_are_off(scripted: Scripted) -> None:
    scripted.ask("{}", tool_choice="none", response_format={"type": "json_object"})
    grammar = scripted.engine.submitted[-1].grammar
    assert grammar is not None and grammar.kind == "json_schema"


@pytest.mark.parametrize(
    "form",
    [
        {"response_format": {"type": "json_object"}},
        {"extra_body": {"guided_regex": "[a-z/]+"}},
        {"extra_body": {"guided_choice": ["}", "b"]}},
    ],
    ids=str,
)
def test_with_tools_a_form_is_for_answers_that_are_no_calls(scripted: Scripted, form: dict[str, Any]) -> None:
    called = scripted.ask(CALL, **form).choices[0]
    assert calls_of(called) == [("get_weather", {"city": "Rome", "days": 2})]
    answer = '{"name": "Rome", "type": "city"}'
    choice = scripted.ask(answer, **form).choices[0]
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (answer, None, "stop")
    grammar = scripted.engine.submitted[-1].grammar
    assert grammar is not None and grammar.kind == "lark" and "get_weather" in grammar.source
    scripted.ask(FORCED, tool_choice="required", **form)
    grammar = scripted.engine.submitted[-1].grammar
    assert grammar is not None and "other" not in grammar.source, "where calls are forced there is no other answer"


def test_a_form_that_reads_like_a_call_stays_text(scripted: Scripted) -> None:
    for answer in ('{"name": "get_time"}', '{"name": "get_time", "arguments": {}}'):
        choice = scripted.ask(answer, response_format={"type": "json_object"}).choices[0]
        assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (answer, None, "stop")


def test_choices_are_taken_apart_one_by_one(scripted: Scripted) -> None:
    assert [len(choice.message.tool_calls) for choice in scripted.ask(CALL, n=2).choices] == [1, 1]
    names = {0: "", 1: ""}
    for chunk in scripted.ask(CALL, n=2, stream=True):
        for call in chunk.choices[0].delta.tool_calls or []:
            names[chunk.choices[0].index] += call.function.name or ""
    assert names == {0: "get_weather", 1: "get_weather"}


def test_grammars_can_be_switched_off(model_folder: Path) -> None:
    with live_server(model_folder, disable_grammar_support=True) as server, server.client() as client:
        for field, options in (
            ("tool_choice", {"tools": [TIME], "tool_choice": "required"}),
            ("response_format", {"response_format": {"type": "json_object"}}),
            ("guided_regex", {"guided_regex": "a+"}),
        ):
            error = client.post("/v1/chat/completions", json={"messages": MESSAGES, **options}).json()["error"]
            assert error["param"] == field and "--disable-grammar-support" in error["message"]
        body = {"messages": MESSAGES, "tools": [TIME], "max_tokens": 2}
        assert client.post("/v1/chat/completions", json=body).status_code == 200


def test_only_one_form_can_be_prescribed(scripted: Scripted) -> None:
    formats: dict[str, Any] = {"response_format": {"type": "json_object"}, "extra_body": {"guided_regex": "a"}}
    assert "`guided_regex`" in scripted.refused(tools=[], **formats).message


def test_streamed_logprobs_cover_calls_and_thoughts(scripted: Scripted) -> None:
    text = f"<think>Hm.</think>{CALL}"
    whole = scripted.ask(text, logprobs=True).choices[0].logprobs.content
    chunks = list(scripted.ask(text, logprobs=True, stream=True))
    entries = [e for chunk in chunks if chunk.choices[0].logprobs for e in chunk.choices[0].logprobs.content]
    assert entries == whole
    assert bytes(byte for entry in entries for byte in entry.bytes).decode() == text


def test_reasoning_effort_is_for_the_template(scripted: Scripted) -> None:
    scripted.ask("x", reasoning_effort="none")
    assert scripted.engine.last_prompt.endswith("<think>\n\n</think>\n\n")
    scripted.ask("x", reasoning_effort="low")
    assert scripted.engine.last_prompt.endswith("<|im_start|>assistant\n")
    assert scripted.refused(reasoning_effort="huge").param == "reasoning_effort"


# --- Other families -----------------------------------------------------------------------------------------

PLAIN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


DEEPSEEK_CALL = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{before}get_weather{after}"
    '{{"city": "Rome"}}{end}<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
)


def family(tmp_path: Path, template: str, marks: tuple[str, ...], **settings: Any) -> Any:
    return scripted_server(make_marked_model(tmp_path / "family", template, marks), **settings)


@pytest.mark.parametrize(
    ("template", "marks", "settings", "text", "name"),
    [
        (TOOLS_TEMPLATE.replace("<tool_call>", ""), ("[TOOL_CALLS]", "[ARGS]"), {},
         '[TOOL_CALLS]get_weather[ARGS]{"city": "Rome"}', "mistral"),
        (TOOLS_TEMPLATE.replace("<tool_call>", ""), ("<|python_tag|>",), {},
         '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Rome"}}', "llama3_json"),
        (TOOLS_TEMPLATE.replace("<tool_call>", ""), (), {},
         '{"name": "get_weather", "arguments": {"city": "Rome"}}', "json"),
        (TOOLS_TEMPLATE + "{# <function=f> <parameter=p> #}", MARKS, {},
         '<tool_call>\n<function=get_weather>\n<parameter=city>\nRome\n</parameter>\n</function>\n</tool_call>',
         "qwen3_coder"),
        (PLAIN_TEMPLATE, DEEPSEEK_MARKS, {},
         DEEPSEEK_CALL.format(before="function<｜tool▁sep｜>", after="\n```json\n", end="\n```"), "deepseek"),
        (PLAIN_TEMPLATE, DEEPSEEK_MARKS, {},
         DEEPSEEK_CALL.format(before="", after="<｜tool▁sep｜>", end=""), "deepseek"),
        (TOOLS_TEMPLATE, (), {"tool_call_parser": "json"},
         '{"name": "get_weather", "arguments": {"city": "Rome"}}', "json"),
        (PLAIN_TEMPLATE, (), {},
         '<tool_call>{"name": "get_weather", "arguments": {"city": "Rome"}}</tool_call>', "hermes"),
    ],
    ids=["mistral", "llama", "json", "Qwen3-Coder", "DeepSeek-V3", "DeepSeek-V3.1", "by setting", "in words"],
)  # fmt: skip
def test_every_family_is_understood(
    tmp_path: Path, template: str, marks: tuple[str, ...], settings: dict[str, Any], text: str, name: str
) -> None:
    with family(tmp_path, template, marks, **settings) as (server, engine):
        assert server.service.answer_format.tools.name == name
        scripted = Scripted(server.url, engine)
        assert calls_of(scripted.ask(text).choices[0]) == [("get_weather", {"city": "Rome"})]
        _, _, calls, finish, _ = streamed(scripted.ask(text, stream=True))
        assert (calls, finish) == ([["get_weather", '{"city": "Rome"}']], "tool_calls")
        assert scripted.ask("Just text.").choices[0].message.content == "Just text."


def test_calls_in_words_are_in_the_models_own_notation(tmp_path: Path) -> None:
    with family(tmp_path, PLAIN_TEMPLATE, DEEPSEEK_MARKS) as (server, engine):
        call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
        result = {"role": "tool", "tool_call_id": "c1", "content": "Sunny"}
        Scripted(server.url, engine).ask("x", messages=[*MESSAGES, {"role": "assistant", "tool_calls": [call]}, result])
        written = DEEPSEEK_CALL.format(before="", after="<｜tool▁sep｜>", end="").replace(": ", ":")
        assert written in engine.last_prompt


HARMONY_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}"
    "{% if tools %}{% endif %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


def test_channels_become_thoughts_text_and_calls(tmp_path: Path) -> None:
    thoughts = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    to_tool = '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Rome"}'
    with family(tmp_path, HARMONY_TEMPLATE, HARMONY_MARKS) as (server, engine):
        scripted = Scripted(server.url, engine)
        message = scripted.ask(f"{thoughts}<|channel|>final<|message|>Rome.", tools=[]).choices[0].message
        assert (message.content, message.reasoning_content, message.tool_calls) == ("Rome.", "Hm.", None)
        choice = scripted.ask(f"{thoughts}{to_tool}").choices[0]
        assert calls_of(choice) == [("get_weather", {"city": "Rome"})]
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        told = streamed(scripted.ask(f"{thoughts}{to_tool}", stream=True))
        assert told[:4] == ("", "Hm.", [["get_weather", '{"city": "Rome"}']], "tool_calls")
        response = scripted.openai.responses.create(model=MODEL_ID, input="Weather?")
        assert [item.type for item in response.output] == ["reasoning", "message"]
        assert response.output_text == '{"city": "Rome"}', "where there are no functions it is text"
        scripted.ask('{"a": 1}', tools=[], response_format={"type": "json_object"})
        assert engine.last_prompt.endswith("<|start|>assistant<|channel|>final<|message|>")
        forced = scripted.ask('[{"name": "get_time", "arguments": {}}]', tool_choice="required").choices[0]
        assert calls_of(forced) == [("get_time", {})]


def test_a_template_without_tools_gets_them_in_words(tmp_path: Path) -> None:
    with family(tmp_path, PLAIN_TEMPLATE, MARKS + SPECIAL_MARKS, tool_call_parser="hermes") as (server, engine):
        scripted = Scripted(server.url, engine)
        call = {"id": "c1", "type": "function", "function": {"name": "get_time", "arguments": '{"zone": "CET"}'}}
        results = [{"role": "tool", "tool_call_id": "c1", "content": content} for content in ("10:00", "11:00")]
        history: Any = [*MESSAGES, {"role": "assistant", "content": "Wait.", "tool_calls": [call]}, *results]
        scripted.ask("x", messages=history)
        prompt = engine.last_prompt
        assert prompt.startswith("<|im_start|>user\nYou can call these functions:\n")
        assert json.dumps(WEATHER["function"]["parameters"], separators=(",", ":")) in prompt
        assert '<tool_call>\n{"name":"get_time","arguments":{"zone":"CET"}}\n</tool_call><|im_end|>' in prompt
        assert prompt.count("<|im_start|>user") == 2, "results follow each other in one message"
        assert "<tool_response>\n10:00\n</tool_response>\n<tool_response>\n11:00\n</tool_response><|im_end|>" in prompt
        scripted.ask("x", messages=[{"role": "system", "content": "Be brief."}, *MESSAGES])
        assert engine.last_prompt.startswith("<|im_start|>system\nBe brief.\n\nYou can call these functions:\n")
        scripted.ask("x", extra_body={"tool_prompt": "Write JSON."})
        assert "Write JSON." in engine.last_prompt and "To call a function" not in engine.last_prompt


def test_thoughts_that_the_prompt_opens_are_thoughts(tmp_path: Path) -> None:
    with family(tmp_path, PLAIN_TEMPLATE + "<think>\n", MARKS) as (server, engine):
        scripted = Scripted(server.url, engine)
        message = scripted.ask("Hm.\n</think>\n\nRome.", tools=[]).choices[0].message
        assert (message.content, message.reasoning_content) == ("Rome.", "Hm.")
        content, thoughts, *_ = streamed(scripted.ask("Hm.\n</think>\n\nRome.", tools=[], stream=True))
        assert (content, thoughts) == ("Rome.", "Hm.")
        # What a grammar prescribes has no room for thoughts: they are closed before it begins.
        scripted.ask('{"a": 1}', tools=[], response_format={"type": "json_object"})
        assert engine.last_prompt.endswith("<think>\n\n</think>\n\n")


def test_thoughts_stay_in_the_text_if_the_operator_wants(tmp_path: Path) -> None:
    with family(tmp_path, PLAIN_TEMPLATE, MARKS, reasoning_parser="none") as (server, engine):
        engine.text = "<think>Hm.</think>Rome."
        answer = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": MESSAGES}).json()
        assert answer["choices"][0]["message"] == {
            "role": "assistant",
            "content": "<think>Hm.</think>Rome.",
            "refusal": None,
        }


@pytest.mark.parametrize("kind", [*TOOL_FORMATS, "harmony"])
@pytest.mark.parametrize("parallel", [True, False])
def test_every_family_can_be_forced(model_folder: Path, kind: str, parallel: bool) -> None:
    """The engine draws at random within the grammar, and the parser reads what comes out."""
    zones = {"type": "object", "properties": {"zone": {"enum": ["CET", "UTC"]}}, "required": ["zone"]}
    tools = [{"type": "function", "function": {"name": name, "parameters": zones}} for name in ("get_time", "set_time")]
    body = {"messages": MESSAGES, "tools": tools, "tool_choice": "required", "parallel_tool_calls": parallel}
    with live_server(model_folder, tool_call_parser=kind) as server, server.client() as client:
        for seed in range(3):
            answer = client.post("/v1/chat/completions", json={**body, "seed": seed, "max_tokens": 1500}).json()
            choice = answer["choices"][0]
            calls = choice["message"]["tool_calls"]
            assert choice["message"]["content"] is None and choice["finish_reason"] == "tool_calls"
            assert 1 <= len(calls) <= (16 if parallel else 1)
            for call in calls:
                assert call["function"]["name"] in ("get_time", "set_time")
                assert json.loads(call["function"]["arguments"])["zone"] in ("CET", "UTC")


# --- At the start -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "warns"), [(None, True), ("secret", False)])
def test_adapters_from_anybody_are_warned_of(
    model_folder: Path, caplog: pytest.LogCaptureFixture, key: str | None, warns: bool
) -> None:
    with live_server(model_folder, allow_runtime_lora=True, api_key=key):
        assert any("--allow-runtime-lora" in record.getMessage() for record in caplog.records) is warns


def test_the_page_of_documents_is_made_once(model_folder: Path) -> None:
    with live_server(model_folder) as server, server.client() as client:
        page = server.app.state.docs_page
        server.app.state.openapi = b"{}"
        assert client.get("/docs").content == page and b"/v1/chat/completions" in page
