"""Turns the text of one answer into thoughts, text and calls, while it is being written. Knows text only."""

from __future__ import annotations

from .reasoning import ReasoningSplitter
from .tool_calls import Delta, TextDelta, ToolCallParser


class AnswerParser:
    """Turns the text of one answer into deltas: thoughts, then text and calls."""

    def __init__(self, reasoning: ReasoningSplitter | None, tools: ToolCallParser | None) -> None:
        self._reasoning = reasoning
        self._tools = tools

    def push(self, text: str) -> list[Delta]:
        if self._reasoning is None:
            return self._answer(text)
        thoughts, answer = self._reasoning.push(text)
        return self._deltas(thoughts, answer)

    def flush(self) -> list[Delta]:
        """What was held back, once the answer is over."""
        deltas = self._deltas(*self._reasoning.flush()) if self._reasoning else []
        return deltas + (self._tools.flush() if self._tools else [])

    def _deltas(self, thoughts: str, answer: str) -> list[Delta]:
        found: list[Delta] = [TextDelta(thoughts, is_reasoning=True)] if thoughts else []
        return found + self._answer(answer)

    def _answer(self, text: str) -> list[Delta]:
        if not text:
            return []
        return self._tools.push(text) if self._tools else [TextDelta(text)]
