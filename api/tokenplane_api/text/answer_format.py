"""How the served model writes what is more than text: its thoughts and its function calls.

Decided once, from the chat template and the vocabulary; the operator may overrule it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from tokenplane_core.backend.errors import ConfigError

from .answer_parser import AnswerParser
from .chat_template import ChatTemplate
from .harmony import ASSISTANT, CHANNEL, FINAL, MARKS, HarmonyParser
from .reasoning import REASONING_MARKS, ReasoningSplitter
from .tokenizer import TextTokenizer
from .tool_calls import ToolCallParser
from .tool_formats import TOOL_FORMATS, ToolFormat

AUTO, NONE, HARMONY = "auto", "none", "harmony"


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """tools: the notation for calls; with channels only of those that a grammar forces. reasoning: the marks around
    thoughts, or None. shown_ids: special tokens that must stay in the text for the parsers to see. has_channels:
    answers are in harmony's format. tells_thoughts: they come apart, where marks or channels show them.
    """

    tools: ToolFormat
    reasoning: tuple[str, str] | None
    shown_ids: frozenset[int]
    has_channels: bool = False
    tells_thoughts: bool = True

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
            ConfigError: there is no notation of that name, or the two exclude each other.
        """
        source = template.source if template else ""
        kind = _named("--tool-call-parser", tool_call_parser, (*TOOL_FORMATS, HARMONY))
        kind = kind or _tool_format(tokenizer, template, source)
        name = _named("--reasoning-parser", reasoning_parser, (NONE, *REASONING_MARKS, HARMONY))
        if kind == HARMONY:
            if name not in (None, NONE, HARMONY):
                raise ConfigError(f"--reasoning-parser is {name!r}; with harmony it may be {AUTO}, {NONE} or {HARMONY}")
            return cls(TOOL_FORMATS["json"], None, _ids(tokenizer, MARKS), True, name != NONE)
        if name == HARMONY:
            raise ConfigError(f"--reasoning-parser is {HARMONY!r}; that needs --tool-call-parser {HARMONY}")
        name = name or _reasoning_marks(tokenizer, source)
        reasoning = REASONING_MARKS[name] if name != NONE else None
        tools = TOOL_FORMATS[kind]
        return cls(tools, reasoning, _ids(tokenizer, (*tools.all_marks, *(reasoning or ()))))

    def opens_reasoning(self, prompt_text: str) -> bool:
        """Whether the prompt ends inside thoughts, as the templates of some families have it."""
        return self.reasoning is not None and prompt_text.rstrip().endswith(self.reasoning[0])

    def for_prescribed(self, prompt_text: str) -> str:
        """The prompt of an answer that a grammar prescribes: it leaves no room for thoughts and channels."""
        if self.has_channels and prompt_text.endswith(ASSISTANT):
            return prompt_text + FINAL
        if self.reasoning is not None and self.opens_reasoning(prompt_text):
            return f"{prompt_text.rstrip()}\n\n{self.reasoning[1]}\n\n"
        return prompt_text

    def needs_parser(self, has_tools: bool, is_prescribed: bool) -> bool:
        """Whether an answer may be more than text."""
        return has_tools or self.has_channels or (self.reasoning is not None and not is_prescribed)

    def new_parser(
        self,
        prompt_text: str,
        parameters: Mapping[str, Mapping[str, Any]] | None,
        max_calls: int | None = None,
        *,
        is_prescribed: bool = False,
    ) -> AnswerParser:
        """For one answer to `prompt_text`. parameters: JSON Schemas by the tools' names, None without tools.

        is_prescribed: a grammar decides what the answer is: calls, or also another form that the client asks for. Where
        the notation gives such calls no mark, an object with a tool's name and arguments is a call, all else the form.
        """
        tools = reasoning = None
        if parameters is not None and (is_prescribed or not self.has_channels):
            tools = ToolCallParser(
                self.tools,
                parameters,
                max_calls,
                is_forced=is_prescribed and not self.tools.forces_marks,
                needs_arguments=is_prescribed,  # a grammar for calls asks for them
            )
        if self.has_channels:
            return HarmonyParser(prompt_text, tools, max_calls, self.tells_thoughts, parameters is not None)
        if self.reasoning is not None and not is_prescribed:
            reasoning = ReasoningSplitter(self.reasoning, self.opens_reasoning(prompt_text))
        return AnswerParser(reasoning, tools)


def _ids(tokenizer: TextTokenizer, marks: Collection[str]) -> frozenset[int]:
    ids = (tokenizer.token_id(mark) for mark in marks)
    return frozenset(id for id in ids if id is not None)


def _named(flag: str, name: str, known: Collection[str]) -> str | None:
    if name == AUTO:
        return None
    if name not in known:
        raise ConfigError(f"{flag} is {name!r}; it may be {AUTO}, {', '.join(known)}")
    return name


def _tool_format(tokenizer: TextTokenizer, template: ChatTemplate | None, source: str) -> str:
    def knows(mark: str) -> bool:
        return mark in source or tokenizer.token_id(mark) is not None

    if knows(CHANNEL):
        return HARMONY
    if knows("<｜tool▁call▁begin｜>"):
        return "deepseek"
    if knows("[TOOL_CALLS]"):
        return "mistral"
    if "<function=" in source and "<parameter=" in source:
        return "qwen3_coder"
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
