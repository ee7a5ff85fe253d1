"""How a request's reader learns that the engine refused it, failed, or got too far ahead; how long others wait."""

from __future__ import annotations

import pytest

from tokenplane_core import request_stream
from tokenplane_core.backend.errors import EngineFailed, InvalidRequest, ReaderTooSlow
from tokenplane_core.messages import Submit, TokenEvent
from tokenplane_core.request_stream import FinishRate, RequestStream

REFUSAL = TokenEvent("1", finish_reason="error", error="the request needs 900 tokens", error_field="max_new_tokens")


@pytest.fixture
def ended_early() -> list[RequestStream]:
    return []


@pytest.fixture
def stream(ended_early: list[RequestStream]) -> RequestStream:
    return RequestStream(Submit("r", [1, 2], 9), wire_id="1", on_end=ended_early.append)


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
    stream.num_deaths = 1
    stream.push(REFUSAL)
    with pytest.raises(EngineFailed):
        await anext(stream)


async def test_news_without_tokens_is_not_an_event(stream: RequestStream) -> None:
    assert not stream.has_started
    stream.push(TokenEvent("1", queue_s=0.5))
    assert stream.has_started
    stream.push(TokenEvent("1", [5], queue_s=0.5))
    assert (await anext(stream)).token_ids == [5]


async def test_a_reader_that_fell_behind_gets_what_is_new_at_once(stream: RequestStream) -> None:
    stream.push(TokenEvent("1", [5], [-0.5], [[(5, -0.5)]], queue_s=0.5, num_cached_tokens=2))
    stream.push(TokenEvent("1", [6], [-0.25], [[(6, -0.25)]]))
    stream.push(TokenEvent("1", [7], [-0.125], [[(7, -0.125)]], "length"))
    joined = TokenEvent(
        "1",
        [5, 6, 7],
        [-0.5, -0.25, -0.125],
        [[(5, -0.5)], [(6, -0.25)], [(7, -0.125)]],
        "length",
        queue_s=0.5,
        num_cached_tokens=2,
    )
    assert [event async for event in stream] == [joined]


async def test_an_end_without_tokens_is_not_joined_to_the_token_before_it(stream: RequestStream) -> None:
    stream.push(TokenEvent("1", [5]))
    stream.push(TokenEvent("1", finish_reason="stop_token"))
    assert [event.token_ids async for event in stream] == [[5], []]


async def test_no_more_events_are_joined_than_the_limit(stream: RequestStream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_stream, "MAX_JOINED_EVENTS", 2)
    for token_id in range(5):
        stream.push(TokenEvent("1", [token_id]))
    assert [(await anext(stream)).token_ids for _ in range(3)] == [[0, 1], [2, 3], [4]]


async def test_a_reader_far_behind_is_given_up(
    stream: RequestStream, ended_early: list[RequestStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_stream, "MAX_UNREAD_EVENTS", 3)
    for token_id in range(3):
        stream.push(TokenEvent("1", [token_id]))
    assert not ended_early
    stream.push(TokenEvent("1", [3]))
    assert ended_early == [stream]
    with pytest.raises(ReaderTooSlow, match="3 tokens"):
        await anext(stream)


def test_the_wait_grows_with_the_queue_and_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    rate, now_s = FinishRate(), 100.0
    monkeypatch.setattr(request_stream, "monotonic", lambda: now_s)
    assert rate.wait_s(3, most_s=60, unknown_s=5) == 5
    for _ in range(10):
        rate.note()
        now_s += 2
    assert [rate.wait_s(ahead, most_s=60, unknown_s=5) for ahead in (1, 4, 1000)] == [2, 8, 60]
    now_s -= 19.9
    assert rate.wait_s(1, most_s=60, unknown_s=5) == 1
