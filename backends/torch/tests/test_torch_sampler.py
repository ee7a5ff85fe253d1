"""The torch sampler keeps to the reference sampler of the core: same order, same ties, same draw."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenplane_torch.sampler as torch_sampler
from tokenplane_core.backend import sampling as reference
from tokenplane_core.backend.records import TokenMask
from tokenplane_core.messages import SamplingParams
from tokenplane_torch.slots import Histories
from tokenplane_torch.testing.device import PlainDevice
from tokenplane_torch.testing.driver import sampling_batch

VOCAB = 97
ROUNDING = 1e-5  # of float32 probabilities, summed in another order

FEATURES: dict[str, st.SearchStrategy[Any]] = {
    "top_k": st.integers(1, VOCAB + 5),
    "top_p": st.floats(0.0625, 0.984375, width=32),
    "min_p": st.floats(0.015625, 0.875, width=32),
    "typical_p": st.floats(0.0625, 0.984375, width=32),
    "repetition_penalty": st.floats(0.5, 2.0, width=32),
    "presence_penalty": st.floats(-2.0, 2.0, width=32),
    "frequency_penalty": st.floats(-2.0, 2.0, width=32),
    "logit_bias": st.dictionaries(
        st.integers(0, VOCAB - 1), st.sampled_from([-100.0, -1.5, 3.0, float("-inf")]), max_size=5
    ),
    "num_logprobs": st.integers(0, 7),
    "processed_logprobs": st.just(True),
}


def drawn_by_torch(
    logits: torch.Tensor, batch: Any, histories: list[reference.History] | None = None
) -> reference.Samples:
    """What the torch sampler draws, on the host; histories of every row."""
    device = PlainDevice()
    known = None
    penalised = np.flatnonzero(torch_sampler.needs_history(batch))
    if histories is not None and len(penalised):
        mine = [histories[i] for i in penalised]
        padded = np.full((len(mine), max(len(h.token_ids) for h in mine)), VOCAB - 1, np.int32)
        for row, history in zip(padded, mine, strict=True):
            row[: len(history.token_ids)] = history.token_ids
        lengths, prompts = [len(h.token_ids) for h in mine], [h.num_prompt_tokens for h in mine]
        known = Histories(torch.from_numpy(padded), torch.tensor(lengths), torch.tensor(prompts))
    drawn = torch_sampler.TorchSampler(device).draw(logits, np.arange(len(logits)), batch, known)
    token_ids, *rest = [tensor.numpy() for tensor in drawn.tensors()]
    return reference.Samples(token_ids, *(rest or (None, None, None)))


def rows(features: list[str]) -> st.SearchStrategy[list[SamplingParams]]:
    """Rows that each use some of the features, greedy or not."""
    fields = {name: st.one_of(FEATURES[name], st.just(getattr(SamplingParams(), name))) for name in features}
    temperature = st.one_of(st.just(0.0), st.floats(0.25, 2.0, width=32))
    row = st.builds(SamplingParams, temperature=temperature, seed=st.integers(0, 2**64 - 1), **fields)
    return st.lists(row, min_size=1, max_size=6)


def random_case(params: list[SamplingParams], seed: int, ties: bool) -> tuple[np.ndarray, Any, list[reference.History]]:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (len(params), VOCAB)).astype(np.float32)
    if ties:
        logits = np.round(logits)
    histories = [
        reference.History(rng.integers(0, VOCAB, length).astype(np.int32), int(rng.integers(0, length + 1)))
        for length in rng.integers(0, 40, len(params))
    ]
    return logits, sampling_batch(params, [len(h.token_ids) for h in histories]), histories


def assert_same(logits: np.ndarray, batch: Any, histories: list[reference.History]) -> None:
    want = reference.sample(logits, batch, histories)
    got = drawn_by_torch(torch.from_numpy(logits.copy()), batch, histories)
    same = got.token_ids == want.token_ids
    for i in np.flatnonzero(~same).tolist():
        assert is_borderline(logits[i], batch, i, histories[i], int(got.token_ids[i]))
    if want.logprobs is None:
        assert got.logprobs is None and got.top_ids is None and got.top_logprobs is None
        return
    assert got.logprobs is not None and got.top_ids is not None and got.top_logprobs is not None
    assert want.top_ids is not None and want.top_logprobs is not None
    np.testing.assert_allclose(got.logprobs[same], want.logprobs[same], atol=1e-4)
    np.testing.assert_allclose(got.top_logprobs[same], want.top_logprobs[same], atol=1e-4)
    assert got.top_ids.dtype == np.int32 and got.top_ids.shape == want.top_ids.shape
    for i, j in np.argwhere((got.top_ids != want.top_ids) & same[:, None]):
        # Ids whose logprobs agree but for rounding may trade places, or be the one that just missed the list.
        alike = np.isclose(want.top_logprobs[i], want.top_logprobs[i, j], rtol=0, atol=1e-5).sum()
        assert alike > 1 or j == batch.num_logprobs[i] - 1


def is_borderline(logits: np.ndarray, batch: Any, i: int, history: reference.History, token: int) -> bool:
    """True if the reference draws the token too once a limit or the random number moves by a rounding error."""
    if batch.temperature[i] == 0:
        return False
    u = float(reference.uniforms(batch.seeds, batch.positions)[i])
    for moves in itertools.product((-ROUNDING, 0, ROUNDING), repeat=3):
        moved = replace(
            batch,
            top_p=np.where(batch.top_p < 1, batch.top_p + np.float32(moves[0]), 1).astype(np.float32),
            typical_p=np.where(batch.typical_p < 1, batch.typical_p + np.float32(moves[1]), 1).astype(np.float32),
            min_p=(batch.min_p * np.float32(1 + moves[2])).astype(np.float32),
        )
        warped = reference._warp(reference._adjust(logits, moved, i, history), moved, i)
        cumulative = np.cumsum(np.exp(reference.log_softmax(warped)), dtype=np.float64)
        below = cumulative[token - 1] if token else 0.0
        if np.isfinite(warped[token]) and below - ROUNDING <= u * cumulative[-1] <= cumulative[token] + ROUNDING:
            return True
    return False


@pytest.mark.parametrize("feature", [None, *FEATURES])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1), ties=st.booleans())
def test_each_feature_alone_draws_what_the_reference_draws(
    feature: str | None, data: st.DataObject, seed: int, ties: bool
) -> None:
    assert_same(*random_case(data.draw(rows([feature] if feature else [])), seed, ties))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1), ties=st.booleans())
def test_all_features_together_draw_what_the_reference_draws(data: st.DataObject, seed: int, ties: bool) -> None:
    assert_same(*random_case(data.draw(rows(list(FEATURES))), seed, ties))


def test_hardly_any_draw_needs_the_tolerance() -> None:
    """The allowance for rounding must not hide a sampler that is merely close."""
    mismatches = total = 0
    for seed in range(40):
        params = [SamplingParams(temperature=0.9, top_p=0.9, typical_p=0.95, min_p=0.01, seed=s) for s in range(64)]
        logits, batch, histories = random_case(params, seed, ties=False)
        want = reference.sample(logits, batch, histories)
        got = drawn_by_torch(torch.from_numpy(logits), batch, histories)
        mismatches += int((got.token_ids != want.token_ids).sum())
        total += len(params)
    assert mismatches <= total // 1000


def test_a_vocabulary_larger_than_the_nucleus_guess_is_cut_the_same() -> None:
    """Flat and peaked rows: the guess holds for one and fails for the other."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1, (6, 9000)).astype(np.float32)
    logits[::2] *= 8
    logits = np.round(logits, 2)  # thousands of ties
    for top_p, top_k in itertools.product((0.3, 0.9, 0.9999), (0, 40, 2000)):
        params = [SamplingParams(temperature=1.0, top_p=top_p, top_k=top_k, seed=i) for i in range(6)]
        assert_same(logits, sampling_batch(params, range(6)), [reference.History(np.zeros(0, np.int32), 0)] * 6)


