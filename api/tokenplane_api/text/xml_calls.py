"""Reads a function call that a model writes as tags around bare values, as Qwen3-Coder does, while it is being written.

    <function=NAME>
    <parameter=KEY>
    VALUE
    </parameter>
    </function>

What a value means follows from the schema of the tool's parameters: a string stands there as it is, everything else as
JSON. Strings are passed on as they grow, other values when they are complete. Models forget `</parameter>`, so the next
parameter and the end of the function end a value too; that a string has such a tag inside is the rarer case.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from .stop_strings import overlap

FUNCTION = "<function="

_NAME = re.compile(r"<function=([^<>\n]{1,200})>")
_MOST_NAME_CHARS = 200 + len(FUNCTION)
_NEXT = re.compile(r"<parameter=([^<>\n]{1,200})>|</function>|(?=</tool_call>)")
_PARAMETER = "<parameter="
_ENDS_OF_CALL = ("</function>", "</tool_call>")
_END = re.compile(r"\n?(?:</parameter>|(?=<parameter=[^<>\n]{1,200}>|</function>))")
_MAY_BE_NEXT = re.compile(r"\n?<parameter=[^<>\n]{0,200}\Z")
_ENDS_OF_VALUE = tuple(f"{space}{mark}" for space in ("", "\n") for mark in ("</parameter>", _PARAMETER, "</function>"))

_MOST_DEPTH = 20
"""Of alternatives within alternatives in a schema; what lies deeper is open."""

_PYTHON = {"True": "true", "False": "false", "None": "null"}
_KINDS: dict[type, set[str]] = {
    bool: {"boolean"}, int: {"integer", "number"}, float: {"number"}, str: {"string"}, list: {"array"},
    dict: {"object"}, type(None): {"null"},
}  # fmt: skip


class XmlCallReader:
    """One call, from `<function=` to `</function>`, told as JSON arguments. What stands between values is skipped."""

    def __init__(self, parameters: Mapping[str, Mapping[str, Any]]) -> None:
        """parameters: JSON Schemas by the tools' names."""
        self._parameters = parameters
        self.name: str | None = None
        self.is_done = False
        self.is_broken = False
        """It has no name. Nothing more is read."""
        self._arguments: list[str] = []
        self._num_values = 0
        self._kinds: set[str] | None = None  # of the value that is being read; None between values
        self._begins = False  # the value has, but for the line break in front of it
        self._held: list[str] = []

    @property
    def is_call(self) -> bool:
        return self.name is not None

    def take_arguments(self) -> str:
        """What the arguments have grown by."""
        text = "".join(self._arguments)
        self._arguments.clear()
        return text

    def push(self, text: str, at: int = 0) -> int:
        """Read on; returns the position behind what was read. The rest is wanted again, with what follows it."""
        while at < len(text) and not (self.is_done or self.is_broken):
            before = at, self._kinds
            if self.name is None:
                at = self._read_name(text, at)
            elif self._kinds is None:
                at = self._read_between(text, at)
            else:
                at = self._read_value(text, at, self._kinds)
            if (at, self._kinds) == before:  # an empty value may end without a character
                break
        return at

    def _read_name(self, text: str, at: int) -> int:
        found = _NAME.match(text, at)
        if found is None:
            self.is_broken = len(text) - at > _MOST_NAME_CHARS or bool(re.search(r"[>\n]", text[at:]))
            return at
        self.name = found[1].strip()
        self._arguments.append("{")
        return found.end()

    def _read_between(self, text: str, at: int) -> int:
        found = _NEXT.search(text, at)
        if found is None:
            rest = text[at:]
            begins = rest.rfind(_PARAMETER)
            if begins >= 0:
                return at + begins
            return len(text) - max(overlap(rest, mark) for mark in (_PARAMETER, *_ENDS_OF_CALL))
        if found[1] is None:
            self._arguments.append("}")
            self.is_done = True
        else:
            self._begin(found[1].strip())
        return found.end()

    def _begin(self, key: str) -> None:
        properties = self._parameters.get(self.name or "", {}).get("properties") or {}
        self._kinds = _kinds(properties.get(key)) if isinstance(properties, Mapping) else set()
        self._begins = True
        comma = ", " if self._num_values else ""
        quote = '"' if self._kinds == {"string"} else ""
        self._arguments.append(f"{comma}{_string(key)}: {quote}")
        self._num_values += 1

    def _read_value(self, text: str, at: int, kinds: set[str]) -> int:
        if self._begins:
            self._begins = False
            if text[at] == "\n":
                return at + 1
        end = _END.search(text, at)
        stop = end.start() if end else _safe_end(text, at)
        value = text[at:stop]
        if kinds == {"string"}:
            self._arguments.append(_string(value)[1:-1])
        else:
            self._held.append(value)
        if end is None:
            return stop
        self._arguments.append('"' if kinds == {"string"} else _json("".join(self._held), kinds))
        self._held.clear()
        self._kinds = None
        return end.end()


def _safe_end(text: str, at: int) -> int:
    """Up to where no end of the value that goes on at `at` can begin."""
    found = _MAY_BE_NEXT.search(text, at)
    if found is not None:
        return found.start()
    return len(text) - max(overlap(text[at:], mark) for mark in _ENDS_OF_VALUE)


def _kinds(schema: Any, depth: int = 0) -> set[str]:
    """The types that a schema names; empty if it leaves them open, or makes no sense."""
    if not isinstance(schema, Mapping) or depth > _MOST_DEPTH:
        return set()
    if isinstance(schema.get("enum"), list):
        return {kind for value in schema["enum"] for kind in _KINDS.get(type(value), ())}
    parts = schema.get("anyOf") or schema.get("oneOf")
    if isinstance(parts, list):
        of_parts = [_kinds(part, depth + 1) for part in parts]
        return set().union(*of_parts) if all(of_parts) else set()
    types = schema.get("type")
    if isinstance(types, str):
        return {types}
    return {kind for kind in types if isinstance(kind, str)} if isinstance(types, list) else set()


def _json(text: str, kinds: set[str]) -> str:
    """The value as JSON: as it stands if that is one and may be meant, else a string."""
    stripped = text.strip()
    stripped = _PYTHON.get(stripped, stripped)
    try:
        value = msgspec.json.decode(stripped)
    except (ValueError, RecursionError):
        return _string(text)
    may_be_meant = not kinds or kinds & _KINDS[type(value)] - {"string"} or "string" not in kinds
    return stripped if may_be_meant else _string(text)


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
