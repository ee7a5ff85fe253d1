"""How the client tells a request's reader that the engine refused it, or failed."""

from __future__ import annotations

import pytest

from tokenplane_core.backend.errors import EngineFailed, InvalidRequest
from tokenplane_core.backend.records import ModelSpec
from tokenplane_core.client import EngineClient, RequestStream
from tokenplane_core.config import EngineConfig
from tokenplane_core.messages import Submit, TokenEvent

MODEL = ModelSpec("m", "", None, "", {}, 1, 1, 1, 8, 89, 256, "float32")
REFUSAL = TokenEvent("1", finish_reason="error", error="the request needs 900 tokens", error_field="max_new_tokens")


@pytest.fixture
def stream() -> RequestStream:
    client = EngineClient(EngineConfig(model=MODEL, backend="none"))
    return RequestStream(client, Submit("r", [1, 2], 9), wire_id="1")


async def test_a_refusal_names_the_field(stream: RequestStream) -> None:
    stream.push(REFUSAL)
    with pytest.raises(InvalidRequest, match="needs 900 tokens") as caught:
        await anext(stream)
    assert caught.value.field == "max_new_tokens"


async def test_a_failure_without_a_field_is_the_engines(stream: RequestStream) -> None:
    stream.push(TokenEvent("1", [5]))
    stream.push(TokenEvent("1", finish_reason="error", error="device lost"))
    assert (await anext(stream)).token_ids == [5]
    with pytest.raises(EngineFailed, match="device lost"):
        await anext(stream)


async def test_what_a_second_engine_refuses_is_not_the_clients_fault(stream: RequestStream) -> None:
    stream.num_engines = 2
    stream.push(REFUSAL)
    with pytest.raises(EngineFailed):
        await anext(stream)
