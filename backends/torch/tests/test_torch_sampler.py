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
from tokenplane_core.backend.records import SamplingBatch
from tokenplane_core.messages import SamplingParams
from tokenplane_torch.testing import samples
from tokenplane_torch.testing.device import PlainDevice
from tokenplane_torch.testing.driver import sampling_batch
from tokenplane_torch.testing.samples import FEATURES, VOCAB, masked, padded_histories, random_case, rows


def drawn_by_torch(
    logits: torch.Tensor, batch: SamplingBatch, histories: list[reference.History] | None = None
) -> reference.Samples:
    """What the torch sampler draws, on the host."""
    known = padded_histories(batch, histories)
    drawn = torch_sampler.TorchSampler(PlainDevice()).draw(logits, np.arange(len(logits)), batch, known)
    token_ids, *rest = [tensor.numpy() for tensor in drawn.tensors()]
    return reference.Samples(token_ids, *(rest or (None, None, None)))


def assert_same(logits: np.ndarray, batch: SamplingBatch, histories: list[reference.History]) -> None:
    samples.assert_same(drawn_by_torch, logits, batch, histories)


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
    batch, guided, allowed = masked(batch, seed)
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


@pytest.mark.parametrize("vocab", [31, 32, 97])
def test_bits_unpack_alike_on_the_host_and_on_a_device(vocab: int) -> None:
    words = np.random.default_rng(vocab).integers(0, 2**32, (3, -(-vocab // 32)), np.uint32)
    bits = [[bool(int(row[t // 32]) >> t % 32 & 1) for t in range(vocab)] for row in words]
    assert torch_sampler.unpacked_on_host(words, vocab).tolist() == bits
    assert torch_sampler.unpacked_on_device(torch.from_numpy(words.view(np.int32)), vocab).tolist() == bits
