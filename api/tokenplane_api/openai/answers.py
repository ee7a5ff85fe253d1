"""What OpenAI's routes answer, for the OpenAPI document.

The renderers write this JSON piece by piece, as it grows; tests hold their output against these schemas.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from ..meaning import means

FinishReason = Literal["stop", "length"]


class Answer(msgspec.Struct, forbid_unknown_fields=True):
    """What is set to UNSET is left out in some answers; everything else is always there."""


# --- Completions of both kinds ------------------------------------------------------------------------------


class PromptTokensDetails(Answer):
    cached_tokens: Annotated[int, means("found in the prefix cache")]


class Usage(Answer):
    prompt_tokens: Annotated[int, means("of each prompt once, however many choices it has")]
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionHead(Answer):
    id: str
    created: Annotated[int, means("seconds since 1970")]
    model: str
    system_fingerprint: Annotated[str, means("version and backend")]


# --- Chat ---------------------------------------------------------------------------------------------------


class FunctionCall(Answer):
    name: str
    arguments: Annotated[str, means("JSON as the model wrote it")]


class AnswerToolCall(Answer):
    id: Annotated[str, means("for `tool_call_id` of the tool's message")]
    type: Literal["function"]
    function: FunctionCall


class AnswerMessage(Answer):
    role: Literal["assistant"]
    content: Annotated[str | None, means("null if there is nothing but calls")]
    refusal: None
    reasoning_content: Annotated[str | msgspec.UnsetType, means("thoughts, if there are any")] = msgspec.UNSET
    tool_calls: list[AnswerToolCall] | msgspec.UnsetType = msgspec.UNSET


class TopLogprob(Answer):
    token: str
    logprob: Annotated[float, means("-9999 for what cannot happen")]
    bytes: Annotated[list[int], means("UTF-8; a token may hold part of a character")]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    content: list[TokenLogprob]
    refusal: None


class ChatChoice(Answer):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | Literal["tool_calls"]


class ChatCompletion(CompletionHead):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class FunctionDelta(Answer):
    arguments: str
    name: str | msgspec.UnsetType = msgspec.UNSET


class ToolCallDelta(Answer):
    index: Annotated[int, means("which call this is a piece of")]
    function: FunctionDelta
    id: str | msgspec.UnsetType = msgspec.UNSET
    type: Literal["function"] | msgspec.UnsetType = msgspec.UNSET


class ChatDelta(Answer):
    """The first of a choice has the role; the first of a call its id and name."""

    role: Literal["assistant"] | msgspec.UnsetType = msgspec.UNSET
    content: str | msgspec.UnsetType = msgspec.UNSET
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[ToolCallDelta] | msgspec.UnsetType = msgspec.UNSET


class ChatChunkChoice(Answer):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | Literal["tool_calls"] | None


class ChatCompletionChunk(CompletionHead):
    """One event; the stream ends with `data: [DONE]`."""

    object: Literal["chat.completion.chunk"]
    choices: Annotated[list[ChatChunkChoice], means("one; none in the event with the usage")]
    usage: Annotated[Usage | msgspec.UnsetType | None, means("with `include_usage`: null but in the last")] = (
        msgspec.UNSET
    )


# --- Text ---------------------------------------------------------------------------------------------------


class TextLogprobs(Answer):
    """Four lists side by side, an entry for each token."""

    tokens: list[str]
    token_logprobs: Annotated[list[float | None], means("null for the first token of an echoed prompt")]
    top_logprobs: list[dict[str, float] | None]
    text_offset: Annotated[list[int], means("in characters")]


class CompletionChoice(Answer):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason


class Completion(CompletionHead):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunkChoice(Answer):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None


class CompletionChunk(CompletionHead):
    """One event; the stream ends with `data: [DONE]`."""

    object: Literal["text_completion"]
    choices: Annotated[list[CompletionChunkChoice], means("one; none in the event with the usage")]
    usage: Annotated[Usage | msgspec.UnsetType | None, means("with `include_usage`: null but in the last")] = (
        msgspec.UNSET
    )


# --- Responses ----------------------------------------------------------------------------------------------


class OutputText(Answer, tag="output_text"):
    text: str
    annotations: list[Any]
    logprobs: list[Any]


class ReasoningText(Answer, tag="reasoning_text"):
    text: str


class Item(Answer):
    id: str
    status: Literal["in_progress", "completed", "incomplete"]


class MessageItem(Item, tag="message"):
    role: Literal["assistant"]
    content: list[OutputText]


class ReasoningItem(Item, tag="reasoning"):
    summary: list[Any]
    content: list[ReasoningText]


class FunctionCallItem(Item, tag="function_call"):
    call_id: str
    name: str
    arguments: str


class Incomplete(Answer):
    reason: Literal["max_output_tokens"]


class CachedTokens(Answer):
    cached_tokens: Annotated[int, means("found in the prefix cache")]


class ReasoningTokens(Answer):
    reasoning_tokens: int


class ResponseUsage(Answer):
    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class ResponseReasoning(Answer):
    effort: str | None
    summary: None


class Response(Answer):
    """The request's own fields are repeated; nothing is stored under the id."""

    id: str
    object: Literal["response"]
    created_at: Annotated[int, means("seconds since 1970")]
    status: Literal["in_progress", "completed", "incomplete"]
    error: None
    incomplete_details: Incomplete | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, Any]
    model: str
    output: list[MessageItem | ReasoningItem | FunctionCallItem]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: ResponseReasoning
    store: Literal[False]
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: str | None


class ResponseEvent(msgspec.Struct):
    """One event, from response.created to response.completed or response.incomplete, or error."""

    type: str
    sequence_number: int


# --- Models -------------------------------------------------------------------------------------------------


class Model(Answer):
    id: str
    object: Literal["model"]
    created: Annotated[int, means("when the server started, in seconds since 1970")]
    owned_by: str
    max_model_len: Annotated[int | msgspec.UnsetType, means("vLLM's: tokens of prompt and answer together")] = (
        msgspec.UNSET
    )
    parent: Annotated[str | msgspec.UnsetType, means("of a LoRA adapter: the model it belongs to, as in vLLM")] = (
        msgspec.UNSET
    )


class ModelList(Answer):
    object: Literal["list"]
    data: list[Model]
