"""The law for random draws and the reference sampler, against arithmetic one can do by hand."""

from __future__ import annotations

import numpy as np
import pytest

from tokenplane_core.backend.records import SamplingBatch
from tokenplane_core.backend.sampling import History, best_ids, draw, log_softmax, sample, uniforms


def batch(n: int = 1, **fields: object) -> SamplingBatch:
    """A sampling batch of n equal rows, neutral but for `fields`."""
    values: dict[str, tuple[object, type]] = {
        "temperature": (1.0, np.float32),
        "top_k": (0, np.int32),
        "top_p": (1.0, np.float32),
        "min_p": (0.0, np.float32),
        "typical_p": (1.0, np.float32),
        "repetition_penalty": (1.0, np.float32),
        "presence_penalty": (0.0, np.float32),
        "frequency_penalty": (0.0, np.float32),
        "seeds": (0, np.uint64),
        "positions": (0, np.int64),
        "num_logprobs": (-1, np.int32),
        "processed_logprobs": (False, np.bool_),
    }
    bias = fields.pop("bias", {})
    assert isinstance(bias, dict)
    arrays = {name: np.full(n, fields.get(name, value), dtype) for name, (value, dtype) in values.items()}
    return SamplingBatch(
        features=frozenset(),
        bias_starts=np.arange(n + 1, dtype=np.int32) * len(bias),
        bias_ids=np.array(list(bias) * n, np.int32),
        bias_values=np.array(list(bias.values()) * n, np.float32),
        **arrays,  # type: ignore[arg-type]
    )


def frequencies(logits: list[float], draws: int = 4000, history: tuple[int, ...] = (), **fields: object) -> np.ndarray:
    """How often each id is drawn over many positions."""
    rows = np.tile(np.array(logits, np.float32), (draws, 1))
    one = batch(draws, **fields)
    object.__setattr__(one, "positions", np.arange(draws, dtype=np.int64))
    drawn = sample(rows, one, [History(np.array(history, np.int32), 0)] * draws)
    return np.bincount(drawn.token_ids, minlength=len(logits)) / draws


def test_the_published_numbers_of_the_law() -> None:
    """Fixed for ever: another implementation can be checked against these."""
    seeds = np.array([0, 0, 1, 42, 2**64 - 1], np.uint64)
    positions = np.array([0, 1, 0, 1000, 2**40], np.int64)
    steps = (uniforms(seeds, positions) * 2**24).astype(np.int64).tolist()
    assert steps == [reference_law(int(s), int(p)) for s, p in zip(seeds, positions, strict=True)]
    assert steps == [4727170, 10946269, 14476323, 1649633, 12170834]


def reference_law(seed: int, position: int) -> int:
    """The law in plain integers, as the docstring of `uniforms` states it."""
    mask, golden = 2**64 - 1, 0x9E3779B97F4A7C15

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    return mix((mix((seed + golden) & mask) + position * golden) & mask) >> 40


def test_draws_are_uniform_over_positions_and_over_seeds() -> None:
    for seeds, positions in ((np.zeros(20_000), np.arange(20_000)), (np.arange(20_000), np.full(20_000, 7))):
        counts = np.histogram(uniforms(seeds.astype(np.uint64), positions.astype(np.int64)), bins=20, range=(0, 1))[0]
        assert abs(counts - 1000).max() < 150  # about five standard deviations


def test_a_draw_is_the_first_id_whose_cumulative_probability_passes_u() -> None:
    probabilities = np.array([0.25, 0.0, 0.5, 0.25, 0.0], np.float32)
    assert [draw(probabilities, u) for u in (0.0, 0.24, 0.25, 0.74, 0.75, 0.9999999)] == [0, 0, 2, 2, 3, 3]


def test_greedy_takes_the_highest_logit_and_the_lowest_id_on_a_tie() -> None:
    drawn = sample(
        np.array([[1.0, 5.0, 5.0, 2.0]], np.float32), batch(temperature=0.0), [History(np.zeros(0, np.int32), 0)]
    )
    assert drawn.token_ids.tolist() == [1]
    assert drawn.logprobs is None


