"""The masks of a step: what its draws may be, as grammars demand and as the requests say of single ids.

Everything here happens while the device computes: guides take in what the step before drew, then all masks are built.
What was drawn is held against its mask, not against the guide, which is one token behind until the next step. Because
the mask of a token depends on the token before it, the engine reads a step with masks back before it launches the next
one, also at async depth 1.

Where the text may end, the mask allows the request's stop tokens; where nothing else may follow, only them. If none of
them can be drawn then (the client ignores them, or min_new_tokens bans them still), the sequence ends there, with
reason "stop_token" and no further token. If the text may not end and no token of the vocabulary leads on, the request
fails with an error.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field

import numpy as np

from ..backend.records import I64, U32, TokenMask
from ..messages import SamplingParams
from .grammar import Grammars, Guide


@dataclass(frozen=True, slots=True, eq=False)
class Edits:
    """What a request says of single ids, whatever its grammar says: bits of a mask. Equal requests share one."""

    columns: I64  # i64 [k] words of a mask, each once
    kept: U32  # u32 [k] bits there that nothing is said about
    stops: U32  # u32 [k] bits there of stop tokens, for where the text may end

    def apply(self, words: U32, rows: list[int], ending: list[int]) -> None:
        """Change rows of u32 [m, w] in place; ending: those of them where a stop token may be drawn."""
        if not self.columns.size:
            return
        words[_at(rows, self.columns)] &= self.kept
        if ending:
            words[_at(ending, self.columns)] |= self.stops


def edits_for(params: SamplingParams, stop_token_ids: frozenset[int], vocab_size: int) -> Edits:
    """A stop token that stands for text would end the answer in the middle, so it is allowed at the end only."""
    banned = (token_id for token_id, bias in params.logit_bias.items() if bias == -np.inf)
    return _edits(frozenset(i for i in stop_token_ids if 0 <= i < vocab_size), frozenset(banned))


@functools.lru_cache(256)
def _edits(stop_ids: frozenset[int], banned_ids: frozenset[int]) -> Edits:
    columns = sorted({token_id // 32 for token_id in stop_ids | banned_ids})
    stops, touched = _bits(stop_ids - banned_ids, columns), _bits(stop_ids | banned_ids, columns)
    return Edits(np.array(columns, np.int64), ~touched, stops)


@dataclass(slots=True)
class Guidance:
    """Keeps one sequence within its grammar.

    It knows the generated tokens and nothing of the device, so it survives preemption as it is.
    """

    guide: Guide
    edits: Edits
    tokens_to_come: int  # before a stop token may be drawn, as min_new_tokens wants
    behind: list[int] = field(default_factory=list)  # tokens of the sequence that the guide has not consumed yet

    def catch_up(self) -> Guide:
        """The guide where the sequence is. All of `behind` was allowed; one that fails nevertheless has its `error`."""
        for token_id in self.behind:
            self.guide.consume(token_id)
        self.tokens_to_come -= len(self.behind)
        self.behind.clear()
        return self.guide


GuidedRow = tuple[int, Guidance, Rows[int]]
"""A row of a step that is under a grammar: its draw's entry in the SamplingBatch, whose it is, and its drafts; behind
each of these is another draw.
"""


@dataclass(frozen=True, slots=True)
class StepMasks:
    """The masks of one step, and the draws that can be nothing. The latter draw anything, which is dropped."""

    words: U32  # u32 [m, ceil(vocab / 32)]
    rows: dict[int, int]  # draw -> row of words; of draws that count if the drafts before them are right
    finished: frozenset[int]  # draws of texts that are complete
    stuck: frozenset[int]  # draws where no token leads on

    def allows(self, draw: int, token_id: int) -> bool:
        row, (word, bit) = self.rows.get(draw), divmod(token_id, 32)
        if row is None or not 0 <= word < self.words.shape[1]:
            return False
        return self.words.item(row, word) >> bit & 1 == 1


NO_MASKS = StepMasks(np.zeros((0, 0), np.uint32), {}, frozenset(), frozenset())


class PendingMasks:
    """The masks of one step, built when somebody first asks: the backend's sampler, which does so once the forward pass
    is launched, or the engine before it waits for the device. Until then, no token of these sequences is committed.

    Not in a thread of its own: that would wait for the interpreter's lock longer than the work takes.
    """

    def __init__(self, grammars: Grammars, rows: Rows[GuidedRow]) -> None:
        self._grammars, self._rows = grammars, rows
        self._draws: list[int] = []
        for draw, _, drafts in rows:
            self._draws += range(draw, draw + 1 + len(drafts))
        self._masks: StepMasks | None = None

    def token_mask(self) -> TokenMask:
        """For the backend."""
        return TokenMask(np.array(self._draws, np.int32), lambda: self.result().words)

    def result(self) -> StepMasks:
        if self._masks is None:
            self._masks = self._build()
        return self._masks

    def _build(self) -> StepMasks:
        masked = _masked(self._rows)
        words, may_end = self._grammars.allowed(masked.guides)
        for edits, some in masked.alike.items():
            edits.apply(words, some, [i for i in some if may_end[i] and i not in masked.early])
        lost = [i for i, bits in enumerate(np.bitwise_or.reduce(words, axis=1).tolist()) if not bits]
        if lost:
            words[lost] = ~np.uint32(0)
        draws = [self._draws[row] for row in masked.at]
        finished = frozenset(draws[i] for i in lost if may_end[i])
        stuck = frozenset(draws[i] for i in lost) - finished
        if len(draws) < len(self._draws):
            words = _spread(words, masked.at, len(self._draws))
        return StepMasks(words, dict(zip(draws, masked.at, strict=True)), finished, stuck)


@dataclass(slots=True)
class _Masked:
    """The draws of a step that a guide says something about."""

    guides: list[Guide] = field(default_factory=list)
    at: list[int] = field(default_factory=list)  # their rows of the mask
    alike: defaultdict[Edits, list[int]] = field(default_factory=lambda: defaultdict(list))  # entries of `guides`
    early: set[int] = field(default_factory=set)  # entries of those where min_new_tokens bans the stop tokens still


def _masked(rows: Rows[GuidedRow]) -> _Masked:
    """Changes: the guides are where their sequences are."""
    out, row = _Masked(), 0
    guides = out.guides
    for _, guidance, drafts in rows:
        first = len(guides)
        guides.append(guidance.catch_up())
        if drafts:
            guides += guesses(guides[first], drafts)
        entries = range(first, len(guides))
        if guidance.tokens_to_come > 0:
            out.early.update(entries[: guidance.tokens_to_come])
        out.alike[guidance.edits] += entries
        out.at += range(row, row + len(entries))
        row += 1 + len(drafts)
    return out


def guesses(guide: Guide, drafts: Rows[int]) -> list[Guide]:
    """Where the sequence would be after each of the drafts, up to the first that the grammar does not allow: what is
    drawn behind that one is dropped, so it needs no mask.
    """
    out: list[Guide] = []
    for token_id in drafts:
        ahead = guide.ahead_by(token_id)
        if ahead is None:
            break
        guide = ahead
        out.append(guide)
    return out


def _spread(words: U32, at: list[int], num_rows: int) -> U32:
    """The same in these of so many rows; all others allow everything."""
    out = np.full((num_rows, words.shape[1]), ~np.uint32(0), np.uint32)
    out[at] = words
    return out


def _bits(ids: frozenset[int], columns: list[int]) -> U32:
    """u32 [len(columns)]: the bits of the ids in these words."""
    of_word = dict.fromkeys(columns, 0)
    for token_id in ids:
        of_word[token_id // 32] |= 1 << token_id % 32
    return np.array(list(of_word.values()), np.uint32)


def _at(rows: list[int], columns: I64) -> tuple[np.ndarray, I64]:
    """Index of these columns in these rows."""
    return np.array(rows)[:, None], columns
