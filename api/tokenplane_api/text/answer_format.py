"""How the served model writes what is more than text: its thoughts and its function calls.

Decided once, from the chat template and the vocabulary; the operator may overrule it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from tokenplane_core.backend.errors import ConfigError

from .chat_template import ChatTemplate
from .reasoning import REASONING_MARKS, ReasoningSplitter
from .tokenizer import TextTokenizer
from .tool_calls import TOOL_FORMATS, Delta, TextDelta, ToolCallParser, ToolFormat

AUTO, NONE = "auto", "none"

_MARKS_IN_CALLS = ("[ARGS]", "[CALL_ID]")


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """tools: the notation for calls. reasoning: the marks around thoughts, or None. shown_ids: special tokens that
    must stay in the text for the parsers to see."""

    tools: ToolFormat
    reasoning: tuple[str, str] | None
    shown_ids: frozenset[int]

    @classmethod
    def of_model(
        cls,
        tokenizer: TextTokenizer,
        template: ChatTemplate | None,
        tool_call_parser: str = AUTO,
        reasoning_parser: str = AUTO,
    ) -> AnswerFormat:
        """Look at what the model was trained with, unless the operator names a notation.

        Raises:
            ConfigError: there is no notation of that name.
        """
        source = template.source if template else ""
        tools = TOOL_FORMATS[
            _named("--tool-call-parser", tool_call_parser, TOOL_FORMATS) or _tool_format(tokenizer, template, source)
        ]
        name = _named("--reasoning-parser", reasoning_parser, (NONE, *REASONING_MARKS))
        name = name or _reasoning_marks(tokenizer, source)
        reasoning = REASONING_MARKS[name] if name != NONE else None
        marks = [*(mark for pair in tools.marks for mark in pair), *(reasoning or ()), *_MARKS_IN_CALLS]
        ids = (tokenizer.token_id(mark) for mark in marks)
        return cls(tools, reasoning, frozenset(id for id in ids if id is not None))

    def opens_reasoning(self, prompt_text: str) -> bool:
        """Whether the prompt ends inside thoughts, as the templates of some families have it."""
        return self.reasoning is not None and prompt_text.rstrip().endswith(self.reasoning[0])

    def without_reasoning(self, prompt_text: str) -> str:
        """A prompt that opens thoughts, with them closed again: for answers that leave no room for any."""
        return f"{prompt_text.rstrip()}\n\n{self.reasoning[1]}\n\n" if self.reasoning else prompt_text


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


def _named(flag: str, name: str, known: Collection[str]) -> str | None:
    if name == AUTO:
        return None
    if name not in known:
        raise ConfigError(f"{flag} is {name!r}; it may be {AUTO}, {', '.join(known)}")
    return name


def _tool_format(tokenizer: TextTokenizer, template: ChatTemplate | None, source: str) -> str:
    def knows(mark: str) -> bool:
        return mark in source or tokenizer.token_id(mark) is not None

    if knows("[TOOL_CALLS]"):
        return "mistral"
    if knows("<tool_call>"):
        return "hermes"
    if knows("<|python_tag|>"):
        return "llama3_json"
    # A template that cannot describe tools gets them described in words, which ask for the Hermes notation.
    return "json" if template and "tools" in template.variables else "hermes"


def _reasoning_marks(tokenizer: TextTokenizer, source: str) -> str:
    for name, (opener, _) in REASONING_MARKS.items():
        if opener in source or tokenizer.token_id(opener) is not None:
            return name
    return NONE
