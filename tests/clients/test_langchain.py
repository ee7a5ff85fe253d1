"""LangChain against a server process: ChatOpenAI on the OpenAI routes, HuggingFaceEndpoint on TGI's."""

from __future__ import annotations

import functools
import operator
from typing import Any, Literal, cast

import pydantic
import pytest

from helpers.cities import QUESTION, TOO_HOT
from helpers.server_process import ServerProcess

langchain_openai = pytest.importorskip(
    "langchain_openai", reason="LangChain has an environment of its own: make test-clients"
)
langchain_huggingface = pytest.importorskip("langchain_huggingface", reason="make test-clients")


class City(pydantic.BaseModel):
    """A city of some size."""

    name: str = pydantic.Field(max_length=8)
    kind: Literal["big", "small"]


@pytest.fixture(params=["ChatOpenAI", "ChatHuggingFace"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def chat_model(kind: str, server: ServerProcess, max_tokens: int, **options: Any) -> Any:
    if kind == "ChatOpenAI":
        return langchain_openai.ChatOpenAI(
            base_url=f"{server.url}/v1", api_key="none", model="tgi", max_retries=0, max_tokens=max_tokens, **options
        )
    endpoint = langchain_huggingface.HuggingFaceEndpoint(
        endpoint_url=server.url, huggingfacehub_api_token="none", max_new_tokens=max_tokens, **options
    )
    return langchain_huggingface.ChatHuggingFace(llm=endpoint)  # which takes no seed over from it


def added(chunks: Any) -> Any:
    return functools.reduce(operator.add, chunks)


def test_chat_and_stream(kind: str, server: ServerProcess) -> None:
    model = chat_model(kind, server, 8).bind(seed=3)
    whole = model.invoke(QUESTION)
    assert whole.usage_metadata["output_tokens"] == 8
    assert whole.response_metadata["finish_reason"] == "length"
    assert added(model.stream(QUESTION)).content == whole.content != ""


def test_logprobs(kind: str, server: ServerProcess) -> None:
    answer = chat_model(kind, server, 8).bind(seed=3, logprobs=True, top_logprobs=2).invoke(QUESTION)
    tokens = answer.response_metadata["logprobs"]["content"]
    assert len(tokens) == 8
    assert all(len(token["top_logprobs"]) in (2, 3) for token in tokens)


@pytest.mark.parametrize("choice", ["City", "required"])
def test_bound_tools_are_called(kind: str, server: ServerProcess, choice: str) -> None:
    model = chat_model(kind, server, 400).bind_tools([City], tool_choice=choice, seed=1)
    call, *_ = model.invoke(QUESTION).tool_calls
    assert call["name"] == "City"
    City.model_validate(call["args"])
    streamed, *_ = added(model.stream(QUESTION)).tool_calls
    assert streamed["args"] == call["args"]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(server: ServerProcess, method: str) -> None:
    model = chat_model("ChatOpenAI", server, 400, seed=1).with_structured_output(City, method=method)
    assert isinstance(model.invoke(QUESTION), City)


def test_a_tools_answer_goes_back_into_the_conversation(kind: str, server: ServerProcess) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage

    model = chat_model(kind, server, 400)
    asked = model.bind_tools([City], tool_choice="City").invoke(QUESTION)
    result = ToolMessage("Paris is big.", tool_call_id=asked.tool_calls[0]["id"])
    answer = model.bind_tools([City]).invoke([HumanMessage(QUESTION), asked, result])
    assert answer.usage_metadata["input_tokens"] > asked.usage_metadata["input_tokens"]


def test_responses(server: ServerProcess) -> None:
    answer = chat_model("ChatOpenAI", server, 20, use_responses_api=True, temperature=0).invoke(QUESTION)
    assert answer.usage_metadata["output_tokens"] == 20
    assert answer.content[0]["type"] == "text"


def test_an_error_shows_our_message(kind: str, server: ServerProcess) -> None:
    with pytest.raises(Exception, match=r"Bad request|Error code: 400") as failure:
        chat_model(kind, server, 8).invoke(QUESTION, temperature=9)
    assert TOO_HOT in str(failure.value)
    assert kind == "ChatHuggingFace" or cast(Any, failure.value).param == "temperature"


def test_the_endpoint_generates_and_streams(server: ServerProcess) -> None:
    model = langchain_huggingface.HuggingFaceEndpoint(
        endpoint_url=server.url, huggingfacehub_api_token="none", max_new_tokens=8, seed=3, temperature=1.0
    )
    whole = model.invoke(QUESTION)
    assert "".join(model.stream(QUESTION)) == whole != ""


def test_leaving_a_stream(kind: str, server: ServerProcess) -> None:
    options = {"extra_body": {"ignore_eos": True}} if kind == "ChatOpenAI" else {}
    with server.nothing_stays():
        stream = chat_model(kind, server, 1500, **options).stream(QUESTION)
        for _ in range(3):
            next(stream)
        stream.close()
