"""Random rows to sample from, and the comparison of a sampler with the reference sampler of the core."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray

from tokenplane_core.backend import sampling as reference
from tokenplane_core.backend.records import F32, I32, SamplingBatch, TokenMask
from tokenplane_core.messages import SamplingParams

from ..slots import Histories
from .driver import sampling_batch

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


class Draws(Protocol):
    def __call__(
        self, logits: torch.Tensor, batch: SamplingBatch, histories: list[reference.History] | None = None
    ) -> reference.Samples:
        """What a sampler draws; histories of every row."""
        ...


def padded_histories(batch: SamplingBatch, histories: Sequence[reference.History] | None) -> Histories | None:
    """Those of the penalised rows, as samplers are given them."""
    penalised = np.flatnonzero(reference.needs_history(batch))
    if histories is None or not len(penalised):
        return None
    mine = [histories[i] for i in penalised.tolist()]
    padded = np.full((len(mine), max(len(h.token_ids) for h in mine)), VOCAB - 1, np.int32)
    for row, history in zip(padded, mine, strict=True):
        row[: len(history.token_ids)] = history.token_ids
    lengths, prompts = [len(h.token_ids) for h in mine], [h.num_prompt_tokens for h in mine]
    return Histories(torch.from_numpy(padded), torch.tensor(lengths), torch.tensor(prompts))


def rows(features: list[str]) -> st.SearchStrategy[list[SamplingParams]]:
    """Rows that each use some of the features, greedy or not."""
    fields = {name: st.one_of(FEATURES[name], st.just(getattr(SamplingParams(), name))) for name in features}
    temperature = st.one_of(st.just(0.0), st.floats(0.25, 2.0, width=32))
    row = st.builds(SamplingParams, temperature=temperature, seed=st.integers(0, 2**64 - 1), **fields)
    return st.lists(row, min_size=1, max_size=6)


def random_case(
    params: list[SamplingParams], seed: int, ties: bool
) -> tuple[F32, SamplingBatch, list[reference.History]]:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (len(params), VOCAB)).astype(np.float32)
    if ties:
        logits = np.round(logits)
    histories = [
        reference.History(rng.integers(0, VOCAB, length).astype(np.int32), int(rng.integers(0, length + 1)))
        for length in rng.integers(0, 40, len(params))
    ]
    return logits, sampling_batch(params, [len(h.token_ids) for h in histories]), histories


def assert_same(draws: Draws, logits: F32, batch: SamplingBatch, histories: list[reference.History]) -> None:
    want = reference.sample(logits, batch, histories)
    got = draws(torch.from_numpy(logits.copy()), batch, histories)
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


def is_borderline(logits: F32, batch: SamplingBatch, i: int, history: reference.History, token: int) -> bool:
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


def masked(batch: SamplingBatch, seed: int) -> tuple[SamplingBatch, I32, NDArray[np.bool_]]:
    """The batch with a random mask for every second row; those rows, and what is allowed: bool [rows, VOCAB]."""
    allowed = np.random.default_rng(seed).random((len(batch), VOCAB)) < 0.2
    # A bias that bans whatever the mask leaves is the core's to notice.
    allowed[:, sorted({*range(VOCAB)} - {*batch.bias_ids[np.isinf(batch.bias_values)].tolist()})[:8]] = True
    guided = np.arange(0, len(batch), 2, dtype=np.int32)
    padded = np.pad(allowed[guided], ((0, 0), (0, -VOCAB % 32)))
    words = np.packbits(padded, axis=-1, bitorder="little").view(np.uint32)
    batch = replace(batch, mask=TokenMask(guided, lambda: words), features=batch.features | {"mask"})
    return batch, guided, allowed
