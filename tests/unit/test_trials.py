"""Who is tried, in which order, and when a trial is over. The deaths themselves: tests/e2e/test_isolation.py."""

from __future__ import annotations

import pytest

from tokenplane_core.backend.errors import EngineFailed
from tokenplane_core.messages import Submit, TokenEvent
from tokenplane_core.request_stream import RequestStream
from tokenplane_core.trials import FIRST_TRIAL_TOKENS, SUSPECT_AFTER, Trials


def request(name: str, num_deaths: int = SUSPECT_AFTER) -> RequestStream:
    stream = RequestStream(Submit(name, [1], 100), wire_id=name, on_end=lambda _: None)
    stream.num_deaths = num_deaths
    return stream


def emit(stream: RequestStream, num_tokens: int) -> None:
    for _ in range(num_tokens):
        stream.push(TokenEvent(stream.wire_id, [5]))


def test_only_suspects_are_tried_one_after_another() -> None:
    first, bystander, second = request("first"), request("bystander", SUSPECT_AFTER - 1), request("second")
    trials = Trials()
    trials.open([first, bystander, second])
    assert trials.defendant is first and not trials.is_over()
    emit(first, FIRST_TRIAL_TOKENS)
    assert trials.is_over() and trials.acquit() is first
    assert trials.defendant is second
    second.cancel()
    assert trials.is_over() and trials.acquit() is None
    assert trials.defendant is None and not trials.is_over()


def test_without_suspects_there_is_no_trial() -> None:
    trials = Trials()
    trials.open([request("a", 0), request("b", SUSPECT_AFTER - 1)])
    assert trials.defendant is None and trials.adjourn() is None


def test_the_acquitted_need_one_more_death_and_then_a_longer_trial() -> None:
    stream, trials = request("a"), Trials()
    for factor in (1, 2, 4):
        stream.num_deaths = max(stream.num_deaths, SUSPECT_AFTER)
        trials.open([stream])
        emit(stream, FIRST_TRIAL_TOKENS * factor - 1)
        assert not trials.is_over()
        emit(stream, 1)
        assert trials.is_over() and trials.acquit() is stream
        assert stream.num_deaths == SUSPECT_AFTER - 1


def test_who_was_alone_at_a_death_is_the_culprit() -> None:
    stream, other, trials = request("a"), request("b"), Trials()
    trials.open([stream, other])
    assert trials.adjourn() is stream and trials.defendant is None
    stream.fail(EngineFailed("died"))
    trials.open([other])
    assert trials.defendant is other


@pytest.mark.parametrize("gone", [0, 1])
def test_suspects_that_have_left_are_passed_over(gone: int) -> None:
    suspects, trials = [request("a"), request("b")], Trials()
    suspects[gone].cancel()
    trials.open(suspects)
    assert trials.defendant is suspects[1 - gone]
