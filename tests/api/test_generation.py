"""From token events to pieces of text, where the events are chosen by the test."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest

from tokenplane_api.errors import as_api_error, openai_body, tgi_body
from tokenplane_api.generation import Generation, GenerationSpec, Output, Piece, Times, collect, prompt_tokens
from tokenplane_api.openai.chat_render import ChatRenderer
from tokenplane_api.openai.convert import Prepared
from tokenplane_api.openai.render import Head
from tokenplane_api.text.tokenizer import TextTokenizer
from tokenplane_api.tgi.render import stream_events
from tokenplane_core.backend.errors import EngineFailed, EngineNotReady, InvalidRequest, QueueFull, RequestError
from tokenplane_core.messages import SamplingParams, TokenEvent


class Script:
    """A token stream that says what it was told; an exception among the events is raised."""

    def __init__(self, events: Sequence[TokenEvent | Exception]) -> None:
        self._events = list(events)
        self.num_cancels = 0

    async def __anext__(self) -> TokenEvent:
        await asyncio.sleep(0)
        if not self._events:
            raise StopAsyncIteration
        event = self._events.pop(0)
        if isinstance(event, Exception):
            raise event
        return event

    def cancel(self) -> None:
        self.num_cancels += 1


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> TextTokenizer:
    return TextTokenizer.load(model_folder)


def start(tokenizer: TextTokenizer, events: Sequence[TokenEvent | Exception], **spec: Any) -> tuple[Generation, Script]:
    script = Script(events)
    sampling = spec.pop("sampling", SamplingParams())
    made = GenerationSpec(prompt_text="p", prompt_ids=[70], max_new_tokens=99, sampling=sampling, **spec)
    return Generation(made, script, tokenizer, Times(perf_counter()), lambda generation: None), script


def tell(
    tokenizer: TextTokenizer, text: str, per_event: int = 1, finish: Any = "length"
) -> list[TokenEvent | Exception]:
    """Events that spell the text, so many tokens in each."""
    ids = tokenizer.encode(text)
    events = [TokenEvent("r", ids[i : i + per_event], [-0.5] * per_event) for i in range(0, len(ids), per_event)]
    last = events.pop()
    return [*events, TokenEvent("r", last.token_ids, last.logprobs, finish_reason=finish)]


async def read(generation: Generation) -> Output:
    (output,) = await collect([generation])
    return output


@pytest.mark.parametrize("per_event", [1, 2, 3, 7])
async def test_text_does_not_depend_on_how_tokens_are_bundled(tokenizer: TextTokenizer, per_event: int) -> None:
    text = "Zwölf Boxkämpfer 👍🏽 jagen Viktor."
    generation, _ = start(tokenizer, tell(tokenizer, text, per_event), wants_tokens=True, wants_token_texts=True)
    output = await read(generation)
    assert output.text == text
    assert "".join(token.text for token in output.tokens) == text
    assert (output.finish_reason, generation.num_tokens) == ("length", len(tokenizer.encode(text)))


@pytest.mark.parametrize("per_event", [1, 4])
async def test_a_stop_string_cancels_and_ends_the_count(tokenizer: TextTokenizer, per_event: int) -> None:
    generation, script = start(tokenizer, tell(tokenizer, "one two three four", per_event), stop=("wo t",))
    output = await read(generation)
    assert (output.text, output.finish_reason) == ("one t", "stop_sequence")
    assert script.num_cancels == 1
    assert generation.num_tokens < len(tokenizer.encode("one two three four"))


async def test_a_kept_stop_string_ends_text_and_tokens_alike(tokenizer: TextTokenizer) -> None:
    events = tell(tokenizer, "The capital of France")
    generation, _ = start(tokenizer, events, stop=("apit",), keep_stop=True, wants_tokens=True, wants_token_texts=True)
    output = await read(generation)
    assert output.text == "The capit"
    assert "".join(token.text for token in output.tokens) == "The capit"


async def test_held_back_text_comes_with_the_end(tokenizer: TextTokenizer) -> None:
    generation, _ = start(tokenizer, tell(tokenizer, "almost a sto"), stop=("stop",))
    assert (await read(generation)).text == "almost a sto"


async def test_min_tokens_hold_for_stop_strings_too(tokenizer: TextTokenizer) -> None:
    events = tell(tokenizer, "a.a.a.")
    generation, _ = start(tokenizer, events, stop=(".",), sampling=SamplingParams(min_new_tokens=3))
    assert (await read(generation)).text == "a.a"


async def test_the_stop_token_adds_no_text_even_if_it_is_not_special(tokenizer: TextTokenizer) -> None:
    events = tell(tokenizer, "done!", finish="stop_token")
    generation, _ = start(tokenizer, events, wants_tokens=True)
    output = await read(generation)
    assert (output.text, output.finish_reason) == ("done", "eos_token")
    assert [token.is_stop for token in output.tokens] == [False] * (len(output.tokens) - 1) + [True]


async def test_half_a_character_at_the_end_is_shown_as_such(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode("👍")
    generation, _ = start(tokenizer, [TokenEvent("r", ids[:1], finish_reason="length")])
    assert (await read(generation)).text == "\ufffd"


async def test_native_stream_numbers_every_token_of_an_event(tokenizer: TextTokenizer) -> None:
    events = tell(tokenizer, "one two three", per_event=3)
    generation, _ = start(tokenizer, events, wants_tokens=True, wants_token_texts=True)
    sent = [data async for data in stream_events(generation, tokenizer, full_text=True, with_details=True)]
    assert [data.startswith(b'data: {"index":%d,' % (i + 1)) for i, data in enumerate(sent)] == [True] * len(sent)
    assert b'"generated_text":"pone two three"' in sent[-1]
    assert all(b'"generated_text":null' in data for data in sent[:-1])


async def test_a_native_stream_that_ends_without_a_token_still_has_a_last_event(tokenizer: TextTokenizer) -> None:
    said = [event for event in tell(tokenizer, "one", finish=None) if isinstance(event, TokenEvent)]
    generation, _ = start(
        tokenizer, [*said, TokenEvent("r", finish_reason="stop_token")], wants_tokens=True, wants_token_texts=True
    )
    sent = [data async for data in stream_events(generation, tokenizer, full_text=False, with_details=True)]
    assert len(sent) == len(said) + 1
    assert b'"token":{"id":0,"text":"","logprob":null,"special":true},"generated_text":"one"' in sent[-1]
    assert b'"finish_reason":"eos_token","generated_tokens":%d' % len(said) in sent[-1]


async def test_the_prompts_tokens_join_to_the_prompt(tokenizer: TextTokenizer) -> None:
    text = "<|im_start|>Zwölf 👍🏽"
    prompt = tokenizer.encode(text)
    logprobs = [math.nan, *(-0.5 for _ in prompt[1:])]
    event = TokenEvent("r", [70], finish_reason="length", prompt_logprobs=logprobs)
    spec = GenerationSpec(prompt_text=text, prompt_ids=prompt, max_new_tokens=1, sampling=SamplingParams())
    generation = Generation(spec, Script([event]), tokenizer, Times(perf_counter()), lambda generation: None)
    assert prompt_tokens(generation, tokenizer) == []
    await read(generation)
    found = prompt_tokens(generation, tokenizer)
    assert [token.id for token in found] == prompt
    assert "".join(token.text for token in found) == text
    assert [token.logprob for token in found] == [None, *logprobs[1:]]


async def test_one_failing_choice_ends_all(tokenizer: TextTokenizer) -> None:
    good, _ = start(tokenizer, tell(tokenizer, "fine"))
    bad, _ = start(tokenizer, [EngineFailed("the engine died 3 times while it held this request")])
    with pytest.raises(EngineFailed):
        await collect([good, bad])
    assert len(asyncio.all_tasks()) == 1, "no reader is left behind"


@pytest.mark.parametrize(
    ("error", "openai", "tgi"),
    [
        (EngineFailed("gone"), (503, "server_error", None), (424, "generation")),
        (EngineNotReady("wait"), (503, "server_error", None), (503, "not_ready")),
        (QueueFull("full"), (429, "rate_limit_error", None), (429, "overloaded")),
        (InvalidRequest("no", "token_ids"), (400, "invalid_request_error", "prompt"), (422, "validation")),
        (InvalidRequest("no", "max_new_tokens"), (400, "invalid_request_error", "max_tokens"), (422, "validation")),
        (InvalidRequest("no", "sampling.top_k"), (400, "invalid_request_error", "top_k"), (422, "validation")),
        (ValueError("secret"), (500, "server_error", None), (500, "internal")),
    ],
)
def test_every_core_error_has_a_name_in_both_dialects(error: Exception, openai: Any, tgi: Any) -> None:
    found = as_api_error(error)
    body = openai_body(found).error
    assert (found.kind.openai_status, body.type, body.param) == openai
    assert (found.kind.tgi_status, tgi_body(found).error_type) == tgi
    assert "secret" not in body.message


@pytest.mark.parametrize(
    ("error", "param"),
    [
        (InvalidRequest("too long", "token_ids"), "token_ids"),
        (InvalidRequest("too hot", "sampling.temperature"), "temperature"),
        (EngineFailed("device lost"), None),
        (EngineFailed("the server is shutting down"), None),
    ],
)
async def test_an_engine_that_reports_an_error_is_believed(
    tokenizer: TextTokenizer, error: RequestError, param: str | None
) -> None:
    generation, _ = start(tokenizer, [error])
    with pytest.raises(type(error)) as failure:
        await read(generation)
    assert as_api_error(failure.value).param == param


async def test_streamed_chunks_of_choices_are_valid_json(tokenizer: TextTokenizer) -> None:
    import json

    text = 'quotes " and \\ and \n and \u2028'
    generations = [start(tokenizer, tell(tokenizer, text))[0] for _ in range(2)]
    prepared = Prepared(specs=[generation.spec for generation in generations], num_choices=2, num_candidates=2)
    renderer = ChatRenderer(Head.now("x", 'na"me', "f"), generations, prepared, tokenizer)
    texts = ["", ""]
    async for data in renderer.stream(include_usage=False):
        for line in data.decode().split("\n\n"):
            if line.startswith("data: {"):
                choice = json.loads(line.removeprefix("data: "))["choices"][0]
                texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == [text, text]


def test_an_output_is_the_sum_of_its_pieces(tokenizer: TextTokenizer) -> None:
    output = Output(start(tokenizer, [])[0])
    for piece in (Piece("a", [], None), Piece("b", [], "length")):
        output.add(piece)
    assert (output.text, output.finish_reason) == ("ab", "length")
