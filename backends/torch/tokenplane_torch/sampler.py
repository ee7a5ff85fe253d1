"""Sampling on the device, vectorised over rows. The meaning of every parameter: tokenplane_core/backend/sampling.py.

Each function is the counterpart of one there and keeps its order, its ties (lower ids first) and its law for the
random draw. Rows that do not use a feature are not touched by it. Knows no slots: histories come with the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenplane_core.backend.records import F32, Bool, SamplingBatch
from tokenplane_core.backend.sampling import History, Samples, uniforms

NUCLEUS_GUESS = 512  # ids that are enough for top_p nearly always


def needs_history(batch: SamplingBatch) -> Bool:
    """bool [n]: rows whose penalties look at earlier tokens."""
    if not batch.features & {"repetition_penalty", "presence_penalty", "frequency_penalty"}:
        return np.zeros(len(batch), np.bool_)
    needs: Bool = (batch.repetition_penalty != 1) | (batch.presence_penalty != 0) | (batch.frequency_penalty != 0)
    return needs


def sample(logits: Tensor, batch: SamplingBatch, histories: Sequence[History | None]) -> Samples:
    """Draw one token for each row of [n, vocab] logits of any float dtype. A row that needs none has no history."""
    greedy = batch.temperature == 0
    if greedy.all() and batch.num_logprobs.max(initial=-1) < 0 and not batch.features & _ADJUSTMENTS:
        return Samples(_to_i32(logits.argmax(-1)), None, None, None)
    raw = logits.float()
    warped = _adjust(raw, batch, histories)
    token_ids = warped.argmax(-1)
    if not greedy.all():
        drawn = np.flatnonzero(~greedy)
        rows = _upload(drawn, raw)
        filtered = _warp(warped[rows], batch, drawn)
        token_ids[rows] = _draw(filtered, uniforms(batch.seeds[drawn], batch.positions[drawn]))
        warped[rows] = filtered
    return Samples(_to_i32(token_ids), *_logprobs(raw, warped, token_ids, batch))


_ADJUSTMENTS = frozenset({"logit_bias", "repetition_penalty", "presence_penalty", "frequency_penalty"})


def _adjust(raw: Tensor, batch: SamplingBatch, histories: Sequence[History | None]) -> Tensor:
    """Steps 1 to 3, bias and penalties, into a new tensor."""
    out = raw.clone()
    if len(batch.bias_ids):
        rows = np.repeat(np.arange(len(batch)), np.diff(batch.bias_starts))
        ids = (_upload(rows, raw), _upload(batch.bias_ids, raw))
        out.index_put_(ids, _upload(batch.bias_values, raw), accumulate=True)
    penalised = np.flatnonzero(needs_history(batch))
    if len(penalised):
        out[_upload(penalised, raw)] = _penalise(out[_upload(penalised, raw)], batch, penalised, histories)
    return out


def _penalise(
    out: Tensor, batch: SamplingBatch, rows: NDArray[np.int64], histories: Sequence[History | None]
) -> Tensor:
    seen = torch.zeros_like(out, dtype=torch.bool)
    counts = torch.zeros_like(out)
    known = [histories[i] or _NO_HISTORY for i in rows]
    everything = [h.token_ids for h in known]
    generated = [h.token_ids[h.num_prompt_tokens :] for h in known]
    seen[_scatter_ids(everything, out)] = True
    ids = _scatter_ids(generated, out)
    counts.index_put_(ids, torch.ones_like(ids[0], dtype=out.dtype), accumulate=True)
    repetition = _column(batch.repetition_penalty[rows], out)
    out = torch.where(seen, torch.where(out > 0, out / repetition, out * repetition), out)
    presence, frequency = _column(batch.presence_penalty[rows], out), _column(batch.frequency_penalty[rows], out)
    return torch.where(counts > 0, out - (presence + frequency * counts), out)


_NO_HISTORY = History(np.zeros(0, np.int32), 0)


def _scatter_ids(lists: Sequence[NDArray[np.int32]], like: Tensor) -> tuple[Tensor, Tensor]:
    rows = np.repeat(np.arange(len(lists)), [len(ids) for ids in lists])
    return _upload(rows, like), _upload(np.concatenate(lists), like)


def _warp(adjusted: Tensor, batch: SamplingBatch, rows: NDArray[np.int64]) -> Tensor:
    """Steps 5 and 6 for the drawn rows: temperature and the filters; what a filter drops becomes -inf."""
    out = adjusted / _column(batch.temperature[rows], adjusted)
    vocab = out.shape[1]
    top_k, top_p, typical_p, min_p = (getattr(batch, name)[rows] for name in ("top_k", "top_p", "typical_p", "min_p"))
    if (chosen := np.flatnonzero((top_k > 0) & (top_k < vocab))).size:
        some = _upload(chosen, out)
        best = _best(out[some], int(top_k[chosen].max()), floor=-torch.inf)
        out[some] = _keep(out[some], best, _column(top_k[chosen], out))
    if (chosen := np.flatnonzero(top_p < 1)).size:
        some = _upload(chosen, out)
        out[some] = _nucleus(out[some], _column(top_p[chosen], out))
    if (chosen := np.flatnonzero(typical_p < 1)).size:
        some = _upload(chosen, out)
        out[some] = _typical(out[some], _column(typical_p[chosen], out))
    if (chosen := np.flatnonzero(min_p > 0)).size:
        some = _upload(chosen, out)
        least = out[some].amax(-1, keepdim=True) + _column(np.log(min_p[chosen]), out)
        out[some] = out[some].masked_fill(out[some] < least, -torch.inf)
    return out


def _nucleus(out: Tensor, mass: Tensor, guess: int = NUCLEUS_GUESS) -> Tensor:
    """top_p, from the `guess` most likely ids; rows that need more are done again with more.

    Sorting a whole vocabulary takes longer than a small model.
    """
    guess = min(guess, out.shape[1])
    probabilities = torch.softmax(out, -1)
    order = _best(probabilities, guess, floor=0.0)
    below = _below_mass(probabilities.gather(1, order), mass)
    kept = _keep(out, order, below + 1)
    short = (below == guess).squeeze(1)
    if guess < out.shape[1] and bool(short.any()):
        kept[short] = _nucleus(out[short], mass[short], guess * 16)
    return kept


def _typical(out: Tensor, mass: Tensor) -> Tensor:
    scores = torch.log_softmax(out, -1)
    probabilities = scores.exp()
    possible = probabilities > 0
    entropy = torch.where(possible, probabilities * -scores, 0.0).sum(-1, keepdim=True)
    surprise = torch.where(possible, (-scores - entropy).abs(), torch.inf)
    order = surprise.sort(dim=-1, stable=True).indices
    return _keep(out, order, _below_mass(probabilities.gather(1, order), mass) + 1)


def _below_mass(ordered: Tensor, mass: Tensor) -> Tensor:
    """How many leading entries of ordered probabilities [n, k] stay below the mass [n, 1]: [n, 1]."""
    return (ordered.cumsum(-1, dtype=torch.float64) < mass.double()).sum(-1, keepdim=True)


def _keep(out: Tensor, order: Tensor, limits: Tensor) -> Tensor:
    """Keep the first `limits` [n, 1] ids of `order` [n, k]; the rest becomes -inf."""
    ranks = torch.arange(order.shape[1], device=out.device)
    kept = out.gather(1, order).masked_fill(ranks >= limits, -torch.inf)
    return torch.full_like(out, -torch.inf).scatter_(1, order, kept)


def _best(scores: Tensor, k: int, floor: float | None = None) -> Tensor:
    """The ids of the k highest of f32 [n, vocab], best first, lower ids first on a tie: [n, k].

    floor: scores down there may come in any order; thousands of ids that were filtered out tie.
    """
    vocab = scores.shape[1]
    reach = k
    if 0 < k <= vocab // 8:
        # torch.topk breaks ties as it likes, so reach for all that tie with the last one, and sort those few.
        last = scores.topk(k).values[:, -1:]
        ties = scores >= last if floor is None else (scores >= last) & (scores > floor)
        reach = max(k, int(ties.sum(-1).max()))
    if reach > vocab // 8:
        return scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    ids = scores.topk(reach).indices.sort(dim=-1).values
    order = scores.gather(1, ids).sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return ids.gather(1, order)


def _draw(warped: Tensor, us: F32) -> Tensor:
    """The first id whose cumulative probability exceeds u."""
    cumulative = torch.softmax(warped, -1).cumsum(-1, dtype=torch.float64)
    wanted = _column(us, warped).double() * cumulative[:, -1:]
    return torch.searchsorted(cumulative, wanted, right=True).squeeze(1).clamp_(max=warped.shape[1] - 1)


def _logprobs(
    raw: Tensor, warped: Tensor, token_ids: Tensor, batch: SamplingBatch
) -> tuple[F32 | None, NDArray[np.int32] | None, F32 | None]:
    """StepOutput's logprobs, top_ids and top_logprobs."""
    width = int(batch.num_logprobs.max(initial=-1))
    if width < 0:
        return None, None, None
    logprobs = np.full(len(batch), np.nan, np.float32)
    top_ids = np.zeros((len(batch), width), np.int32)
    top_logprobs = np.full((len(batch), width), np.nan, np.float32)
    asked = np.flatnonzero(batch.num_logprobs >= 0)
    rows = _upload(asked, raw)
    processed = _column(batch.processed_logprobs[asked], raw)
    scores = torch.log_softmax(torch.where(processed, warped[rows], raw[rows]), -1)
    logprobs[asked] = scores.gather(1, token_ids[rows, None]).squeeze(1).cpu().numpy()
    best = _best(scores, min(width, scores.shape[1]))
    beyond = np.arange(best.shape[1]) >= batch.num_logprobs[asked, None]
    top_ids[asked, : best.shape[1]] = np.where(beyond, 0, best.cpu().numpy())
    top_logprobs[asked, : best.shape[1]] = np.where(beyond, np.nan, scores.gather(1, best).cpu().numpy())
    return logprobs, top_ids, top_logprobs


def _column(values: NDArray[Any], like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(like.device)[:, None]


def _upload(values: NDArray[Any], like: Tensor) -> Tensor:
    """Ids as i64, as torch wants its indices; floats as they are."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.to(like.device, torch.int64 if not tensor.is_floating_point() else tensor.dtype)


def _to_i32(ids: Tensor) -> NDArray[np.int32]:
    return ids.to(torch.int32).cpu().numpy()
