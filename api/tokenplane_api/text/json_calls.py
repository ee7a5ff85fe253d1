"""Reads a function call that a model writes as JSON, while it is being written.

Looks at the structure only: whether the values are valid JSON is for the client to find out, as with any model.
Every character is looked at once, however the text is split.
"""

from __future__ import annotations

import re

import msgspec

WHITESPACE = " \t\r\n"

_STRING_MARK = re.compile(r'["\\]')
_STRUCTURE_MARK = re.compile(r'["{}\[\]]')
_SCALAR_END = re.compile(r"[\s,\]}]")

_NAME_KEYS = ("name", "function")
_ARGUMENT_KEYS = ("arguments", "parameters")
_KNOWN_KEYS = frozenset({*_NAME_KEYS, *_ARGUMENT_KEYS, "type", "id"})
"""What models write into a call; an object with another key in front is not one, so it need not be held back longer."""


class JsonValue:
    """Finds the end of one JSON value in text that comes in pieces."""

    def __init__(self) -> None:
        self.first = ""
        """Its first character; "" before there is one."""
        self.is_done = False
        self._depth = 0
        self._in_string = False
        self._is_escaped = False

    def push(self, text: str, at: int) -> int:
        """The position up to which `text` belongs to the value, which begins or goes on at `at`."""
        if not self.first:
            self.first = text[at]
            self._in_string = self.first == '"'
            self._depth = int(self.first in "{[")
            at += self._in_string or self._depth
        if not self._in_string and not self._depth:
            return self._scalar_end(text, at)
        while at < len(text):
            if self._is_escaped:
                self._is_escaped = False
                at += 1
                continue
            mark = (_STRING_MARK if self._in_string else _STRUCTURE_MARK).search(text, at)
            if mark is None:
                return len(text)
            at = mark.end()
            self._step(mark[0])
            if not self._depth and not self._in_string:
                self.is_done = True
                break
        return at

    def _scalar_end(self, text: str, at: int) -> int:
        end = _SCALAR_END.search(text, at)
        self.is_done = end is not None
        return end.start() if end else len(text)

    def _step(self, mark: str) -> None:
        if mark == "\\":
            self._is_escaped = True
        elif mark == '"':
            self._in_string = not self._in_string
        else:
            self._depth += 1 if mark in "{[" else -1


class CallReader:
    """One call: an object such as {"name": "f", "arguments": {...}}, or the arguments of a call whose name is known.

    Arguments are passed on as the model writes them, once the name is known; a string of JSON is unpacked.
    """

    def __init__(self, name: str | None = None, needs_arguments: bool = False) -> None:
        """name: what follows are the arguments alone. needs_arguments: without them an object is no call."""
        self.name = name
        self.is_done = False
        self.is_broken = False
        """It is no call, or one that goes on as no JSON can. Nothing more is read."""
        self._has_arguments = False  # they have begun
        self._arguments: list[str] = []
        self._needs_arguments = needs_arguments
        self._only_arguments = name is not None
        self._expects = "value" if self._only_arguments else "{"
        self._key = _ARGUMENT_KEYS[0]
        self._value: JsonValue | None = None
        self._held: list[str] = []

    def push(self, text: str, at: int = 0) -> int:
        """Read on; returns the position behind what was read."""
        while at < len(text) and not (self.is_done or self.is_broken):
            if self._value is not None:
                at = self._read_value(self._value, text, at)
            elif text[at] in WHITESPACE:
                at += 1
            elif self._expects == "value" or (self._expects == "key" and text[at] == '"'):
                self._value = JsonValue()
            else:
                at = self._read_mark(text[at], at)
        return at

    @property
    def is_call(self) -> bool:
        """From the name and the first character of the arguments on; then it stays one, even if it breaks."""
        return self.name is not None and self._has_arguments

    def take_arguments(self) -> str:
        """What the arguments have grown by."""
        text = "".join(self._arguments)
        self._arguments.clear()
        return text

    def _read_mark(self, mark: str, at: int) -> int:
        follows = {"{": {"{": "key"}, ":": {":": "value"}, ",": {",": "key", "}": "end"}, "key": {"}": "end"}}
        expects = follows[self._expects].get(mark)
        if expects == "end":
            self._end()
        elif expects is None:
            self.is_broken = True
            return at
        else:
            self._expects = expects
        return at + 1

    def _read_value(self, value: JsonValue, text: str, at: int) -> int:
        end = value.push(text, at)
        is_streamed = self._expects == "value" and self._key in _ARGUMENT_KEYS and value.first in "{["
        if is_streamed:
            self._has_arguments = True
            self._arguments.append(text[at:end])
        else:
            self._held.append(text[at:end])
        if value.is_done:
            self._value = None
            self._end_value(value, "".join(self._held))
            self._held.clear()
        return end

    def _end_value(self, value: JsonValue, held: str) -> None:
        if self._expects == "key":
            self._key = "" if self.is_call else _string(held) or ""  # a call has all it needs; the rest is skipped
            self.is_broken = not self.is_call and self._key not in _KNOWN_KEYS
            self._expects = ":"
            return
        self._expects = ","
        if self._key in _NAME_KEYS:
            self.is_broken = self.name is not None or not _string(held)
            self.name = self.name or _string(held)
        elif self._key in _ARGUMENT_KEYS:
            self._has_arguments = True
            if value.first not in "{[":
                self._arguments.append("{}" if held == "null" else _string(held) or held)
        if self._only_arguments:
            self.is_done = True

    def _end(self) -> None:
        self.is_done = self.is_call or (self.name is not None and not self._needs_arguments)
        self.is_broken = not self.is_done
        if self.is_done and not self._has_arguments:
            self._has_arguments = True
            self._arguments.append("{}")


def _string(json: str) -> str | None:
    """The string that the JSON writes; None if it writes something else."""
    try:
        return msgspec.json.decode(json, type=str)
    except ValueError:
        return None
