"""Generations to OpenAI's JSON: whole answers and stream chunks.

A stream chunk is the same bytes but for a few values, so what is around them is built once for each request.
"""

from __future__ import annotations

import math
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from ..errors import ApiError, openai_body
from ..generation import FinishReason, GeneratedToken, Generation, Output, Piece, merge
from ..streaming import encode_line, event
from ..text.tokenizer import TextTokenizer

_encode = msgspec.json.Encoder().encode

DONE = b"data: [DONE]\n\n"

_FINISH: dict[FinishReason, Literal["stop", "length"]] = {
    "eos_token": "stop",
    "stop_sequence": "stop",
    "length": "length",
}

_NEVER = -9999.0
"""How a log-probability of minus infinity is written: JSON has no infinity, and clients expect a number."""


@dataclass(frozen=True, slots=True)
class Head:
    """What every object of one answer says about itself."""

    request_id: str
    model: str
    system_fingerprint: str
    created: int

    @classmethod
    def now(cls, request_id: str, model: str, system_fingerprint: str) -> Head:
        return cls(request_id, model, system_fingerprint, int(time.time()))


class Renderer:
    """What both routes share. One object for each request; streams keep their state per choice in it."""

    object: str
    chunk_object: str
    id_prefix: str

    def __init__(
        self, head: Head, generations: Sequence[Generation], choices_per_prompt: int, tokenizer: TextTokenizer
    ) -> None:
        self._head = head
        self._generations = generations
        self._choices_per_prompt = choices_per_prompt
        self._tokenizer = tokenizer

    def answer(self, outputs: Sequence[Output]) -> bytes:
        choices = [self._choice(index, output) for index, output in enumerate(outputs)]
        return _encode({**self._fields(self.object), "choices": choices, "usage": self._usage()})

    async def stream(self, include_usage: bool) -> AsyncGenerator[bytes, None]:
        """Chunks as the choices grow, the usage if asked for, and the end mark."""
        prefix = encode_line({**self._fields(self.chunk_object), "choices": []})[: -len(b"]}")]
        frames = [b'data: %b{"index":%d,' % (prefix, index) for index in range(len(self._generations))]
        self._frame_end = b'}],"usage":null}\n\n' if include_usage else b"}]}\n\n"
        holders = [_LogprobHolder() for _ in self._generations]
        started = [False] * len(self._generations)
        async with aclosing(merge(self._generations)) as pieces:
            async for index, piece in pieces:
                tokens = holders[index].release(piece)
                if data := self._chunks(frames[index], piece, tokens, not started[index]):
                    started[index] = True
                    yield data
        if include_usage:
            yield event({**self._fields(self.chunk_object), "choices": [], "usage": self._usage()})
        yield DONE

    @property
    def num_prompt_tokens(self) -> int:
        """A prompt counts once, however many choices it has."""
        return sum(len(generation.spec.prompt_ids) for generation in self._firsts())

    @property
    def num_prompt_chars(self) -> int:
        return sum(len(generation.spec.prompt_text) for generation in self._firsts())

    def _firsts(self) -> Sequence[Generation]:
        return self._generations[:: self._choices_per_prompt]

    def _usage(self) -> dict[str, Any]:
        prompt = self.num_prompt_tokens
        completion = sum(generation.num_tokens for generation in self._generations)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(g.num_cached_tokens for g in self._firsts())},
        }

    def _fields(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"{self.id_prefix}-{self._head.request_id}",
            "object": kind,
            "created": self._head.created,
            "model": self._head.model,
            "system_fingerprint": self._head.system_fingerprint,
        }

    def _choice(self, index: int, output: Output) -> dict[str, Any]:
        raise NotImplementedError

    def _chunks(self, frame: bytes, piece: Piece, tokens: list[GeneratedToken], is_first: bool) -> bytes:
        """The events for one piece; b"" if there is nothing to say."""
        raise NotImplementedError

    def _logprobs(self, tokens: Sequence[GeneratedToken]) -> dict[str, Any]:
        raise NotImplementedError

    def _whole_logprobs(self, output: Output) -> dict[str, Any] | None:
        if not output.generation.spec.wants_tokens:
            return None
        return self._logprobs(_LogprobHolder().release(Piece(output.text, output.tokens, output.finish_reason)))

    def _chunk(self, frame: bytes, body: bytes, logprobs: bytes, finish_reason: FinishReason | None) -> bytes:
        finish = b'"%b"' % _FINISH[finish_reason].encode() if finish_reason else b"null"
        return b'%b%b,"logprobs":%b,"finish_reason":%b%b' % (frame, body, logprobs, finish, self._frame_end)


