"""No request can hurt the engine: what is out of range is refused with a sentence, what is in range runs."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenplane_core.backend.records import ModelSpec
from tokenplane_core.kit.runner import LocalEngine, Outcome
from tokenplane_core.kit.simulated import SimulatedCuda, SimulatedNeuron
from tokenplane_core.messages import SamplingParams, Submit
from tokenplane_core.validation import request_refusal, sampling_refusal

VOCAB = 89
MODEL = ModelSpec("m", "", None, "", {}, 1, 1, 1, 8, VOCAB, 256, "float32")


@pytest.mark.parametrize(
    ("params", "field"),
    [
        (SamplingParams(temperature=-0.1), "temperature"),
        (SamplingParams(temperature=math.nan), "temperature"),
        (SamplingParams(temperature=math.inf), "temperature"),
        (SamplingParams(top_k=-1), "top_k"),
        (SamplingParams(top_k=2**31), "top_k"),
        (SamplingParams(top_p=0.0), "top_p"),
        (SamplingParams(top_p=1.1), "top_p"),
        (SamplingParams(min_p=2.0), "min_p"),
        (SamplingParams(typical_p=0.0), "typical_p"),
        (SamplingParams(repetition_penalty=0.0), "repetition_penalty"),
        (SamplingParams(presence_penalty=math.nan), "presence_penalty"),
        (SamplingParams(frequency_penalty=1e30), "frequency_penalty"),
        (SamplingParams(seed=-1), "seed"),
        (SamplingParams(seed=2**64), "seed"),
        (SamplingParams(num_logprobs=10**9), "num_logprobs"),
        (SamplingParams(num_logprobs=VOCAB + 1), "num_logprobs"),
        (SamplingParams(logit_bias={-1: 1.0}), "logit_bias"),
        (SamplingParams(logit_bias={VOCAB: 1.0}), "logit_bias"),
        (SamplingParams(logit_bias={3: math.nan}), "logit_bias"),
        (SamplingParams(logit_bias={3: math.inf}), "logit_bias"),
        (SamplingParams(logit_bias=dict.fromkeys(range(VOCAB), -math.inf)), "logit_bias"),
    ],
)
def test_parameters_out_of_range_are_named(params: SamplingParams, field: str) -> None:
    refusal = sampling_refusal(params, VOCAB)
    assert refusal is not None
    assert refusal[0] == f"sampling.{field}" and field in refusal[1]


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (Submit("a", [], 5), "token_ids"),
        (Submit("a", [1], 5, num_prompt_tokens=2), "token_ids"),
        (Submit("a", [-1], 5), "token_ids"),
        (Submit("a", [VOCAB], 5), "token_ids"),
        (Submit("a", [1, 2, 3], 1, num_prompt_tokens=2), "max_new_tokens"),
        (Submit("a", [1], 256), "max_new_tokens"),
    ],
)
def test_requests_out_of_range_are_named(request_: Submit, field: str) -> None:
    refusal = request_refusal(request_, VOCAB, 256)
    assert refusal is not None and refusal[0] == field


def test_min_new_tokens_must_leave_a_token_to_draw() -> None:
    params = SamplingParams(min_new_tokens=1)
    request = Submit("a", [1], 5, sampling=params, stop_token_ids=list(range(VOCAB)))
    refusal = request_refusal(request, VOCAB, 256)
    assert refusal is not None and refusal[0] == "sampling.min_new_tokens"


def test_stop_ids_beyond_the_vocabulary_do_no_harm() -> None:
    """A tokenizer may know more tokens than the model has logits for."""
    engine = LocalEngine(SimulatedCuda, MODEL)
    request = engine.submit([1, 2], 4, SamplingParams(min_new_tokens=2), stop_token_ids=[VOCAB + 7, 10**6])
    engine.run()
    assert len(engine.outcomes[request].token_ids) == 4


def test_prompt_logprobs_are_refused_where_the_device_cannot_tell_them() -> None:
    engine = LocalEngine(SimulatedNeuron, MODEL)
    request = engine.submit([1, 2], 4, prompt_logprobs=True)
    engine.run()
    outcome = engine.outcomes[request]
    assert outcome.finish_reason == "error" and "simulated-neuron cannot tell" in outcome.error


def test_too_many_alternatives_in_a_prompt_are_refused() -> None:
    engine = LocalEngine(SimulatedCuda, MODEL)
    for asked in (-1, 21):
        request = engine.submit([1, 2], 4, prompt_logprobs=True, num_prompt_top_logprobs=asked)
        engine.run()
        assert f"num_prompt_top_logprobs is {asked}, allowed is 0 to 20" in engine.outcomes[request].error


def test_a_request_that_outlived_its_engine_is_not_told_its_prompt_again() -> None:
    engine = LocalEngine(SimulatedCuda, MODEL)
    engine.outcomes["r"] = Outcome()
    engine.engine._take(0, Submit("r", [1, 2, 3], 4, num_prompt_tokens=2, prompt_logprobs=True))
    engine.run()
    assert engine.outcomes["r"].prompt_logprobs is None
    assert len(engine.outcomes["r"].token_ids) == 3


edge = st.sampled_from([0.0, 1e-45, 1e-9, 1e-5, 0.5, 1.0, 2.0, 1e3, 1e9, 1e38, -1.0, math.nan, math.inf, -math.inf])
params = st.builds(
    SamplingParams,
    temperature=edge,
    top_k=st.sampled_from([0, 1, 5, VOCAB, 10**6, 2**31, -3]),
    top_p=edge,
    min_p=edge,
    typical_p=edge,
    repetition_penalty=edge,
    presence_penalty=edge,
    frequency_penalty=edge,
    seed=st.sampled_from([0, 1, 2**63, 2**64 - 1, 2**64, -1]),
    logit_bias=st.dictionaries(st.integers(-2, VOCAB + 2), edge, max_size=4),
    min_new_tokens=st.integers(-1, 9),
    num_logprobs=st.sampled_from([-2, -1, 0, 3, VOCAB, VOCAB + 1, 10**9]),
    processed_logprobs=st.booleans(),
)


@pytest.mark.parametrize("card", [SimulatedCuda, SimulatedNeuron], ids=["on the device", "on the host"])
@given(several=st.lists(params, min_size=1, max_size=4))
@settings(max_examples=300, deadline=None)
def test_any_parameters_are_refused_or_served_and_hurt_nobody(
    card: type[SimulatedCuda], several: list[SamplingParams]
) -> None:
    engine = LocalEngine(card, MODEL, max_sequences=4)
    ids = [engine.submit([1, 2, 3], 5, p, stop_token_ids=[4]) for p in several]
    innocent = engine.submit([7], 5)
    engine.run()
    for request_id, p in zip(ids, several, strict=True):
        outcome = engine.outcomes[request_id]
        if sampling_refusal(p, VOCAB) is None:
            assert outcome.finish_reason in ("length", "stop_token")
            assert all(0 <= token < VOCAB for token in outcome.token_ids)
            assert not any(math.isnan(value) for value in outcome.logprobs)
        else:
            assert outcome.finish_reason == "error" and outcome.error
    assert len(engine.outcomes[innocent].token_ids) == 5
