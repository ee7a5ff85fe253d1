"""What /v1/responses takes. Shapes only: responses_convert.py checks what they mean.

The route keeps nothing: every request brings its whole conversation.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from ..meaning import means, only
from .schemas import RequestFields


class ContentPart(msgspec.Struct, frozen=True):
    """A part of a message's content."""

    type: Annotated[str, means("input_text, output_text, text, refusal or reasoning_text; others are refused by name")]
    text: Annotated[str | None, means("the part's text")] = None
    refusal: Annotated[str | None, means("of a part of type refusal")] = None


class InputItem(msgspec.Struct, frozen=True, kw_only=True):
    """A message, a function_call, a function_call_output or a reasoning item, as earlier answers had them."""

    type: Annotated[str, means("message if absent")] = "message"
    role: Annotated[str | None, means("of a message: system, developer, user or assistant")] = None
    content: Annotated[str | list[ContentPart] | None, means("of a message or a reasoning item")] = None
    call_id: Annotated[str | None, means("of a call, and of the output that answers it")] = None
    name: Annotated[str | None, means("of a call: the function")] = None
    arguments: Annotated[str | None, means("of a call: a string of JSON")] = None
    output: Annotated[str | list[ContentPart] | None, means("of a function_call_output: what the function said")] = None


class ResponseTool(msgspec.Struct, frozen=True, kw_only=True):
    type: Annotated[str, means("`function`; others are refused by name")]
    name: Annotated[str | None, means("up to 64 of A-Z a-z 0-9 _ . -")] = None
    description: Annotated[str | None, means("what it does, for the model")] = None
    parameters: Annotated[dict[str, Any] | None, means("JSON Schema of the arguments")] = None
    strict: Annotated[bool | None, means("makes no difference, as on /v1/chat/completions")] = None


class TextFormat(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    type: Annotated[str, means("text, json_object or json_schema")]
    name: Annotated[str | None, means("of a schema: no effect on the answer")] = None
    description: Annotated[str | None, means("of a schema: no effect on the answer")] = None
    schema: Annotated[dict[str, Any] | None, means("with type json_schema")] = None
    strict: Annotated[bool | None, means("makes no difference: a schema is always kept")] = None


class TextOptions(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    format: Annotated[TextFormat | None, means("what the answer must be")] = None
    verbosity: Annotated[str | None, means("only medium")] = None


class Reasoning(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    effort: Annotated[str | None, means("as `reasoning_effort` on /v1/chat/completions")] = None
    summary: Annotated[Any, only("thoughts are given as they are", ("auto",))] = None
    generate_summary: Annotated[Any, only("OpenAI's older name of `summary`", ("auto",))] = None


class ResponsesRequest(RequestFields, frozen=True, kw_only=True):
    input: Annotated[str | list[InputItem], means("what the user says, or the whole conversation")]
    instructions: Annotated[str | None, means("a system message in front")] = None
    max_output_tokens: Annotated[
        int | None, means("how many tokens at most; absent: until the context is full", minimum=1)
    ] = None
    parallel_tool_calls: Annotated[bool | None, means("false: one call at most")] = None
    reasoning: Annotated[Reasoning | None, means("for models that think")] = None
    text: Annotated[TextOptions | None, means("what the answer must be")] = None
    tool_choice: Annotated[
        str | dict[str, Any] | None, means("auto, none, required, a function by name, or OpenAI's allowed_tools")
    ] = None
    tools: Annotated[list[ResponseTool] | None, means("functions that the model may call, up to 128")] = None

    background: Annotated[Any, only("wait for the answer, or stream it", NEUTRAL["background"])] = None
    context_management: Annotated[Any, only("not supported", NEUTRAL["context_management"])] = None
    conversation: Annotated[Any, only("send all of it as `input`", NEUTRAL["conversation"])] = None
    include: Annotated[Any, only("not supported", NEUTRAL["include"])] = None
    max_tool_calls: Annotated[Any, only("the server calls nothing itself", NEUTRAL["max_tool_calls"])] = None
    previous_response_id: Annotated[Any, only("send all of it as `input`", NEUTRAL["previous_response_id"])] = None
    prompt: Annotated[Any, only("the server stores no prompts", NEUTRAL["prompt"])] = None
    top_logprobs: Annotated[Any, only("given on /v1/chat/completions", NEUTRAL["top_logprobs"])] = None
    truncation: Annotated[Any, only("shorten the input yourself", NEUTRAL["truncation"])] = None


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