def test_temperature_shapes_the_distribution() -> None:
    logits = [0.0, 1.0, 2.0]
    expected = np.exp(log_softmax(np.array(logits, np.float32) / np.float32(0.5)))
    assert np.abs(frequencies(logits, temperature=0.5) - expected).max() < 0.03


@pytest.mark.parametrize(
    ("fields", "allowed"),
    [
        ({"top_k": 2}, {2, 3}),
        ({"top_p": 0.6}, {3}),
        ({"top_p": 0.7}, {2, 3}),
        ({"min_p": 0.3}, {2, 3}),
        ({"bias": {3: -np.inf}}, {0, 1, 2}),
        ({"bias": {0: 50.0}}, {0}),
        ({"typical_p": 0.2}, {2}),  # entropy 0.947; information of id 2 is 1.44, of id 3 0.44
    ],
)
def test_filters_keep_exactly_these_ids(fields: dict[str, object], allowed: set[int]) -> None:
    seen = frequencies([0.0, 1.0, 2.0, 3.0], **fields)  # probabilities 0.03 0.09 0.24 0.64
    assert set(np.flatnonzero(seen)) == allowed


def test_penalties_touch_what_they_should() -> None:
    logits = np.array([[2.0, -2.0, 1.0, 0.5]], np.float32)
    history = History(np.array([0, 1, 3, 3], np.int32), num_prompt_tokens=2)
    raw = {"temperature": 0.0, "num_logprobs": 4, "processed_logprobs": True}

    def adjusted(**fields: object) -> list[float]:
        out = sample(logits, batch(**raw, **fields), [history])
        assert out.top_ids is not None and out.top_logprobs is not None
        by_id = dict(zip(out.top_ids[0].tolist(), out.top_logprobs[0].tolist(), strict=True))
        return [by_id[i] - by_id[2] + 1.0 for i in range(4)]  # id 2 is in no history

    assert adjusted(repetition_penalty=2.0) == pytest.approx([1.0, -4.0, 1.0, 0.25], abs=1e-5)
    assert adjusted(presence_penalty=0.5) == pytest.approx([2.0, -2.0, 1.0, 0.0], abs=1e-5)
    assert adjusted(frequency_penalty=0.5) == pytest.approx([2.0, -2.0, 1.0, -0.5], abs=1e-5)


def test_logprobs_raw_and_processed() -> None:
    logits = np.array([[0.0, 1.0, 2.0, 3.0]], np.float32)
    history = [History(np.zeros(0, np.int32), 0)]
    raw = sample(logits, batch(num_logprobs=3, top_k=1), history)
    processed = sample(logits, batch(num_logprobs=3, top_k=1, processed_logprobs=True), history)
    assert raw.logprobs is not None and processed.logprobs is not None and raw.top_ids is not None
    assert raw.logprobs[0] == pytest.approx(float(log_softmax(logits[0])[3]))
    assert raw.top_ids[0].tolist() == [3, 2, 1]
    assert processed.logprobs[0] == pytest.approx(0.0)
    assert processed.top_logprobs is not None and processed.top_logprobs[0, 1] == -np.inf


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    logits = np.random.default_rng(0).normal(size=(5, 50)).astype(np.float32)
    together = sample(logits, batch(5, seeds=9, positions=3), [History(np.zeros(0, np.int32), 0)] * 5).token_ids
    alone = [
        sample(logits[i : i + 1], batch(seeds=9, positions=3), [History(np.zeros(0, np.int32), 0)]).token_ids[0]
        for i in range(5)
    ]
    assert together.tolist() == alone


@pytest.mark.parametrize("seed", range(20))
def test_the_best_ids_are_the_first_of_a_stable_sort(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(-3, 3, 50).astype(np.float32)  # with many ties
    scores[rng.random(50) < 0.2] = -np.inf
    for k in (0, 1, 3, 10, 49, 50):
        assert best_ids(scores, k).tolist() == np.argsort(-scores, kind="stable")[:k].tolist()
