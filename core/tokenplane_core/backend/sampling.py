"""What every sampling parameter means: the law for random draws and the reference sampler, in numpy.

A backend's own sampler is held to this file by the conformance kit, and the core runs it when a device cannot
sample what a request asks for.

Order, per row, on float32 logits:

0. ids that the row's mask does not allow become -inf, and nothing below brings them back: a mask is never violated
1. logit bias is added (-inf bans an id)
2. repetition penalty: logits of ids seen in prompt or output are divided by it if positive, else multiplied
   (CTRL, arXiv 1909.05858)
3. presence and frequency penalty: presence once, frequency times the count, subtracted for generated ids
4. temperature 0: the highest logit wins, the lowest id on a tie; nothing below applies
5. temperature divides
6. top_k keeps the k most likely ids, top_p the smallest set of most likely ids with at least that mass,
   typical_p the same in the order of |information - entropy| (arXiv 2202.00666), min_p the ids with at least that
   share of the best id's probability; each renormalises, each keeps at least one, lower ids win ties
7. the draw

The draw is one number: u = uniform(seed, position), where position is the absolute position of the token being
drawn. The token is the first id, in id order, at which the cumulative probability exceeds u. So a seed means the
same on every accelerator, in every batch, after preemption and after a restart, and a speculated token is right
exactly when it is the token that would have been drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .records import F32, I32, I64, U32, U64, Bool, SamplingBatch

PENALTIES = frozenset({"repetition_penalty", "presence_penalty", "frequency_penalty"})
"""The features that look at earlier tokens; who samples without them need keep none."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix64(x: U64) -> U64:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection on 64 bits that looks random."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniforms(seeds: U64, positions: I64) -> F32:
    """The published law: u64 [n], i64 [n] -> f32 [n] in [0, 1), multiples of 2**-24 (exact in float32).

    u = mix64(mix64(seed + G) + position * G) >> 40, times 2**-24, in arithmetic modulo 2**64, G = 0x9E3779B97F4A7C15.
    """
    with np.errstate(over="ignore"):
        mixed = _mix64(_mix64(seeds + _GOLDEN) + positions.astype(np.uint64) * _GOLDEN)
    return ((mixed >> np.uint64(40)).astype(np.float64) * 2.0**-24).astype(np.float32)


@dataclass(frozen=True, slots=True)
class History:
    """The tokens before the one being drawn: i32 [t], of which the first `num_prompt_tokens` are the prompt."""

    token_ids: I32
    num_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Samples:
    """Fields as in StepOutput."""

    token_ids: I32
    logprobs: F32 | None
    top_ids: I32 | None
    top_logprobs: F32 | None


def best_ids(scores: F32, k: int) -> I64:
    """i64 [k]: ids of the k largest of f32 [vocab], best first; lower ids first on a tie. Less than k beside NaNs."""
    if not 0 < k < len(scores):
        return np.argsort(-scores, kind="stable")[:k]
    least = np.partition(scores, -k)[-k]
    good = np.flatnonzero(scores >= least)
    return good[np.argsort(-scores[good], kind="stable")[:k]]


def of_prompt(scores: F32, token_ids: I32, k: int) -> tuple[F32, I32 | None, F32 | None]:
    """What StepOutput tells of a prompt, from the log-probabilities f32 [p, vocab] at places where i32 [p] comes next.

    Returns:
        prompt_logprobs f32 [p]; prompt_top_ids i32 [p, k] and prompt_top_logprobs f32 [p, k], None if k is 0
    """
    chosen = np.take_along_axis(scores, token_ids[:, None].astype(np.int64), 1)[:, 0]
    if k == 0:
        return chosen, None, None
    ids, values = np.zeros((len(scores), k), np.int32), np.full((len(scores), k), np.nan, np.float32)
    for i, row in enumerate(scores):
        best = best_ids(row, k)
        ids[i, : len(best)], values[i, : len(best)] = best, row[best]
    return chosen, ids, values


def sample(logits: F32, batch: SamplingBatch, histories: Sequence[History]) -> Samples:
    """Draw one token for each row of f32 [n, vocab] logits. `histories` has n entries."""
    n = len(batch)
    us = uniforms(batch.seeds, batch.positions)
    width = int(batch.num_logprobs.max(initial=-1))
    token_ids = np.empty(n, np.int32)
    logprobs = np.full(n, np.nan, np.float32)
    top_ids = np.zeros((n, max(width, 0)), np.int32)
    top_logprobs = np.full((n, max(width, 0)), np.nan, np.float32)
    for i in range(n):
        adjusted = _adjust(logits[i], batch, i, histories[i])
        if batch.temperature[i] == 0:
            warped, token = adjusted, int(np.argmax(adjusted))
        else:
            warped = _warp(adjusted, batch, i)
            token = draw(_softmax(warped), float(us[i]))
        token_ids[i] = token
        if batch.num_logprobs[i] >= 0:
            scores = log_softmax(warped if batch.processed_logprobs[i] else logits[i])
            logprobs[i] = scores[token]
            k = int(batch.num_logprobs[i])
            best = best_ids(scores, k)
            top_ids[i, : len(best)], top_logprobs[i, : len(best)] = best, scores[best]
    if width < 0:
        return Samples(token_ids, None, None, None)
    return Samples(token_ids, logprobs, top_ids, top_logprobs)


