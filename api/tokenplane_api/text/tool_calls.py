"""Finds function calls in an answer, while it is being written, in the notations that model families were taught.

Knows text only: which notation a model writes is decided in answer_format.py. However the text is split into pieces,
the deltas add up to the same contents and the same calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .json_calls import WHITESPACE, CallReader
from .stop_strings import overlap
from .tool_formats import ToolFormat
from .xml_calls import FUNCTION, XmlCallReader

_SEPARATORS = frozenset(WHITESPACE + "[],;")
"""What may stand around calls: lists of them, and the semicolons of Llama."""

_AFTER_CALL = WHITESPACE + "],;"

_MOST_HEADER_CHARS = 200


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More of the answer, or of the thinking before it."""

    text: str
    is_reasoning: bool = False


@dataclass(frozen=True, slots=True)
class CallDelta:
    """More of a call. The first delta of each call, and only that, has the id and the name."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


Delta = TextDelta | CallDelta


class ToolCallParser:
    """Turns the text of one answer into deltas."""

    def __init__(
        self,
        format: ToolFormat,
        parameters: Mapping[str, Mapping[str, Any]],
        max_calls: int | None = None,
        *,
        is_forced: bool = False,
        needs_arguments: bool = False,
    ) -> None:
        """parameters: JSON Schemas by the tools' names; where calls need no mark, only what has such a name is a call.

        max_calls: calls beyond that are left out. is_forced: the answer may begin with calls without marks.
        needs_arguments: a JSON object without arguments is no call.
        """
        self._format = format
        self._parameters = parameters
        self._max_calls = max_calls
        self._needs_arguments = needs_arguments
        self._num_calls = 0
        self._reader: CallReader | XmlCallReader | None = None
        self._buffer = ""
        self._between = ""  # marks and separators that become text again if no call follows
        self._call_text = ""  # what the reader took of a call that may still turn out to be none
        self._may_be_header = False
        self._checks_name = format.is_bare or is_forced
        self._closer = ""
        self._in_calls = format.is_bare or is_forced  # between calls, as opposed to in text
        self._follows_call = False
        self._is_started = False  # the call that is being read has been told of
        self._deltas: list[Delta] = []

    def push(self, text: str) -> list[Delta]:
        self._buffer += text
        while self._buffer and self._advance():
            pass
        return self._take()

    def flush(self) -> list[Delta]:
        """What was held back, once the answer is over."""
        if self._in_calls and self._follows_call:
            self._buffer = ""  # the beginning of a mark
        if self._in_calls and not self._is_started:
            self._give_up()
        if not self._in_calls:
            self._say(self._buffer)
        self._buffer = ""
        return self._take()

    def _take(self) -> list[Delta]:
        deltas, self._deltas = self._deltas, []
        return deltas

    def _advance(self) -> bool:
        """Use up some of the buffer; false if it takes more text to go on."""
        if self._reader is not None:
            return self._read_call(self._reader)
        return self._read_between() if self._in_calls else self._read_text()

    # --- In text --------------------------------------------------------------------------------------------

    def _read_text(self) -> bool:
        if self._follows_call:
            self._buffer = self._buffer.lstrip()
        found = [(at, mark) for mark in self._format.marks if (at := self._buffer.find(mark[0])) >= 0]
        if not found:
            keep = self._num_safe_chars()
            self._say(self._buffer[:keep])
            self._buffer = self._buffer[keep:]
            return False
        at, (opener, closer) = min(found)
        text = self._buffer[:at].rstrip()
        self._say(text)
        end = at + len(opener)
        self._between = self._buffer[len(text) : end]
        self._buffer = self._buffer[end:]
        self._in_calls, self._follows_call = True, False
        self._enter(closer)
        return True

    def _enter(self, closer: str) -> None:
        self._closer, self._may_be_header = closer, self._format.header is not None

    def _num_safe_chars(self) -> int:
        """Up to where no mark can begin; neither can the whitespace in front of one."""
        text = self._buffer
        longest = max(overlap(text, opener) for opener, _ in self._format.marks)
        return len(text[: len(text) - longest].rstrip())

    def _say(self, text: str) -> None:
        if text:
            self._deltas.append(TextDelta(text))
            self._follows_call = False

    # --- Between calls --------------------------------------------------------------------------------------

    def _read_between(self) -> bool:
        """Behind a mark or a call: what may come is a call, a separator, the closing mark or another opening one."""
        openers = (opener for opener, _ in self._format.marks)
        marks = [mark for mark in (self._closer, *openers, *self._format.inner_marks) if mark]
        for mark in marks:
            if self._buffer.startswith(mark):
                self._pass_mark(mark)
                return True
        is_xml = self._format.is_xml and self._buffer.startswith(FUNCTION)
        beginnings = (*marks, FUNCTION) if self._format.is_xml else marks
        if not is_xml and any(mark.startswith(self._buffer) for mark in beginnings):
            return False
        first = self._buffer[0]
        if is_xml:
            self._reader = XmlCallReader(self._parameters)
        elif first == "{":
            self._reader = CallReader(needs_arguments=self._needs_arguments)
        elif self._may_be_header and first not in _SEPARATORS:
            return self._read_header()
        elif first in _SEPARATORS:
            self._between += first
            self._buffer = self._buffer[1:]
            self._may_be_header = self._may_be_header and first in WHITESPACE
        else:
            self._give_up()
        return True

    def _pass_mark(self, mark: str) -> None:
        self._buffer = self._buffer[len(mark) :]
        opens = dict(self._format.marks).get(mark)
        if mark == self._closer and self._follows_call:
            self._leave()
        elif opens is not None:
            self._between += mark
            self._enter(opens)
        elif not self._follows_call:
            self._between += mark
            self._give_up()

    def _read_header(self) -> bool:
        """Behind a mark: what `format.header` says, and the arguments."""
        at = self._buffer.find("{")
        if at < 0 and len(self._buffer) < _MOST_HEADER_CHARS:
            return False
        assert self._format.header is not None
        header = self._format.header.fullmatch(self._buffer[: max(at, 0)])
        if header is None:
            self._give_up()
            return True
        self._between += self._buffer[:at]
        self._buffer = self._buffer[at:]
        self._reader = CallReader(header[1])
        return True

    def _give_up(self) -> None:
        """What was held back is no call but text. Behind a call, separators are not even that."""
        held = self._between.lstrip(_AFTER_CALL) if self._follows_call else self._between
        self._buffer = self._call_text + self._buffer
        follows_call = self._follows_call
        self._leave()
        self._follows_call = follows_call
        self._say(held)

    def _leave(self) -> None:
        """On with text."""
        self._in_calls, self._reader, self._is_started = False, None, False
        self._between = self._call_text = self._closer = ""
        self._may_be_header = False

    # --- In a call ------------------------------------------------------------------------------------------

    def _read_call(self, reader: CallReader | XmlCallReader) -> bool:
        end = reader.push(self._buffer)
        self._call_text += self._buffer[:end]
        self._buffer = self._buffer[end:]
        if not self._is_started and reader.is_call:
            if self._checks_name and reader.name not in self._parameters:
                self._give_up()
                return True
            self._start(reader.name or "")
        if self._is_started:
            self._call_text = ""
            self._tell(reader.take_arguments())
        if reader.is_broken:
            self._leave() if self._is_started else self._give_up()
        elif reader.is_done:
            self._reader, self._is_started = None, False
        return reader.is_broken or reader.is_done

    def _start(self, name: str) -> None:
        self._is_started = self._follows_call = True
        self._between, self._may_be_header = "", False
        if self._is_wanted(self._num_calls):
            self._deltas.append(CallDelta(self._num_calls, "", self._format.new_id(), name))
        self._num_calls += 1

    def _tell(self, arguments: str) -> None:
        if arguments and self._is_wanted(self._num_calls - 1):
            self._deltas.append(CallDelta(self._num_calls - 1, arguments))

    def _is_wanted(self, index: int) -> bool:
        return self._max_calls is None or index < self._max_calls
