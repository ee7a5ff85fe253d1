"""Laws of the prompt's own log-probabilities: right where numpy can say, and the same in all circumstances."""

from __future__ import annotations

import math

from ..messages import SamplingParams
from .runner import LocalEngine
from .sampling_laws import without_sampler
from .subject import NotApplicable, Subject, law, same

_TOLERANCE = 2e-3


@law
def prompt_logprobs_are_right(subject: Subject) -> None:
    """Prompt logprobs equal a plain computation, and the text is the one that comes without them."""
    engine = _engine(subject)
    prompts = _prompts(subject)
    texts, got = _run(engine, prompts)
    same(texts, engine.generate(prompts, 4), "with prompt logprobs")
    engine.close()
    for prompt, ours in zip(prompts, got, strict=True):
        assert len(ours) == len(prompt), f"{len(ours)} prompt logprobs for {len(prompt)} tokens"
        assert math.isnan(ours[0]), f"the first token has nothing before it, but the logprob {ours[0]}"
        assert all(value <= 0 for value in ours[1:]), f"a logprob above 0 (or none) among {ours}"
    if subject.logprobs_reference is None:
        raise NotApplicable("no reference for this model (or for a dtype below float32)")
    expected = [[math.nan, *subject.logprobs_reference(prompt)] for prompt in prompts]
    _same_logprobs(got, expected, "compared with the reference")


@law
def prompt_logprobs_do_not_depend_on_circumstances(subject: Subject) -> None:
    """Alone, beside requests that want none, in chunks, with the prompt in the cache, sampled on the host: the same."""
    engine = _engine(subject, prefix_cache=False, async_depth=0)
    prompts = _prompts(subject)
    alone = [_run(engine, [prompt])[1][0] for prompt in prompts]
    engine.close()
    engine = _engine(subject)
    _same_logprobs(_run(engine, prompts, among_others=True)[1], alone, "in a batch")
    _same_logprobs(_run(engine, prompts)[1], alone, "with the prompt in the prefix cache")
    engine.close()
    if engine.capabilities.sampling.returns_logits:
        engine = _engine(subject, adjust=without_sampler)
        _same_logprobs(_run(engine, prompts, SamplingParams(temperature=1.0))[1], alone, "sampled on the host")
        engine.close()
    for max_step_tokens in (16, 48) if engine.capabilities.limits.chunk_tokens else ():
        engine = _engine(subject, max_step_tokens=max_step_tokens)
        _same_logprobs(_run(engine, prompts)[1], alone, f"in steps of {max_step_tokens} tokens")
        engine.close()


@law
def prompt_logprobs_outlive_preemption(subject: Subject) -> None:
    """A prompt that is thrown out when half of it is computed gets the numbers of an uninterrupted one."""
    engine = _engine(subject)
    caps, size = engine.capabilities, engine.engine.layout.block_tokens
    if caps.kv.kind == "slot":
        raise NotApplicable('kv.kind is "slot": a line never runs out of blocks')
    if caps.limits.chunk_tokens == 0:
        raise NotApplicable("limits.chunk_tokens is 0: prompts are never interrupted")
    if 3 * size > subject.model.max_model_tokens:
        raise NotApplicable(f"max_model_tokens holds no three blocks of {size}")
    prompt = [i * 7 % 83 for i in range(3 * size - 5)]
    expected = _run(engine, [prompt])[1]
    engine.close()
    # The first request grows into a second block while the prompt, in small steps, holds all the others.
    engine = _engine(subject, kv_cache_tokens=4 * size, max_step_tokens=16)
    engine.submit([1] * (size - 1), 8)
    got = _run(engine, [prompt])[1]
    assert engine.engine.stats.requests_preempted > 0, "nothing was preempted: the law has lost its subject"
    engine.close()
    _same_logprobs(got, expected, "after preemption")


