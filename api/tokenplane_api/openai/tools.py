"""The tools of a chat request, checked: which the model may call, which it must, and how templates want to see them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from tokenplane_core.messages import Grammar

from ..errors import invalid
from ..structured import tool_call_grammar
from ..text.tool_formats import ToolFormat
from .schemas import ChatRequest, Function, Tool

MAX_TOOLS = 128

MAX_FORCED_CALLS = 16
"""A small model that must call tools may never stop of its own accord."""

_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,64}")
_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}


@dataclass(frozen=True, slots=True)
class ToolUse:
    """functions: name, description and parameters of each, as JSON. is_forced: the answer must be calls."""

    functions: list[dict[str, Any]]
    is_forced: bool
    max_calls: int | None

    @property
    def parameters(self) -> dict[str, dict[str, Any]]:
        """JSON Schemas by the functions' names."""
        return {function["name"]: function["parameters"] for function in self.functions}

    @property
    def for_template(self) -> list[dict[str, Any]]:
        return [{"type": "function", "function": function} for function in self.functions]


def tool_use(request: ChatRequest) -> ToolUse | None:
    """None: the model sees no tools and may call none.

    Raises:
        ApiError: a tool or the choice among them makes no sense; names the field.
    """
    choice = request.tool_choice
    if not request.tools:
        if choice not in (None, "none", "auto"):
            raise invalid(f"`tool_choice` is {choice!r}, but there are no `tools` to choose from", "tool_choice")
        return None
    if len(request.tools) > MAX_TOOLS:
        raise invalid(f"`tools` holds {len(request.tools)} tools, the limit is {MAX_TOOLS}", "tools")
    functions = [_function(tool, f"tools[{i}]") for i, tool in enumerate(request.tools)]
    _check_unique(functions)
    if choice == "none":
        return None
    max_calls = 1 if request.parallel_tool_calls is False else None
    if choice in (None, "auto"):
        return ToolUse(functions, False, max_calls)
    if choice == "required":
        return ToolUse(functions, True, max_calls)
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        return _allowed(choice.get("allowed_tools"), functions, max_calls)
    # As OpenAI has it, a named function is called exactly once.
    return ToolUse(_chosen([_chosen_name(choice)], functions, "tool_choice"), True, 1)


def calls_grammar(tools: ToolUse, kind: ToolFormat) -> Grammar:
    """An answer of nothing but calls, in the model's own notation as far as plain text can spell it."""
    before, between, after = kind.forced
    most = tools.max_calls or MAX_FORCED_CALLS
    return tool_call_grammar(
        tools.functions,
        arguments_key=kind.arguments_key,
        before=before,
        between=between if most > 1 else None,
        after=after,
        max_calls=most,
    )


def _function(tool: Tool, field: str) -> dict[str, Any]:
    if tool.type != "function":
        raise invalid(f"`{field}.type` is {tool.type!r}; it can only be 'function'", f"{field}.type")
    function = tool.function
    if function is None:
        raise invalid(f"`{field}.function` is missing", f"{field}.function", "missing_required_parameter")
    if not _NAME.fullmatch(function.name):
        raise invalid(
            f"`{field}.function.name` is {function.name[:80]!r}; a name has 1 to 64 letters, digits, '_', '-' and '.'",
            f"{field}.function.name",
        )
    return {
        "name": function.name,
        "description": function.description or "",
        "parameters": _parameters(function, f"{field}.function"),
    }


def _parameters(function: Function, field: str) -> dict[str, Any]:
    if function.parameters is not None and function.arguments is not None:
        raise invalid(f"`{field}` has `parameters` and `arguments`; they mean the same, send one", f"{field}.arguments")
    return function.parameters or function.arguments or _NO_PARAMETERS


def _check_unique(functions: list[dict[str, Any]]) -> None:
    seen: set[str] = set()
    for i, function in enumerate(functions):
        if function["name"] in seen:
            raise invalid(f"`tools[{i}].function.name` is {function['name']!r}, which is taken", "tools")
        seen.add(function["name"])


def _chosen_name(choice: Any) -> str:
    """OpenAI names a function in an object, TGI also as the string alone."""
    if isinstance(choice, str):
        return choice
    function = choice.get("function")
    if choice.get("type", "function") != "function" or not isinstance(function, dict):
        raise invalid(
            '`tool_choice` must be \'none\', \'auto\', \'required\' or {"type": "function", "function": {"name": ...}}',
            "tool_choice",
        )
    name = function.get("name")
    if not isinstance(name, str):
        raise invalid("`tool_choice.function.name` is missing", "tool_choice", "missing_required_parameter")
    return name


def _allowed(allowed: Any, functions: list[dict[str, Any]], max_calls: int | None) -> ToolUse:
    field = "tool_choice.allowed_tools"
    tools = allowed.get("tools") if isinstance(allowed, dict) else None
    if not isinstance(tools, list) or not tools or not all(isinstance(tool, dict) for tool in tools):
        raise invalid(f"`{field}` must have a list `tools` that names at least one", field)
    mode = allowed.get("mode", "auto")
    if mode not in ("auto", "required"):
        raise invalid(f"`{field}.mode` is {mode!r}; it may be 'auto' or 'required'", f"{field}.mode")
    chosen = _chosen([_chosen_name(tool) for tool in tools], functions, field)
    return ToolUse(chosen, mode == "required", max_calls)


def _chosen(names: list[str], functions: list[dict[str, Any]], field: str) -> list[dict[str, Any]]:
    known = {function["name"]: function for function in functions}
    for name in names:
        if name not in known:
            raise invalid(f"`{field}` names {name[:80]!r}, which is not among the `tools`: {', '.join(known)}", field)
    return [known[name] for name in dict.fromkeys(names)]
