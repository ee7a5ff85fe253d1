"""With drafts of any quality, requests get the texts they get without, in whatever circumstances; no block is lost or
published with a wrong token in it."""

from __future__ import annotations

import itertools
import random
from array import array
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenplane_core.backend.hookspecs import hookimpl
from tokenplane_core.backend.records import (
    Capabilities,
    DecodeBatch,
    LoadOptions,
    ModelSpec,
    PrefillBatch,
    SamplingBatch,
    StepHandle,
)
from tokenplane_core.engine.scheduler import Row, Scheduler
from tokenplane_core.engine.speculation import LONGEST_MATCH, NgramDrafter
from tokenplane_core.kit.adapters import write_adapter
from tokenplane_core.kit.checkpoint import write_tiny_llama
from tokenplane_core.kit.runner import LocalEngine, Outcome
from tokenplane_core.kit.simulated import SimulatedBackend, SimulatedCuda, SimulatedTpu, oracle
from tokenplane_core.kit.speculation_laws import ForesightedDrafter
from tokenplane_core.messages import SamplingParams
from tokenplane_core.model import describe_model

VOCAB = 89
MODEL = ModelSpec("simulated", "", None, "", {}, 1, 1, 1, 8, VOCAB, 320, "float32")


class VerifyingTpu(SimulatedTpu):
    """A device of compiled shapes that draws as often as it must in each."""

    profile = replace(SimulatedTpu.profile, drafts=True)


class Loop(SimulatedCuda):
    """Its texts are 0, 1, 2, 3, 4, 0, 1, ..., whatever the prompt."""

    def _contexts(self, slots: list[int], lengths: list[int]) -> list[int]:
        return [length % 5 for length in lengths]


def engine_of(
    card: type[SimulatedBackend], texts: list[list[int]], seed: int, mistakes: float, **options: object
) -> LocalEngine:
    drafter = ForesightedDrafter(texts, VOCAB, seed, mistakes)
    return LocalEngine(card, MODEL, card.profile.name, drafter=drafter, **options)  # type: ignore[arg-type]


def check_published(engine: LocalEngine) -> None:
    """Every block in the prefix index holds the tokens that it is found by."""
    pool, device = engine.engine.pool, engine.backend._hook.prefill.get_hookimpls()[0].plugin
    for sequence in engine.engine.scheduler.running:
        for i in range(sequence.num_published_blocks):
            block = pool._index.get(sequence.block_keys[i])
            if block is not None:
                known = sequence.token_ids[i * pool.block_tokens : (i + 1) * pool.block_tokens].tolist()
                assert device.cells[block].tolist() == known, "a block was published before all of it was computed"


requests = st.lists(
    st.tuples(
        st.integers(1, 90),  # prompt tokens
        st.integers(1, 60),  # new tokens
        st.integers(0, 3),  # steps before it comes
        st.one_of(st.none(), st.none(), st.integers(0, 10)),  # steps until it is cancelled
        st.booleans(),  # whether it stops at a token
    ),
    min_size=1,
    max_size=14,
)


