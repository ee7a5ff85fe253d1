"""Random arrivals, cancels, lengths and priorities on all four simulated cards: no leak, no starvation, right text."""

from __future__ import annotations

import math
import random
from collections.abc import Set
from dataclasses import dataclass, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenplane_core.backend.records import ModelSpec
from tokenplane_core.kit.runner import LocalEngine
from tokenplane_core.kit.simulated import (
    SimulatedBackend,
    SimulatedCuda,
    SimulatedGaudi,
    SimulatedNeuron,
    SimulatedTpu,
    oracle,
    oracle_logprobs,
)

VOCAB = 89
MAX_TOKENS = 320
MODEL = ModelSpec("simulated", "", None, "", {}, 1, 1, 1, 8, VOCAB, MAX_TOKENS, "float32")
CARDS = [SimulatedCuda, SimulatedTpu, SimulatedGaudi, SimulatedNeuron]


@dataclass(frozen=True)
class Arrival:
    """One request and what happens around it."""

    prompt_seed: int
    shared_tokens: int  # that it has in common with the others
    own_tokens: int
    new_tokens: int
    priority: int
    steps_before: int
    cancel_after: int | None  # steps; None: runs to its end

    @property
    def prompt(self) -> list[int]:
        shared, own = random.Random(0), random.Random(self.prompt_seed)
        head = [shared.randrange(VOCAB) for _ in range(self.shared_tokens)]
        return head + [own.randrange(VOCAB) for _ in range(self.own_tokens)]


