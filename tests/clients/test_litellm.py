"""LiteLLM against a server process, as an OpenAI-compatible server and as TGI."""

from __future__ import annotations

import asyncio
import gc
import json
from typing import Any

import jsonschema
import pytest

from helpers.cities import MESSAGES, RESPONSE_FORMAT, SCHEMA, TOO_HOT, TOOL
from helpers.server_process import ServerProcess

litellm = pytest.importorskip("litellm", reason="LiteLLM has an environment of its own: make test-clients")

# It warns of its own types when they are first used.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(params=["openai", "huggingface"])
def provider(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(provider: str, server: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Where LiteLLM finds the server."""
    # It asks the hub how long the context of "tgi" is, and does without an answer.
    monkeypatch.setattr("litellm.utils._get_max_position_embeddings", lambda model_name: None)
    base = f"{server.url}/v1" if provider == "openai" else server.url
    return {"model": f"{provider}/tgi", "api_base": base, "api_key": "none", "messages": MESSAGES}


def test_chat_with_logprobs(model: dict[str, Any]) -> None:
    answer = litellm.completion(**model, max_tokens=8, temperature=0, logprobs=True, top_logprobs=2)
    choice = answer.choices[0]
    tokens = choice.logprobs.content
    assert len(tokens) == answer.usage.completion_tokens == 8
    assert b"".join(bytes(token.bytes) for token in tokens).decode(errors="replace") == choice.message.content
    assert [token.top_logprobs[0].logprob for token in tokens] == [token.logprob for token in tokens]
    assert choice.finish_reason == "length"


def test_a_stream_is_the_same_answer(model: dict[str, Any]) -> None:
    options = {"max_tokens": 8, "temperature": 0}
    whole = litellm.completion(**model, **options)
    chunks = list(litellm.completion(**model, **options, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == 8


async def test_many_at_once(model: dict[str, Any]) -> None:
    options = {"max_tokens": 8, "temperature": 1, "seed": 5}
    alone = await litellm.acompletion(**model, **options)
    together = await asyncio.gather(*(litellm.acompletion(**model, **options) for _ in range(8)))
    assert {answer.choices[0].message.content for answer in together} == {alone.choices[0].message.content}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "find_city"}}], ids=str)
def test_tools(model: dict[str, Any], choice: Any) -> None:
    options = {"tools": [TOOL], "tool_choice": choice, "parallel_tool_calls": False, "seed": 1, "max_tokens": 400}
    answer = litellm.completion(**model, **options).choices[0]
    (call,) = answer.message.tool_calls
    assert (answer.finish_reason, call.function.name) == ("tool_calls", "find_city")
    jsonschema.validate(json.loads(call.function.arguments), SCHEMA)
    chunks = list(litellm.completion(**model, **options, stream=True))
    rebuilt = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls[0].function
    assert (rebuilt.name, rebuilt.arguments) == (call.function.name, call.function.arguments)


def test_structured_output(model: dict[str, Any]) -> None:
    answer = litellm.completion(**model, response_format=RESPONSE_FORMAT, max_tokens=200, seed=1)
    jsonschema.validate(json.loads(answer.choices[0].message.content), SCHEMA)


def test_an_error_shows_our_message(model: dict[str, Any], provider: str) -> None:
    with pytest.raises(litellm.BadRequestError) as failure:
        litellm.completion(**model, temperature=9)
    assert TOO_HOT in str(failure.value)
    assert provider != "openai" or failure.value.body["param"] == "temperature"


def test_leaving_a_stream(model: dict[str, Any], provider: str, server: ServerProcess) -> None:
    with server.nothing_stays():
        stream = litellm.completion(**model, max_tokens=1500, stream=True, seed=1, ignore_eos=True)
        for _ in range(3):
            next(stream)
        if provider == "openai":
            stream.completion_stream.close()
        del stream  # LiteLLM's own wrapper of the other has no way to close it
        gc.collect()