class ChatRenderer(Renderer):
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def _choice(self, index: int, output: Output) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": output.text, "refusal": None},
            "logprobs": self._whole_logprobs(output),
            "finish_reason": _FINISH[output.finish_reason],
        }

    def _chunks(self, frame: bytes, piece: Piece, tokens: list[GeneratedToken], is_first: bool) -> bytes:
        events = []
        if is_first:
            events.append(self._chunk(frame, b'"delta":{"role":"assistant","content":""}', b"null", None))
        if piece.text or tokens:
            logprobs = encode_line(self._logprobs(tokens)) if tokens else b"null"
            events.append(self._chunk(frame, b'"delta":{"content":%b}' % encode_line(piece.text), logprobs, None))
        if piece.finish_reason:
            events.append(self._chunk(frame, b'"delta":{}', b"null", piece.finish_reason))
        return b"".join(events)

    def _logprobs(self, tokens: Sequence[GeneratedToken]) -> dict[str, Any]:
        content = []
        for token in tokens:
            best = [self._logprob(token_id, logprob) for token_id, logprob in token.top_logprobs]
            content.append({**self._logprob(token.id, token.logprob), "top_logprobs": best})
        return {"content": content, "refusal": None}

    def _logprob(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        raw = self._tokenizer.token_bytes(token_id)
        return {"token": self._tokenizer.token_text(token_id), "logprob": _number(logprob), "bytes": list(raw)}


class CompletionRenderer(Renderer):
    object = chunk_object = "text_completion"
    id_prefix = "cmpl"

    def _choice(self, index: int, output: Output) -> dict[str, Any]:
        return {
            "index": index,
            "text": output.text,
            "logprobs": self._whole_logprobs(output),
            "finish_reason": _FINISH[output.finish_reason],
        }

    def _chunks(self, frame: bytes, piece: Piece, tokens: list[GeneratedToken], is_first: bool) -> bytes:
        if not (piece.text or tokens or piece.finish_reason):
            return b""
        logprobs = encode_line(self._logprobs(tokens)) if tokens else b"null"
        return self._chunk(frame, b'"text":%b' % encode_line(piece.text), logprobs, piece.finish_reason)

    def _logprobs(self, tokens: Sequence[GeneratedToken]) -> dict[str, Any]:
        """The older format: four lists side by side. The drawn token is always among its top_logprobs."""
        return {
            "tokens": [self._tokenizer.token_text(token.id) for token in tokens],
            "token_logprobs": [_number(token.logprob) for token in tokens],
            "top_logprobs": [
                {
                    self._tokenizer.token_text(i): _number(value)
                    for i, value in [*token.top_logprobs, (token.id, token.logprob)]
                }
                for token in tokens
            ],
            "text_offset": [token.start for token in tokens],
        }


class _LogprobHolder:
    """Sends each token's log-probability with the text that the token begins in, and none for text that is not sent."""

    def __init__(self) -> None:
        self._held: list[GeneratedToken] = []
        self._num_sent_chars = 0

    def release(self, piece: Piece) -> list[GeneratedToken]:
        self._held += piece.tokens
        self._num_sent_chars += len(piece.text)
        ends = piece.finish_reason is not None and piece.finish_reason != "stop_sequence"
        ready = [token for token in self._held if not token.is_stop and (ends or token.start < self._num_sent_chars)]
        self._held = [] if ends else self._held[len(ready) :]
        return ready


def error_events(error: ApiError) -> bytes:
    """An error in a stream, in the shape the OpenAI clients raise from."""
    return event(openai_body(error)) + DONE


def _number(logprob: float | None) -> float:
    if logprob is None or not math.isfinite(logprob):
        return _NEVER
    return float(f"{logprob:.8g}")  # float32 holds no more digits
