"""/v1/responses in terms of the chat route, which does the work. The other way is responses_render.py."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from ..checks import is_one_of
from ..errors import ApiError, invalid
from ..service import Service
from .convert import Prepared, prepare_chat
from .responses_schemas import INSTEAD, NEUTRAL, ContentPart, InputItem, ResponsesRequest, ResponseTool
from .schemas import CalledFunction, ChatRequest, Function, Message, Tool, ToolCall

_TEXT_PARTS = frozenset({"input_text", "output_text", "text", "reasoning_text", "summary_text"})

_NAMES_HERE = (
    (re.compile(r"response_format\.json_schema\b"), "text.format"),
    (re.compile(r"response_format\b"), "text.format"),
    (re.compile(r"max_tokens\b"), "max_output_tokens"),
    (re.compile(r"reasoning_effort\b"), "reasoning.effort"),
    (re.compile(r"(tools\[\d+\])\.function\b"), r"\1"),
    (re.compile(r"tool_choice\.(?:function|allowed_tools)\b"), "tool_choice"),
    (re.compile(r"messages\b"), "input"),
)
"""What the chat route calls what, for its error messages."""


async def prepare_response(request: ResponsesRequest, service: Service) -> Prepared:
    _refuse_unsupported(request)
    chat = _as_chat(request)
    try:
        return await prepare_chat(chat, service)
    except ApiError as error:
        raise ApiError(
            error.kind, _name_here(error.message), error.param and _name_here(error.param), error.code
        ) from None


def _name_here(text: str) -> str:
    for pattern, name in _NAMES_HERE:
        text = pattern.sub(name, text)
    return text


def _refuse_unsupported(request: ResponsesRequest) -> None:
    for name, neutral in NEUTRAL.items():
        value = getattr(request, name)
        if value is not None and not is_one_of(value, neutral):
            shown = msgspec.json.encode(value).decode()[:60]
            instead = INSTEAD.get(name, "leave it out")
            raise invalid(f"`{name}` is not supported; the value is {shown}: {instead}", name, "unsupported_parameter")
    if request.text is not None and request.text.verbosity not in (None, "medium"):
        raise invalid(
            f"`text.verbosity` is {request.text.verbosity[:40]!r}; it is not supported, leave it out",
            "text.verbosity",
            "unsupported_parameter",
        )
    for name in ("summary", "generate_summary"):
        if request.reasoning is not None and getattr(request.reasoning, name) not in (None, "auto"):
            raise invalid(
                f"`reasoning.{name}` is not supported: thoughts are given as they are; leave it out",
                f"reasoning.{name}",
                "unsupported_parameter",
            )
    if request.stream_options is not None and request.stream_options.include_usage is not None:
        field = "stream_options.include_usage"
        raise invalid(f"`{field}` is not of this route: its last event always has the usage; leave it out", field)


def _as_chat(request: ResponsesRequest) -> ChatRequest:
    return ChatRequest(
        model=request.model,
        messages=_messages(request),
        max_tokens=request.max_output_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        stream=request.stream,
        stream_options=request.stream_options,
        tools=[_tool(tool, f"tools[{i}]") for i, tool in enumerate(request.tools or ())],
        tool_choice=_tool_choice(request.tool_choice),
        parallel_tool_calls=request.parallel_tool_calls,
        response_format=_response_format(request),
        reasoning_effort=request.reasoning.effort if request.reasoning else None,
        continue_final_message=False,
    )


# --- Input --------------------------------------------------------------------------------------------------


def _messages(request: ResponsesRequest) -> list[Message]:
    messages = [] if request.instructions is None else [Message("system", request.instructions)]
    if isinstance(request.input, str):
        return [*messages, Message("user", request.input)]
    if not request.input:
        raise invalid("`input` is empty; at least one item is needed", "input")
    thoughts: str | None = None
    for i, item in enumerate(request.input):
        if item.type == "reasoning":
            thoughts = _text(item.content or [], f"input[{i}].content") or None
            continue
        message = _message(item, f"input[{i}]")
        last = messages[-1] if messages else None
        if message.role != "assistant":
            messages.append(message)
        elif item.type == "function_call" and last is not None and last.role == "assistant":
            # A message and the calls after it were one turn.
            calls = [*(last.tool_calls or ()), *(message.tool_calls or ())]
            messages[-1] = msgspec.structs.replace(last, tool_calls=calls)
        else:
            messages.append(msgspec.structs.replace(message, reasoning_content=thoughts))
        thoughts = None
    return messages


def _message(item: InputItem, here: str) -> Message:
    match item.type:
        case "message":
            role = _required(item.role, f"{here}.role")
            return Message(role, _text(_required(item.content, f"{here}.content"), f"{here}.content"))
        case "function_call":
            function = CalledFunction(_required(item.name, f"{here}.name"), item.arguments)
            return Message("assistant", tool_calls=[ToolCall(function, _required(item.call_id, f"{here}.call_id"))])
        case "function_call_output":
            output = _text(_required(item.output, f"{here}.output"), f"{here}.output")
            return Message("tool", output, tool_call_id=_required(item.call_id, f"{here}.call_id"))
        case _:
            raise invalid(
                f"`{here}.type` is {item.type[:40]!r}; it may be message, function_call, function_call_output or"
                " reasoning",
                f"{here}.type",
                "unsupported_value",
            )


def _required(value: Any, field: str) -> Any:
    if value is None:
        raise invalid(f"`{field}` is missing", field, "missing_required_parameter")
    return value


def _text(content: str | list[ContentPart], here: str) -> str:
    if isinstance(content, str):
        return content
    for i, part in enumerate(content):
        if part.type not in _TEXT_PARTS and part.type != "refusal":
            field = f"{here}[{i}].type"
            raise invalid(f"`{field}` is {part.type[:40]!r}; this model takes only text", field, "unsupported_value")
    return "".join(part.text or part.refusal or "" for part in content)


# --- Tools and format ---------------------------------------------------------------------------------------


def _tool(tool: ResponseTool, here: str) -> Tool:
    if tool.type != "function":
        raise invalid(
            f"`{here}.type` is {tool.type[:40]!r}; this server has no tools of its own, only 'function'",
            f"{here}.type",
            "unsupported_value",
        )
    name = _required(tool.name, f"{here}.name")
    return Tool(
        "function",
        Function(name=name, description=tool.description, parameters=tool.parameters, strict=tool.strict),
    )


def _tool_choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    """Here the name stands beside the type, on the chat route in an object of its own."""
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") == "allowed_tools":
        tools = choice.get("tools")
        named = [_tool_choice(tool) for tool in tools] if isinstance(tools, list) else tools
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode", "auto"), "tools": named}}
    return {"type": choice.get("type"), "function": {"name": choice.get("name")}}


def _response_format(request: ResponsesRequest) -> dict[str, Any] | None:
    format = request.text.format if request.text else None
    if format is None:
        return None
    if format.type == "json_schema":
        described = {"name": format.name} if format.schema is None else {"name": format.name, "schema": format.schema}
        return {"type": "json_schema", "json_schema": described}
    return {"type": format.type}
