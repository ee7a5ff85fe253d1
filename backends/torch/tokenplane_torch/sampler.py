"""Sampling on the device, vectorised over rows. The meaning of every parameter: tokenplane_core/backend/sampling.py.

Each function is the counterpart of one there and keeps its order, its ties (lower ids first) and its law for the
random draw. Rows that do not use a feature are not touched by it. Knows no slots: histories come with the call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenplane_core.backend.records import U32, SamplingBatch
from tokenplane_core.backend.sampling import PENALTIES, needs_history, uniforms

from .device import TorchDevice
from .failures import first_line
from .slots import Histories

PENALISED_ROWS = 32  # at a time: what counting takes grows with rows times the longest sequence
NUCLEUS_GUESS = 512  # ids that are enough for top_p nearly always

Upload = Callable[[NDArray[Any]], Tensor]
FastDraw = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""logits [n, vocab], temperature, top_k, top_p, min_p, uniforms [n] -> token ids i64 [n], without synchronising."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """On the device. Logprob fields as in StepOutput, None if no row asks."""

    token_ids: Tensor  # i64 [n]
    logprobs: Tensor | None = None  # f32 [n]
    top_ids: Tensor | None = None  # i64 [n, k]
    top_logprobs: Tensor | None = None  # f32 [n, k]

    def tensors(self) -> list[Tensor]:
        return [
            t for t in (self.token_ids.to(torch.int32), self.logprobs, self.top_ids, self.top_logprobs) if t is not None
        ]


class Sampler(Protocol):
    fixed_shape: bool
    """True: draws for every row of the logits, so that its shapes do not depend on how many are wanted."""

    def describe(self) -> str:
        """For Capabilities.kernels."""
        ...

    def draw(self, logits: Tensor, rows: NDArray[np.int64], batch: SamplingBatch, histories: Histories | None) -> Drawn:
        """Draw a token for each of `rows` of the logits [r, vocab], as `batch` says, which has one entry for each.

        Without `fixed_shape`, `rows` is all of the logits. histories: of the rows that `needs_history` names.
        Returns as many rows as the logits have.
        """
        ...

    def warm(self, logits: Tensor) -> Iterable[Drawn]:
        """What each program or kernel that must be compiled draws from logits of this shape, one by one."""
        ...


_ADJUSTMENTS = PENALTIES | {"logit_bias"}
_FAST = frozenset({"temperature", "top_k", "top_p", "min_p"})


class TorchSampler:
    """Draws with torch, or with one kernel (`fast_draw`) where a batch asks for nothing that the kernel lacks.

    The kernel is tried first, on this very device, and not used if it fails or draws something else.
    """

    fixed_shape = False

    def __init__(self, device: TorchDevice, fast_draw: FastDraw | None = None) -> None:
        self._upload: Upload = device.upload
        self._fast_draw = fast_draw
        self._problem = self._try(fast_draw) if fast_draw is not None else ""
        if self._problem:
            self._fast_draw = None

    def describe(self) -> str:
        if self._fast_draw is None:
            return f"torch (not the fused kernel: {self._problem})" if self._problem else "torch"
        return "one fused kernel, torch for penalties, typical_p and processed logprobs"

    def draw(self, logits: Tensor, rows: NDArray[np.int64], batch: SamplingBatch, histories: Histories | None) -> Drawn:
        greedy = batch.temperature == 0
        if greedy.all() and batch.num_logprobs.max(initial=-1) < 0 and not batch.features & _ADJUSTMENTS:
            return Drawn(masked(logits, batch, self._upload).argmax(-1))
        if self._fast_draw is not None and batch.features <= _FAST | {"logprobs", "mask"}:
            allowed = masked(logits, batch, self._upload)
            token_ids = self._fast_draw(allowed, *self._parameters(batch))
            return Drawn(token_ids, *_logprobs(logits, allowed, token_ids, batch, self._upload))
        return sample(logits, batch, histories, self._upload)

    def warm(self, logits: Tensor) -> Iterable[Drawn]:
        if self._fast_draw is None:
            return ()
        neutral = self._upload(np.repeat(np.array([[1], [0], [1], [0], [0]], np.float32), len(logits), axis=1))
        temperature, top_k, top_p, min_p, us = neutral
        return [Drawn(self._fast_draw(logits, temperature, top_k.to(torch.int32), top_p, min_p, us))]

    @torch.inference_mode()
    def _try(self, fast_draw: FastDraw) -> str:
        """Why the kernel cannot be used; "" if it draws what `sample` does."""
        i = np.arange(64)
        batch = replace(
            neutral_batch(len(i)),
            features=_FAST,
            temperature=(i % 4 * 0.5).astype(np.float32),
            top_k=(i % 3 * 20).astype(np.int32),
            top_p=(1 - i % 5 * 0.15).astype(np.float32),
            min_p=(i % 7 * 0.01).astype(np.float32),
            seeds=i.astype(np.uint64),
        )
        logits = self._upload(np.random.default_rng(0).normal(0, 3, (len(i), 8208)).astype(np.float32))
        try:
            drawn = fast_draw(logits, *self._parameters(batch))
            wrong = int((drawn != sample(logits, batch, None, self._upload).token_ids).sum())
        except Exception as error:  # a compiler may fail in any way, and torch can do without
            return f"{type(error).__name__}: {first_line(error)}"
        # A number may fall within rounding of the border between two ids.
        return f"it draws {wrong} of {len(i)} tokens otherwise" if wrong > 3 else ""

    def _parameters(self, batch: SamplingBatch) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """In one copy: temperature, top_k, top_p, min_p, uniforms."""
        columns = (batch.temperature, batch.top_k, batch.top_p, batch.min_p, uniforms(batch.seeds, batch.positions))
        temperature, top_k, top_p, min_p, us = self._upload(np.stack(columns, dtype=np.float32))
        return temperature, top_k.to(torch.int32), top_p, min_p, us


def neutral_batch(rows: int) -> SamplingBatch:
    """Greedy rows that ask for nothing else."""

    def all_rows(value: float, dtype: type[np.generic]) -> NDArray[Any]:
        return np.full(rows, value, dtype)

    off, on = all_rows(0, np.float32), all_rows(1, np.float32)
    return SamplingBatch(
        features=frozenset(),
        temperature=off,
        top_k=all_rows(0, np.int32),
        top_p=on,
        min_p=off,
        typical_p=on,
        repetition_penalty=on,
        presence_penalty=off,
        frequency_penalty=off,
        seeds=all_rows(0, np.uint64),
        positions=all_rows(0, np.int64),
        bias_starts=np.zeros(rows + 1, np.int32),
        bias_ids=np.zeros(0, np.int32),
        bias_values=np.zeros(0, np.float32),
        num_logprobs=all_rows(-1, np.int32),
        processed_logprobs=all_rows(0, np.bool_),
    )


def sample(logits: Tensor, batch: SamplingBatch, histories: Histories | None, upload: Upload) -> Drawn:
    """Draw one token for each row of [n, vocab] logits of any float dtype."""
    greedy = batch.temperature == 0
    raw = logits.float()
    warped = _adjust(raw, batch, histories, upload)
    token_ids = warped.argmax(-1)
    if not greedy.all():
        drawn = np.flatnonzero(~greedy)
        rows = upload(drawn)
        filtered = _warp(warped[rows], batch, drawn, upload)
        token_ids[rows] = _draw(filtered, upload(uniforms(batch.seeds[drawn], batch.positions[drawn])))
        warped[rows] = filtered
    return Drawn(token_ids, *_logprobs(raw, warped, token_ids, batch, upload))


def masked(logits: Tensor, batch: SamplingBatch, upload: Upload) -> Tensor:
    """Step 0: [n, vocab] logits with -inf for what the masks forbid, in a new tensor if there are masks."""
    if batch.mask is None:
        return logits
    words, vocab = ~batch.mask.words(), logits.shape[1]
    if logits.is_cpu:
        forbidden = unpacked_on_host(words, vocab)
    else:  # the words are the smaller upload
        forbidden = unpacked_on_device(upload(words.view(np.int32)), vocab)
    if len(forbidden) == len(logits):
        return logits.masked_fill(forbidden, -torch.inf)
    rows = upload(batch.mask.rows.astype(np.int64))
    return logits.index_copy(0, rows, logits[rows].masked_fill(forbidden, -torch.inf))


def unpacked_on_host(words: U32, vocab: int) -> Tensor:
    """bool [m, vocab] from u32 [m, ceil(vocab / 32)], in a tenth of the time that torch takes there."""
    bits = np.unpackbits(words.view(np.uint8), axis=1, count=vocab, bitorder="little")
    return torch.from_numpy(bits).view(torch.bool)


def unpacked_on_device(words: Tensor, vocab: int) -> Tensor:
    """The same from i32 words on a device: torch has few operations for u32, and the bits are the same."""
    bits = words[:, :, None] >> torch.arange(32, dtype=torch.int32, device=words.device) & 1
    return bits.flatten(1)[:, :vocab].bool()


def _adjust(raw: Tensor, batch: SamplingBatch, histories: Histories | None, upload: Upload) -> Tensor:
    """Steps 0 to 3, mask, bias and penalties, into a new tensor."""
    out = raw.clone() if batch.mask is None else masked(raw, batch, upload)
    if len(batch.bias_ids):
        rows = np.repeat(np.arange(len(batch)), np.diff(batch.bias_starts))
        ids = (upload(rows), upload(batch.bias_ids).long())
        out.index_put_(ids, upload(batch.bias_values), accumulate=True)
    if histories is None:
        return out
    penalised = np.flatnonzero(needs_history(batch))
    for start in range(0, len(penalised), PENALISED_ROWS):
        some = penalised[start : start + PENALISED_ROWS]
        at, part = upload(some), histories.part(start, start + PENALISED_ROWS)
        out[at] = _penalise(out[at], batch, some, part, upload)
    return out


def _penalise(
    out: Tensor, batch: SamplingBatch, rows: NDArray[np.int64], histories: Histories, upload: Upload
) -> Tensor:
    """Penalties for rows [n, vocab] of which `histories` tells the tokens."""
    ids = histories.token_ids.long()
    at = torch.arange(ids.shape[1], device=ids.device)
    known = at < histories.lengths[:, None]
    generated = known & (at >= histories.num_prompt_tokens[:, None])
    ids = torch.where(known, ids, 0)  # what is not known counts zero times
    seen = torch.zeros_like(out).scatter_add_(1, ids, known.to(out.dtype)) > 0
    counts = torch.zeros_like(out).scatter_add_(1, ids, generated.to(out.dtype))
    repetition = _column(batch.repetition_penalty[rows], upload)
    out = torch.where(seen, torch.where(out > 0, out / repetition, out * repetition), out)
    presence, frequency = _column(batch.presence_penalty[rows], upload), _column(batch.frequency_penalty[rows], upload)
    return torch.where(counts > 0, out - (presence + frequency * counts), out)


def _warp(adjusted: Tensor, batch: SamplingBatch, rows: NDArray[np.int64], upload: Upload) -> Tensor:
    """Steps 5 and 6 for the drawn rows: temperature and the filters; what a filter drops becomes -inf."""
    out = adjusted / _column(batch.temperature[rows], upload)
    vocab = out.shape[1]
    top_k, top_p, typical_p, min_p = (getattr(batch, name)[rows] for name in ("top_k", "top_p", "typical_p", "min_p"))
    if (chosen := np.flatnonzero((top_k > 0) & (top_k < vocab))).size:
        some = upload(chosen)
        best = _best(out[some], int(top_k[chosen].max()), floor=-torch.inf)
        out[some] = _keep(out[some], best, _column(top_k[chosen], upload))
    if (chosen := np.flatnonzero(top_p < 1)).size:
        some = upload(chosen)
        out[some] = _nucleus(out[some], _column(top_p[chosen], upload))
    if (chosen := np.flatnonzero(typical_p < 1)).size:
        some = upload(chosen)
        out[some] = _typical(out[some], _column(typical_p[chosen], upload))
    if (chosen := np.flatnonzero(min_p > 0)).size:
        some = upload(chosen)
        least = out[some].amax(-1, keepdim=True) + _column(np.log(min_p[chosen]), upload)
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


def _draw(warped: Tensor, us: Tensor) -> Tensor:
    """The first id whose cumulative probability exceeds u; us f32 [n]."""
    cumulative = torch.softmax(warped, -1).cumsum(-1, dtype=torch.float64)
    wanted = us[:, None].double() * cumulative[:, -1:]
    return torch.searchsorted(cumulative, wanted, right=True).squeeze(1).clamp_(max=warped.shape[1] - 1)


def _logprobs(
    raw: Tensor, warped: Tensor, token_ids: Tensor, batch: SamplingBatch, upload: Upload
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Drawn's logprobs, top_ids and top_logprobs."""
    width = int(batch.num_logprobs.max(initial=-1))
    if width < 0:
        return None, None, None
    raw, warped = raw.float(), warped.float()
    asked = np.flatnonzero(batch.num_logprobs >= 0)
    rows = upload(asked)
    processed = _column(batch.processed_logprobs[asked], upload)
    scores = torch.log_softmax(torch.where(processed, warped[rows], raw[rows]), -1)
    logprobs = raw.new_full((len(raw),), torch.nan)
    logprobs[rows] = scores.gather(1, token_ids[rows, None]).squeeze(1)
    top_ids = torch.zeros((len(raw), width), dtype=torch.int32, device=raw.device)
    top_logprobs = raw.new_full((len(raw), width), torch.nan)
    if k := min(width, scores.shape[1]):
        best = _best(scores, k)
        beyond = torch.arange(k, device=raw.device) >= _column(batch.num_logprobs[asked], upload)
        top_ids[rows, :k] = best.masked_fill(beyond, 0).to(torch.int32)
        top_logprobs[rows, :k] = scores.gather(1, best).masked_fill(beyond, torch.nan)
    return logprobs, top_ids, top_logprobs


def _column(values: NDArray[Any], upload: Upload) -> Tensor:
    return upload(np.ascontiguousarray(values))[:, None]
