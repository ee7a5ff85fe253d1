"""OpenAI requests to generation specs: defaults, ranges, chat template, tokens. The other way is render.py."""

from __future__ import annotations

import dataclasses

import msgspec

from tokenplane_core.messages import SamplingParams

from ..checks import (
    check_prompt_length,
    check_range,
    check_repetition_penalty,
    check_stops,
    draw_seed,
    usable_temperature,
)
from ..errors import NOT_FOUND, ApiError, invalid
from ..generation import GenerationSpec
from ..service import Service
from ..settings import Limits
from .prompts import encode_prompts, render_chat
from .schemas import NEUTRAL, ChatRequest, CompletionRequest, SamplingFields

MAX_CHOICES = 16
"""`n` may be this at most; OpenAI allows 128, which no single engine should run for one client."""

MAX_TOP_LOGPROBS = 20
_CONTEXT = "context_length_exceeded"


def check_model(name: str | None, service: Service) -> None:
    """Refuse any name but the served model's; "tgi" is what TGI's users send. Raises ApiError 404."""
    if name and name not in service.settings.accepted_names:
        raise ApiError(
            NOT_FOUND,
            f"the model `{name}` does not exist here; this server has `{service.settings.public_name}`",
            "model",
            "model_not_found",
        )


async def chat_specs(request: ChatRequest, service: Service) -> list[GenerationSpec]:
    """One spec for each of the `n` choices."""
    limits = service.require_ready()
    check_model(request.model, service)
    _refuse_unsupported(request)
    if request.top_logprobs is not None:
        check_range("top_logprobs", request.top_logprobs, 0, MAX_TOP_LOGPROBS)
        if not request.logprobs:
            raise invalid("`top_logprobs` needs `logprobs` to be true", "top_logprobs")
    max_tokens = _one_of(request, "max_completion_tokens", "max_tokens")
    sampling = _sampling(request, service, (request.top_logprobs or 0) if request.logprobs else -1)
    # A template takes time with every message and every character.
    num_chars = sum(100 + (len(m.content) if isinstance(m.content, str) else 1000) for m in request.messages)
    text = await service.in_worker(num_chars, lambda: render_chat(request, service))
    prompt_ids = await service.encode(text, add_special_tokens=False)
    spec = GenerationSpec(
        prompt_text=text,
        prompt_ids=prompt_ids,
        max_new_tokens=_room("messages", len(prompt_ids), max_tokens, limits),
        sampling=sampling,
        stop=_stops(request, service),
        ignore_eos=bool(request.ignore_eos),
        wants_tokens=sampling.num_logprobs >= 0,
    )
    return _choices(spec, request)


async def completion_specs(request: CompletionRequest, service: Service) -> list[GenerationSpec]:
    """`n` specs for each prompt, prompt by prompt."""
    limits = service.require_ready()
    check_model(request.model, service)
    _refuse_unsupported(request)
    if request.logprobs is not None:
        check_range("logprobs", request.logprobs, 0, MAX_TOP_LOGPROBS)
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise invalid(
            f"`best_of` is {request.best_of!r}; only the value of `n` ({request.n or 1}) is supported on this route",
            "best_of",
        )
    sampling = _sampling(request, service, -1 if request.logprobs is None else request.logprobs)
    stops = _stops(request, service)
    specs: list[GenerationSpec] = []
    for text, prompt_ids in await encode_prompts(request.prompt, service):
        spec = GenerationSpec(
            prompt_text=text,
            prompt_ids=prompt_ids,
            max_new_tokens=_room("prompt", len(prompt_ids), request.max_tokens, limits),
            sampling=sampling,
            stop=stops,
            ignore_eos=bool(request.ignore_eos),
            wants_tokens=sampling.num_logprobs >= 0,
        )
        specs += _choices(spec, request)
    return specs


def _room(field: str, num_prompt_tokens: int, max_tokens: int | None, limits: Limits) -> int:
    """How many tokens may be generated; absent max_tokens fills the context."""
    if max_tokens is not None:
        check_range("max_tokens", max_tokens, 1)
    check_prompt_length(field, num_prompt_tokens, limits, _CONTEXT)
    left = limits.max_total_tokens - num_prompt_tokens
    if max_tokens is not None and max_tokens > left:
        raise invalid(
            f"`{field}` has {num_prompt_tokens} tokens and `max_tokens` is {max_tokens}, together"
            f" {num_prompt_tokens + max_tokens}; the limit is {limits.max_total_tokens}, which leaves room for {left}",
            "max_tokens",
            _CONTEXT,
        )
    return left if max_tokens is None else max_tokens


