"""What TGI's native routes take. Shapes only: ranges and combinations are checked in convert.py.

As in TGI, unknown fields are ignored, `parameters` may be absent but not null, and where null is refused the type here
says so.
"""

from __future__ import annotations

from typing import Any

import msgspec


class Parameters(msgspec.Struct, frozen=True, kw_only=True):
    """`parameters: {}` is greedy; absent `parameters` sample (convert.py)."""

    adapter_id: str | None = None
    best_of: int | None = None
    decoder_input_details: bool = False
    details: bool = False
    do_sample: bool = False
    frequency_penalty: float | None = None
    grammar: Any = None
    max_new_tokens: int | None = None
    repetition_penalty: float | None = None
    return_full_text: bool | None = None
    seed: int | None = None
    stop: list[str] = []
    temperature: float | None = None
    top_k: int | None = None
    top_n_tokens: int | None = None
    top_p: float | None = None
    truncate: int | None = None
    typical_p: float | None = None
    watermark: bool = False


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True):
    inputs: str
    parameters: Parameters = Parameters(do_sample=True)


class CompatGenerateRequest(GenerateRequest, frozen=True, kw_only=True):
    """Of `POST /`."""

    stream: bool = False


class VertexRequest(msgspec.Struct, frozen=True):
    """Each instance is a GenerateRequest, or a chat request if it has `messages`."""

    instances: list[msgspec.Raw]


class PrefillToken(msgspec.Struct, frozen=True):
    id: int
    text: str
    logprob: float | None  # null for the first


class Token(msgspec.Struct, frozen=True):
    id: int
    text: str
    logprob: float | None
    special: bool


class StreamDetails(msgspec.Struct, frozen=True):
    finish_reason: str
    generated_tokens: int
    seed: int | None
    input_length: int


class StreamResponse(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a stream."""

    index: int
    token: Token
    top_tokens: list[Token] | msgspec.UnsetType = msgspec.UNSET  # left out when empty
    generated_text: str | None = None
    details: StreamDetails | None = None


class BestOfSequence(msgspec.Struct, frozen=True, kw_only=True):
    generated_text: str
    finish_reason: str
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken] = []
    tokens: list[Token] = []
    top_tokens: list[list[Token]] | msgspec.UnsetType = msgspec.UNSET


class Details(msgspec.Struct, frozen=True, kw_only=True):
    finish_reason: str
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken] = []  # with decoder_input_details
    tokens: list[Token] = []
    best_of_sequences: list[BestOfSequence] | msgspec.UnsetType = msgspec.UNSET
    top_tokens: list[list[Token]] | msgspec.UnsetType = msgspec.UNSET


class GenerateResponse(msgspec.Struct, frozen=True, kw_only=True):
    generated_text: str
    details: Details | msgspec.UnsetType = msgspec.UNSET
