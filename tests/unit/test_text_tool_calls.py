"""Tool calls and thoughts found in streamed text: the same however it is split."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from tokenplane_api.text.answer_format import AnswerFormat
from tokenplane_api.text.answer_parser import AnswerParser
from tokenplane_api.text.chat_template import ChatTemplate
from tokenplane_api.text.reasoning import REASONING_MARKS, ReasoningSplitter
from tokenplane_api.text.tokenizer import TextTokenizer
from tokenplane_api.text.tool_calls import CallDelta, ToolCallParser
from tokenplane_api.text.tool_formats import TOOL_FORMATS
from tokenplane_core.backend.errors import ConfigError

PARAMETERS: dict[str, dict[str, Any]] = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "unit": {"enum": ["C", "F"]},
            "note": {"type": ["string", "null"]},
            "options": {"type": "object"},
        },
    },
    "add": {},
    "ping": {},
}


class Told:
    """What the deltas of one answer add up to."""

    def __init__(self) -> None:
        self.content = self.thoughts = ""
        self.calls: list[list[str]] = []
        self.ids: list[str] = []

    def add(self, deltas: Iterable[Any]) -> None:
        for delta in deltas:
            if not isinstance(delta, CallDelta):
                assert delta.text, "no delta is empty"
                if delta.is_reasoning:
                    assert not self.content and not self.calls
                    self.thoughts += delta.text
                else:
                    self.content += delta.text
            elif delta.name is not None:
                assert delta.index == len(self.calls) and delta.id
                self.calls.append([delta.name, delta.arguments])
                self.ids.append(delta.id)
            else:
                assert delta.id is None and delta.arguments
                self.calls[delta.index][1] += delta.arguments

    @property
    def all(self) -> tuple[str, str, list[list[str]]]:
        return self.thoughts, self.content, self.calls


def parser_of(kind: str, thinks: str | None = None, is_open: bool = False, **options: Any) -> AnswerParser:
    reasoning = ReasoningSplitter(REASONING_MARKS[thinks], is_open) if thinks else None
    return AnswerParser(reasoning, ToolCallParser(TOOL_FORMATS[kind], PARAMETERS, **options))


def read(pieces: Iterable[str], parser: AnswerParser) -> Told:
    told = Told()
    for piece in pieces:
        told.add(parser.push(piece))
    told.add(parser.flush())
    return told


WEATHER = '{"city": "Ber\\"lin}{", "days": [1, {"a": 2}], "x": "\\\\"}'
CALLS, CALL, SEP, CALL_END, CALLS_END = (
    f"<｜tool▁{name}｜>" for name in ("calls▁begin", "call▁begin", "sep", "call▁end", "calls▁end")
)
ANSWERS: list[tuple[str, str, str, list[list[str]]]] = [
    ("hermes", "Just text.", "Just text.", []),
    ("hermes", " a <b> </tool_call> <tool_cal\n", " a <b> </tool_call> <tool_cal\n", []),
    (
        "hermes",
        f'Let me see.\n<tool_call>\n{{"name": "get_weather", "arguments": {WEATHER}}}\n</tool_call>',
        "Let me see.",
        [["get_weather", WEATHER]],
    ),
    (
        "hermes",
        '<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>\n<tool_call>\n{"name": "ping"}\n</tool_call>\n',
        "",
        [["add", '{"a": 1}'], ["ping", "{}"]],
    ),
    ("hermes", '<tool_call>{"name": "add", "arguments": {}}</tool_call>\nDone.', "Done.", [["add", "{}"]]),
    ("hermes", "<tool_call>\nno json</tool_call> ok", "<tool_call>\nno json</tool_call> ok", []),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1', "", [["add", '{"a": 1']]),
    ("hermes", '<tool_call>\n{"name": "ad', '<tool_call>\n{"name": "ad', []),
    ("hermes", '<tool_call>{"name": "unheard_of", "arguments": null}</tool_call>', "", [["unheard_of", "{}"]]),
    ("hermes", '<tool_call>{"name": "add", "arguments": "{\\"a\\": 2}"}</tool_call>', "", [["add", '{"a": 2}']]),
    ("hermes", '<tool_call> {"name": "add" 5 <tool_call>{"name": "ping"}</tool_call>',
     '<tool_call> {"name": "add" 5', [["ping", "{}"]]),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1}, "extra": {"name": 2}, "name": 3}</tool_call>tail',
     "tail", [["add", '{"a": 1}']]),
    ("hermes", "a <tool_call> </tool_call> b", "a <tool_call> </tool_call> b", []),
    ("llama3_json", '{"name": "get_weather", "parameters": ' + WEATHER + "}", "", [["get_weather", WEATHER]]),
    (
        "llama3_json",
        '<|python_tag|>{"name": "add", "parameters": {"a": 1}}; {"type": "function", "name": "ping", "parameters": {}}',
        "",
        [["add", '{"a": 1}'], ["ping", "{}"]],
    ),
    ("llama3_json", '{"function": "add", "parameters": {}}', "", [["add", "{}"]]),
    ("llama3_json", '{"name": "Anna", "age": 5}', '{"name": "Anna", "age": 5}', []),
    ("llama3_json", '{"name": "Anna", "parameters": {}} <|python', '{"name": "Anna", "parameters": {}} <|python', []),
    ("llama3_json", "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
    ("llama3_json", '  Sure: {"name": "add", "parameters": {}}', '  Sure: {"name": "add", "parameters": {}}', []),
    ("mistral", '[TOOL_CALLS] [{"name": "add", "arguments": {"a": [1]}}, {"name": "ping", "arguments": {}}]', "",
     [["add", '{"a": [1]}'], ["ping", "{}"]]),
    ("mistral", '[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]ping[CALL_ID]abcdef123[ARGS]{}', "",
     [["add", '{"a": 1}'], ["ping", "{}"]]),
    ("mistral", 'Well. [TOOL_CALLS]get_weather{"city": "Rome"} That is all.', "Well.That is all.",
     [["get_weather", '{"city": "Rome"}']]),
    ("mistral", "[TOOL_CALLS] I do not know", "[TOOL_CALLS] I do not know", []),
    ("mistral", "[1, 2] are [TOOL", "[1, 2] are [TOOL", []),
    ("json", '[{"name": "add", "arguments": {}}, {"name": "ping", "arguments": {"x": 1}}]', "",
     [["add", "{}"], ["ping", '{"x": 1}']]),
    ("json", 'I will add.\n```json\n{"name": "add", "arguments": {"a": 1}}\n```\nDone', "I will add.Done",
     [["add", '{"a": 1}']]),
    ("json", '```json\n{"name": "Anna", "arguments": 1}\n```', '```json\n{"name": "Anna", "arguments": 1}\n```', []),
    ("json", "[1, 2, 3]", "[1, 2, 3]", []),
    (
        "qwen3_coder",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nSão \"P\"\n</parameter>\n"
        "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
        "",
        [["get_weather", '{"city": "São \\"P\\"", "days": 3}']],
    ),
    (
        "qwen3_coder",
        "Look:\n<tool_call><function=get_weather><parameter=city>a\n\nb</para </parameter>"
        "<parameter=unit>\n\nF\n</parameter></function></tool_call>\n"
        "<tool_call>\n<function=ping>\n</function>\n</tool_call> Bye",
        "Look:Bye",
        [["get_weather", '{"city": "a\\n\\nb</para ", "unit": "\\nF"}'], ["ping", "{}"]],
    ),
    (
        "qwen3_coder",
        '<tool_call>\n<function=add>\n<parameter=a>\n[1, {"b": 2}]\n</parameter>\n<parameter=b>\nTrue\n</parameter>\n'
        "<parameter=c>\nfour\n</parameter>\n</function>\n</tool_call>",
        "",
        [["add", '{"a": [1, {"b": 2}], "b": true, "c": "four"}']],
    ),
    (
        "qwen3_coder",
        "<tool_call><function=get_weather><parameter=note>null</parameter><parameter=city>7</parameter>"
        "<parameter=note>8</parameter></tool_call>",
        "",
        [["get_weather", '{"note": null, "city": "7", "note": "8"}']],
    ),
    ("qwen3_coder", "<tool_call>\n<function=get_weather>\n<parameter=city>\nRo", "", [["get_weather", '{"city": "Ro']]),
    (
        "qwen3_coder",
        "<tool_call><function=get_weather>\n<parameter=city>\nRome < <parameter=\n<parameter=days>3<parameter=note>"
        "<parameter=x>\n</function></tool_call>",
        "",
        [["get_weather", '{"city": "Rome < <parameter=", "days": 3, "note": "", "x": ""}']],
    ),
    ("qwen3_coder", "<tool_call>\n<function=get_wea", "<tool_call>\n<function=get_wea", []),
    ("qwen3_coder", "<tool_call>\n<function=>\n", "<tool_call>\n<function=>\n", []),
    ("qwen3_coder", '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>', "", [["add", "{}"]]),
    (
        "deepseek",
        f"Ok.{CALLS}{CALL}function{SEP}get_weather\n```json\n{WEATHER}\n```{CALL_END}\n"
        f"{CALL}function{SEP}ping\n```json\n{{}}\n```{CALL_END}{CALLS_END}",
        "Ok.",
        [["get_weather", WEATHER], ["ping", "{}"]],
    ),
    (
        "deepseek",
        f'{CALLS}{CALL}add{SEP}{{"a": 1}}{CALL_END}{CALL}ping{SEP}{{}}{CALL_END}{CALLS_END}',
        "",
        [["add", '{"a": 1}'], ["ping", "{}"]],
    ),
    ("deepseek", f"{CALL}add{SEP}{{}}{CALL_END}", "", [["add", "{}"]]),
    ("deepseek", f"{CALLS}```{CALL_END} x", f"{CALLS}```{CALL_END} x", []),
    ("json", "", "", []),
    ("json", " \n", " \n", []),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text", "content", "calls"), ANSWERS, ids=lambda value: str(value)[:40])
def test_calls_are_found_whole_by_character_and_at_every_cut(
    kind: str, text: str, content: str, calls: list[list[str]]
) -> None:
    expected = ("", content, calls)
    assert read([text], parser_of(kind)).all == expected
    assert read(text, parser_of(kind)).all == expected
    for cut in range(len(text)):
        assert read([text[:cut], text[cut:]], parser_of(kind)).all == expected, text[:cut]


@pytest.mark.parametrize("kind", TOOL_FORMATS)
@given(data=st.data())
def test_no_split_changes_what_is_found(kind: str, data: st.DataObject) -> None:
    opener, closer = TOOL_FORMATS[kind].marks[0]
    parts = [
        opener, closer, "[", "]", ",", ";", " ", "\n", "{", "}", '"', "text", "name", "<", "add", "[ARGS]",
        '{"name": "add", "arguments": {"a": "}"}}', '{"name": "zzz", "parameters": {}}', '{"a": 1}', '"name": "ping"',
        *TOOL_FORMATS[kind].all_marks, "<function=", "add>", "<parameter=", "a>", "</parameter>", "</function>",
        '{"name": "add", "arguments": ', "<tool_call>", "</tool_call>", "<think>", "</think>",
    ]  # fmt: skip
    text = "".join(data.draw(st.lists(st.sampled_from(parts), max_size=12)))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    thinks, is_open = data.draw(st.sampled_from([(None, False), ("think", False), ("think", True)]))
    whole = read([text], parser_of(kind, thinks, is_open))
    assert read(pieces, parser_of(kind, thinks, is_open)).all == whole.all
    assert read(text, parser_of(kind, thinks, is_open)).all == whole.all


@given(
    arguments=st.dictionaries(
        st.text(max_size=5), st.recursive(st.text(max_size=9) | st.integers() | st.none(), st.lists), max_size=4
    ),
    content=st.text(alphabet="ab <[`{\n", max_size=20),
)
def test_any_arguments_come_through(arguments: dict[str, Any], content: str) -> None:
    call = json.dumps({"name": "add", "arguments": arguments})
    told = read(f"{content}<tool_call>\n{call}\n</tool_call>", parser_of("hermes"))
    assert told.content == content.rstrip()
    assert [(name, json.loads(given)) for name, given in told.calls] == [("add", arguments)]


def test_arguments_are_passed_on_while_they_are_written() -> None:
    parser = parser_of("hermes")
    assert parser.push('<tool_call>{"name": "add"') == []
    (begun,) = parser.push(', "arguments":') or [None]
    assert begun is None
    first, more = parser.push(' {"a"')
    assert (first.name, more.arguments) == ("add", '{"a"')
    (more,) = parser.push(": 15")
    assert more.arguments == ": 15"


def test_calls_beyond_the_limit_are_left_out() -> None:
    text = '<tool_call>{"name": "add"}</tool_call><tool_call>{"name": "ping"}</tool_call>'
    assert read(text, parser_of("hermes", max_calls=1)).calls == [["add", "{}"]]


def test_forced_calls_need_no_mark() -> None:
    text = '[{"name": "add", "parameters": {"a": 1}}, {"name": "ping", "parameters": {}}]'
    for kind in TOOL_FORMATS:
        assert read(text, parser_of(kind, is_forced=True)).calls == [["add", '{"a": 1}'], ["ping", "{}"]]


def test_schemas_that_make_no_sense_leave_the_types_open() -> None:
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(600):
        deep = {"anyOf": [deep]}
    properties = {"a": {"type": None}, "b": {"type": 5}, "c": deep, "d": {"type": ["string", 5]}, "e": 5}
    parser = ToolCallParser(TOOL_FORMATS["qwen3_coder"], {"f": {"properties": properties}})
    values = "".join(f"<parameter={name}>1</parameter>" for name in properties)
    told = read(f"<tool_call><function=f>{values}</function></tool_call>", AnswerParser(None, parser))
    assert told.calls == [["f", '{"a": 1, "b": 1, "c": 1, "d": "1", "e": 1}']]


@pytest.mark.parametrize("kind", TOOL_FORMATS)
@pytest.mark.parametrize("form", ['{"name": "ping"}', '{"name": "ping", "type": "b"}', '[{"name": "ping"}]'])
def test_a_prescribed_answer_without_arguments_is_no_call(kind: str, form: str) -> None:
    format = AnswerFormat(TOOL_FORMATS[kind], None, frozenset())
    assert read(form, format.new_parser("", PARAMETERS, is_prescribed=True)).all == ("", form, [])
    before, _, after = TOOL_FORMATS[kind].forced
    call = f'{before}{{"name": "ping", "{TOOL_FORMATS[kind].arguments_key}": {{}}}}{after}'
    assert read(call, format.new_parser("", PARAMETERS, is_prescribed=True)).all == ("", "", [["ping", "{}"]])


def test_marks_tell_a_prescribed_call_from_an_answer_that_reads_like_one() -> None:
    form = '{"name": "add", "arguments": {"a": 1}}'
    for kind in ("hermes", "qwen3_coder"):
        parser = AnswerFormat(TOOL_FORMATS[kind], None, frozenset()).new_parser("", PARAMETERS, is_prescribed=True)
        assert read(form, parser).all == ("", form, [])


def test_ids_are_unique_and_as_long_as_the_family_wants() -> None:
    text = '[TOOL_CALLS] [{"name": "add"}, {"name": "ping"}]'
    ids = read(text, parser_of("mistral")).ids
    assert len(set(ids)) == 2 and all(len(id) == 9 and id.isalnum() for id in ids)
    assert TOOL_FORMATS["hermes"].new_id().startswith("call_")


@pytest.mark.parametrize(
    ("text", "is_open", "thoughts", "content"),
    [
        ("<think>\nHm.\n</think>\n\nParis.", False, "Hm.", "Paris."),
        ("Hm.\n</think>\nParis.", True, "Hm.", "Paris."),
        ("\n <think></think>Paris", False, "", "Paris"),
        ("Paris <think>no</think>", False, "", "Paris <think>no</think>"),
        ("<think>endless </thi", False, "endless </thi", ""),
        ("<thin", False, "", "<thin"),
        ("  x", False, "", "  x"),
        ("", True, "", ""),
        ("a\n\nb </think", True, "a\n\nb </think", ""),
    ],
)
def test_thoughts_are_kept_apart(text: str, is_open: bool, thoughts: str, content: str) -> None:
    for cut in range(len(text) + 1):
        told = read([text[:cut], text[cut:]], parser_of("hermes", "think", is_open))
        assert told.all == (thoughts, content, [])
    assert read(text, parser_of("hermes", "think", is_open)).all == (thoughts, content, [])


def test_a_call_may_follow_thoughts() -> None:
    text = '<think>I <tool_call>must</think>\n<tool_call>{"name": "ping"}</tool_call>'
    assert read(text, parser_of("hermes", "think")).all == ("I <tool_call>must", "", [["ping", "{}"]])


# --- Which notation -----------------------------------------------------------------------------------------


def format_of(template: str | None, tokens: tuple[str, ...] = (), **settings: str) -> AnswerFormat:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.add_tokens(list(tokens))
    chat = None if template is None else ChatTemplate({"default": template})
    return AnswerFormat.of_model(TextTokenizer(tokenizer, {}), chat, **settings)


@pytest.mark.parametrize(
    ("template", "tokens", "tools", "reasoning"),
    [
        ("{{ tools }} <tool_call>", (), "hermes", None),
        ("{{ tools }}", ("<tool_call>", "<think>"), "hermes", "<think>"),
        ("{{ tools }} [TOOL_CALLS] [THINK]", (), "mistral", "[THINK]"),
        ("{{ tools }}", ("<|python_tag|>",), "llama3_json", None),
        ("{{ tools }} <tool_call> <function=...> <parameter=...>", ("<tool_call>",), "qwen3_coder", None),
        ("{{ messages }}", (CALL, SEP, "<think>"), "deepseek", "<think>"),
        ("{{ tools }} <tool_call>" + CALL, (), "deepseek", None),
        ("{{ tools }}", (), "json", None),
        ("{{ messages }}", (), "hermes", None),
        (None, (), "hermes", None),
    ],
    ids=str,
)
def test_the_notation_is_seen_in_template_and_vocabulary(
    template: str | None, tokens: tuple[str, ...], tools: str, reasoning: str | None
) -> None:
    found = format_of(template, tokens)
    assert found.tools.name == tools
    assert (found.reasoning[0] if found.reasoning else None) == reasoning
    assert len(found.shown_ids) == len(tokens), "the marks that are tokens are shown"


def test_the_operator_may_name_another_notation() -> None:
    found = format_of("{{ tools }} <tool_call> <think>", tool_call_parser="mistral", reasoning_parser="none")
    assert (found.tools.name, found.reasoning) == ("mistral", None)
    assert format_of(None, reasoning_parser="think").reasoning == ("<think>", "</think>")
    assert format_of(None, reasoning_parser="think").opens_reasoning("a\n<think>\n")
    assert not format_of(None).opens_reasoning("a\n<think>\n")


@pytest.mark.parametrize("name", ["tool_call_parser", "reasoning_parser"])
def test_a_notation_that_does_not_exist_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} is 'xml'; it may be auto, .*") as failure:
        format_of(None, **{name: "xml"})
    assert ("none" in str(failure.value)) is (name == "reasoning_parser")
