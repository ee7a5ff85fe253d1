"""Draw tokens on the device: temperature, top_k, top_p and min_p without sorting and without waiting for the device.

The law and the order of the filters are those of tokenplane_core/backend/sampling.py. One program per row looks for
the lowest score that a filter keeps by quartering the range of float32 until it holds one value; where several ids
share that value, the lowest ids win. Probabilities are whole numbers (units of 2**-40 of the best id's), so that a sum
does not depend on its order, needs no float64, and u * total and top_p * total are exact.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# (Triton compiles kernel bodies itself; their arguments have no Python types.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096
MOST_VOCAB = 1 << 22  # sums of that many weights of 2**40 stay below 2**63


def draw(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one token for each row of [n, vocab] logits of any float type: i64 [n].

    temperature f32 [n] (0: the highest logit, lowest id on a tie), top_k i32 [n] (0: off), top_p f32 [n] (1: off),
    min_p f32 [n] (0: off), uniforms f32 [n] in [0, 1), multiples of 2**-24. Does not change the logits.

    Raises:
        ValueError: the vocabulary is larger than `MOST_VOCAB`.
    """
    rows, vocab = logits.shape
    if vocab > MOST_VOCAB:
        raise ValueError(f"a vocabulary of {vocab} ids is too large for the draw kernel: the limit is {MOST_VOCAB}")
    # By torch, because its float32 division is correctly rounded everywhere: ties must be the reference's ties.
    divisor = torch.where(temperature > 0, temperature, 1.0)
    scores = (logits.float() / divisor[:, None]).contiguous()
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    _draw[(rows,)](
        scores,
        temperature,
        top_k,
        top_p,
        min_p,
        uniforms,
        out,
        vocab,
        TILE=min(TILE, triton.next_power_of_2(vocab)),
        num_warps=16,
    )
    return out


