"""Reads answers in OpenAI's harmony format, which gpt-oss writes: messages on channels.

    <|channel|>analysis<|message|>THOUGHTS<|end|><|start|>assistant<|channel|>final<|message|>ANSWER<|return|>
    <|channel|>commentary to=functions.NAME <|constrain|>json<|message|>ARGUMENTS<|call|>

Format: https://cookbook.openai.com/articles/openai-harmony. What is on `analysis` are thoughts, as is what is meant for
tools that nobody has here; `commentary` that is meant for no tool is shown to the user before a call, like `final`.
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
_BEGINNINGS = (CHANNEL, "<|start|>", MESSAGE, "to=")


class HarmonyParser(AnswerParser):
    """Of one answer. `is_told` thoughts are apart, else they stay in the text."""

    def __init__(self, prompt_text: str, tools: ToolCallParser | None, max_calls: int | None, is_told: bool) -> None:
        """prompt_text: may end within the answer's first message. tools: reads calls in the text as well.

        max_calls: calls beyond that are left out.
        """
        super().__init__(None, tools)
        self._max_calls, self._is_told = max_calls, is_told
        self._num_calls = 0
        self._buffer = ""
        self._kind = "header"  # or "thoughts", "text", "call"
        _, begun, message = prompt_text.rpartition(ASSISTANT)
        if begun:
            self._read(message)
        self._num_calls = 0

    def push(self, text: str) -> list[Delta]:
        return self._read(text)

    def flush(self) -> list[Delta]:
        """What was held back, once the answer is over. A header without a message tells nothing."""
        text, self._buffer = self._buffer, ""
        deltas = [] if self._kind == "header" and self._is_header(text) else self._tell(text)
        return deltas + (self._tools.flush() if self._tools else [])

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
        header, ends, rest = self._buffer.partition(MESSAGE)
        if not self._is_header(header + ends):
            self._kind = "text"  # the model did not keep to the format
            return []
        if not ends:
            return None
        self._buffer = rest
        return self._begin(header)

    def _is_header(self, text: str) -> bool:
        start = text.removeprefix("assistant").lstrip()
        return any(mark.startswith(start) or start.startswith(mark) for mark in (*_BEGINNINGS, "assistant"))

    def _begin(self, header: str) -> list[Delta]:
        channel = _CHANNEL_NAME.search(header)
        function = _FUNCTION.search(header)
        if function is not None:
            self._kind = "call"
            self._num_calls += 1
            call = CallDelta(self._num_calls - 1, "", f"call_{secrets.token_hex(12)}", function[1])
            return [call] if self._is_wanted else []
        is_shown = (channel is None or channel[1] != "analysis") and not _RECIPIENT.search(header)
        self._kind = "text" if is_shown else "thoughts"
        return []

    def _read_message(self) -> list[Delta] | None:
        found = [(at, mark) for mark in _ENDS if (at := self._buffer.find(mark)) >= 0]
        if not found:
            held = max(overlap(self._buffer, mark) for mark in _ENDS)
            text = self._buffer[: len(self._buffer) - held]
            self._buffer = self._buffer[len(text) :]
            return self._tell(text) if text else None
        at, mark = min(found)
        text, self._buffer = self._buffer[:at], self._buffer[at + len(mark) :]
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
