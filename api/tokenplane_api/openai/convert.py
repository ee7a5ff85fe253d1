"""OpenAI requests to generation specs: defaults, ranges, tools, chat template. The other way is render.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from tokenplane_core.client_adapters import LoadedAdapter
from tokenplane_core.messages import Grammar, SamplingParams

from ..checks import (
    check_prompt_length,
    check_range,
    check_repetition_penalty,
    check_stops,
    draw_seed,
    is_one_of,
    usable_temperature,
)
from ..errors import NOT_FOUND, ApiError, invalid
from ..generation import GenerationSpec
from ..service import Service
from ..settings import Limits
from ..structured import VLLM_FIELDS, at_most_one, either, from_openai, from_vllm
from ..text.answer_parser import AnswerParser
from .chat_prompt import num_characters, render_chat
from .prompts import encode_prompts
from .schemas import NEUTRAL, ChatRequest, CompletionRequest, SamplingFields
from .tools import ToolUse, calls_grammar, tool_use

MAX_CHOICES = 16
"""`n` may be this at most; OpenAI allows 128, which no single engine should run for one client."""

MAX_TOP_LOGPROBS = 20
_CONTEXT = "context_length_exceeded"


def adapter_of(name: str | None, service: Service) -> LoadedAdapter | None:
    """The adapter that `model` names; None for the served model's own names, "tgi" (of TGI's users) among them.

    Raises:
        ApiError: 404, nothing here has that name.
    """
    if not name or name in service.settings.accepted_names:
        return None
    adapter = service.engine.adapters.find(name)
    if adapter is None:
        others = len(service.engine.adapters)
        adapters = f" and {others} adapters, listed at /v1/models" if others else ""
        raise ApiError(
            NOT_FOUND,
            f"the model `{name}` does not exist here; this server has `{service.settings.public_name}`{adapters}",
            "model",
            "model_not_found",
        )
    return adapter


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A checked request, ready to run.

    specs: for each prompt its candidates. num_choices: how many candidates of each prompt the client wants to see.
    new_parser: of chat answers that may hold more than text. echoes: the texts that go in front, one for each spec.
    is_prompt_only: the client wants these alone. The one token that the engine generates then, nobody sees.
    """

    specs: list[GenerationSpec]
    num_choices: int = 1
    num_candidates: int = 1
    new_parser: Callable[[], AnswerParser] | None = None
    echoes: list[str] | None = None
    wants_logprobs: bool = False
    is_prompt_only: bool = False


async def prepare_chat(request: ChatRequest, service: Service) -> Prepared:
    limits = service.require_ready()
    adapter = adapter_of(request.model, service)
    _refuse_unsupported(request)
    max_tokens = _one_of(request, "max_completion_tokens", "max_tokens")
    sampling = _sampling(request, service, _num_chat_logprobs(request))
    tools = tool_use(request)
    grammar = _grammar(request, tools, service)
    text = await service.in_worker(num_characters(request), lambda: render_chat(request, tools, service))
    format = service.answer_format
    if grammar is not None:
        text = format.for_prescribed(text)
    prompt_ids = await service.encode(text, add_special_tokens=False)
    parses = format.needs_parser(tools is not None, grammar is not None)
    spec = GenerationSpec(
        prompt_text=text,
        prompt_ids=prompt_ids,
        max_new_tokens=_room("messages", len(prompt_ids), max_tokens, limits),
        sampling=sampling,
        stop=_stops(request, service),
        ignore_eos=bool(request.ignore_eos),
        shown_token_ids=format.shown_ids if parses else frozenset(),
        grammar=grammar,
        grammar_field=_grammar_field(request, tools),
        wants_tokens=sampling.num_logprobs >= 0,
        adapter=adapter,
    )

    def new_parser() -> AnswerParser:
        parameters, max_calls = (tools.parameters, tools.max_calls) if tools else (None, None)
        return format.new_parser(text, parameters, max_calls, is_prescribed=grammar is not None)

    return Prepared(
        specs=_choices(spec, request.n or 1),
        num_choices=request.n or 1,
        num_candidates=request.n or 1,
        new_parser=new_parser if parses else None,
        wants_logprobs=bool(request.logprobs),
    )