@triton.jit
def _draw(scores, temperature, top_k, top_p, min_p, uniforms, out, vocab, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    scores += row * vocab
    highest = tl.full([TILE], float("-inf"), tl.float32)
    for start in range(0, vocab, TILE):
        ids = start + tl.arange(0, TILE)
        highest = tl.maximum(highest, tl.load(scores + ids, mask=ids < vocab, other=float("-inf")))
    best = tl.maximum(tl.max(highest, 0), -3.0e38)  # a row of -inf alone must not make NaNs
    none_above = _order(best) + 1

    if tl.load(temperature + row) > 0:
        # Kept are the ids whose score is above the cut, and those at the cut up to the id `last`. First: all.
        cut, last = tl.full((), -(2**31), tl.int32), vocab
        number, weight = vocab.to(tl.int64), tl.full((), 0, tl.int64)
        k = tl.load(top_k + row).to(tl.int64)
        if (k > 0) & (k < vocab):
            cut, last = _tighten(scores, vocab, best, cut, last, number, number, k, False, TILE)
        p = tl.load(top_p + row)
        if p < 1:
            number, weight = _measure(scores, vocab, best, cut, last, TILE)
            wanted = _share(weight, p, 0xFFFFFF)
            cut, last = _tighten(scores, vocab, best, cut, last, number, weight, wanted, True, TILE)
        least = tl.load(min_p + row)
        if least > 0:
            floor = _order(best + tl.log(least))
            last = tl.where(floor > cut, vocab, last)
            cut = tl.maximum(cut, floor)
        number, weight = _measure(scores, vocab, best, cut, last, TILE)
        wanted = _share(weight, tl.load(uniforms + row), 0)
        token = _locate(scores, vocab, best, cut, last, none_above, wanted, True, TILE)
    else:
        nothing = tl.full((), 0, tl.int64)
        token = _locate(scores, vocab, best, _order(best), vocab, none_above, nothing, False, TILE)
    tl.store(out + row, token.to(tl.int64))


@triton.jit
def _order(score):
    """An i32 that orders as the float does, with -0.0 equal to 0.0."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _weight(score, best):
    """exp(score - best) as a whole number of 2**-40."""
    return (tl.exp(score - best) * 1099511627776.0).to(tl.int64)


@triton.jit
def _share(total, fraction, round_up):
    """total * fraction, the fraction in units of 2**-24; round_up 0xFFFFFF or 0. i64 without overflow."""
    parts = (fraction * 16777216.0).to(tl.int64)
    return (total >> 24) * parts + (((total & 0xFFFFFF) * parts + round_up) >> 24)


@triton.jit
def _look(scores, ids, vocab, cut, last):
    """Scores and order of some ids, and which of them are kept."""
    score = tl.load(scores + ids, mask=ids < vocab, other=float("-inf"))
    order = _order(score)
    return score, order, (ids < vocab) & ((order > cut) | ((order == cut) & (ids <= last)))


@triton.jit
def _measure(scores, vocab, best, cut, last, TILE: tl.constexpr):
    """Number and weight of the kept ids, i64."""
    number, weight = tl.zeros([TILE], tl.int64), tl.zeros([TILE], tl.int64)
    for start in range(0, vocab, TILE):
        score, _, kept = _look(scores, start + tl.arange(0, TILE), vocab, cut, last)
        number += kept.to(tl.int64)
        weight += tl.where(kept, _weight(score, best), 0)
    return tl.sum(number, 0), tl.sum(weight, 0)


@triton.jit
def _tighten(scores, vocab, best, cut, last, number, measure, wanted, BY_WEIGHT: tl.constexpr, TILE: tl.constexpr):
    """The cut and last id that keep the fewest of the best ids whose number (or weight) reaches `wanted`.

    number, measure: of the ids kept so far, and their weight if BY_WEIGHT; measure >= wanted.
    """
    # Kept ids at or above `low` reach wanted, those at or above `high` do not.
    low, high = cut.to(tl.int64), _order(best).to(tl.int64) + 1
    low_number, low_measure = number, measure
    high_number, high_measure = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
    while (high - low > 1) & (low_number - high_number > 1):
        step = tl.maximum((high - low) >> 2, 1)
        pivot = low + step
        n1, n2, n3 = tl.zeros([TILE], tl.int32), tl.zeros([TILE], tl.int32), tl.zeros([TILE], tl.int32)
        w1, w2, w3 = tl.zeros([TILE], tl.int64), tl.zeros([TILE], tl.int64), tl.zeros([TILE], tl.int64)
        for start in range(0, vocab, TILE):
            score, order, kept = _look(scores, start + tl.arange(0, TILE), vocab, cut, last)
            above1 = kept & (order >= pivot.to(tl.int32))
            above2 = kept & (order >= (pivot + step).to(tl.int32))
            above3 = kept & (order >= (pivot + 2 * step).to(tl.int32))
            n1 += above1.to(tl.int32)
            n2 += above2.to(tl.int32)
            n3 += above3.to(tl.int32)
            if BY_WEIGHT:
                weight = _weight(score, best)
                w1 += tl.where(above1, weight, 0)
                w2 += tl.where(above2, weight, 0)
                w3 += tl.where(above3, weight, 0)
        for i in tl.static_range(3):
            n = tl.sum(n1 if i == 0 else n2 if i == 1 else n3, 0).to(tl.int64)
            m = tl.sum(w1 if i == 0 else w2 if i == 1 else w3, 0) if BY_WEIGHT else n
            undecided, reaches = pivot < high, m >= wanted
            up, down = undecided & reaches, undecided & (m < wanted)
            low, low_number, low_measure = (
                tl.where(up, pivot, low),
                tl.where(up, n, low_number),
                tl.where(up, m, low_measure),
            )
            high, high_number, high_measure = (
                tl.where(down, pivot, high),
                tl.where(down, n, high_number),
                tl.where(down, m, high_measure),
            )
            pivot += step

    # What lies between is one id, or several of equal score, of which the first few in id order are kept.
    tied = low_number - high_number
    each = tl.maximum((low_measure - high_measure) // tl.maximum(tied, 1), 1)
    rank = (wanted - high_measure + each - 1) // each
    last = tl.where(low == cut, last, vocab)
    cut = low.to(tl.int32)
    if rank < tied:
        last = _locate(scores, vocab, best, cut, last, high.to(tl.int32), tl.maximum(rank - 1, 0), False, TILE)
    return cut, last


@triton.jit
def _locate(scores, vocab, best, cut, last, end, wanted, BY_WEIGHT: tl.constexpr, TILE: tl.constexpr):
    """The first id, in id order, at which the number (or weight) of kept ids in order below `end` exceeds wanted."""
    passed = tl.full((), 0, tl.int64)
    found, start = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    while start < vocab:
        ids = start + tl.arange(0, TILE)
        score, order, kept = _look(scores, ids, vocab, cut, last)
        kept = kept & (order < end)
        amount = tl.where(kept, _weight(score, best), 0) if BY_WEIGHT else kept.to(tl.int64)
        here = tl.sum(amount, 0)
        if passed + here > wanted:
            reached = passed + tl.cumsum(amount, 0) > wanted
            found = tl.min(tl.where(reached, ids, vocab), 0)
            start = vocab
        else:
            passed += here
            start += TILE
    return found
