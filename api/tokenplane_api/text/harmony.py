"""Reads answers in OpenAI's harmony format, which gpt-oss writes: messages on channels.

    <|channel|>analysis<|message|>THOUGHTS<|end|><|start|>assistant<|channel|>final<|message|>ANSWER<|return|>
    <|channel|>commentary to=functions.NAME <|constrain|>json<|message|>ARGUMENTS<|call|>

Format: https://cookbook.openai.com/articles/openai-harmony. What is on `analysis` are thoughts, as is what is meant for
tools that nobody has here; `commentary` that is meant for no tool is shown to the user before a call, like `final`.
Models stray from the format; what they write is shown all the same, but for the marks.
"""

from __future__ import annotations

import re
import secrets

from .answer_parser import AnswerParser
from .stop_strings import overlap
from .tool_calls import CallDelta, Delta, TextDelta, ToolCallParser

MESSAGE, CHANNEL, ASSISTANT = "<|message|>", "<|channel|>", "<|start|>assistant"
FINAL = f"{CHANNEL}final{MESSAGE}"
MARKS = (MESSAGE, CHANNEL, "<|start|>", "<|end|>", "<|call|>", "<|return|>", "<|constrain|>")

_ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>")
_CHANNEL_NAME = re.compile(r"<\|channel\|>\s*(\w+)")
_FUNCTION = re.compile(r"to=functions\.([\w.\-]+)")
_RECIPIENT = re.compile(r"to=\S")
_HEADER_END = re.compile(r"<\|(?:message|end|call|return)\|>")
_HEADER = re.compile(
    r"(?:\s*(?:assistant(?=\s*<\||\s+to=)|<\|start\|>(?:assistant)?|to=[\w.\-]*|<\|constrain\|>\s*(?:json|code)?"
    r"|<\|channel\|>\s*(?:analysis|commentary|final)?))*\s*"
)
_MOST_HEADER_CHARS = 200
_BEGINNINGS = (CHANNEL, "<|start|>", MESSAGE, "to=")


class HarmonyParser(AnswerParser):
    """Of one answer. `is_told` thoughts are apart, else they stay in the text."""

    def __init__(
        self,
        prompt_text: str,
        tools: ToolCallParser | None,
        max_calls: int | None,
        is_told: bool,
        has_functions: bool = True,
    ) -> None:
        """prompt_text: may end within the answer's first message. tools: reads calls in the text as well.

        max_calls: calls beyond that are left out. has_functions: without them the arguments of a call are text.
        """
        super().__init__(None, tools)
        self._max_calls, self._is_told, self._has_functions = max_calls, is_told, has_functions
        self._num_calls = 0
        self._buffer = ""
        self._kind = "header"  # or "thoughts", "text", "call"
        _, begun, message = prompt_text.rpartition(ASSISTANT)
        if begun:
            self._read(message)
        self._num_calls = 0
        if self._kind == "call":
            self._kind = "text"  # the client has the beginning, which none of our deltas would tell again

    def push(self, text: str) -> list[Delta]:
        return self._read(text)

    def flush(self) -> list[Delta]:
        """What was held back, once the answer is over. Of a header without a message: what is behind its marks."""
        deltas: list[Delta] = []
        while self._kind == "header" and self._buffer:
            self._leave_header(self._buffer)
            deltas += self._read("")
        text, self._buffer = self._buffer, ""
        return deltas + self._tell(text) + (self._tools.flush() if self._tools else [])

    def _read(self, text: str) -> list[Delta]:
        self._buffer += text
        deltas: list[Delta] = []
        while self._buffer:
            found = self._read_header() if self._kind == "header" else self._read_message()
            if found is None:
                break
            deltas += found
        return deltas

    def _read_header(self) -> list[Delta] | None:
        """None: it takes more text to go on."""
        found = _HEADER_END.search(self._buffer)
        if not self._is_header(self._buffer[: found.end()] if found else self._buffer):
            self._kind = "text"  # the model did not keep to the format
            return []
        held = 0 if found else max(overlap(self._buffer, mark) for mark in (MESSAGE, *_ENDS))
        header = self._buffer[: found.start() if found else len(self._buffer) - held]
        if len(header) <= _MOST_HEADER_CHARS:
            if found is None:
                return None
            if found[0] == MESSAGE:
                self._buffer = self._buffer[found.end() :]
                return self._begin(header)
        self._leave_header(header)
        return []

    def _leave_header(self, header: str) -> None:
        """No `<|message|>` follows: the message is what lies behind the marks; without any, all but mere whitespace."""
        header = header[:_MOST_HEADER_CHARS]
        found = _HEADER.match(header)
        assert found is not None, "it may match nothing"
        has_marks = any(mark in header for mark in MARKS)
        channel = _CHANNEL_NAME.search(found[0])
        self._kind = "thoughts" if channel and channel[1] == "analysis" else "text"
        self._buffer = self._buffer[found.end() if has_marks or not header.strip() else 0 :]

    def _is_header(self, text: str) -> bool:
        start = text.removeprefix("assistant").lstrip()
        return any(mark.startswith(start) or start.startswith(mark) for mark in (*_BEGINNINGS, "assistant"))

    def _begin(self, header: str) -> list[Delta]:
        channel = _CHANNEL_NAME.search(header)
        function = _FUNCTION.search(header)
        if function is not None and self._has_functions:
            self._kind = "call"
            self._num_calls += 1
            call = CallDelta(self._num_calls - 1, "", f"call_{secrets.token_hex(12)}", function[1])
            return [call] if self._is_wanted else []
        is_thought = _RECIPIENT.search(header) or (channel is not None and channel[1] == "analysis")
        self._kind = "thoughts" if is_thought and function is None else "text"
        return []

    def _read_message(self) -> list[Delta] | None:
        found = [(at, mark) for mark in _ENDS if (at := self._buffer.find(mark)) >= 0]
        if not found:
            held = max(overlap(self._buffer, mark) for mark in _ENDS)
            text = self._buffer[: len(self._buffer) - held]
            self._buffer = self._buffer[len(text) :]
            return self._tell(text) if text else None
        at, mark = min(found)
        begins = at if mark == "<|start|>" else at + len(mark)  # which is the header's
        text, self._buffer = self._buffer[:at], self._buffer[begins:]
        deltas = self._tell(text)
        self._kind = "header"
        return deltas

    def _tell(self, text: str) -> list[Delta]:
        if not text:
            return []
        if self._kind == "call":
            return [CallDelta(self._num_calls - 1, text)] if self._is_wanted else []
        if self._kind == "thoughts":
            return [TextDelta(text, is_reasoning=self._is_told)]
        return self._answer(text)

    @property
    def _is_wanted(self) -> bool:
        return self._max_calls is None or self._num_calls <= self._max_calls
