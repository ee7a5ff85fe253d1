"""Generations to OpenAI's JSON: what whole answers and stream chunks of both older routes have in common.

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
from .convert import Prepared

_encode = msgspec.json.Encoder().encode

DONE = b"data: [DONE]\n\n"

FINISH: dict[FinishReason, Literal["stop", "length"]] = {
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
    tells_stop_token = False  # whether a drawn stop token is among those with log-probabilities

    def __init__(
        self, head: Head, generations: Sequence[Generation], prepared: Prepared, tokenizer: TextTokenizer
    ) -> None:
        self._head = head
        self._generations = generations
        self._prepared = prepared
        self._tokenizer = tokenizer

    def answer(self, outputs: Sequence[Output]) -> bytes:
        choices = [self._choice(index, output) for index, output in enumerate(self._best(outputs))]
        return _encode({**self._fields(self.object), "choices": choices, "usage": self._usage()})

    def _best(self, outputs: Sequence[Output]) -> Sequence[Output]:
        """Of each prompt's candidates those the client sees, best first if there are more than that."""
        given, wanted = self._prepared.num_candidates, self._prepared.num_choices
        if given == wanted:
            return outputs
        best: list[Output] = []
        for start in range(0, len(outputs), given):
            best += sorted(outputs[start : start + given], key=_mean_logprob, reverse=True)[:wanted]
        return best

    async def stream(self, include_usage: bool) -> AsyncGenerator[bytes, None]:
        """Chunks as the choices grow, the usage if asked for, and the end mark."""
        prefix = encode_line({**self._fields(self.chunk_object), "choices": []})[: -len(b"]}")]
        frames = [b'data: %b{"index":%d,' % (prefix, index) for index in range(len(self._generations))]
        self._frame_end = b'}],"usage":null}\n\n' if include_usage else b"}]}\n\n"
        holders = [_LogprobHolder(self.tells_stop_token) for _ in self._generations]
        started = [False] * len(self._generations)
        async with aclosing(merge(self._generations)) as pieces:
            async for index, piece in pieces:
                tokens = holders[index].release(piece)
                if data := self._chunks(index, frames[index], piece, tokens, not started[index]):
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
    def num_completion_tokens(self) -> int:
        return sum(generation.num_tokens for generation in self._generations)

    @property
    def num_prompt_chars(self) -> int:
        return sum(len(generation.spec.prompt_text) for generation in self._firsts())

    def _firsts(self) -> Sequence[Generation]:
        return self._generations[:: self._prepared.num_candidates]

    def _usage(self) -> dict[str, Any]:
        prompt, completion = self.num_prompt_tokens, self.num_completion_tokens
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

    def _chunks(self, index: int, frame: bytes, piece: Piece, tokens: list[GeneratedToken], is_first: bool) -> bytes:
        """The events for one piece; b"" if there is nothing to say."""
        raise NotImplementedError

    def _logprobs(self, tokens: Sequence[GeneratedToken]) -> dict[str, Any]:
        raise NotImplementedError

    def _whole_logprobs(self, output: Output) -> dict[str, Any] | None:
        if not self._prepared.wants_logprobs:
            return None
        whole = Piece(output.text, output.tokens, output.finish_reason)
        return self._logprobs(_LogprobHolder(self.tells_stop_token).release(whole))

    def _chunk(self, frame: bytes, body: bytes, logprobs: bytes, finish_reason: str | None) -> bytes:
        finish = b'"%b"' % finish_reason.encode() if finish_reason else b"null"
        return b'%b%b,"logprobs":%b,"finish_reason":%b%b' % (frame, body, logprobs, finish, self._frame_end)


class _LogprobHolder:
    """Sends each token's log-probability with the text that the token begins in, and none for text that is not sent."""

    def __init__(self, tells_stop_token: bool) -> None:
        self._tells_stop_token = tells_stop_token
        self._held: list[GeneratedToken] = []
        self._num_sent_chars = 0

    def release(self, piece: Piece) -> list[GeneratedToken]:
        self._num_sent_chars += len(piece.text)
        if not (piece.tokens or self._held):
            return []
        self._held += piece.tokens
        ends = piece.finish_reason is not None and piece.finish_reason != "stop_sequence"
        told = (token for token in self._held if self._tells_stop_token or not token.is_stop)
        ready = [token for token in told if ends or token.start < self._num_sent_chars]
        self._held = [] if ends else self._held[len(ready) :]
        return ready


def error_events(error: ApiError) -> bytes:
    """An error in a stream, in the shape the OpenAI clients raise from."""
    return event(openai_body(error)) + DONE


def number(logprob: float | None) -> float:
    """A log-probability as JSON can write it."""
    if logprob is None or not math.isfinite(logprob):
        return _NEVER
    return float(f"{logprob:.8g}")  # float32 holds no more digits


def _mean_logprob(output: Output) -> float:
    logprobs = [token.logprob for token in output.tokens if token.logprob is not None]
    return sum(logprobs) / len(logprobs) if logprobs else -math.inf
