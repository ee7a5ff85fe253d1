"""Turns chat messages into the text that the model was trained on, with the Jinja template it came with.

Knows nothing about HTTP schemas: messages are plain dicts with string contents. The environment gives templates
what transformers gives them (`apply_chat_template` is the reference, and compared with in the tests).

Templates are downloaded with the model, so they are not trusted: they run sandboxed, may write `MAX_CHARACTERS`
and take `MAX_LOOP_STEPS` through loops, per rendering. A single expression is not limited; what it may cost is
bounded by nothing but the sandbox's cap on `range` (100,000).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tokenplane_core.backend.errors import ConfigError, RequestError

from .tokenizer import read_config_option, read_json_object

MAX_CHARACTERS = 16 * 2**20
"""What one rendering may write: several times what the longest context of today's models holds."""

MAX_LOOP_STEPS = 1_000_000
"""How many passes through loop bodies one rendering may make, nested loops together."""

# Written behind the message that is to be continued, and looked for in the result. The space at the end shows
# whether the template trims contents.
_CONTINUE_MARK = "<tokenplane:continue-here>"

_SPEND_FILTER = "tokenplane_spend_loop_step"


class TemplateError(RequestError):
    """The template refused the messages, or failed on them; says what the template said."""


class ChatTemplate:
    """One model's template, or several under the names `default` and `tool_use`."""

    def __init__(self, sources: Mapping[str, str], origin: str = "chat template") -> None:
        """origin: where the sources come from, for messages.

        Raises:
            ConfigError: a source is no valid template.
        """
        environment = _environment()
        self._templates: dict[str, jinja2.Template] = {}
        variables: set[str] = set()
        for name, source in sources.items():
            try:
                tree = environment.parse(source)
                variables |= find_undeclared_variables(tree)
                self._templates[name] = environment.from_string(_with_loop_budget(tree))
            except jinja2.TemplateSyntaxError as error:
                raise ConfigError(f"{origin}: line {error.lineno} is not valid Jinja: {error.message}") from error
        self.source = "\n".join(sources.values())
        self.variables = frozenset(variables)
        """What the template reads: `tools` is among them if it can describe tools to the model."""

    @classmethod
    def load(cls, folder: Path, tokenizer_config_path: Path | None = None) -> ChatTemplate | None:
        """Read the template of a model folder; None if it has none.

        The first of these that has one: the file `tokenizer_config_path`, chat_template.jinja, chat_template.json,
        tokenizer_config.json, processor_config.json.

        Raises:
            ConfigError: a file cannot be read, or the template is no valid Jinja.
        """
        if tokenizer_config_path and (
            sources := _sources(read_config_option(tokenizer_config_path), tokenizer_config_path)
        ):
            return cls(sources, str(tokenizer_config_path))
        file = folder / "chat_template.jinja"
        if file.is_file():
            return cls({"default": file.read_text(encoding="utf-8")}, str(file))
        for name in ("chat_template.json", "tokenizer_config.json", "processor_config.json"):
            if sources := _sources(read_json_object(folder / name), folder / name):
                return cls(sources, str(folder / name))
        return None

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        bos_token: str | None,
        eos_token: str | None,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt for `messages`; special tokens are part of its text.

        With `continue_final_message` it ends inside the last message, right behind its content, and
        `add_generation_prompt` has no effect. `variables` are handed to the template.

        Raises:
            TemplateError: the template raised or failed, or went over a limit of this module; nothing was changed.
        """
        template = self._choose(tools is not None)
        tokens = {"bos_token": bos_token, "eos_token": eos_token}
        variables = {
            "documents": None,
            **{name: token for name, token in tokens.items() if token is not None},
            **variables,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
        }
        if not continue_final_message:
            return _render(template, {**variables, "messages": messages})
        content = messages[-1].get("content") if messages else None
        if not isinstance(content, str):
            raise TemplateError("continue_final_message is set, but the last message has no text content to continue")
        final = {**messages[-1], "content": f"{content}{_CONTINUE_MARK} "}
        return _cut_at_mark(_render(template, {**variables, "messages": [*messages[:-1], final]}), content)

    def _choose(self, has_tools: bool) -> jinja2.Template:
        names = ("tool_use", "default") if has_tools else ("default",)
        for name in names:
            if name in self._templates:
                return self._templates[name]
        raise TemplateError(
            f"the model has no default chat template, only {', '.join(map(repr, self._templates))};"
            " name one 'default' in its tokenizer_config.json"
        )


def _sources(config: dict[str, Any], file: Path) -> dict[str, str]:
    """The templates of a config: one string, or a list of {"name": ..., "template": ...}."""
    value = config.get("chat_template")
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    try:
        return {str(entry["name"]): str(entry["template"]) for entry in value}
    except (TypeError, KeyError) as error:
        raise ConfigError(f"{file}: chat_template is neither a string nor a list of named templates") from error


def _cut_at_mark(text: str, content: str) -> str:
    at = text.rfind(_CONTINUE_MARK)
    if at < 0 or content.strip() not in text:
        raise TemplateError(
            "continue_final_message is set, but the chat template does not keep the last message as it is"
        )
    is_trimmed = not text.startswith(f"{_CONTINUE_MARK} ", at)
    return text[:at].rstrip() if is_trimmed else text[:at]


def _render(template: jinja2.Template, variables: dict[str, Any]) -> str:
    pieces, num_characters = [], 0
    try:
        with _loop_budget():
            for piece in template.generate(variables):
                pieces.append(piece)
                num_characters += len(piece)
                if num_characters > MAX_CHARACTERS:
                    raise TemplateError(f"the chat template wrote more than {MAX_CHARACTERS} characters")
    except jinja2.TemplateError as error:
        raise TemplateError(error.message or type(error).__name__) from error
    except RecursionError as error:
        raise TemplateError("the chat template calls itself without end") from error
    except (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError) as error:
        raise TemplateError(f"the chat template failed on these messages: {error}") from error
    return "".join(pieces)


# --- What a template finds ----------------------------------------------------------------------------------


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlocks]
    )
    environment.filters["tojson"] = _to_json
    environment.filters[_SPEND_FILTER] = _spend_loop_step
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own `tojson` escapes HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


class _GenerationBlocks(Extension):
    """`{% generation %}` ... `{% endgeneration %}` mark what to train on; for serving they are their body."""

    tags: ClassVar[set[str]] = {"generation"}  # type: ignore[misc]  # the base class forgot ClassVar

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


_loop_steps_left: ContextVar[list[int]] = ContextVar("_loop_steps_left")
"""One number in a list; belongs to the thread or task that renders."""


@contextmanager
def _loop_budget() -> Iterator[None]:
    token = _loop_steps_left.set([MAX_LOOP_STEPS])
    try:
        yield
    finally:
        _loop_steps_left.reset(token)


@jinja2.pass_context  # or the compiler would take it for a constant
def _spend_loop_step(context: jinja2.runtime.Context, value: None) -> None:
    left = _loop_steps_left.get()
    left[0] -= 1
    if left[0] < 0:
        raise jinja2.TemplateRuntimeError(f"the chat template made more than {MAX_LOOP_STEPS} loop steps")


def _with_loop_budget(tree: nodes.Template) -> nodes.Template:
    """Put a statement that spends one step in front of every loop body: a filter, the cheapest call there is."""
    for loop in tree.find_all(nodes.For):
        spend = nodes.Filter(nodes.Const(None), _SPEND_FILTER, [], [], None, None)
        loop.body.insert(0, nodes.ExprStmt(spend).set_lineno(loop.lineno))
    return tree