arrivals = st.builds(
    Arrival,
    prompt_seed=st.integers(0, 5),
    shared_tokens=st.sampled_from([0, 0, 15, 64, 130]),
    own_tokens=st.integers(1, 60),
    new_tokens=st.integers(1, 40),
    priority=st.integers(-2, 2),
    steps_before=st.integers(0, 3),
    cancel_after=st.one_of(st.none(), st.none(), st.integers(0, 12)),
)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.profile.name)
@given(
    load=st.lists(arrivals, min_size=1, max_size=30),
    kv_cache_tokens=st.sampled_from([256, 512, 1024, None]),
    max_step_tokens=st.sampled_from([32, 100, None]),
    async_depth=st.sampled_from([0, 1]),
    prefix_cache=st.booleans(),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_request_gets_its_text_and_every_block_comes_back(
    card: type[SimulatedBackend],
    load: list[Arrival],
    kv_cache_tokens: int | None,
    max_step_tokens: int | None,
    async_depth: int,
    prefix_cache: bool,
) -> None:
    engine = LocalEngine(
        card,
        MODEL,
        card.profile.name,
        max_step_tokens=max_step_tokens,
        kv_cache_tokens=kv_cache_tokens,
        prefix_cache=prefix_cache,
        async_depth=async_depth,
    )
    ids = play(engine, load)  # every step checks the invariants
    for request_id, arrival in zip(ids, load, strict=True):
        outcome = engine.outcomes[request_id]
        expected = oracle(arrival.prompt, arrival.new_tokens, VOCAB)
        if len(arrival.prompt) + arrival.new_tokens > engine.engine.pool.num_total * engine.engine.layout.block_tokens:
            assert outcome.finish_reason == "error" and "KV cache" in outcome.error
        elif arrival.cancel_after is None:
            assert outcome.token_ids == expected
            assert outcome.finish_reason == "length"
        else:
            assert outcome.token_ids == expected[: len(outcome.token_ids)]
    assert engine.engine.pool.num_used == 0
    assert engine.engine.stats.num_running == engine.engine.stats.num_waiting == 0


@pytest.mark.parametrize("card", [SimulatedCuda, SimulatedTpu, SimulatedGaudi], ids=lambda card: card.profile.name)
@given(
    load=st.lists(arrivals, min_size=1, max_size=8),
    kv_cache_tokens=st.sampled_from([256, 512]),
    max_step_tokens=st.sampled_from([32, 100, None]),
    wanted=st.sets(st.integers(0, 7)),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_prompt_logprobs_are_told_once_and_complete(
    card: type[SimulatedBackend],
    load: list[Arrival],
    kv_cache_tokens: int,
    max_step_tokens: int | None,
    wanted: set[int],
) -> None:
    engine = LocalEngine(
        card, MODEL, card.profile.name, max_step_tokens=max_step_tokens, kv_cache_tokens=kv_cache_tokens
    )
    ids = play(engine, load, wanted)
    for i, (request_id, arrival) in enumerate(zip(ids, load, strict=True)):
        outcome = engine.outcomes[request_id]
        if i not in wanted or not outcome.token_ids:
            assert outcome.prompt_logprobs is None
        else:
            assert outcome.prompt_logprobs is not None and math.isnan(outcome.prompt_logprobs[0])
            assert outcome.prompt_logprobs[1:] == pytest.approx(oracle_logprobs(arrival.prompt, VOCAB))


def play(engine: LocalEngine, load: list[Arrival], prompt_logprobs: Set[int] = frozenset()) -> list[str]:
    """Run a load to its end; the ids of its requests. prompt_logprobs: the numbers of those that want them."""
    ids: list[str] = []
    cancels: dict[int, list[str]] = {}
    step = 0
    for arrival in load:
        for _ in range(arrival.steps_before):
            advance(engine, cancels, step)
            step += 1
        wants = len(ids) in prompt_logprobs
        ids.append(engine.submit(arrival.prompt, arrival.new_tokens, priority=arrival.priority, prompt_logprobs=wants))
        if arrival.cancel_after is not None:
            cancels.setdefault(step + arrival.cancel_after, []).append(ids[-1])
    while not engine.is_idle or any(when >= step for when in cancels):
        advance(engine, cancels, step)
        step += 1
        assert step < 20_000, f"not done: {engine.engine.stats}"
    return ids


def advance(engine: LocalEngine, cancels: dict[int, list[str]], step: int) -> None:
    for request_id in cancels.get(step, ()):
        engine.cancel(request_id)
    engine.step()


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.profile.name)
def test_a_low_priority_request_is_not_starved_by_a_stream_of_urgent_ones(card: type[SimulatedBackend]) -> None:
    engine = LocalEngine(card, MODEL, card.profile.name, max_sequences=2, kv_cache_tokens=512)
    patient = engine.submit([1, 2, 3], 4, priority=3)
    # Ageing is 10 s a level and a step 10 ms: after 3,000 steps the request is worth a newcomer's urgency.
    for step in range(6_000):
        if engine.outcomes[patient].finish_reason:
            break
        if len([o for o in engine.outcomes.values() if not o.finish_reason]) < 6:
            engine.submit([step % VOCAB, 5, 6], 4, priority=0)
        engine.step()
    assert engine.outcomes[patient].token_ids == oracle([1, 2, 3], 4, VOCAB)


def test_urgent_requests_overtake_those_that_wait() -> None:
    engine = LocalEngine(SimulatedCuda, MODEL, max_sequences=1)
    running = engine.submit([1], 20)
    engine.step()
    late = engine.submit([2], 1, priority=1)
    urgent = engine.submit([3], 1, priority=-1)
    while not engine.outcomes[urgent].finish_reason:
        engine.step()
        assert not engine.outcomes[late].finish_reason
    assert engine.outcomes[running].finish_reason == "length"
    engine.run()
    assert engine.outcomes[late].finish_reason == "length"


def test_the_best_rank_is_never_preempted() -> None:
    engine = LocalEngine(SimulatedCuda, MODEL, kv_cache_tokens=128)
    ids = [engine.submit([i] * 14, 60) for i in range(4)]
    order = []
    while not engine.is_idle:
        engine.step()
        order += [i for i in ids if engine.outcomes[i].finish_reason and i not in order]
    assert engine.engine.stats.requests_preempted > 0
    assert order[0] == ids[0]


def test_decode_goes_on_while_a_long_prompt_is_taken_in() -> None:
    """On a card that mixes, chunks of a prompt and decode rows share steps; on one that cannot, they take turns."""
    for card in (SimulatedCuda, SimulatedGaudi):
        engine = LocalEngine(card, MODEL, max_step_tokens=32, async_depth=0)
        short = engine.submit([1, 2], 30)
        while not engine.outcomes[short].token_ids:
            engine.step()
        before = len(engine.outcomes[short].token_ids)
        long = engine.submit([3] * 280, 2)
        while not engine.outcomes[long].token_ids:
            engine.step()
        assert len(engine.outcomes[short].token_ids) - before >= 4


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.profile.name)
def test_cancel_returns_blocks_in_every_state(card: type[SimulatedBackend]) -> None:
    engine = LocalEngine(card, MODEL, max_sequences=1, max_step_tokens=32)
    decoding = engine.submit([1, 2], 100)
    queued = engine.submit([3, 4], 100)
    for _ in range(6):
        engine.step()
    assert engine.outcomes[decoding].token_ids and not engine.outcomes[queued].token_ids
    engine.cancel(queued)
    engine.cancel(decoding)
    engine.run()
    prefilling = engine.submit([5] * 300, 2)
    engine.step()
    engine.cancel(prefilling)
    engine.run()
    assert engine.engine.pool.num_used == 0
    assert not engine.engine.scheduler.running


