"""Sampling for devices that compile: programs of fixed shape draw for every row of the logits.

Greedy, temperature, top_k, top_p, min_p and the drawn token's logprob, by the published law
(tokenplane_core/backend/sampling.py), with the uniform numbers computed on the host. What depends on more (a mask, a
bias, penalties, typical_p, the best tokens' logprobs) the core draws from returned logits. Nothing here synchronises,
and no shape depends on a value.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenplane_core.backend.records import F32, SamplingBatch, SamplingCaps
from tokenplane_core.backend.sampling import uniforms

from .device import TorchDevice
from .sampler import Drawn
from .slots import Histories

STATIC_SAMPLING = SamplingCaps(
    frozenset({"temperature", "top_k", "top_p", "min_p", "logprobs"}),
    max_top_logprobs=0,  # of the drawn token only
)


class StaticSampler:
    """Four programs for each number of rows: greedy or drawn, with or without logprobs.

    exact_sums: cumulate in float64, as the law says. Devices without it add up in float32; a draw may then differ
    where its number falls within rounding of the border between two ids.
    """

    fixed_shape = True

    def __init__(self, device: TorchDevice, exact_sums: bool = True) -> None:
        self._upload = device.upload
        self._sums = torch.float64 if exact_sums else torch.float32

    def describe(self) -> str:
        sums = "" if self._sums is torch.float64 else ", sums in float32"
        return f"torch, fixed shape{sums}; masks, bias, penalties, typical_p and top logprobs on the host"

    def draw(self, logits: Tensor, rows: NDArray[np.int64], batch: SamplingBatch, histories: Histories | None) -> Drawn:
        """For all r rows of the logits; what it draws for those that `rows` does not name means nothing."""
        parameters = row_parameters(batch, rows, len(logits))
        return self._run(logits, parameters, "temperature" in batch.features, "logprobs" in batch.features)

    def warm(self, logits: Tensor) -> Iterable[Drawn]:
        for random, logprobs in product((False, True), repeat=2):
            yield self._run(logits, greedy_parameters(len(logits)), random, logprobs)

    def _run(self, logits: Tensor, parameters: F32, random: bool, logprobs: bool) -> Drawn:
        columns = self._upload(parameters)
        token_ids = draw(logits, columns, self._sums) if random else greedy(logits)
        return Drawn(token_ids, token_logprobs(logits, token_ids, columns[5]) if logprobs else None)


def greedy_parameters(count: int) -> F32:
    """f32 [6, count]: temperature, top_k, top_p, min_p, uniform number and num_logprobs of greedy rows."""
    return np.repeat(np.array([[0], [0], [1], [0], [0], [-1]], np.float32), count, axis=1)


def row_parameters(batch: SamplingBatch, rows: NDArray[np.int64], count: int) -> F32:
    """The same with the `rows` of the logits that are to be drawn as the batch says."""
    out = greedy_parameters(count)
    us = uniforms(batch.seeds, batch.positions)
    out[:, rows] = np.stack([batch.temperature, batch.top_k, batch.top_p, batch.min_p, us, batch.num_logprobs])
    return out


def greedy(logits: Tensor) -> Tensor:
    """The lowest id of the highest logit, i64 [r]."""
    return logits.argmax(-1)


def draw(logits: Tensor, parameters: Tensor, sums: torch.dtype = torch.float64) -> Tensor:
    """One token id i64 [r] for each row of [r, vocab] logits; parameters f32 [6, r] as `row_parameters` makes them.

    All filters keep the first few ids in one order, by falling logit and rising id. So each only says how many, the
    smallest number wins, and the ids themselves need not be sorted.
    """
    temperature, top_k, top_p, min_p, uniform, _ = (column[:, None] for column in parameters)
    scores = logits.float() / torch.where(temperature > 0, temperature, 1)
    ordered = scores.sort(dim=-1, descending=True).values
    kept = _how_many(ordered, top_k, top_p, min_p, sums)
    weights = torch.softmax(scores.masked_fill(~_first(scores, ordered, kept), -torch.inf), -1)
    cumulative = weights.cumsum(-1, dtype=sums)
    passed = cumulative <= uniform.to(sums) * cumulative[:, -1:]
    # Rounding may leave the last sum at or below the wanted one: then it is the last id that has a chance.
    ids = torch.arange(scores.shape[1], device=scores.device)
    last = torch.where(weights > 0, ids, 0).amax(-1)
    drawn = torch.minimum(passed.sum(-1), last)
    return torch.where(temperature[:, 0] > 0, drawn, greedy(logits))


def token_logprobs(logits: Tensor, token_ids: Tensor, num_logprobs: Tensor) -> Tensor:
    """f32 [r] of the raw logits; NaN for rows that ask for none."""
    scores = torch.log_softmax(logits.float(), -1).gather(1, token_ids[:, None]).squeeze(1)
    return torch.where(num_logprobs >= 0, scores, torch.nan)


def _how_many(ordered: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, sums: torch.dtype) -> Tensor:
    """How many ids [r, 1] the filters keep of falling scores [r, vocab]; at least 1."""
    vocab = ordered.shape[1]
    ranks = torch.arange(vocab, device=ordered.device)
    kept = torch.where((top_k > 0) & (top_k < vocab), top_k, vocab).long()
    mass = torch.softmax(ordered.masked_fill(ranks >= kept, -torch.inf), -1).cumsum(-1, dtype=sums)
    nucleus = (mass < top_p.to(sums)).sum(-1, keepdim=True) + 1
    kept = torch.where(top_p < 1, torch.minimum(kept, nucleus), kept)
    likely = (ordered >= ordered[:, :1] + min_p.log()).sum(-1, keepdim=True)  # min_p 0: log gives -inf, all are
    return torch.minimum(kept, likely)


def _first(scores: Tensor, ordered: Tensor, kept: Tensor) -> Tensor:
    """bool [r, vocab]: the first `kept` [r, 1] ids by falling score, lower ids first among equal ones."""
    border = ordered.gather(1, kept - 1)
    above, level = scores > border, scores == border
    room = kept - above.sum(-1, keepdim=True)
    return above | (level & (level.cumsum(-1) <= room))
