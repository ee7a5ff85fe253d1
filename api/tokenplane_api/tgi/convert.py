"""Native requests to generation specs: TGI's defaults and validation rules. The other way is render.py."""

from __future__ import annotations

import dataclasses
from itertools import islice

import msgspec

from tokenplane_core.client_adapters import LoadedAdapter
from tokenplane_core.messages import SamplingParams

from ..checks import (
    check_prompt_length,
    check_range,
    check_repetition_penalty,
    check_stops,
    draw_seed,
    usable_temperature,
)
from ..errors import invalid
from ..generation import GenerationSpec
from ..service import Service
from ..settings import Limits, Settings
from ..structured import from_tgi
from .schemas import GenerateRequest, Parameters

SLICE_TOKENS = 1024
"""TGI admits a request if its input and this many new tokens fit; beyond that it answers as much as fits."""


async def generate_specs(request: GenerateRequest, service: Service, streaming: bool) -> list[GenerationSpec]:
    """One spec, or `best_of` specs with seeds of their own.

    Raises:
        ApiError: a rule of TGI's validation is broken; names field, value and limit.
    """
    limits = service.require_ready()
    parameters = request.parameters
    best_of = _best_of(parameters, service.settings, streaming)
    _check_parameters(parameters, service.settings)
    if not request.inputs:
        raise invalid("`inputs` is empty; it needs at least one character", "inputs")
    if parameters.truncate is not None:
        check_range("truncate", parameters.truncate, 1, limits.max_input_tokens)
    prompt_ids = await service.encode(request.inputs)
    if parameters.truncate is not None:
        prompt_ids = prompt_ids[-parameters.truncate :]
    wants_tokens = streaming or wants_details(parameters)
    spec = GenerationSpec(
        prompt_text=request.inputs,
        prompt_ids=prompt_ids,
        max_new_tokens=_room(len(prompt_ids), parameters.max_new_tokens, limits),
        sampling=_sampling(parameters, service, wants_logprobs=wants_tokens or best_of > 1),
        stop=tuple(parameters.stop),
        keep_stop=True,
        wants_tokens=wants_tokens or best_of > 1,
        wants_token_texts=wants_tokens,
        grammar=from_tgi(parameters.grammar),
        wants_prompt_logprobs=parameters.decoder_input_details,
        adapter=_adapter(parameters.adapter_id, service),
    )
    return [spec, *(_another(spec) for _ in range(best_of - 1))]


def _adapter(name: str | None, service: Service) -> LoadedAdapter | None:
    if name is None:
        return None
    adapter = service.engine.adapters.find(name)
    if adapter is None:
        known = ", ".join(f"`{adapter.name}`" for adapter in islice(service.engine.adapters, 8)) or "none"
        raise invalid(f"`adapter_id` is {name!r}, which no adapter here is called; there are: {known}", "adapter_id")
    return adapter


def wants_details(parameters: Parameters) -> bool:
    return parameters.details or parameters.decoder_input_details


def _best_of(parameters: Parameters, settings: Settings, streaming: bool) -> int:
    best_of = 1 if parameters.best_of is None else parameters.best_of
    if streaming and best_of != 1:
        raise invalid(f"`best_of` must be 1 when streaming, but it is {best_of}", "best_of")
    if streaming and parameters.decoder_input_details:
        raise invalid("`decoder_input_details` must be false when streaming", "decoder_input_details")
    check_range("best_of", best_of, 1, settings.max_best_of)
    if best_of > 1 and not _names_sampling(parameters):
        raise invalid(f"`best_of` is {best_of}, which needs sampling: set `do_sample` to true", "best_of")
    return best_of


def _names_sampling(parameters: Parameters) -> bool:
    named = (parameters.temperature, parameters.top_k, parameters.top_p, parameters.typical_p)
    return parameters.do_sample or any(value is not None for value in named)


def _check_parameters(parameters: Parameters, settings: Settings) -> None:
    if parameters.temperature is not None:
        check_range("temperature", parameters.temperature, 0, low_open=True)
    if parameters.repetition_penalty is not None:
        check_repetition_penalty(parameters.repetition_penalty)
    if parameters.frequency_penalty is not None:
        check_range("frequency_penalty", parameters.frequency_penalty, -2, 2)
    for name, share in (("top_p", parameters.top_p), ("typical_p", parameters.typical_p)):
        if share is not None:
            check_range(name, share, 0, 1, low_open=True, high_open=True)
    for name, count in (("top_k", parameters.top_k), ("max_new_tokens", parameters.max_new_tokens)):
        if count is not None:
            check_range(name, count, 1)
    check_stops("stop", parameters.stop, settings.max_stop_sequences)
    if parameters.seed is not None:
        check_range("seed", parameters.seed, 0, 2**64 - 1)
        if (parameters.best_of or 1) > 1:
            raise invalid("`seed` must not be set when `best_of` is greater than 1", "seed")
    if parameters.top_n_tokens is not None:
        check_range("top_n_tokens", parameters.top_n_tokens, 0, settings.max_top_n_tokens)
    if parameters.watermark:
        raise invalid(
            "`watermark` is true, but this server does not watermark: the green lists that detectors look for come from"
            " the random numbers of one kind of device, which no other repeats; set it to false",
            "watermark",
        )
    if parameters.grammar is not None and settings.disable_grammar_support:
        raise invalid(
            "`grammar` is set, but grammars are turned off (--disable-grammar-support); leave it out", "grammar"
        )


def _room(num_prompt_tokens: int, max_new_tokens: int | None, limits: Limits) -> int:
    """TGI's rules 21 and 22, without its overshoot: the answer ends with `length` when the context is full."""
    least = min(max_new_tokens or 1, SLICE_TOKENS)
    if max_new_tokens is not None and num_prompt_tokens + least > limits.max_total_tokens:
        raise invalid(
            f"`inputs` has {num_prompt_tokens} tokens and `max_new_tokens` is {max_new_tokens}; together they may be"
            f" {limits.max_total_tokens}",
            "max_new_tokens",
        )
    check_prompt_length("inputs", num_prompt_tokens, limits)
    left = limits.max_total_tokens - num_prompt_tokens
    return left if max_new_tokens is None else min(max_new_tokens, left)


def _sampling(parameters: Parameters, service: Service, wants_logprobs: bool) -> SamplingParams:
    """Greedy unless do_sample, or a value that only means something with sampling."""
    off = (None, 1.0)
    is_sampling = (
        parameters.do_sample
        or parameters.top_k is not None
        or parameters.temperature not in off
        or parameters.top_p not in off
        or parameters.typical_p not in off
    )
    temperature = 1.0 if parameters.temperature is None else parameters.temperature
    return SamplingParams(
        temperature=usable_temperature(temperature) if is_sampling else 0.0,
        top_k=min(parameters.top_k or 0, service.engine.info.vocab_size),
        top_p=parameters.top_p or 1.0,
        typical_p=parameters.typical_p or 1.0,
        repetition_penalty=parameters.repetition_penalty or 1.0,
        frequency_penalty=parameters.frequency_penalty or 0.0,
        seed=draw_seed() if parameters.seed is None else parameters.seed,
        num_logprobs=(parameters.top_n_tokens or 0) if wants_logprobs else -1,
        processed_logprobs=True,
    )


def _another(spec: GenerationSpec) -> GenerationSpec:
    """For best_of: with a seed of its own; the prompt's log-probabilities are told once."""
    sampling = msgspec.structs.replace(spec.sampling, seed=draw_seed())
    return dataclasses.replace(spec, sampling=sampling, wants_prompt_logprobs=False)
