"""What TGI's native routes take and answer. Shapes only: ranges and combinations are checked in convert.py.

As in TGI, unknown fields are ignored, `parameters` may be absent but not null, and where null is refused the type here
says so.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from tokenplane_core.memory import MemoryRow

from ..generation import FinishReason
from ..meaning import either, means


class Parameters(msgspec.Struct, frozen=True, kw_only=True):
    """How to generate. An empty object is greedy; leaving `parameters` out samples."""

    adapter_id: Annotated[str | None, means("the adapter to answer with; an unknown one is refused")] = None
    best_of: Annotated[int | None, means("generate so many and answer with the likeliest; needs sampling")] = None
    decoder_input_details: Annotated[bool, means("tell the prompt's tokens; turns `details` on")] = False
    details: Annotated[bool, means("tell tokens, log-probabilities, seed and why the text ended")] = False
    do_sample: Annotated[bool, means("draw tokens; implied by temperature, top_k, top_p or typical_p")] = False
    frequency_penalty: Annotated[float | None, means("-2 to 2, for each time that a token was generated")] = None
    grammar: Annotated[
        dict[str, Any] | None,
        means("`{type, value}`: json, json_object or json_schema with a JSON Schema, or regex"),
    ] = None
    max_new_tokens: Annotated[int | None, means("how many tokens at most; absent: until the context is full")] = None
    repetition_penalty: Annotated[float | None, means("0.01 to 100, above 1 against what prompt and answer hold")] = (
        None
    )
    return_full_text: Annotated[bool | None, means("put the prompt in front; absent: only on `POST /`")] = None
    seed: Annotated[int | None, means("the same seed gives the same answer, whatever else is running")] = None
    stop: Annotated[list[str], means("strings that end the answer; the text ends with the one that was found")] = []
    temperature: Annotated[float | None, means("above 0; 1 if absent")] = None
    top_k: Annotated[int | None, means("draw from so many likeliest tokens, at least 1")] = None
    top_n_tokens: Annotated[int | None, means("so many likeliest alternatives for each token")] = None
    top_p: Annotated[float | None, means("draw from the likeliest tokens that make up this share, between 0 and 1")] = (
        None
    )
    truncate: Annotated[int | None, means("keep so many of the prompt's last tokens")] = None
    typical_p: Annotated[float | None, means("locally typical sampling, between 0 and 1")] = None
    watermark: Annotated[bool, means("only false: the green lists of detectors cannot be repeated here")] = False


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True):
    inputs: Annotated[str, means("the prompt")]
    parameters: Annotated[Parameters, means("how to generate; absent: sampled, null is refused")] = Parameters(
        do_sample=True
    )


class CompatGenerateRequest(GenerateRequest, frozen=True, kw_only=True):
    stream: Annotated[bool, means("send the answer in events while it is generated")] = False


class VertexRequest(msgspec.Struct, frozen=True):
    instances: Annotated[
        list[Annotated[msgspec.Raw, either("GenerateRequest", "ChatRequest")]],
        means("bodies of /generate, or of /v1/chat/completions if they have `messages`"),
    ]


class PrefillToken(msgspec.Struct, frozen=True):
    id: int
    text: str
    logprob: Annotated[float | None, means("null for the first")]


class Token(msgspec.Struct, frozen=True):
    id: int
    text: str
    logprob: Annotated[float | None, means("null if sampling parameters had excluded the token")]
    special: bool


class StreamDetails(msgspec.Struct, frozen=True):
    finish_reason: FinishReason
    generated_tokens: int
    seed: Annotated[int | None, means("null if greedy")]
    input_length: int


class StreamResponse(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a stream."""

    index: Annotated[int, means("1, 2, 3 ...")]
    token: Token
    top_tokens: Annotated[list[Token] | msgspec.UnsetType, means("left out when empty")] = msgspec.UNSET
    generated_text: Annotated[str | None, means("the whole text, in the last event")]
    details: Annotated[StreamDetails | None, means("in the last event, if asked for")]


class BestOfSequence(msgspec.Struct, frozen=True, kw_only=True):
    generated_text: str
    finish_reason: FinishReason
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    top_tokens: list[list[Token]] | msgspec.UnsetType = msgspec.UNSET


class Details(msgspec.Struct, frozen=True, kw_only=True):
    finish_reason: FinishReason
    generated_tokens: int
    seed: Annotated[int | None, means("null if greedy")]
    prefill: Annotated[list[PrefillToken], means("the prompt's tokens, with `decoder_input_details`")]
    tokens: list[Token]
    best_of_sequences: Annotated[list[BestOfSequence] | msgspec.UnsetType, means("the candidates that lost")] = (
        msgspec.UNSET
    )
    top_tokens: Annotated[list[list[Token]] | msgspec.UnsetType, means("with `top_n_tokens`")] = msgspec.UNSET


class GenerateResponse(msgspec.Struct, frozen=True, kw_only=True):
    generated_text: str
    details: Annotated[Details | msgspec.UnsetType, means("if asked for")] = msgspec.UNSET


class SimpleToken(msgspec.Struct, frozen=True):
    id: int
    text: str
    start: Annotated[int, means("first byte in the UTF-8 of the text")]
    stop: Annotated[int, means("behind the last byte")]


class ChatTokenizeResponse(msgspec.Struct, frozen=True):
    tokenize_response: list[SimpleToken]
    templated_text: Annotated[str, means("the prompt as the model sees it")]


class VertexResponse(msgspec.Struct, frozen=True):
    predictions: Annotated[list[str], means("in the order of the instances")]


class Info(msgspec.Struct, frozen=True, kw_only=True):
    """TGI's fields, then ours about the engine."""

    model_id: str
    model_sha: str | None
    model_pipeline_tag: str | None
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int
    max_total_tokens: int
    validation_workers: int
    max_client_batch_size: int
    router: str
    version: str
    sha: str | None
    docker_label: str | None
    model_dtype: str
    model_device_type: str
    device: str
    backend: str
    backend_version: str
    kernels: Annotated[dict[str, str], means("which kernel serves what, and why that one")]
    max_batch_prefill_tokens: int
    max_batch_total_tokens: int
    max_batch_size: int
    memory: Annotated[list[MemoryRow], means("where the device's memory went")]
