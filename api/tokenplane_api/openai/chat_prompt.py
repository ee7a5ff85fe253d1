"""What the model reads of a conversation: messages and tools through its chat template.

A template that cannot describe tools gets messages that describe them in words, with calls and results as text.
"""

from __future__ import annotations

from typing import Any

import msgspec

from ..errors import TEMPLATE, ApiError, invalid
from ..service import Service
from ..text.tool_formats import ToolFormat
from .schemas import ChatRequest, Message, ToolCall
from .tools import ToolUse

RESERVED_VARIABLES = frozenset(
    {"self", "messages", "tools", "bos_token", "eos_token", "add_generation_prompt", "continue_final_message"}
)
"""What a template gets from the server, so that `chat_template_kwargs` must not set it."""

REASONING_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


def render_chat(request: ChatRequest, tools: ToolUse | None, service: Service) -> str:
    """The prompt text of a conversation; a final assistant message is continued unless the request says otherwise."""
    template = service.chat_template
    if template is None:
        raise ApiError(
            TEMPLATE,
            "the model has no chat template; use /v1/completions, or start the server with --tokenizer-config-path",
            "messages",
            "template_error",
        )
    if not request.messages:
        raise invalid("`messages` is empty; at least one message is needed", "messages")
    variables = _variables(request, template.variables)
    messages = [_message(message, f"messages[{i}]") for i, message in enumerate(request.messages)]
    knows_tools = "tools" in template.variables
    if not knows_tools:
        messages = _in_words(messages, tools, request.tool_prompt, service.answer_format.tools)
    elif tools is not None and request.tool_prompt:
        messages[-1] = _with_text_behind(messages[-1], f"\n---\n{request.tool_prompt}")
    return template.render(
        messages,
        bos_token=service.tokenizer.bos_token,
        eos_token=service.tokenizer.eos_token,
        tools=tools.for_template if tools is not None and knows_tools else None,
        add_generation_prompt=request.add_generation_prompt is not False,
        continue_final_message=_continues(request),
        **variables,
    )


def num_characters(request: ChatRequest) -> int:
    """About how much a template has to do: it takes time with every message and every character."""
    text = sum(100 + (len(m.content) if isinstance(m.content, str) else 1000) for m in request.messages)
    return text + 1000 * len(request.tools or ())


def _continues(request: ChatRequest) -> bool:
    last = request.messages[-1]
    if request.continue_final_message is None:
        return last.role == "assistant" and not last.tool_calls and not request.add_generation_prompt
    if request.continue_final_message and request.add_generation_prompt:
        raise invalid(
            "`continue_final_message` and `add_generation_prompt` exclude each other", "add_generation_prompt"
        )
    return request.continue_final_message


def _variables(request: ChatRequest, known: frozenset[str]) -> dict[str, Any]:
    """What the client sets of the template's own variables."""
    variables = dict(request.chat_template_kwargs or {})
    for name in variables:
        if name in RESERVED_VARIABLES:
            raise invalid(f"`chat_template_kwargs` must not set {name!r}: the server does", "chat_template_kwargs")
    effort = request.reasoning_effort
    if effort is None:
        return variables
    if effort not in REASONING_EFFORTS:
        allowed = ", ".join(REASONING_EFFORTS)
        raise invalid(f"`reasoning_effort` is {effort[:40]!r}; it may be {allowed}", "reasoning_effort")
    if "reasoning_effort" in known:
        return {"reasoning_effort": effort, **variables}
    if "enable_thinking" in known:
        return {"enable_thinking": effort != "none", **variables}
    if effort != "none":
        raise invalid(
            f"`reasoning_effort` is {effort!r}, but this model's template takes none; leave it out",
            "reasoning_effort",
            "unsupported_parameter",
        )
    return variables


# --- Messages -----------------------------------------------------------------------------------------------


