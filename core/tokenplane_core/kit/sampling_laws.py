"""Laws of sampling: the published draw, the reference sampler, every row on its own parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec

from ..backend.records import Capabilities
from ..messages import SamplingParams
from .runner import LocalEngine, Outcome
from .subject import NotApplicable, Subject, law, same

SAMPLING_CASES = {
    "greedy": SamplingParams(),
    "greedy tie": SamplingParams(logit_bias={9: 2.0**29, 4: 2.0**29}),  # float32 makes the two logits equal
    "drawn tie": SamplingParams(temperature=1.0, top_k=1, logit_bias={9: 2.0**29, 4: 2.0**29}),
    "temperature": SamplingParams(temperature=0.8),
    "top_k": SamplingParams(temperature=1.0, top_k=5),
    "top_p": SamplingParams(temperature=1.1, top_p=0.6),
    "min_p": SamplingParams(temperature=1.0, min_p=0.2),
    "typical_p": SamplingParams(temperature=0.9, typical_p=0.5),
    "repetition_penalty": SamplingParams(repetition_penalty=1.7),
    "presence_penalty": SamplingParams(presence_penalty=1.5),
    "frequency_penalty": SamplingParams(temperature=0.7, frequency_penalty=0.9),
    "logit_bias": SamplingParams(temperature=1.0, logit_bias={0: 3.0, 1: float("-inf"), 2: -2.5}),
    "logprobs": SamplingParams(temperature=0.9, num_logprobs=4),
    "processed_logprobs": SamplingParams(temperature=0.9, top_k=20, num_logprobs=4, processed_logprobs=True),
    "all": SamplingParams(
        temperature=1.2,
        top_k=30,
        top_p=0.9,
        min_p=0.01,
        typical_p=0.95,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        logit_bias={3: 1.5},
        num_logprobs=2,
    ),
}


@law
def seed_means_the_same_everywhere(subject: Subject) -> None:
    """A seeded draw does not depend on the batch, on what ran before, or on how the prompt was cut."""
    prompts = subject.prompts(6, seed=8)
    params = [SamplingParams(temperature=1.0, seed=(i << 40) + 100) for i in range(len(prompts))]
    alone = subject.engine(prefix_cache=False, async_depth=0)
    expected = [alone.generate([prompt], 8, p)[0] for prompt, p in zip(prompts, params, strict=True)]
    for circumstance, options in (("in a batch", {}), ("with chunked prompts", {"max_step_tokens": 16})):
        engine = subject.engine(**options)
        ids = [engine.submit(prompt, 8, p) for prompt, p in zip(prompts, params, strict=True)]
        engine.run()
        same([engine.outcomes[i].token_ids for i in ids], expected, f"seeded, {circumstance}")
        engine.close()
    alone.close()


@law
def filters_bite(subject: Subject) -> None:
    """What can be said without logits: top_k 1 is greedy, a banned id is never drawn, a hugely favoured one always."""
    engine = subject.engine()
    prompts = subject.prompts(4, seed=11, longest=24)
    greedy = engine.generate(prompts, 6)
    same(engine.generate(prompts, 6, SamplingParams(temperature=1.5, top_k=1, seed=3)), greedy, "top_k 1")
    banned = {text[0]: float("-inf") for text in greedy}
    texts = engine.generate(prompts, 12, SamplingParams(temperature=1.0, logit_bias=banned))
    drawn = set().union(*texts) & set(banned)
    assert not drawn, f"banned ids were drawn: {drawn}"
    favoured = engine.generate(prompts, 6, SamplingParams(temperature=1.0, logit_bias={5: 1e4}))
    same(favoured, [[5] * 6] * len(prompts), "a bias of 10,000")
    engine.close()


@law
def sampler_keeps_the_law(subject: Subject) -> None:
    """The device draws what the reference sampler draws from the device's own logits, and reports its logprobs.

    All parameter sets run together, greedy rows among them, so that no row may take another's; once more with
    chunked prompts, with prefix hits, and with preemption, where penalties must still count the right tokens.
    """
    host = subject.engine(prefix_cache=False, adjust=without_sampler)
    if not host.capabilities.sampling.returns_logits:
        raise NotApplicable("sampling.returns_logits is False: there is nothing to compare with")
    expected = _sampled(subject, host)
    host.close()
    circumstances: tuple[tuple[str, dict[str, Any]], ...] = (
        ("", {}),
        (" in chunks", {"max_step_tokens": 16}),
        (" after preemption", {"kv_cache_tokens": max(4 * host.engine.layout.block_tokens, 96)}),
    )
    for circumstance, options in circumstances:
        device = subject.engine(**options)
        for again in ("", ", a second time (prefix hits)"):
            got = _sampled(subject, device)
            for name, ours, theirs in zip(_CASE_ROWS, got, expected, strict=True):
                _same_samples(f"{name}{circumstance}{again}", ours, theirs)
        device.close()


@law
def declared_features_act(subject: Subject) -> None:
    """Every sampling feature the device declares has an effect, seen from the texts alone."""
    engine = subject.engine(prefix_cache=False)
    features = engine.capabilities.sampling.features
    if not features:
        raise NotApplicable("sampling.features is empty: the core samples on the host")
    prompts = subject.prompts(3, seed=15, longest=24)
    for feature in sorted(features - {"mask"}):  # that one has laws of its own: mask_laws.py
        _EFFECTS[feature](engine, prompts)
    engine.close()


_HOT = SamplingParams(temperature=5.0)  # so flat that two seeds hardly ever draw the same text
_NUM_TOKENS = 8


def _texts(engine: LocalEngine, prompts: list[list[int]], params: SamplingParams, **changes: Any) -> list[list[int]]:
    return engine.generate(prompts, _NUM_TOKENS, msgspec.structs.replace(params, **changes))


def _temperature_acts(engine: LocalEngine, prompts: list[list[int]]) -> None:
    first, second = (_texts(engine, prompts, _HOT, seed=seed) for seed in (1, 2))
    assert first != second, "temperature 5: two seeds drew the same text"


def _keeps_only_the_best(feature: str, value: float) -> Callable[[LocalEngine, list[list[int]]], None]:
    def check(engine: LocalEngine, prompts: list[list[int]]) -> None:
        got = _texts(engine, prompts, _HOT, **{feature: value})
        same(got, _texts(engine, prompts, SamplingParams()), f"{feature} {value:g} leaves the best id only, but")

    return check


def _typical_p_acts(engine: LocalEngine, prompts: list[list[int]]) -> None:
    first, second = (_texts(engine, prompts, _HOT, typical_p=1e-6, seed=seed) for seed in (1, 2))
    same(first, second, "typical_p 1e-06 leaves one id, so the seed cannot matter, but")


def _never_repeats(feature: str, of_prompt: bool) -> Callable[[LocalEngine, list[list[int]]], None]:
    def check(engine: LocalEngine, prompts: list[list[int]]) -> None:
        for prompt, text in zip(prompts, _texts(engine, prompts, SamplingParams(), **{feature: 1e3}), strict=True):
            seen = set(prompt) if of_prompt else set()
            for token in text:
                assert token not in seen, f"{feature} 1000: {text} repeats {token}"
                seen.add(token)

    return check


def _logit_bias_acts(engine: LocalEngine, prompts: list[list[int]]) -> None:
    got = _texts(engine, prompts, SamplingParams(), logit_bias={7: 1e4})
    same(got, [[7] * _NUM_TOKENS] * len(prompts), "a logit bias of 10,000 on id 7")


def _logprobs_act(engine: LocalEngine, prompts: list[list[int]]) -> None:
    for outcome in _outcomes(engine, prompts, SamplingParams(num_logprobs=2)):
        best = [top[0][1] for top in outcome.top_logprobs if len(top) == 2]
        assert len(best) == _NUM_TOKENS, f"num_logprobs 2: {outcome.top_logprobs}"
        assert _close(outcome.logprobs, best) and max(best) <= 0, f"greedy logprobs {outcome.logprobs} are not {best}"


def _processed_logprobs_act(engine: LocalEngine, prompts: list[list[int]]) -> None:
    flat = SamplingParams(temperature=1e4, num_logprobs=1, processed_logprobs=True)
    for outcome in _outcomes(engine, prompts, flat):
        spread = [outcome.logprobs[i] - top[0][1] for i, top in enumerate(outcome.top_logprobs)]
        assert len(spread) == _NUM_TOKENS and min(spread) > -0.1, (
            f"temperature 10,000 draws all ids alike, processed_logprobs lie {spread} below the best"
        )


def _outcomes(engine: LocalEngine, prompts: list[list[int]], params: SamplingParams) -> list[Outcome]:
    ids = [engine.submit(prompt, _NUM_TOKENS, params) for prompt in prompts]
    engine.run()
    return [engine.outcomes[i] for i in ids]


_EFFECTS = {
    "temperature": _temperature_acts,
    "top_k": _keeps_only_the_best("top_k", 1),
    "top_p": _keeps_only_the_best("top_p", 1e-6),
    "min_p": _keeps_only_the_best("min_p", 1.0),
    "typical_p": _typical_p_acts,
    "repetition_penalty": _never_repeats("repetition_penalty", of_prompt=True),
    "presence_penalty": _never_repeats("presence_penalty", of_prompt=False),
    "frequency_penalty": _never_repeats("frequency_penalty", of_prompt=False),
    "logit_bias": _logit_bias_acts,
    "logprobs": _logprobs_act,
    "processed_logprobs": _processed_logprobs_act,
}


def without_sampler(caps: Capabilities) -> Capabilities:
    """The same device, made to hand over logits for all but greedy rows."""
    return replace(caps, sampling=replace(caps.sampling, features=frozenset()))


_CASE_ROWS = [name for name in SAMPLING_CASES for _ in range(2)]


def _sampled(subject: Subject, engine: LocalEngine) -> list[Outcome]:
    """Two prompts with each set of parameters, all at once."""
    prompts = subject.prompts(len(_CASE_ROWS) + 1, seed=9, longest=40)[1:]
    ids = [
        engine.submit(prompt, 8, replace_seed(SAMPLING_CASES[name], (7 * i) << 34))
        for i, (name, prompt) in enumerate(zip(_CASE_ROWS, prompts, strict=True))
    ]
    engine.run()
    return [engine.outcomes[i] for i in ids]


def _same_samples(name: str, ours: Outcome, theirs: Outcome) -> None:
    same([ours.token_ids], [theirs.token_ids], f"sampling with {name}")
    assert len(ours.logprobs) == len(theirs.logprobs), f"{name}: {len(ours.logprobs)} logprobs"
    assert _close(ours.logprobs, theirs.logprobs), f"{name}: {ours.logprobs} instead of {theirs.logprobs}"
    for mine, other in zip(ours.top_logprobs, theirs.top_logprobs, strict=True):
        assert _close([v for _, v in mine], [v for _, v in other]), f"{name}: {mine} instead of {other}"
        for (my_id, value), (other_id, _) in zip(mine, other, strict=True):
            # Ids may change places only where their values are as good as equal.
            near = {i for i, v in other if abs(v - value) <= 1e-3}
            assert my_id == other_id or my_id in near, f"{name}: ids of {mine} instead of {other}"


def replace_seed(params: SamplingParams, seed: int) -> SamplingParams:
    """The same parameters with another seed."""
    return msgspec.structs.replace(params, seed=seed)


def _close(ours: list[float], theirs: list[float], tolerance: float = 1e-3) -> bool:
    return all(a == b or abs(a - b) <= tolerance * max(1.0, abs(b)) for a, b in zip(ours, theirs, strict=True))
