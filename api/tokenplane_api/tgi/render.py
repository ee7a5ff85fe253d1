"""Generations to TGI's JSON: whole answers and stream events."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Sequence

import msgspec

from ..errors import ApiError, tgi_body
from ..generation import GeneratedToken, Generation, Output, prompt_tokens
from ..streaming import event
from ..text.tokenizer import TextTokenizer
from .schemas import BestOfSequence, Details, GenerateResponse, PrefillToken, StreamDetails, StreamResponse, Token

_NO_TOKEN = GeneratedToken(id=0, logprob=None, top_logprobs=[], start=0, is_special=True)
"""For the last event of a stream that a grammar ends although the model has no token for an end."""


def pick_best(outputs: Sequence[Output]) -> list[Output]:
    """best_of: the highest mean log-probability first."""
    return sorted(outputs, key=_mean_logprob, reverse=True)


def _mean_logprob(output: Output) -> float:
    logprobs = [token.logprob for token in output.tokens if token.logprob is not None]
    return sum(logprobs) / len(logprobs) if logprobs else -math.inf


def generate_response(
    outputs: Sequence[Output], tokenizer: TextTokenizer, full_text: bool, with_details: bool
) -> GenerateResponse:
    """The answer; outputs[0] is the winner, the rest are told in its details."""
    best, *others = outputs
    text = text_of(best, full_text)
    if not with_details:
        return GenerateResponse(generated_text=text)
    prefill = _prefill(outputs, tokenizer)
    sequences = [
        BestOfSequence(
            generated_text=text_of(output, full_text),
            finish_reason=output.finish_reason,
            generated_tokens=output.generation.num_tokens,
            seed=seed_of(output.generation),
            prefill=prefill,
            tokens=[_token(token) for token in output.tokens],
            top_tokens=_top_tokens(output.tokens, tokenizer),
        )
        for output in others
    ]
    details = Details(
        finish_reason=best.finish_reason,
        generated_tokens=best.generation.num_tokens,
        seed=seed_of(best.generation),
        prefill=prefill,
        tokens=[_token(token) for token in best.tokens],
        best_of_sequences=sequences or msgspec.UNSET,
        top_tokens=_top_tokens(best.tokens, tokenizer),
    )
    return GenerateResponse(generated_text=text, details=details)


async def stream_events(
    generation: Generation, tokenizer: TextTokenizer, full_text: bool, with_details: bool
) -> AsyncGenerator[bytes, None]:
    """One event for each token; the last has the whole text, and the details if asked for. No end mark."""
    output = Output(generation)
    index = 0
    async for piece in generation:
        output.text += piece.text
        tokens = piece.tokens
        if not tokens and piece.finish_reason is not None:
            tokens = [_NO_TOKEN]
        for i, token in enumerate(tokens):
            index += 1
            is_last = piece.finish_reason is not None and i == len(tokens) - 1
            yield event(
                StreamResponse(
                    index=index,
                    token=_token(token),
                    top_tokens=_tops(token, tokenizer) or msgspec.UNSET,
                    generated_text=text_of(output, full_text) if is_last else None,
                    details=_stream_details(generation) if is_last and with_details else None,
                )
            )


def error_event(error: ApiError) -> bytes:
    """An error in a stream: the body of the HTTP error as an event."""
    return event(tgi_body(error))


def seed_of(generation: Generation) -> int | None:
    """None for a greedy generation, which draws nothing."""
    sampling = generation.spec.sampling
    return sampling.seed if sampling.temperature > 0 else None


def _stream_details(generation: Generation) -> StreamDetails:
    return StreamDetails(
        finish_reason=generation.finish_reason or "length",
        generated_tokens=generation.num_tokens,
        seed=seed_of(generation),
        input_length=len(generation.spec.prompt_ids),
    )


def text_of(output: Output, full_text: bool) -> str:
    """full_text: with the prompt in front."""
    return output.generation.spec.prompt_text + output.text if full_text else output.text


def _prefill(outputs: Sequence[Output], tokenizer: TextTokenizer) -> list[PrefillToken]:
    """The prompt, which all outputs have in common; one generation at most knows its log-probabilities."""
    return [
        PrefillToken(token.id, token.text, _number(token.logprob))
        for output in outputs
        for token in prompt_tokens(output.generation, tokenizer)
    ]


def _token(token: GeneratedToken) -> Token:
    return Token(token.id, token.text, _number(token.logprob), token.is_special)


def _tops(token: GeneratedToken, tokenizer: TextTokenizer) -> list[Token]:
    return [
        Token(token_id, tokenizer.token_text(token_id), _number(logprob), tokenizer.is_special(token_id))
        for token_id, logprob in token.top_logprobs
    ]


def _top_tokens(tokens: Sequence[GeneratedToken], tokenizer: TextTokenizer) -> list[list[Token]] | msgspec.UnsetType:
    if not any(token.top_logprobs for token in tokens):
        return msgspec.UNSET
    return [_tops(token, tokenizer) for token in tokens]


def _number(logprob: float | None) -> float | None:
    """null for what JSON cannot say: a token that the sampling parameters excluded."""
    if logprob is None or not math.isfinite(logprob):
        return None
    return float(f"{logprob:.8g}")  # float32 holds no more digits