async def prepare_completion(request: CompletionRequest, service: Service) -> Prepared:
    limits = service.require_ready()
    adapter = adapter_of(request.model, service)
    _refuse_unsupported(request)
    num_choices = request.n or 1
    num_candidates = _best_of(request, service)
    sampling = _sampling(request, service, _num_logprobs(request, num_candidates))
    stops = _stops(request, service)
    grammar = _grammar(request, None, service)
    is_prompt_only = bool(request.echo) and request.max_tokens == 0
    max_tokens = 1 if is_prompt_only else request.max_tokens
    specs: list[GenerationSpec] = []
    echoes: list[str] = []
    for text, prompt_ids in await encode_prompts(request.prompt, service):
        spec = GenerationSpec(
            prompt_text=text,
            prompt_ids=prompt_ids,
            max_new_tokens=_room("prompt", len(prompt_ids), max_tokens, limits),
            sampling=sampling,
            stop=stops,
            ignore_eos=bool(request.ignore_eos),
            grammar=grammar,
            grammar_field=_grammar_field(request, None),
            wants_tokens=sampling.num_logprobs >= 0,
            wants_prompt_logprobs=bool(request.echo) and request.logprobs is not None,
            num_prompt_top_logprobs=(request.logprobs or 0) if request.echo else 0,
            adapter=adapter,
        )
        specs += _choices(spec, num_candidates)
        echoes += [text or service.tokenizer.decode(prompt_ids)] * num_candidates
    return Prepared(
        specs=specs,
        num_choices=num_choices,
        num_candidates=num_candidates,
        echoes=echoes if request.echo else None,
        wants_logprobs=request.logprobs is not None,
        is_prompt_only=is_prompt_only,
    )


def _best_of(request: CompletionRequest, service: Service) -> int:
    """How many candidates are generated for each prompt."""
    n, best_of = request.n or 1, request.best_of
    if best_of is None or best_of == n:
        return n
    check_range("best_of", best_of, 1, MAX_CHOICES)
    if best_of < n:
        raise invalid(f"`best_of` is {best_of}, but `n` is {n}; `best_of` must be at least `n`", "best_of")
    if best_of > service.settings.max_best_of:
        raise invalid(f"`best_of` is {best_of}, the limit is {service.settings.max_best_of} (--max-best-of)", "best_of")
    if request.stream:
        raise invalid(f"`best_of` is {best_of} and `stream` is true; the best is known only at the end", "best_of")
    return best_of


def _num_chat_logprobs(request: ChatRequest) -> int:
    """As in SamplingParams."""
    if request.top_logprobs is not None:
        check_range("top_logprobs", request.top_logprobs, 0, MAX_TOP_LOGPROBS)
        if not request.logprobs:
            raise invalid("`top_logprobs` needs `logprobs` to be true", "top_logprobs")
    return (request.top_logprobs or 0) if request.logprobs else -1


def _num_logprobs(request: CompletionRequest, num_candidates: int) -> int:
    """As in SamplingParams; candidates are compared by their log-probabilities."""
    if request.logprobs is None:
        return 0 if num_candidates > (request.n or 1) else -1
    check_range("logprobs", request.logprobs, 0, MAX_TOP_LOGPROBS)
    return request.logprobs


def _grammar(request: SamplingFields, tools: ToolUse | None, service: Service) -> Grammar | None:
    """What the answer must be, if anything: a forced call, or what the client's words for it say, or a call instead."""
    vllm = from_vllm({name: getattr(request, name) for name in VLLM_FIELDS})
    field = _grammar_field(request, None)
    grammar = at_most_one(response_format=from_openai(request.response_format), **({field: vllm} if vllm else {}))
    if tools is not None and tools.is_forced:  # then no answer is left for a format to be about
        field, grammar = "tool_choice", calls_grammar(tools, service.answer_format.tools)
    elif tools is not None and grammar is not None:
        grammar = either(calls_grammar(tools, service.answer_format.tools), grammar, field)
    if grammar is not None and service.settings.disable_grammar_support:
        raise invalid(f"`{field}` needs grammars, which the operator has disabled (--disable-grammar-support)", field)
    return grammar


def _grammar_field(request: SamplingFields, tools: ToolUse | None) -> str:
    """The field that `_grammar` was made from."""
    if tools is not None and tools.is_forced:
        return "tools"
    return next((name for name in VLLM_FIELDS if getattr(request, name) is not None), "response_format")


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
        if value is not None and not is_one_of(value, neutral):
            shown = msgspec.json.encode(value).decode()
            shown = shown if len(shown) <= 60 else shown[:57] + "..."
            raise invalid(
                f"`{name}` is not supported; the value is {shown}, leave it out", name, "unsupported_parameter"
            )
    if isinstance(request, ChatRequest) and not is_one_of(request.best_of, (None, 1)):
        raise invalid(
            "`best_of` is not supported on this route, only on /v1/completions", "best_of", "unsupported_parameter"
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


def _choices(spec: GenerationSpec, count: int) -> list[GenerationSpec]:
    """Copies that differ in their seeds: seed, seed + 1, ... Greedy choices are equal, as asked."""
    return [
        dataclasses.replace(
            spec, sampling=msgspec.structs.replace(spec.sampling, seed=(spec.sampling.seed + i) % 2**64)
        )
        for i in range(count)
    ]
