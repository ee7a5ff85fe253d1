"""What a request may ask for. The client refuses at the door with these rules, the engine once more behind it.

A request that gets past them must not be able to hurt the engine: it would cost everybody else their streams.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .backend.errors import InvalidRequest
from .messages import EngineInfo, SamplingParams, Submit

if TYPE_CHECKING:
    from .backend.records import Capabilities

MAX_LOGPROBS = 1000
MAX_PROMPT_TOP_LOGPROBS = 20
"""At each token of a prompt, which may be long."""
MAX_GRAMMAR_BYTES = 256 * 1024
MAX_BIAS = 1e9
GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing float32 logits by them overflows, and the draw is settled anyway."""
MAX_TEMPERATURE = 1e4
"""Above this the draw is uniform to within float32; more would only overflow."""

Refusal = tuple[str, str]
"""Field at fault, and a sentence with field, value and limit."""

_RANGES: tuple[tuple[str, float, float], ...] = (
    # field of SamplingParams, least, most
    ("temperature", 0.0, MAX_TEMPERATURE),
    ("top_k", 0, 2**31 - 1),
    ("top_p", 1e-9, 1.0),
    ("min_p", 0.0, 1.0),
    ("typical_p", 1e-9, 1.0),
    ("repetition_penalty", 1e-3, 1e3),
    ("presence_penalty", -1e3, 1e3),
    ("frequency_penalty", -1e3, 1e3),
    ("seed", 0, 2**64 - 1),
    ("min_new_tokens", 0, 2**31 - 1),
    ("num_logprobs", -1, MAX_LOGPROBS),
)


def sampling_refusal(params: SamplingParams, vocab_size: int) -> Refusal | None:
    """Why parameters cannot be served by any device, or None."""
    for name, least, most in _RANGES:
        value = getattr(params, name)
        if not least <= value <= most:  # a NaN is in no range
            return f"sampling.{name}", f"{name} is {value}, allowed is {least:g} to {most:g}"
    if params.num_logprobs > vocab_size:
        return "sampling.num_logprobs", f"num_logprobs is {params.num_logprobs}, the vocabulary has {vocab_size} tokens"
    banned = 0
    for token_id, bias in params.logit_bias.items():
        if not 0 <= token_id < vocab_size:
            return "sampling.logit_bias", f"logit_bias names token {token_id}, allowed is 0 to {vocab_size - 1}"
        if not (abs(bias) <= MAX_BIAS or bias == -math.inf):
            return "sampling.logit_bias", f"logit_bias of token {token_id} is {bias}, allowed is ±{MAX_BIAS:g} or -inf"
        banned += bias == -math.inf
    if banned >= vocab_size:
        return "sampling.logit_bias", "logit_bias bans every token of the vocabulary"
    return None


def request_refusal(request: Submit, vocab_size: int, max_request_tokens: int) -> Refusal | None:
    """Why a request cannot be served, or None. `max_request_tokens` bounds prompt plus output."""
    known, new = len(request.token_ids), request.max_new_tokens
    prompt = request.num_prompt_tokens or known
    if not 1 <= prompt <= known:
        return "token_ids", f"token_ids has {known} tokens, the prompt {prompt}; at least 1 is needed"
    if min(request.token_ids) < 0 or max(request.token_ids) >= vocab_size:
        return "token_ids", f"token_ids has an id outside 0..{vocab_size - 1}"
    if new <= known - prompt:
        return "max_new_tokens", f"max_new_tokens is {new}, at least {known - prompt + 1} is needed"
    if prompt + new > max_request_tokens:
        return (
            "max_new_tokens",
            f"the prompt has {prompt} tokens and max_new_tokens is {new}; together they may be {max_request_tokens}",
        )
    top, most = request.num_prompt_top_logprobs, min(MAX_PROMPT_TOP_LOGPROBS, vocab_size)
    if not 0 <= top <= most:
        return "num_prompt_top_logprobs", f"num_prompt_top_logprobs is {top}, allowed is 0 to {most}"
    size = len(request.grammar.source.encode("utf-8", "surrogatepass")) if request.grammar else 0
    if size > MAX_GRAMMAR_BYTES:
        return "grammar", f"the grammar takes {size:,} bytes, the limit is {MAX_GRAMMAR_BYTES:,}"
    banned_ids = set(request.stop_token_ids) if request.sampling.min_new_tokens > 0 else set()
    if len(banned_ids | request.sampling.logit_bias.keys()) >= vocab_size:
        return "sampling.min_new_tokens", "min_new_tokens and logit_bias leave no token to draw"
    return sampling_refusal(request.sampling, vocab_size)


def prompt_logprobs_refusal(request: Submit, backend: str, claims: EngineInfo | Capabilities) -> Refusal | None:
    if request.prompt_logprobs and not claims.prompt_logprobs:
        return "prompt_logprobs", f"{backend} cannot tell the log-probabilities of a prompt; leave the option out"
    if request.num_prompt_top_logprobs and not claims.prompt_top_logprobs:
        why = f"{backend} tells of a prompt its own tokens' log-probabilities alone; ask for no others"
        return "num_prompt_top_logprobs", why
    return None


def check_request(request: Submit, info: EngineInfo) -> None:
    """Refuse at the door what the engine would refuse.

    Raises:
        InvalidRequest: names field, value and limit.
    """
    refusal = request_refusal(request, info.vocab_size, info.max_request_tokens)
    prompt = request.num_prompt_tokens or len(request.token_ids)
    if prompt > info.max_prompt_tokens:
        refusal = "token_ids", f"the prompt has {prompt} tokens, the limit is {info.max_prompt_tokens}"
    elif refusal is None and 0 <= info.max_top_logprobs < request.sampling.num_logprobs:
        asked = request.sampling.num_logprobs
        refusal = "sampling.num_logprobs", f"num_logprobs is {asked}, the limit is {info.max_top_logprobs}"
    elif refusal is None:
        refusal = prompt_logprobs_refusal(request, info.backend, info)
    if refusal is not None:
        field, why = refusal
        raise InvalidRequest(why, field)