def test_the_best_ids_are_those_of_a_stable_sort() -> None:
    rng = np.random.default_rng(1)
    scores = np.round(rng.normal(0, 2, (5, 4000))).astype(np.float32)
    scores[0, :100] = -np.inf
    scores[1, 7], scores[1, 5] = 0.0, -0.0
    for k in (1, 37, 499, 501, 4000):
        want = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        np.testing.assert_array_equal(torch_sampler._best(torch.from_numpy(scores), k).numpy(), want)


def test_greedy_takes_the_lowest_id_on_a_tie_and_asks_for_no_histories() -> None:
    logits = torch.zeros(3, VOCAB, dtype=torch.bfloat16)
    logits[1, 40] = logits[1, 60] = 1
    drawn = drawn_by_torch(logits, sampling_batch([SamplingParams()] * 3, [0, 1, 2]))
    assert drawn.token_ids.tolist() == [0, 40, 0]
    assert drawn.token_ids.dtype == np.int32 and drawn.logprobs is None


def test_a_seed_draws_the_same_token_whatever_else_is_in_the_batch() -> None:
    rng = np.random.default_rng(2)
    logits = rng.normal(0, 2, (8, VOCAB)).astype(np.float32)
    params = [SamplingParams(temperature=0.5 + i / 8, top_p=0.8 if i % 2 else 1.0, seed=i) for i in range(8)]
    together = drawn_by_torch(torch.from_numpy(logits), sampling_batch(params, range(8)))
    for i in range(8):
        alone = drawn_by_torch(torch.from_numpy(logits[i : i + 1]), sampling_batch([params[i]], [i]))
        assert alone.token_ids[0] == together.token_ids[i]


