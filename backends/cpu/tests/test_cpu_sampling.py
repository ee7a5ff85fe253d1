"""The native sampler keeps to the reference sampler of the core, on every tier that this machine runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import structs

from tokenplane_core.backend import sampling as reference
from tokenplane_core.backend.records import SamplingBatch
from tokenplane_core.messages import SamplingParams
from tokenplane_cpu.module_sampler import as_arrays
from tokenplane_cpu.native import library, runnable_tiers
from tokenplane_cpu.sampler import HostSampler
from tokenplane_torch.testing.driver import sampling_batch
from tokenplane_torch.testing.samples import FEATURES, assert_same, masked, padded_histories, random_case, rows

NO_HISTORY = reference.History(np.zeros(0, np.int32), 0)


LIBRARY = library()
RUNNABLE = [tier for tier in runnable_tiers() if tier != "amx_emulated"]

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="tokenplane-cpu was installed without its native kernels")


@pytest.fixture(scope="module", params=RUNNABLE, autouse=True)
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    assert LIBRARY is not None
    before = LIBRARY.tp_isa()
    LIBRARY.tp_set_isa(request.param.encode())
    yield request.param
    LIBRARY.tp_set_isa(before)


def drawn(
    logits: torch.Tensor, batch: SamplingBatch, histories: list[reference.History] | None = None
) -> reference.Samples:
    padded = padded_histories(batch, histories)
    got = HostSampler().draw(logits.float().numpy(), batch, None if padded is None else as_arrays(padded))
    return reference.Samples(got.token_ids, got.logprobs, got.top_ids, got.top_logprobs)


many = settings(
    max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.differing_executors]
)


@pytest.mark.parametrize("feature", [None, *FEATURES])
@many
@given(data=st.data(), seed=st.integers(0, 2**32 - 1), ties=st.booleans())
def test_each_feature_alone_draws_what_the_reference_draws(
    feature: str | None, data: st.DataObject, seed: int, ties: bool
) -> None:
    assert_same(drawn, *random_case(data.draw(rows([feature] if feature else [])), seed, ties))


@many
@given(data=st.data(), seed=st.integers(0, 2**32 - 1), ties=st.booleans())
def test_all_features_together_draw_what_the_reference_draws(data: st.DataObject, seed: int, ties: bool) -> None:
    assert_same(drawn, *random_case(data.draw(rows(list(FEATURES))), seed, ties))


@many
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_masks_are_never_violated(data: st.DataObject, seed: int) -> None:
    logits, batch, histories = random_case(data.draw(rows(list(FEATURES))), seed, ties=False)
    batch, guided, allowed = masked(batch, seed)
    assert_same(drawn, logits, batch, histories)
    got = drawn(torch.from_numpy(logits), batch, histories).token_ids
    assert allowed[guided, got[guided]].all()


def test_hardly_any_draw_needs_the_tolerance() -> None:
    """The allowance for rounding must not hide a sampler that is merely close."""
    mismatches = total = 0
    for seed in range(20):
        params = [SamplingParams(temperature=0.9, top_p=0.9, typical_p=0.95, min_p=0.01, seed=s) for s in range(64)]
        logits, batch, histories = random_case(params, seed, ties=False)
        want = reference.sample(logits, batch, histories)
        mismatches += int((drawn(torch.from_numpy(logits), batch).token_ids != want.token_ids).sum())
        total += len(params)
    assert mismatches <= total // 1000


def test_large_vocabularies_are_cut_the_same() -> None:
    """Flat rows, peaked rows, thousands of ties, and one logit far from all others."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1, (6, 9003)).astype(np.float32)
    logits[::2] *= 8
    logits[:4] = np.round(logits[:4], 2)
    logits[5, :5000] = -1e9
    for top_p, top_k in itertools.product((0.3, 0.9, 0.9999), (0, 40, 2000)):
        params = [
            SamplingParams(temperature=1.0, top_p=top_p, top_k=top_k, seed=i, num_logprobs=i * 20) for i in range(6)
        ]
        assert_same(drawn, logits, sampling_batch(params, range(6)), [NO_HISTORY] * 6)


def test_ties_go_to_the_lowest_id() -> None:
    logits = np.zeros((4, 5000), np.float32)
    logits[1, [40, 60]] = 1
    logits[2, 4999] = 1
    params = [SamplingParams(), SamplingParams(), SamplingParams(), SamplingParams(temperature=1.0, top_k=3, seed=1)]
    got = drawn(torch.from_numpy(logits), sampling_batch(params, range(4))).token_ids
    assert got[:3].tolist() == [0, 40, 4999]
    assert got[3] in (0, 1, 2)


def test_a_row_draws_the_same_whatever_else_is_in_the_batch() -> None:
    rng = np.random.default_rng(2)
    logits = torch.from_numpy(rng.normal(0, 2, (8, 3001)).astype(np.float32))
    params = [SamplingParams(temperature=0.5 + i / 8, top_p=0.8 if i % 2 else 1.0, seed=i) for i in range(8)]
    together = drawn(logits, sampling_batch(params, range(8))).token_ids
    for i in range(8):
        assert drawn(logits[i : i + 1], sampling_batch([params[i]], [i])).token_ids[0] == together[i]


def test_former_and_biased_ids_that_the_vocabulary_lacks_count_for_nothing() -> None:
    logits = np.random.default_rng(3).normal(0, 1, (1, 1003)).astype(np.float32)
    penalised = SamplingParams(repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.2, num_logprobs=20)
    plain, biased = (
        sampling_batch([structs.replace(penalised, temperature=1.0, seed=1, logit_bias=bias)], [0])
        for bias in ({5: 1.0}, {5: 1.0, 1003: 9.0, 2**31 - 1: 9.0})
    )
    want = drawn(torch.from_numpy(logits), plain, [reference.History(np.array([3, 5, 5], np.int32), 1)])
    former = np.array([3, 2**31 - 1, 5, 1003, -7, 5], np.int32)
    got = drawn(torch.from_numpy(logits), biased, [reference.History(former, 2)])
    for name in ("token_ids", "logprobs", "top_ids", "top_logprobs"):
        assert np.array_equal(getattr(got, name), getattr(want, name))


def test_the_lowest_finite_logit_is_a_logit() -> None:
    """What some models give in place of -inf; alone it can be drawn, and it is among the best where there are few."""
    logits = np.full((4, 5000), np.finfo(np.float32).min, np.float32)
    logits[1:, [7, 900, 4000]] = [3, 1, 2]
    params = [SamplingParams(temperature=1.0, top_k=3, seed=1), *(SamplingParams(num_logprobs=n) for n in (2, 5, 20))]
    assert_same(drawn, logits, sampling_batch(params, range(4)), [NO_HISTORY] * 4)
    got = drawn(torch.from_numpy(logits), sampling_batch(params, range(4)))
    assert got.token_ids[0] in (0, 1, 2)
    assert got.top_ids is not None and got.top_ids[2, :5].tolist() == [7, 4000, 900, 0, 1]
