"""Finds stop strings in streamed text. Knows nothing about tokens."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes text on until a stop string is complete.

    Which stop string hits does not depend on how the text is split into pushes: it is the first to be complete, and
    of several that are complete at the same character the longest, so that no part of a stop string is left over.
    Text that may be the start of a stop string is held back until it cannot be.
    """

    def __init__(self, stops: Sequence[str], keep_stop: bool = False) -> None:
        """keep_stop: the text ends with the stop string instead of before it.

        Raises:
            ValueError: a stop string is empty.
        """
        if not all(stops):
            raise ValueError("a stop string is empty; it would end every text before its first character")
        self._stops = tuple(stops)
        self._keep_stop = keep_stop
        self._max_held = max(map(len, stops), default=1) - 1
        self._held = ""
        self.hit: str | None = None
        """The stop string that was found. From then on `push` and `flush` return "": the text is over."""

    def push(self, text: str) -> str:
        """Text that may be sent now; with the hit, the last of it."""
        if self.hit is not None:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        end, start, stop = min(self._matches(text), default=(0, 0, None))
        if stop is not None:
            self.hit, self._held = stop, ""
            return text[: end if self._keep_stop else start]
        cut = self._hold_from(text)
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """The text still held back, once no more will come."""
        text, self._held = self._held, ""
        return text

    def _matches(self, text: str) -> list[tuple[int, int, str]]:
        """(end, start, stop string) of the first occurrence of each; ordered by who hits first."""
        found = ((text.find(stop), stop) for stop in self._stops)
        return [(start + len(stop), start, stop) for start, stop in found if start >= 0]

    def _hold_from(self, text: str) -> int:
        """Where the longest end of `text` begins that a stop string may continue; its length if none does."""
        for start in range(max(0, len(text) - self._max_held), len(text)):
            end = text[start:]
            if any(stop.startswith(end) for stop in self._stops):
                return start
        return len(text)


def overlap(text: str, mark: str) -> int:
    """How many characters at the end of `text` are the beginning of `mark`, short of all of it."""
    for size in range(min(len(text), len(mark) - 1), 0, -1):
        if text.endswith(mark[:size]):
            return size
    return 0