# --- Parameters ---------------------------------------------------------------------------------------------


def _refuse_unsupported(request: ChatRequest | CompletionRequest) -> None:
    for name, neutral in NEUTRAL.items():
        value = getattr(request, name, None)
        if value is not None and value not in neutral:
            shown = msgspec.json.encode(value).decode()
            shown = shown if len(shown) <= 60 else shown[:57] + "..."
            raise invalid(
                f"`{name}` is not supported; the value is {shown}, leave it out", name, "unsupported_parameter"
            )
    if isinstance(request, ChatRequest) and request.best_of not in (None, 1):
        raise invalid(
            f"`best_of` is {request.best_of!r}; it is not supported on this route", "best_of", "unsupported_parameter"
        )
    if request.stream_options is not None and not request.stream:
        raise invalid("`stream_options` is only allowed when `stream` is true", "stream_options")
    if request.stream_options is not None and request.stream_options.include_obfuscation:
        field = "stream_options.include_obfuscation"
        raise invalid(f"`{field}` is true, but this server does not pad chunks; leave it out", field)


def _sampling(request: SamplingFields, service: Service, num_logprobs: int) -> SamplingParams:
    checks: list[tuple[str, float | None, float, float]] = [
        ("temperature", request.temperature, 0, 2),
        ("min_p", request.min_p, 0, 1),
        ("presence_penalty", request.presence_penalty, -2, 2),
        ("frequency_penalty", request.frequency_penalty, -2, 2),
        ("n", request.n, 1, MAX_CHOICES),
    ]
    for name, value, low, high in checks:
        if value is not None:
            check_range(name, value, low, high)
    if request.top_p is not None:
        check_range("top_p", request.top_p, 0, 1, low_open=True)
    if request.repetition_penalty is not None:
        check_repetition_penalty(request.repetition_penalty)
    if request.top_k is not None:
        check_range("top_k", request.top_k, -1)
    if request.seed is not None:
        check_range("seed", request.seed, -(2**63), 2**64 - 1)
    if request.min_tokens is not None:
        check_range(
            "min_tokens", request.min_tokens, 0, _max_tokens(request) or service.require_ready().max_total_tokens
        )
    return SamplingParams(
        temperature=usable_temperature(1.0 if request.temperature is None else request.temperature),
        top_k=min(max(request.top_k or 0, 0), service.engine.info.vocab_size),
        top_p=1.0 if request.top_p is None else request.top_p,
        min_p=request.min_p or 0.0,
        repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        seed=draw_seed() if request.seed is None else request.seed % 2**64,
        logit_bias=_logit_bias(request.logit_bias or {}, service.engine.info.vocab_size),
        min_new_tokens=request.min_tokens or 0,
        num_logprobs=num_logprobs,
    )


def _logit_bias(given: dict[str, float], vocab_size: int) -> dict[int, float]:
    bias: dict[int, float] = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocab_size):
            raise invalid(
                f"`logit_bias` has the key {key!r}; keys are token ids from 0 to {vocab_size - 1}", "logit_bias"
            )
        check_range(f"logit_bias.{key}", value, -100, 100)
        bias[int(key)] = value
    return bias


def _stops(request: SamplingFields, service: Service) -> tuple[str, ...]:
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    return check_stops("stop", stops, service.settings.max_stop_sequences)


def _max_tokens(request: SamplingFields) -> int | None:
    newer = request.max_completion_tokens if isinstance(request, ChatRequest) else None
    return request.max_tokens if newer is None else newer


def _one_of(request: ChatRequest, newer: str, older: str) -> int | None:
    a, b = getattr(request, newer), getattr(request, older)
    if a is not None and b is not None and a != b:
        raise invalid(f"`{newer}` is {a} and `{older}` is {b}; they mean the same, send one", newer)
    return _max_tokens(request)


def _choices(spec: GenerationSpec, request: SamplingFields) -> list[GenerationSpec]:
    """`n` copies that differ in their seeds: seed, seed + 1, ... Greedy choices are equal, as asked."""
    return [
        dataclasses.replace(
            spec, sampling=msgspec.structs.replace(spec.sampling, seed=(spec.sampling.seed + i) % 2**64)
        )
        for i in range(request.n or 1)
    ]
