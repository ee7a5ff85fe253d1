"""Structured answers: the clients' words for them, over HTTP and by themselves."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from tokenplane_api.errors import ApiError
from tokenplane_api.structured import (
    at_most_one,
    close_objects,
    from_openai,
    from_schema,
    from_tgi,
    from_vllm,
    tool_call_schema,
)
from tokenplane_core.messages import Grammar

PERSON = {"type": "object", "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["age"]}
CLOSED = {**PERSON, "additionalProperties": False}


def schema_of(grammar: Grammar | None) -> Any:
    """The schema without our whitespace."""
    assert grammar is not None and grammar.kind == "json_schema"
    schema = json.loads(grammar.source)
    schema.pop("x-guidance", None)
    return schema


# --- The clients' words -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "grammar",
    [
        from_openai({"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON, "strict": True}}),
        from_openai({"type": "json", "value": PERSON}),
        from_openai({"type": "json_object", "value": json.dumps(PERSON)}),
        from_openai({"type": "json_schema", "value": {"name": "p", "schema": PERSON}}),
        from_tgi({"type": "json", "value": PERSON}),
        from_tgi({"type": "json", "value": json.dumps(PERSON)}),
        from_tgi({"type": "json_schema", "value": {"schema": PERSON}}),
        from_vllm({"guided_json": PERSON}),
        from_vllm({"guided_json": json.dumps(PERSON)}),
        from_vllm({"structured_outputs": {"json": PERSON}}),
    ],
)
def test_many_words_mean_the_same_schema(grammar: Grammar | None) -> None:
    assert schema_of(grammar) == CLOSED


def test_words_for_other_grammars() -> None:
    assert from_openai(None) is from_openai({"type": "text"}) is from_tgi(None) is from_vllm({}) is None
    assert schema_of(from_openai({"type": "json_object"})) == {"type": "object"}
    assert schema_of(from_vllm({"structured_outputs": {"json_object": True}})) == {"type": "object"}
    assert from_tgi({"type": "regex", "value": "a+"}) == Grammar("regex", "a+")
    assert from_vllm({"guided_regex": "a+"}) == from_openai({"type": "regex", "value": "a+"}) == Grammar("regex", "a+")
    assert from_vllm({"guided_choice": ["a", 'b"']}) == Grammar("lark", r'start: "a" | "b\""')
    assert from_vllm({"guided_grammar": 'start: "a"'}) == Grammar("lark", 'start: "a"')
    assert from_vllm({"structured_outputs": {"choice": ["a"], "regex": None}}) == Grammar("lark", 'start: "a"')


@pytest.mark.parametrize(
    ("make", "param", "says"),
    [
        (lambda: from_openai("json"), "response_format", "needs an object"),
        (lambda: from_openai({"type": "xml"}), "response_format.type", "allowed are"),
        (lambda: from_openai({"type": "json_schema"}), "response_format.json_schema", "needs an object"),
        (lambda: from_openai({"type": "json_schema", "json_schema": {"name": "a"}}), None, "is missing"),
        (lambda: from_tgi({"type": "json"}), "grammar.value", "is missing"),
        (lambda: from_tgi({"type": "json", "value": "{"}), "grammar.value", "not JSON"),
        (lambda: from_tgi({"type": "json", "value": 5}), "grammar.value", "is an object"),
        (lambda: from_tgi({"type": "ebnf", "value": ""}), "grammar.type", "allowed are"),
        (lambda: from_tgi({"type": "regex", "value": ""}), "grammar.value", "at least 1 character"),
        (lambda: from_vllm({"guided_choice": []}), "guided_choice", "list of strings"),
        (lambda: from_vllm({"guided_choice": ["a"] * 1001}), "guided_choice", "the limit is 1000"),
        (lambda: from_vllm({"guided_grammar": "root ::= a"}), "guided_grammar", "Lark"),
        (lambda: from_vllm({"guided_json": {}, "guided_regex": "a"}), "guided_json", "only one"),
        (lambda: from_vllm({"structured_outputs": {"jsonn": {}}}), "structured_outputs.jsonn", "allowed are"),
        (lambda: at_most_one(a=Grammar("regex", "a"), b=Grammar("regex", "b")), "a", "only one"),
        (lambda: from_schema({"enum": ["x" * 300_000]}, "f"), "f", "the limit is 262,144"),
        (lambda: from_schema(nested(101), "f"), "f", "100 levels"),
        (lambda: from_schema("[" * 10_000, "f"), "f", "not JSON"),
    ],
)
def test_what_is_malformed_names_its_field(make: Any, param: str | None, says: str) -> None:
    with pytest.raises(ApiError, match=re.escape(says)) as caught:
        make()
    assert param is None or caught.value.param == param


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


def test_objects_that_list_properties_are_closed_where_that_forbids_nothing_listed() -> None:
    assert close_objects(PERSON) == CLOSED
    assert close_objects({"type": "array", "items": PERSON}) == {"type": "array", "items": CLOSED}
    assert close_objects({"type": "object"}) == {"type": "object"}
    said = {**PERSON, "additionalProperties": {"type": "string"}}
    assert close_objects(said) == said
    joint = {"allOf": [PERSON, {"type": "object", "properties": {"b": {}}}]}
    assert close_objects(joint) == joint
    beside = {**PERSON, "anyOf": [{"required": ["age"]}, {"type": "object", "properties": {"c": {}}}]}
    assert close_objects(beside) == beside
    assert close_objects({"const": PERSON}) == {"const": PERSON}
    named = {"type": "object", "properties": {"properties": {"type": "object"}, "type": {"type": "string"}}}
    assert close_objects(named) == {**named, "additionalProperties": False}


def test_references_in_tools_keep_their_meaning() -> None:
    parameters = {"$defs": {"u": {"enum": [1, 2]}}, "type": "object", "properties": {"a/b": {"$ref": "#/$defs/u"}}}
    schema = tool_call_schema([{"name": "f", "parameters": parameters}, {"name": "g"}], "parameters")
    jsonschema.validate({"name": "f", "parameters": {"a/b": 2}}, schema)
    jsonschema.validate({"name": "g", "parameters": {}}, schema)
    for wrong in ({"name": "f", "parameters": {"a/b": 3}}, {"name": "h", "parameters": {}}, {"name": "f"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)


# --- Over HTTP ----------------------------------------------------------------------------------------------

MESSAGES: Any = [{"role": "user", "content": "How old?"}]


def test_a_chat_answer_keeps_the_schema_whole_and_streamed(openai_client: openai.OpenAI) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    options: Any = {"model": "tgi", "messages": MESSAGES, "max_tokens": 200, "response_format": wanted}
    whole = openai_client.chat.completions.create(**options, seed=3)
    streamed = openai_client.chat.completions.create(**options, seed=3, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
    assert whole.choices[0].finish_reason == "stop" and whole.choices[0].message.content == text
    jsonschema.validate(json.loads(text), CLOSED)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "foo"}}}),
        ("guided_json", {"type": "foo"}),
        ("guided_regex", "(a"),
        ("guided_grammar", "start: nothing"),
    ],
)
def test_a_grammar_that_cannot_be_compiled_is_a_400_that_names_the_field(
    field: str, value: Any, stream: bool, client: httpx.Client
) -> None:
    body = {"messages": MESSAGES, "stream": stream, field: value}
    answer = client.post("/v1/chat/completions", json=body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == field
    assert "cannot be compiled" in error["message"] and field in error["message"]


def test_a_native_answer_keeps_its_grammar(client: httpx.Client) -> None:
    for grammar, pattern in (
        ({"type": "regex", "value": "[0-9]{2}:[0-9]{2}"}, r"[0-9]{2}:[0-9]{2}"),
        ({"type": "json", "value": PERSON}, r'\{\s*"age"\s*:\s*[0-9]\s*\}'),
    ):
        parameters = {"grammar": grammar, "max_new_tokens": 200, "details": True}
        answer = client.post("/generate", json={"inputs": "When?", "parameters": parameters}).json()
        assert re.fullmatch(pattern, answer["generated_text"]), answer
        assert answer["details"]["finish_reason"] == "eos_token"


def test_a_native_grammar_that_cannot_be_compiled_is_a_422(client: httpx.Client) -> None:
    parameters = {"grammar": {"type": "regex", "value": "(a"}, "max_new_tokens": 5}
    answer = client.post("/generate", json={"inputs": "When?", "parameters": parameters})
    assert answer.status_code == 422 and answer.json()["error_type"] == "validation"
    assert "grammar" in answer.json()["error"] and "unclosed group" in answer.json()["error"]


def test_choices_and_log_probabilities_go_together(client: httpx.Client) -> None:
    body = {"prompt": "Yes or no?", "guided_choice": ["yes", "no"], "logprobs": 2, "temperature": 2.0, "seed": 1}
    answer = client.post("/v1/completions", json=body).json()
    assert answer["choices"][0]["text"] in ("yes", "no") and answer["choices"][0]["finish_reason"] == "stop"
