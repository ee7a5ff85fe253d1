from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tokenplane_api.text.stop_strings import StopStrings


def first_stop(text: str, stops: list[str]) -> tuple[int, int, str] | None:
    """The oracle: grow the text character by character until it ends in a stop string; take the longest such."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return end - len(stop), end, stop
    return None


def run(pieces: list[str], stops: list[str], keep_stop: bool = False) -> tuple[str, str | None]:
    strings = StopStrings(stops, keep_stop)
    text = "".join(strings.push(piece) for piece in pieces)
    return text + strings.flush(), strings.hit


@settings(deadline=None)
@given(
    pieces=st.lists(st.text("ab\n", max_size=4), max_size=20),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4),
    keep_stop=st.booleans(),
)
@example(pieces=["ab", "cd"], stops=["abcd", "bc"], keep_stop=False)
def test_any_split_gives_what_the_whole_text_gives(pieces: list[str], stops: list[str], keep_stop: bool) -> None:
    text = "".join(pieces)
    found = first_stop(text, stops)
    if found is None:
        assert run(pieces, stops, keep_stop) == (text, None)
    else:
        start, end, stop = found
        assert run(pieces, stops, keep_stop) == (text[: end if keep_stop else start], stop)


@settings(deadline=None)
@given(
    text=st.text("abc", max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=3),
)
def test_holds_back_no_more_than_a_stop_string_may_continue(text: str, stops: list[str]) -> None:
    strings, sent = StopStrings(stops), ""
    for end, character in enumerate(text, start=1):
        sent += strings.push(character)
        if strings.hit is not None:
            break
        held = text[len(sent) : end]
        assert held == "" or any(stop.startswith(held) for stop in stops)


def test_text_that_may_be_a_stop_string_waits() -> None:
    strings = StopStrings(["\nUser:"])
    assert strings.push("Hi\nUs") == "Hi"
    assert strings.push("e") == ""
    assert strings.push("s") == "\nUses"
    assert strings.push("\nUser") == ""
    assert strings.hit is None
    assert strings.push(": more") == ""
    assert strings.hit == "\nUser:"


def test_nothing_comes_after_a_hit() -> None:
    strings = StopStrings(["."])
    assert strings.push("One. Two.") == "One"
    assert strings.push("Three") == ""
    assert strings.flush() == ""
    assert strings.hit == "."


def test_kept_stop_string_ends_the_text() -> None:
    assert run(["One", ".", " Two."], ["."], keep_stop=True) == ("One.", ".")


def test_of_stops_that_end_together_the_longest_hits() -> None:
    assert run(["xa", "bc"], ["c", "abc", "bc"]) == ("x", "abc")


def test_flush_gives_what_was_held() -> None:
    strings = StopStrings(["END"])
    assert strings.push("the EN") == "the "
    assert strings.flush() == "EN"
    assert strings.flush() == ""


def test_without_stop_strings_everything_passes() -> None:
    assert run(["a", "", "b"], []) == ("ab", None)


def test_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="stop string is empty"):
        StopStrings(["a", ""])
