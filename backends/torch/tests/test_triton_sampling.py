"""The draw kernel, in Triton's interpreter, keeps to the reference sampler of the core: same filters, ties and draw."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tokenplane_core.backend import sampling as reference
from tokenplane_core.messages import SamplingParams
from tokenplane_torch.testing.driver import sampling_batch
from tokenplane_torch.triton.sampling import MOST_VOCAB, draw

ROUNDING = 2e-6  # of float32 probabilities; the kernel's own sums are exact


def random_rows(rng: np.random.Generator, count: int, **off: Any) -> list[SamplingParams]:
    """Rows that each use some of the filters."""

    def maybe(off_value: float, value: float) -> float:
        return value if rng.random() < 0.5 else off_value

    def row() -> SamplingParams:
        fields = {
            "temperature": maybe(1.0, float(np.float32(rng.uniform(0.3, 2)))),
            "top_k": int(maybe(0, rng.integers(1, 60))),
            "top_p": maybe(1.0, float(np.float32(rng.uniform(0.05, 0.99)))),
            "min_p": maybe(0.0, float(np.float32(rng.uniform(0.01, 0.5)))),
        }
        return SamplingParams(seed=int(rng.integers(0, 2**63)), **(fields | off))

    return [row() for _ in range(count)]


def drawn(logits: torch.Tensor, batch: Any) -> np.ndarray:
    us = reference.uniforms(batch.seeds, batch.positions)
    columns = (batch.temperature, batch.top_k, batch.top_p, batch.min_p, us)
    token_ids = draw(logits, *(torch.from_numpy(np.ascontiguousarray(column)) for column in columns))
    assert token_ids.dtype == torch.int64
    return token_ids.numpy()


def assert_same(logits: torch.Tensor, params: list[SamplingParams]) -> int:
    """Equal to the reference, but where u lies within rounding of the border between two ids; how many did."""
    batch = sampling_batch(params, list(range(10, 10 + len(params))))
    raw = logits.float().numpy()
    want = reference.sample(raw, batch, [reference.History(np.zeros(0, np.int32), 0)] * len(params)).token_ids
    got = drawn(logits, batch)
    us = reference.uniforms(batch.seeds, batch.positions)
    border = np.flatnonzero(want != got)
    for i in border:
        probabilities = np.exp(reference.log_softmax(reference._warp(raw[i], batch, i)).astype(np.float64))
        assert params[i].temperature > 0 and probabilities[got[i]] > 0, "the filters kept something else"
        cumulative = probabilities.cumsum() / probabilities.sum()
        first, last = sorted((int(want[i]), int(got[i])))
        assert abs(cumulative[first] - us[i]) < ROUNDING and abs(cumulative[last - 1] - us[i]) < ROUNDING
    return len(border)


@pytest.mark.parametrize("vocab", [1, 7, 300, 6000])
def test_random_rows_draw_as_the_reference(vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    params = random_rows(rng, 8 if vocab > 1000 else 20)
    logits = torch.from_numpy(rng.normal(0, 3, (len(params), vocab)).astype(np.float32))
    assert assert_same(logits, params) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spread", [0.4, 2.0])
def test_ties_go_to_lower_ids(dtype: torch.dtype, spread: float) -> None:
    """Whole numbers: a few values share all ids, and every filter cuts through a tie."""
    rng = np.random.default_rng(5)
    params = random_rows(rng, 10)
    logits = torch.from_numpy(np.round(rng.normal(0, spread, (10, 200))).astype(np.float32)).to(dtype)
    assert assert_same(logits, params) <= 1


def test_positive_and_negative_zero_tie() -> None:
    """The sort of the reference does not tell them apart."""
    logits = torch.zeros(8, 64)
    logits[:, ::2] = -0.0
    rng = np.random.default_rng(6)
    assert assert_same(logits, random_rows(rng, 8, top_k=9, top_p=0.5)) == 0


@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": 1},
        {"top_p": 1e-7},
        {"min_p": 1.0},
        {"top_k": 5000},
        {"top_p": 0.9999999},
        {"top_k": 1, "top_p": 0.1, "min_p": 0.9},
    ],
    ids=str,
)
def test_filters_at_their_ends_keep_what_the_reference_keeps(filters: dict[str, Any]) -> None:
    rng = np.random.default_rng(7)
    base = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0}
    logits = torch.from_numpy(rng.normal(0, 2, (5, 150)).astype(np.float32))
    assert assert_same(logits, random_rows(rng, 5, **(base | filters))) == 0


def test_greedy_rows_take_the_lowest_of_the_highest() -> None:
    logits = torch.zeros(3, 5000)
    logits[0, [4999, 4500]] = 2.0
    logits[1, 17] = -1.0
    logits[2] = -torch.inf
    logits[2, 4097] = -3.0
    params = [SamplingParams(temperature=0.0, seed=1)] * 3
    assert drawn(logits, sampling_batch(params, [1, 2, 3])).tolist() == [4500, 0, 4097]


def test_banned_ids_are_never_drawn() -> None:
    rng = np.random.default_rng(8)
    logits = torch.from_numpy(rng.normal(0, 1, (20, 40)).astype(np.float32))
    logits[:, ::2] = -torch.inf
    params = random_rows(rng, 20)
    token_ids = drawn(logits, sampling_batch(params, list(range(20))))
    assert (token_ids % 2 == 1).all()
    assert len(set(token_ids.tolist())) > 3


def test_draws_follow_the_probabilities() -> None:
    """u on a fine grid: each id comes as often as it is likely, in id order."""
    count = 64
    weights = torch.tensor([1.0, 6.0, 0.0, 1.0])
    grid = (torch.arange(count) + 0.5) / count  # away from the borders
    ones, zeros = torch.ones(count), torch.zeros(count)
    token_ids = draw(weights.log().expand(count, 4), ones, zeros.int(), ones, zeros, grid)
    assert token_ids.tolist() == [0] * 8 + [1] * 48 + [3] * 8


def test_logits_are_not_changed() -> None:
    logits = torch.randn(2, 100)
    before = logits.clone()
    half = torch.full((2,), 0.5)
    draw(logits, half, torch.tensor([3, 0], dtype=torch.int32), half, half, half)
    assert torch.equal(logits, before)


def test_a_vocabulary_whose_sums_would_overflow_is_refused() -> None:
    column = torch.ones(1)
    with pytest.raises(ValueError, match=str(MOST_VOCAB)):
        draw(torch.empty(1, MOST_VOCAB + 1, device="meta"), column, column.int(), column, column, column)
