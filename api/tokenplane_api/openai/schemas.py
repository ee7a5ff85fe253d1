"""What OpenAI's older routes take. Shapes only: ranges and combinations are checked in convert.py.

Unknown fields are refused, as OpenAI does: a misspelt option must not be ignored in silence. Fields of servers that
users come from (TGI, vLLM) are listed where we honour them, and in `NEUTRAL` where we cannot.
"""

from __future__ import annotations

from typing import Any

import msgspec


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding of the chunks, which we cannot: only false


class TextPart(msgspec.Struct, frozen=True):
    """One part of a message's content; other types than "text" are refused by name."""

    type: str
    text: str | None = None


class CalledFunction(msgspec.Struct, frozen=True):
    name: str
    arguments: Any = None  # a string of JSON; clients of TGI send the object itself


class ToolCall(msgspec.Struct, frozen=True):
    """A call of an earlier answer, as the client gives it back."""

    function: CalledFunction
    id: str | None = None
    type: str = "function"


class Message(msgspec.Struct, frozen=True):
    role: str
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None
    reasoning_content: str | None = None
    function_call: Any = None
    audio: Any = None


class Function(msgspec.Struct, frozen=True, kw_only=True):
    """strict: calls that are forced always fit the parameters; of free ones nothing can be promised."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    arguments: dict[str, Any] | None = None  # TGI's other name for parameters
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True):
    type: str
    function: Function | None = None


class RequestFields(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """What all routes that generate take."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None

    # Accepted: they do not concern the answer.
    metadata: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    user: str | None = None

    # Only neutral values: see NEUTRAL.
    service_tier: Any = None
    store: Any = None


class SamplingFields(RequestFields, frozen=True, kw_only=True):
    """What the two completion routes take."""

    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: int | None = None
    n: int | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None

    # What the answer must be: OpenAI's word for it, TGI's in the same field, and vLLM's. See structured.py.
    response_format: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    structured_outputs: Any = None

    # Not OpenAI's, but asked for by users of other servers.
    ignore_eos: bool | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    repetition_penalty: float | None = None
    top_k: int | None = None


class ChatRequest(SamplingFields, frozen=True, kw_only=True):
    messages: list[Message]
    logprobs: bool | None = None
    max_completion_tokens: int | None = None
    reasoning_effort: str | None = None
    top_logprobs: int | None = None

    parallel_tool_calls: bool | None = None
    tool_choice: str | dict[str, Any] | None = None
    tool_prompt: str | None = None  # TGI's: words about the tools, for the model
    tools: list[Tool] | None = None

    # As in vLLM. continue_final_message absent: exactly if the last message is the assistant's, as in TGI.
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None

    audio: Any = None
    best_of: Any = None
    function_call: Any = None
    functions: Any = None
    modalities: Any = None
    prediction: Any = None
    verbosity: Any = None
    web_search_options: Any = None


class CompletionRequest(SamplingFields, frozen=True, kw_only=True):
    prompt: str | list[str | int | list[int]]
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None

    suffix: Any = None


NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Fields that cannot be honoured, with the values, besides null, that ask for nothing."""