@law
def prompt_top_logprobs_are_those_of_a_draw(subject: Subject) -> None:
    """The best at each place of a prompt are what a draw there would tell, whoever asks for how many beside it."""
    engine = _engine(subject, prefix_cache=False)
    caps = engine.capabilities
    if not caps.prompt_top_logprobs:
        engine.close()
        raise NotApplicable("prompt_top_logprobs is False")
    prompts = [prompt for prompt in _prompts(subject) if len(prompt) > 1]
    wanted = [i % 4 for i in range(len(prompts))]
    ids = [
        engine.submit(prompt, 4, prompt_logprobs=True, num_prompt_top_logprobs=k)
        for prompt, k in zip(prompts, wanted, strict=True)
    ]
    engine.run()
    tops = [engine.outcomes[i].prompt_top_logprobs for i in ids]
    for prompt, k, top in zip(prompts, wanted, tops, strict=True):
        if k == 0:
            assert top is None, f"{len(top or [])} places with the best, but nobody asked"
            continue
        assert top is not None and [len(best) for best in top] == [0] + [k] * (len(prompt) - 1)
        for place in sorted({1, len(prompt) // 2, len(prompt) - 1}):
            drawn = engine.submit(prompt[:place], 1, SamplingParams(num_logprobs=k))
            engine.run()
            _same_best(top[place], engine.outcomes[drawn].top_logprobs[0], f"at token {place} of {len(prompt)}")
    if caps.limits.chunk_tokens:
        engine.close()
        engine = _engine(subject, prefix_cache=False, max_step_tokens=16)
        chosen = next(i for i, k in enumerate(wanted) if k == 2)
        engine.submit(prompts[chosen], 4, prompt_logprobs=True, num_prompt_top_logprobs=2)
        engine.run()
        (outcome,) = engine.outcomes.values()
        whole = tops[chosen] or []
        assert len(outcome.prompt_top_logprobs or []) == len(whole)
        for place, best in enumerate(outcome.prompt_top_logprobs or []):
            _same_best(best[:1], whole[place][:1], f"in steps of 16 tokens, at token {place}")
    engine.close()


def _same_best(got: list[tuple[int, float]], expected: list[tuple[int, float]], circumstance: str) -> None:
    """As log-probabilities: which of two ids that are about as likely comes first, nobody says."""
    for (_, ours), (_, theirs) in zip(got, expected, strict=True):
        close = abs(ours - theirs) <= _TOLERANCE * max(1.0, abs(theirs))
        assert close, f"{circumstance}: the best are {got}, not {expected}"
    known, least = dict(expected), expected[-1][1] if expected else 0.0
    for token_id, ours in got:
        theirs = known.get(token_id, least)
        assert abs(ours - theirs) <= 2 * _TOLERANCE * max(1.0, abs(theirs)), f"{circumstance}: {got}, not {expected}"


def _engine(subject: Subject, **options: object) -> LocalEngine:
    engine = subject.engine(**options)
    if not engine.capabilities.prompt_logprobs:
        engine.close()
        raise NotApplicable("prompt_logprobs is False")
    return engine


def _prompts(subject: Subject) -> list[list[int]]:
    """The first has a single token, so nothing to tell."""
    edge = min(65, subject.model.max_model_tokens // 3)
    return [*subject.prompts(4, seed=21, longest=80), [i * 7 % 83 for i in range(edge)]]


def _run(
    engine: LocalEngine, prompts: list[list[int]], sampling: SamplingParams | None = None, among_others: bool = False
) -> tuple[list[list[int]], list[list[float]]]:
    """Texts of four tokens, and the prompts' logprobs. among_others: with as many requests that ask for none."""
    ids = []
    for prompt in prompts:
        if among_others:
            engine.submit(prompt[: len(prompt) // 2 + 1], 4)
        ids.append(engine.submit(prompt, 4, sampling, prompt_logprobs=True))
    engine.run()
    outcomes = [engine.outcomes[i] for i in ids]
    for outcome in outcomes:
        assert not outcome.error, outcome.error
        assert outcome.num_cached_tokens == 0, "the core took a prefix hit, whose logprobs nobody computes"
    return [outcome.token_ids for outcome in outcomes], [outcome.prompt_logprobs or [] for outcome in outcomes]


def _same_logprobs(got: list[list[float]], expected: list[list[float]], circumstance: str) -> None:
    for i, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        assert len(ours) == len(theirs), f"{circumstance}: prompt {i} has {len(ours)} logprobs, not {len(theirs)}"
        for at, (a, b) in enumerate(zip(ours[1:], theirs[1:], strict=True), 1):
            close = abs(a - b) <= _TOLERANCE * max(1.0, abs(b))
            assert close, f"{circumstance}: token {at} of prompt {i} has the logprob {a}, not {b}"
