"""Separates what a reasoning model thinks from what it answers, while it writes. Knows text only."""

from __future__ import annotations

from .stop_strings import overlap

REASONING_MARKS = {"think": ("<think>", "</think>"), "mistral": ("[THINK]", "[/THINK]")}
"""What stands around the thoughts, by family."""


class ReasoningSplitter:
    """Passes thoughts and answer on apart; whitespace around the marks belongs to neither.

    Thoughts come first or not at all. How the text is split into pieces makes no difference.
    """

    def __init__(self, marks: tuple[str, str], is_open: bool) -> None:
        """is_open: the prompt ends with the opening mark, so the answer begins inside."""
        self._opener, self._closer = marks
        self._is_inside = is_open
        self._buffer = ""
        self._trims = is_open
        self.is_over = False
        """No thoughts can follow: from here on everything is the answer."""

    def push(self, text: str) -> tuple[str, str]:
        """(thoughts, answer) that can be passed on."""
        if self.is_over:
            return "", self._answer(text)
        self._buffer += text
        if not self._is_inside and not self._enter():
            answer = self._buffer if self.is_over else ""
            self._buffer = self._buffer[len(answer) :]
            return "", answer
        return self._read_thoughts()

    def flush(self) -> tuple[str, str]:
        """What was held back, once the text is over."""
        text, self._buffer = self._buffer, ""
        return (text.rstrip(), "") if self._is_inside else ("", text)

    def _enter(self) -> bool:
        """Whether thoughts begin; where that can be told, the buffer holds what is behind the mark."""
        start = self._buffer.lstrip()
        if start.startswith(self._opener):
            self._buffer = start[len(self._opener) :]
            self._is_inside = self._trims = True
        else:
            self.is_over = not self._opener.startswith(start)
        return self._is_inside

    def _read_thoughts(self) -> tuple[str, str]:
        if self._trims:
            self._buffer = self._buffer.lstrip()
            self._trims = not self._buffer
        at = self._buffer.find(self._closer)
        if at < 0:
            held = overlap(self._buffer, self._closer)
            keep = len(self._buffer[: len(self._buffer) - held].rstrip())
            thoughts, self._buffer = self._buffer[:keep], self._buffer[keep:]
            return thoughts, ""
        thoughts, answer = self._buffer[:at].rstrip(), self._buffer[at + len(self._closer) :]
        self._buffer, self._is_inside, self.is_over, self._trims = "", False, True, True
        return thoughts, self._answer(answer)

    def _answer(self, text: str) -> str:
        if self._trims:
            text = text.lstrip()
            self._trims = not text
        return text
