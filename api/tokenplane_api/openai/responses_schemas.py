"""What /v1/responses takes. Shapes only: responses_convert.py checks what they mean.

The route keeps nothing: every request brings its whole conversation.
"""

from __future__ import annotations

from typing import Any

import msgspec

from .schemas import RequestFields


class ContentPart(msgspec.Struct, frozen=True):
    """type: input_text, output_text, text, refusal or reasoning_text; others are refused by name."""

    type: str
    text: str | None = None
    refusal: str | None = None


class InputItem(msgspec.Struct, frozen=True, kw_only=True):
    """A message, a function_call, a function_call_output or a reasoning item, as earlier answers had them."""

    type: str = "message"
    role: str | None = None
    content: str | list[ContentPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[ContentPart] | None = None


class ResponseTool(msgspec.Struct, frozen=True, kw_only=True):
    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class TextFormat(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    type: str
    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class TextOptions(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    format: TextFormat | None = None
    verbosity: str | None = None


class Reasoning(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    effort: str | None = None
    summary: Any = None
    generate_summary: Any = None


class ResponsesRequest(RequestFields, frozen=True, kw_only=True):
    input: str | list[InputItem]
    instructions: str | None = None
    max_output_tokens: int | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    tool_choice: str | dict[str, Any] | None = None
    tools: list[ResponseTool] | None = None

    # Only neutral values: see NEUTRAL.
    background: Any = None
    context_management: Any = None
    conversation: Any = None
    include: Any = None
    max_tool_calls: Any = None
    previous_response_id: Any = None
    prompt: Any = None
    top_logprobs: Any = None
    truncation: Any = None


NEUTRAL: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "context_management": ([],),
    "conversation": (),
    "include": ([],),
    "max_tool_calls": (),
    "previous_response_id": (),
    "prompt": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
"""As in schemas.py."""

INSTEAD = {
    "background": "wait for the answer, or stream it",
    "conversation": "this server keeps no conversations; send all of it as `input`",
    "include": "leave it out",
    "previous_response_id": "this server keeps no answers; send the whole conversation as `input`",
    "store": "this server keeps no answers; send false or leave it out",
    "top_logprobs": "log-probabilities are given on /v1/chat/completions",
    "truncation": "shorten the input yourself",
}
"""What to do without the field."""