def test_logits_are_left_as_they_were() -> None:
    """The caller may still hand them out."""
    rng = np.random.default_rng(3)
    logits = torch.from_numpy(rng.normal(0, 2, (2, VOCAB)).astype(np.float32))
    before = logits.clone()
    params = [SamplingParams(temperature=0.7, top_k=5, logit_bias={3: 4.0}, repetition_penalty=1.3, num_logprobs=2)] * 2
    drawn_by_torch(logits, sampling_batch(params, [4, 4]), [reference.History(np.arange(4, dtype=np.int32), 2)] * 2)
    assert torch.equal(logits, before)


# --- The fused kernel ---------------------------------------------------------------------------------------


def right(logits: torch.Tensor, temperature: torch.Tensor, *filters: torch.Tensor) -> torch.Tensor:
    """What a kernel computes, by the reference."""
    top_k, top_p, min_p, us = (column.numpy() for column in filters)
    batch = replace(
        torch_sampler.neutral_batch(len(logits)), temperature=temperature.numpy(), top_k=top_k, top_p=top_p, min_p=min_p
    )
    tokens = logits.argmax(-1)
    for i in np.flatnonzero(batch.temperature).tolist():
        warped = reference._warp(logits[i].float().numpy(), batch, i)
        tokens[i] = reference.draw(np.exp(reference.log_softmax(warped)), us[i])
    return tokens


def wrong(logits: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    return logits.argmax(-1)


def failing(*_: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("out of resource: shared memory")


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (right, "one fused kernel"),
        (wrong, r"torch \(not the fused kernel: it draws \d+ of 64 tokens otherwise\)"),
        (failing, r"torch \(not the fused kernel: RuntimeError: out of resource: shared memory\)"),
    ],
)
def test_a_draw_kernel_is_tried_before_it_is_trusted(kernel: Any, said: str) -> None:
    sampler = torch_sampler.TorchSampler(PlainDevice(), kernel)
    assert re.match(said, sampler.describe())
    batch = sampling_batch([SamplingParams(temperature=1.0, seed=3)], [5])
    drawn = sampler.draw(torch.zeros((1, VOCAB)), np.arange(1), batch, None).token_ids
    assert int(drawn) == int(reference.uniforms(batch.seeds, batch.positions)[0] * VOCAB)


def test_logprobs_go_with_the_draw_kernel() -> None:
    """The way through torch waits for the device, and would cost every row of the batch the step ahead."""
    calls = []

    def kernel(logits: torch.Tensor, *columns: torch.Tensor) -> torch.Tensor:
        calls.append(len(logits))
        return right(logits, *columns)

    sampler = torch_sampler.TorchSampler(PlainDevice(), kernel)
    params = [SamplingParams(temperature=0.7, seed=1, num_logprobs=2), SamplingParams(), SamplingParams(num_logprobs=0)]
    batch = sampling_batch(params, [5, 6, 7])
    logits = torch.randn((3, VOCAB), generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    calls.clear()
    drawn = sampler.draw(logits, np.arange(3), batch, None)
    assert calls == [3]
    wanted = torch_sampler.TorchSampler(PlainDevice()).draw(logits, np.arange(3), batch, None)
    for mine, theirs in zip(drawn.tensors(), wanted.tensors(), strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_masks_draw_what_the_reference_draws_and_nothing_else(data: st.DataObject, seed: int) -> None:
    logits, batch, histories = random_case(data.draw(rows(list(FEATURES))), seed, ties=False)
    allowed = np.random.default_rng(seed).random((len(batch), VOCAB)) < 0.2
    # A bias that bans whatever the mask leaves is the core's to notice.
    allowed[:, sorted({*range(VOCAB)} - {*batch.bias_ids[np.isinf(batch.bias_values)].tolist()})[:8]] = True
    guided = np.arange(0, len(batch), 2, dtype=np.int32)
    padded = np.pad(allowed[guided], ((0, 0), (0, -VOCAB % 32)))
    words = np.packbits(padded, axis=-1, bitorder="little").view(np.uint32)
    batch = replace(batch, mask=TokenMask(guided, lambda: words), features=batch.features | {"mask"})
    assert_same(logits, batch, histories)
    drawn = drawn_by_torch(torch.from_numpy(logits.copy()), batch, histories).token_ids
    assert allowed[guided, drawn[guided]].all()


def test_more_penalised_rows_than_are_done_at_once_keep_their_own_histories() -> None:
    count = 2 * torch_sampler.PENALISED_ROWS + 5
    params = [
        SamplingParams(repetition_penalty=1.0 + i / count, presence_penalty=i / count, frequency_penalty=0.1)
        for i in range(count)
    ]
    assert_same(*random_case(params, seed=7, ties=False))