@pytest.mark.parametrize("card", [SimulatedCuda, VerifyingTpu], ids=["cuda", "tpu"])
@given(
    load=requests,
    max_drafts=st.sampled_from([1, 3, 8]),
    mistakes=st.sampled_from([0.0, 0.2, 1.0]),
    seed=st.integers(0, 99),
    kv_cache_tokens=st.sampled_from([192, 512, None]),
    max_step_tokens=st.sampled_from([32, 100, None]),
    max_sequences=st.sampled_from([3, None]),
    prefix_cache=st.booleans(),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_request_gets_its_text(
    card: type[SimulatedBackend],
    load: list[tuple[int, int, int, int | None, bool]],
    max_drafts: int,
    mistakes: float,
    seed: int,
    kv_cache_tokens: int | None,
    max_step_tokens: int | None,
    max_sequences: int | None,
    prefix_cache: bool,
) -> None:
    rng = random.Random(seed)
    prompts = [[rng.randrange(VOCAB) for _ in range(length)] for length, *_ in load]
    answers = [oracle(prompt, new, VOCAB) for prompt, (_, new, *_) in zip(prompts, load, strict=True)]
    engine = engine_of(
        card,
        [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)],
        seed,
        mistakes,
        max_drafts=max_drafts,
        kv_cache_tokens=kv_cache_tokens,
        max_step_tokens=max_step_tokens,
        max_sequences=max_sequences,
        prefix_cache=prefix_cache,
    )
    cancels: dict[int, list[str]] = {}
    ids, stops, step = [], [], 0

    def advance() -> None:
        nonlocal step
        for request_id in cancels.get(step, ()):
            engine.cancel(request_id)
        engine.step()
        check_published(engine)
        step += 1

    for prompt, answer, (_, new, wait, cancel, has_stop) in zip(prompts, answers, load, strict=True):
        for _ in range(wait):
            advance()
        stops.append(answer[len(answer) // 2] if has_stop else -1)
        ids.append(engine.submit(prompt, new, stop_token_ids=[stops[-1]] if has_stop else []))
        if cancel is not None:
            cancels.setdefault(step + cancel, []).append(ids[-1])
    while not engine.is_idle or any(when >= step for when in cancels):
        advance()
        assert step < 20_000, f"not done: {engine.engine.stats}"
    for request_id, answer, stop, (*_, cancel, _) in zip(ids, answers, stops, load, strict=True):
        outcome = engine.outcomes[request_id]
        expected = answer[: answer.index(stop) + 1] if stop in answer else answer
        if cancel is not None:
            assert outcome.token_ids == expected[: len(outcome.token_ids)]
        elif not outcome.error:  # no room in the cache for it
            assert outcome.token_ids == expected
    assert engine.engine.pool.num_used == 0


def test_the_check_of_published_blocks_finds_one_that_holds_a_wrong_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    collected = Scheduler.collected

    def counts_what_was_drawn(self: Scheduler, row: Row, num_right: int = 0) -> None:
        collected(self, row, num_right)
        sequence = row.sequence
        num_full_blocks = min(len(sequence.token_ids) // self.pool.block_tokens, len(sequence.block_ids))
        if row.drafts and num_full_blocks > sequence.num_published_blocks:
            self._publish(sequence, num_full_blocks)

    monkeypatch.setattr(Scheduler, "collected", counts_what_was_drawn)
    engine = engine_of(SimulatedCuda, [[1, 2, *oracle([1, 2], 80, VOCAB)]], 0, 0.5, max_drafts=3)
    engine.submit([1, 2], 80)
    with pytest.raises(AssertionError, match="before all of it was computed"):
        while not engine.is_idle:
            engine.step()
            check_published(engine)


class Watched(SimulatedCuda):
    """Notes how many drafts each step had, and how many tokens it drew."""

    num_drafts: list[int]
    num_draws: list[int]
    decoding: list[int]  # drafts of each step without a prompt

    @hookimpl
    def load(self, model: ModelSpec, options: LoadOptions) -> Capabilities:
        Watched.num_drafts, Watched.num_draws, Watched.decoding = [], [], []
        return super().load(model, options)

    @hookimpl
    def prefill(self, batch: PrefillBatch, sampling: SamplingBatch) -> StepHandle:
        if batch.num_drafts is not None:
            Watched.num_drafts += batch.num_drafts[: batch.num_rows].tolist()
            Watched.decoding.append(int(batch.num_drafts.sum()))
        Watched.num_draws.append(len(sampling))
        return super().prefill(batch, sampling)

    @hookimpl
    def decode(self, batch: DecodeBatch, sampling: SamplingBatch) -> StepHandle:
        Watched.decoding.append(0)
        return super().decode(batch, sampling)


def test_right_drafts_save_steps_and_the_counters_say_so() -> None:
    engine = engine_of(SimulatedCuda, [[1, 2, *oracle([1, 2], 60, VOCAB)]], 1, 0.0, max_drafts=5)
    assert engine.generate([[1, 2]], 60) == [oracle([1, 2], 60, VOCAB)]
    stats = engine.engine.stats
    assert stats.draft_tokens == stats.draft_tokens_accepted > 20
    assert stats.prefill_steps == 1 and stats.prefill_steps + stats.decode_steps == 60 - stats.draft_tokens_accepted
    assert sum(stats.accepted.values()) == stats.prefill_steps + stats.decode_steps
    assert sum(count * times for count, times in stats.accepted.items()) == stats.draft_tokens_accepted
    assert stats.generated_tokens == 60


def test_no_step_draws_more_than_the_contract_allows() -> None:
    prompts = [[i, i] for i in range(6)]
    texts = [prompt + oracle(prompt, 40, VOCAB) for prompt in prompts]
    engine = engine_of(Watched, texts, 0, 0.0, max_drafts=4, max_sequences=6)
    engine.generate(prompts, 40)
    assert max(Watched.num_draws) == 6 + 4
    assert max(Watched.num_drafts) == 4


def test_wrong_drafts_become_few() -> None:
    """Three are tried, then one at a time, after longer and longer pauses."""
    engine = LocalEngine(Watched, MODEL, max_drafts=3, drafter=Wrong(), async_depth=0)
    engine.generate([[1, 2]], 99)
    assert Watched.num_drafts == [3, *[1] * (len(Watched.num_drafts) - 1)]
    steps = [i for i, n in enumerate(Watched.decoding) if n]
    assert [b - a - 1 for a, b in itertools.pairwise(steps)] == [min(i, 8) for i in range(1, len(steps))]
    assert len(steps) > 9


def test_drafts_take_no_block_that_somebody_needs() -> None:
    """In a cache that is just large enough, nothing is preempted, and a waiting prompt comes in as without drafts."""

    def steps(max_drafts: int) -> int:
        engine = LocalEngine(
            Loop, MODEL, max_drafts=max_drafts, drafter=Wrong(), kv_cache_tokens=5 * 16, prefix_cache=False
        )
        for i in range(4):
            engine.submit([i] * 12, 4)
        late = engine.submit([9] * 10, 2)
        count = 0
        while not engine.outcomes[late].token_ids:
            engine.step()
            count += 1
        engine.run()
        assert engine.engine.stats.requests_preempted == 0
        assert (engine.engine.stats.draft_tokens > 0) == (max_drafts > 0)
        return count

    assert steps(8) <= steps(0)


class Wrong:
    def propose(self, token_ids: array[int], most: int) -> list[int]:
        return [88] * most


def test_an_engine_that_speculates_reads_each_step_back_before_the_next() -> None:
    engine = LocalEngine(Loop, MODEL, max_drafts=2, drafter=NgramDrafter())
    engine.submit([1, 2, 3], 30)
    while not engine.is_idle:
        engine.step()
        assert not engine.engine._in_flight


def test_text_that_repeats_itself_comes_in_few_steps() -> None:
    engine = LocalEngine(Loop, MODEL, max_drafts=6, drafter=NgramDrafter())
    (text,) = engine.generate([[7, 8, 9]], 100)
    assert text == [i % 5 for i in range(3, 103)]
    assert engine.engine.stats.decode_steps < 30


def test_min_new_tokens_and_logprobs_hold_behind_drafts() -> None:
    """Of two engines, one with drafts; sampled on the device and, where it lacks a feature, on the host."""
    sampling = SamplingParams(temperature=1.0, seed=3, min_new_tokens=12, num_logprobs=3, frequency_penalty=0.5)
    for features in (None, frozenset({"temperature"})):
        engines = []
        for max_drafts in (0, 4):
            text = [5, 6] + (engines[0].outcomes["r1"].token_ids if engines else [])

            def adjust(caps: Capabilities, features: frozenset[str] | None = features) -> Capabilities:
                sampler = caps.sampling if features is None else replace(caps.sampling, features=features)
                return replace(caps, sampling=sampler)

            engine = engine_of(SimulatedCuda, [text], 0, 0.2, max_drafts=max_drafts, adjust=adjust)
            engine.submit([5, 6], 40, sampling, stop_token_ids=range(0, VOCAB, 4))
            engine.run()
            engines.append(engine)
        plain, fast = (engine.outcomes["r1"] for engine in engines)
        assert (fast.token_ids, fast.finish_reason) == (plain.token_ids, plain.finish_reason)
        assert plain.finish_reason == "stop_token" and len(plain.token_ids) > 12
        assert fast.logprobs == plain.logprobs and fast.top_logprobs == plain.top_logprobs
        assert engines[1].engine.stats.draft_tokens_accepted > 0


# --- Drafts from the text itself ----------------------------------------------------------------------------


def plain_proposal(token_ids: list[int], most: int) -> list[int]:
    """What NgramDrafter says it does, without numpy."""
    best, where = 1, -1
    for end in range(1, len(token_ids) - 1):
        length = 0
        while (
            length < min(LONGEST_MATCH, end + 1) and token_ids[end - length] == token_ids[len(token_ids) - 1 - length]
        ):
            length += 1
        if length >= 2 and length >= best:
            best, where = length, end
    if where < 0:
        return []
    out = list(token_ids)
    for i in range(most):
        out.append(out[where + 1 + i])
    return out[len(token_ids) :]


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 9))
@settings(max_examples=400, deadline=None)
def test_the_longest_recent_match_is_continued(token_ids: list[int], most: int) -> None:
    known = array("i", token_ids)
    assert NgramDrafter().propose(known, most) == plain_proposal(token_ids, most)
    known.append(1)  # nothing holds on to it


def test_drafts_stop_before_a_stop_token() -> None:
    """Of the loop 0 1 2 3 4, none goes beyond the 4 that ends the text."""
    engine = LocalEngine(Loop, MODEL, max_drafts=8, drafter=NgramDrafter())
    prompt = [i % 5 for i in range(11)]
    request = engine.submit(prompt, 40, stop_token_ids=[4])
    engine.run()
    assert engine.outcomes[request].token_ids == [1, 2, 3, 4]
    assert engine.engine.stats.draft_tokens <= 3


def test_rows_of_adapters_have_drafts_beside_prompts_that_are_scored(tmp_path: Path) -> None:
    model = describe_model(write_tiny_llama(tmp_path / "model"))
    folder = write_adapter(tmp_path / "adapter", model, seed=1, rank=4)
    prompts = [[i, 3, i + 5] for i in range(4)]

    def outcomes(texts: list[list[int]]) -> tuple[list[Outcome], LocalEngine]:
        drafter = ForesightedDrafter(texts, model.vocab_size) if texts else None
        drafts = {"max_drafts": 4 if texts else 0, "drafter": drafter}
        engine = LocalEngine(SimulatedCuda, model, max_adapters=1, max_adapter_rank=8, **drafts)  # type: ignore[arg-type]
        number = engine.load_adapter(folder)
        ids = []
        for i, prompt in enumerate(prompts):
            ids.append(engine.submit(prompt, 30, adapter=number * (i % 2), prompt_logprobs=True))
            for _ in range(4):
                engine.step()
        engine.run()
        return [engine.outcomes[i] for i in ids], engine

    plain, _ = outcomes([])
    fast, engine = outcomes([prompt + outcome.token_ids for prompt, outcome in zip(prompts, plain, strict=True)])
    for ours, theirs in zip(fast, plain, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert ours.prompt_logprobs is not None and theirs.prompt_logprobs is not None
        assert ours.prompt_logprobs[1:] == theirs.prompt_logprobs[1:]
    assert engine.engine.stats.draft_tokens_accepted > 20