def needs_history(batch: SamplingBatch) -> Bool:
    """bool [n]: rows whose penalties look at earlier tokens."""
    if not batch.features & PENALTIES:
        return np.zeros(len(batch), np.bool_)
    needs: Bool = (batch.repetition_penalty != 1) | (batch.presence_penalty != 0) | (batch.frequency_penalty != 0)
    return needs


def draw(probabilities: F32, u: float) -> int:
    """The first id whose cumulative probability exceeds u; f32 [vocab] need not be normalised."""
    cumulative = np.cumsum(probabilities, dtype=np.float64)
    token = int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))
    return min(token, int(np.flatnonzero(probabilities)[-1]))


def log_softmax(logits: F32) -> F32:
    """f32 [vocab] -> f32 [vocab]; -inf stays -inf."""
    shifted = logits - logits.max()
    with np.errstate(divide="ignore", invalid="ignore"):
        scores: F32 = (shifted - np.log(np.exp(shifted).sum())).astype(np.float32)
    return scores


def _softmax(logits: F32) -> F32:
    probabilities: F32 = np.exp(log_softmax(logits))
    return probabilities


def allowed_ids(words: U32, vocab_size: int) -> Bool:
    """A mask's words u32 [..., ceil(vocab / 32)] as bool [..., vocab]."""
    little = np.ascontiguousarray(words, "<u4")
    return np.unpackbits(little.view(np.uint8), axis=-1, bitorder="little", count=vocab_size).view(np.bool_)


def _adjust(logits: F32, batch: SamplingBatch, i: int, history: History) -> F32:
    """Steps 0 to 3: mask, bias and penalties."""
    out = logits.astype(np.float32, copy=True)
    if batch.mask is not None and i in batch.mask.rows:
        row = int(np.searchsorted(batch.mask.rows, i))
        out[~allowed_ids(batch.mask.words()[row], len(out))] = -np.inf
    start, end = batch.bias_starts[i], batch.bias_starts[i + 1]
    np.add.at(out, batch.bias_ids[start:end], batch.bias_values[start:end])
    if batch.repetition_penalty[i] != 1:
        seen = np.unique(history.token_ids)
        penalty = batch.repetition_penalty[i]
        out[seen] = np.where(out[seen] > 0, out[seen] / penalty, out[seen] * penalty)
    if batch.presence_penalty[i] != 0 or batch.frequency_penalty[i] != 0:
        ids, counts = np.unique(history.token_ids[history.num_prompt_tokens :], return_counts=True)
        out[ids] -= batch.presence_penalty[i] + batch.frequency_penalty[i] * counts.astype(np.float32)
    return out


def _warp(adjusted: F32, batch: SamplingBatch, i: int) -> F32:
    """Steps 5 and 6: temperature and the filters; what a filter drops becomes -inf."""
    out = adjusted / batch.temperature[i]
    if 0 < batch.top_k[i] < len(out):
        out = _keep(out, np.argsort(-out, kind="stable")[: batch.top_k[i]])
    if batch.top_p[i] < 1:
        probabilities = _softmax(out)
        order = np.argsort(-probabilities, kind="stable")
        out = _keep(out, order[: _mass(probabilities[order], batch.top_p[i])])
    if batch.typical_p[i] < 1:
        scores = log_softmax(out)
        probabilities = np.exp(scores)
        information = np.where(probabilities > 0, -scores, np.inf)
        entropy = float(np.sum(probabilities * np.where(probabilities > 0, -scores, 0)))
        order = np.argsort(np.abs(information - entropy), kind="stable")
        out = _keep(out, order[: _mass(probabilities[order], batch.typical_p[i])])
    if batch.min_p[i] > 0:
        out = np.where(out >= out.max() + np.log(batch.min_p[i]), out, np.float32(-np.inf))
    warped: F32 = out.astype(np.float32)
    return warped


def _mass(ordered: F32, mass: float) -> int:
    """How many leading entries of ordered probabilities reach the mass; at least 1."""
    return int(np.searchsorted(np.cumsum(ordered, dtype=np.float64), mass, side="left")) + 1


def _keep(logits: F32, ids: I64) -> F32:
    out = np.full_like(logits, -np.inf)
    out[ids] = logits[ids]
    return out