@pytest.mark.parametrize("end", ["stop token", "cancel"])
def test_at_depth_one_a_sequence_that_has_ended_runs_at_most_one_step_more(end: str) -> None:
    """The step that was launched before the end was known is its last; its slot and blocks come back with it."""
    engine = LocalEngine(SimulatedCuda, MODEL, async_depth=1)
    third = oracle([1, 2], 3, VOCAB)[2]
    request = engine.submit([1, 2], 200, stop_token_ids=[third] if end == "stop token" else [])
    while len(engine.outcomes[request].token_ids) < 3:
        engine.step()
    if end == "cancel":
        engine.cancel(request)
    engine.run(max_steps=3)
    stats = engine.engine.stats
    assert stats.decode_steps <= 4
    assert stats.blocks_used == 0 and stats.num_running == 0


def test_a_long_prompt_is_not_kept_out_by_decode_rows_where_rows_times_blocks_is_limited() -> None:
    """On a card with a bounded page table, decode rows must leave room for the context of the prompt's next piece."""
    model = replace(MODEL, max_model_tokens=4096)
    engine = LocalEngine(
        SimulatedTpu,
        model,
        async_depth=0,
        prefix_cache=False,
        adjust=lambda caps: replace(caps, limits=replace(caps.limits, max_table_entries=1024)),
    )
    for i in range(31):
        engine.submit([i, 1, 2, 3], 60 + 8 * i)
    for _ in range(20):
        engine.step()
    long = engine.submit([7] * 3500, 4)
    for step in range(400):
        if engine.outcomes[long].finish_reason:
            break
        while engine.engine.scheduler.num_waiting < 4 and not engine._inbox:
            engine.submit([step % VOCAB], 200)
        engine.step()
    assert engine.outcomes[long].finish_reason == "length", "the long prompt starves"


def test_a_prefix_hit_does_not_keep_a_prompt_out_for_longer() -> None:
    """Room for the head's first piece is room behind the blocks it finds, where its table is long already."""

    def steps_to_first_token(known: bool) -> int:
        engine = LocalEngine(
            SimulatedTpu,
            replace(MODEL, max_model_tokens=4096),
            async_depth=0,
            adjust=lambda caps: replace(caps, limits=replace(caps.limits, max_table_entries=1024)),
        )
        if known:
            engine.submit([7] * 3500, 1)
            engine.run()
        for i in range(31):
            engine.submit([i, 1, 2, 3], 60 + 8 * i)
        for _ in range(20):
            engine.step()
        long, steps = engine.submit([7] * 3500, 4), 0
        while not engine.outcomes[long].token_ids:
            engine.step()
            steps += 1
        return steps

    assert steps_to_first_token(known=True) <= steps_to_first_token(known=False)


def test_decode_rows_take_turns_where_the_device_does_not_take_them_all() -> None:
    """A bounded page table holds half of the rows at their length: nobody gets two steps while another gets none."""
    engine = LocalEngine(
        SimulatedTpu,
        MODEL,
        async_depth=0,
        adjust=lambda caps: replace(caps, limits=replace(caps.limits, max_table_entries=18)),
    )
    ids = [engine.submit([i] * 40, 30) for i in range(9)]
    behind = 0
    while not engine.is_idle:
        engine.step()
        counts = [len(engine.outcomes[i].token_ids) for i in ids if not engine.outcomes[i].finish_reason]
        if len(counts) == len(ids) and min(counts) > 0:
            assert max(counts) - min(counts) <= 2
            behind += max(counts) != min(counts)
    assert behind, "every step took all rows"
    assert [engine.outcomes[i].token_ids for i in ids] == [oracle([n] * 40, 30, VOCAB) for n in range(9)]


def test_cancelled_requests_do_not_pile_up_behind_a_blocked_head() -> None:
    engine = LocalEngine(SimulatedCuda, MODEL, max_sequences=1)
    engine.submit([1], 100)
    engine.step()
    engine.submit([2], 5)
    for i in range(500):
        cancelled = engine.submit([i % VOCAB] * 20, 5)
        if i % 50 == 0:
            engine.step()
        engine.cancel(cancelled)
    engine.step()
    assert len(engine.engine.scheduler._waiting) < 50
