"""Hugging Face's InferenceClient on the native routes of a server process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import ValidationError

from helpers.model_folder import make_text_model
from helpers.server_process import ServerProcess, server_process

PROMPT = "What is the capital of France?"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = make_text_model(tmp_path_factory.mktemp("model") / "tiny-chat")
    with server_process(folder, tmp_path_factory.mktemp("log"), "--backend", "simulated-cuda") as running:
        yield running


@pytest.fixture
def hub(server: ServerProcess) -> InferenceClient:
    return InferenceClient(server.url)


def test_text_generation(hub: InferenceClient) -> None:
    text = hub.text_generation(PROMPT, max_new_tokens=8, return_full_text=False)
    answer = hub.text_generation(
        PROMPT, max_new_tokens=8, details=True, decoder_input_details=True, return_full_text=False
    )
    assert answer.generated_text == text
    assert "".join(token.text for token in answer.details.prefill) == PROMPT
    assert len(answer.details.tokens) == 8
    assert hub.text_generation(PROMPT, max_new_tokens=8) == PROMPT + text, "as TGI's route / does unless told"


def test_text_generation_as_a_stream(hub: InferenceClient) -> None:
    text = hub.text_generation(PROMPT, max_new_tokens=8, return_full_text=False)
    assert "".join(hub.text_generation(PROMPT, max_new_tokens=8, stream=True)) == text
    *_, last = hub.text_generation(PROMPT, max_new_tokens=8, stream=True, details=True, top_n_tokens=2)
    assert last.generated_text == PROMPT + text
    assert last.details.generated_tokens == 8
    assert len(last.top_tokens) == 2


def test_text_generation_with_a_grammar(hub: InferenceClient) -> None:
    grammar = {"type": "json", "value": {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]}}
    assert "1" in hub.text_generation(PROMPT, max_new_tokens=60, grammar=grammar)  # type: ignore[arg-type]


async def test_the_asynchronous_hub_client(server: ServerProcess) -> None:
    async with AsyncInferenceClient(server.url) as hub:
        text = await hub.text_generation(PROMPT, max_new_tokens=4, return_full_text=False)
        pieces = [piece async for piece in await hub.text_generation(PROMPT, max_new_tokens=4, stream=True)]
    assert "".join(pieces) == text


def test_an_error_is_raised(hub: InferenceClient) -> None:
    with pytest.raises(ValidationError, match="top_p"):
        hub.text_generation(PROMPT, top_p=1.0)
    with pytest.raises(ValidationError, match="adapter_id"):
        hub.text_generation(PROMPT, adapter_id="none")
