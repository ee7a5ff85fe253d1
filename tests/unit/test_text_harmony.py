"""Answers in harmony's format, which gpt-oss writes: the same however they are split."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from tokenplane_api.text.answer_format import AnswerFormat
from tokenplane_api.text.answer_parser import AnswerParser
from tokenplane_api.text.chat_template import ChatTemplate
from tokenplane_api.text.harmony import MARKS
from tokenplane_api.text.tokenizer import TextTokenizer
from tokenplane_api.text.tool_calls import CallDelta
from tokenplane_core.backend.errors import ConfigError

PROMPT = "<|start|>user<|message|>Hi<|end|><|start|>assistant"
THOUGHTS = "<|channel|>analysis<|message|>Hm < {.<|end|>"
CALL = '<|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Rome"}'
Told = tuple[str, str, list[list[str]]]


def format_of(template: str = "{{ tools }}<|start|><|channel|>", **settings: str) -> AnswerFormat:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.add_special_tokens(list(MARKS))
    return AnswerFormat.of_model(TextTokenizer(tokenizer, {}), ChatTemplate({"default": template}), **settings)


FORMAT = format_of()


def read(pieces: Iterable[str], parser: AnswerParser | None = None) -> Told:
    """(thoughts, content, [name, arguments] of each call)"""
    parser = parser or FORMAT.new_parser(PROMPT, {"get_weather": {}})
    thoughts = content = ""
    calls: list[list[str]] = []
    for delta in itertools.chain(*map(parser.push, pieces), parser.flush()):
        if isinstance(delta, CallDelta):
            if delta.name is not None:
                assert delta.index == len(calls) and delta.id and delta.id.startswith("call_")
                calls.append([delta.name, ""])
            calls[delta.index][1] += delta.arguments
        elif delta.is_reasoning:
            thoughts += delta.text
        else:
            content += delta.text
    return thoughts, content, calls


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{THOUGHTS}<|start|>assistant<|channel|>final<|message|>Paris.<|return|>", ("Hm < {.", "Paris.", [])),
        (f"{THOUGHTS}{CALL}<|call|>", ("Hm < {.", "", [["get_weather", '{"city": "Rome"}']])),
        (
            f"{THOUGHTS}<|start|>assistant<|channel|>commentary<|message|>I look.<|end|>{CALL}",
            ("Hm < {.", "I look.", [["get_weather", '{"city": "Rome"}']]),
        ),
        (" to=functions.a.b<|channel|>commentary json<|message|>{}", ("", "", [["a.b", "{}"]])),
        ("<|channel|>analysis to=python code<|message|>1+1<|call|>", ("1+1", "", [])),
        ("<|channel|>final<|message|>cut <|en", ("", "cut <|en", [])),
        ("<|channel|>final", ("", "", [])),
        ("<|channel|>final Hello world", ("", "Hello world", [])),
        ("<|channel|>analysis Let me see", ("Let me see", "", [])),
        (f"<|channel|>final {'Long. ' * 50}", ("", "Long. " * 50, [])),
        ("<|channel|>final A<|end|><|start|>assistant<|channel|>final<|message|>B<|return|>", ("", "AB", [])),
        ("A<|end|><|start|>assistant", ("", "A", [])),
        ("a", ("", "a", [])),
        ("to", ("", "to", [])),
        ("to=5 it is", ("", "to=5 it is", [])),
        ("Plain words.", ("", "Plain words.", [])),
        ("Plain <|message|> words", ("", "Plain <|message|> words", [])),
        ("", ("", "", [])),
    ],
)
def test_channels_are_told_apart_whole_by_character_and_at_every_cut(text: str, expected: Told) -> None:
    assert read([text]) == expected
    assert read(text) == expected
    for cut in range(len(text)):
        assert read([text[:cut], text[cut:]]) == expected, text[:cut]


@given(data=st.data())
def test_no_split_changes_what_is_found(data: st.DataObject) -> None:
    parts = [*MARKS, "assistant", "analysis", "commentary", "final", " to=functions.add", "{", "text", " ", "<", "to="]
    text = "".join(data.draw(st.lists(st.sampled_from(parts), max_size=15)))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
    assert read(pieces) == read(text) == read([text])


def test_arguments_are_passed_on_while_they_are_written() -> None:
    parser = FORMAT.new_parser(PROMPT, {"get_weather": {}})
    assert parser.push(THOUGHTS)
    (begun, first) = parser.push(CALL[:-8])
    (more,) = parser.push(CALL[-8:-1])
    assert isinstance(begun, CallDelta) and begun.name == "get_weather"
    assert isinstance(first, CallDelta) and isinstance(more, CallDelta)
    assert first.arguments + more.arguments == '{"city": "Rome"'


def test_calls_that_nobody_wants_are_left_out() -> None:
    text = f"{CALL}<|call|>{CALL}<|call|>"
    assert len(read([text])[2]) == 2
    assert len(read([text], FORMAT.new_parser(PROMPT, {"get_weather": {}}, 1))[2]) == 1


def test_a_call_where_there_are_no_functions_is_text() -> None:
    assert read(f"{THOUGHTS}{CALL}<|call|>", FORMAT.new_parser(PROMPT, None)) == ("Hm < {.", '{"city": "Rome"}', [])


def test_a_message_that_the_prompt_began_goes_on() -> None:
    parser = FORMAT.new_parser(f"{PROMPT}<|channel|>analysis<|message|>I thi", {})
    assert read(["nk.<|end|><|start|>assistant<|channel|>final<|message|>Yes"], parser) == ("nk.", "Yes", [])


def test_a_call_that_the_prompt_began_goes_on_as_text() -> None:
    prompt = PROMPT + CALL.removeprefix("<|start|>assistant")[:-5]
    assert read(f'ome"}}<|call|>{CALL}', FORMAT.new_parser(prompt, {"get_weather": {}})) == (
        "", 'ome"}', [["get_weather", '{"city": "Rome"}']],
    )  # fmt: skip


def test_a_prescribed_answer_is_on_the_final_channel() -> None:
    prompt = FORMAT.for_prescribed(PROMPT)
    assert prompt == f"{PROMPT}<|channel|>final<|message|>"
    text = '[{"name": "get_weather", "arguments": {"city": "Rome"}}]'
    parser = FORMAT.new_parser(prompt, {"get_weather": {}}, is_prescribed=True)
    assert read(text, parser) == ("", "", [["get_weather", '{"city": "Rome"}']])


def test_the_format_is_seen_in_template_and_vocabulary_or_named() -> None:
    for found in (FORMAT, format_of("{{ messages }}", tool_call_parser="harmony")):
        assert found.has_channels and found.tells_thoughts and len(found.shown_ids) == len(MARKS)
        assert found.needs_parser(has_tools=False, is_prescribed=True)
    assert not format_of(tool_call_parser="hermes").has_channels
    untold = format_of(reasoning_parser="none")
    assert read([THOUGHTS], untold.new_parser(PROMPT, None)) == ("", "Hm < {.", [])


@pytest.mark.parametrize(
    "settings", [{"reasoning_parser": "think"}, {"reasoning_parser": "harmony", "tool_call_parser": "hermes"}], ids=str
)
def test_formats_that_exclude_each_other_are_refused(settings: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"--reasoning-parser is '(think|harmony)'"):
        format_of(**settings)