def _message(message: Message, here: str) -> dict[str, Any]:
    """As templates want it: content is one string, `developer` is the newer word for `system`."""
    for name in ("function_call", "audio"):
        if getattr(message, name) not in (None, []):
            raise invalid(f"`{here}.{name}` is not supported", f"{here}.{name}", "unsupported_value")
    calls = message.tool_calls or []
    if calls and message.role != "assistant":
        raise invalid(f"`{here}.tool_calls` is set, but only the assistant calls tools", f"{here}.tool_calls")
    if message.content is None and message.refusal is None and not calls:
        raise invalid(f"`{here}.content` is missing", f"{here}.content", "missing_required_parameter")
    role = "system" if message.role == "developer" else message.role
    found: dict[str, Any] = {"role": role, "content": _content(message, here)}
    if calls:
        found["tool_calls"] = [_call(call, f"{here}.tool_calls[{i}]") for i, call in enumerate(calls)]
    for name in ("name", "tool_call_id", "reasoning_content"):
        if getattr(message, name) is not None:
            found[name] = getattr(message, name)
    return found


def _content(message: Message, here: str) -> str:
    content = message.content if message.content is not None else message.refusal
    if content is None or isinstance(content, str):
        return content or ""
    for i, part in enumerate(content):
        field = f"{here}.content[{i}]"
        if part.type != "text":
            raise invalid(
                f"`{field}.type` is {part.type[:40]!r}; this model takes only 'text'",
                f"{field}.type",
                "unsupported_value",
            )
        if part.text is None:
            raise invalid(f"`{field}.text` is missing", f"{field}.text")
    return "".join(part.text or "" for part in content)


def _call(call: ToolCall, here: str) -> dict[str, Any]:
    """Templates want the arguments as an object, clients send the text that the model wrote."""
    if call.type != "function":
        raise invalid(f"`{here}.type` is {call.type[:40]!r}; it can only be 'function'", f"{here}.type")
    arguments = call.function.arguments
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
    elif arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        field = f"{here}.function.arguments"
        raise invalid(f"`{field}` must be a JSON object, or a string that holds one", field)
    found = {"type": "function", "function": {"name": call.function.name, "arguments": arguments}}
    return found if call.id is None else {"id": call.id, **found}


# --- Tools in words -----------------------------------------------------------------------------------------


def _in_words(
    messages: list[dict[str, Any]], tools: ToolUse | None, tool_prompt: str | None, kind: ToolFormat
) -> list[dict[str, Any]]:
    """The same conversation for a template that knows only texts; tool_prompt replaces our instructions."""
    found: list[dict[str, Any]] = []
    follows_result = False
    for message in messages:
        is_result = message["role"] == "tool"
        if is_result:
            message = {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
        elif "tool_calls" in message:
            calls = [_call_text(call["function"], kind) for call in message["tool_calls"]]
            message = {"role": "assistant", "content": "\n".join(filter(None, (message["content"], *calls)))}
        if is_result and follows_result:
            found[-1]["content"] += "\n" + message["content"]  # templates want user and assistant to take turns
        else:
            found.append(message)
        follows_result = is_result
    if tools is not None:
        _describe(found, tools, tool_prompt, kind)
    return found


def _describe(messages: list[dict[str, Any]], tools: ToolUse, tool_prompt: str | None, kind: ToolFormat) -> None:
    """Put the tools behind the system message; without one in front of the first, since not all templates know systems.

    Changes:
        The list, not the messages in it.
    """
    lines = [msgspec.json.encode(tool).decode() for tool in tools.for_template]
    example = {"name": "function name", "arguments": {"argument": "value"}}
    instructions = tool_prompt or (
        "To call a function, write its name and its arguments like this, once for each call:\n"
        f"{_call_text(example, kind)}\n"
        "If no function helps, answer in words."
    )
    text = "You can call these functions:\n" + "\n".join(lines) + f"\n\n{instructions}"
    first = messages[0]
    content = f"{first['content']}\n\n{text}" if first["role"] == "system" else f"{text}\n\n{first['content']}"
    messages[0] = {**first, "content": content}


def _call_text(function: dict[str, Any], kind: ToolFormat) -> str:
    if kind.written:
        arguments = msgspec.json.encode(function["arguments"]).decode()
        return kind.written.format(name=function["name"], arguments=arguments)
    opener, closer = kind.marks[0]
    return f"{opener}\n{msgspec.json.encode(function).decode()}\n{closer}".rstrip()


def _with_text_behind(message: dict[str, Any], text: str) -> dict[str, Any]:
    return {**message, "content": message["content"] + text}
