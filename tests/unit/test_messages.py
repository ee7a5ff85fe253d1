"""Frames survive any splitting, and nothing but our own messages is accepted."""

from __future__ import annotations

import struct
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenplane_core.messages import (
    MAX_FRAME_BYTES,
    Cancel,
    Events,
    FrameReader,
    SamplingParams,
    Submit,
    TokenEvent,
    frame,
    from_engine_decoder,
    to_engine_decoder,
)

SUBMIT = Submit("a", [1, 2, 3], 5, sampling=SamplingParams(temperature=0.5, seed=2**64 - 1, logit_bias={7: -1.0}))


@given(cuts=st.lists(st.integers(0, 400), max_size=20))
def test_frames_survive_any_splitting(cuts: list[int]) -> None:
    stream = b"".join(frame(message) for message in (SUBMIT, Cancel("a"), SUBMIT))
    reader, bodies = FrameReader(), []
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    for start, end in pairwise(edges):
        bodies += reader.feed(stream[start:end])
    assert [to_engine_decoder.decode(body) for body in bodies] == [SUBMIT, Cancel("a"), SUBMIT]


def test_events_keep_what_they_carry() -> None:
    events = Events([TokenEvent("a", [5], [-0.5], [[(5, -0.5), (6, -1.0)]], "stop_token", queue_s=0.1)])
    (body,) = FrameReader().feed(frame(events))
    assert from_engine_decoder.decode(body) == events


def test_an_oversized_frame_is_refused_before_it_is_read() -> None:
    with pytest.raises(ValueError, match="the limit is"):
        list(FrameReader().feed(struct.pack("<I", MAX_FRAME_BYTES + 1)))


def test_a_message_of_another_kind_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        to_engine_decoder.decode(msgspec.msgpack.encode({"type": "shutdown"}))
    with pytest.raises(msgspec.ValidationError):
        to_engine_decoder.decode(msgspec.msgpack.encode({"type": "submit", "request_id": "a", "token_ids": "x"}))
