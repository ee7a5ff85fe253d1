"""Guided decoding: grammars compiled off the hot path, and the masks that keep sequences within them.

llguidance does the work (it is imported with the first grammar). A grammar is compiled in a worker thread, after a
child process has compiled it within limits of time and memory (grammar_check.py); the result is cached, and every
sequence gets a copy of its own, a `Guide`. Masks are built while the device computes, all rows in parallel.

A guide knows the generated tokens and nothing of the device: it survives preemption as it is, and a request that
outlives its engine brings its tokens along, which are consumed again. Because the mask of a token depends on the token
before it, the engine reads a step with masks back before it launches the next one, also at async depth 1.

The grammar is about the whole generated text. Where the text may end, the mask allows the request's stop tokens; where
nothing else may follow, only them. If none of them can be drawn then (the client ignores them, or min_new_tokens bans
them still), the sequence ends there, with reason "stop_token" and no further token. If the text may not end and no
token of the vocabulary leads on, the request fails with an error.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence as Rows
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..backend.records import I32, U32, TokenMask
from ..messages import Grammar, SamplingParams
from .grammar_check import Checker, GrammarError, compile_grammar, first_lines, read_tokenizer

if TYPE_CHECKING:
    import llguidance

MAX_CACHED_GRAMMARS = 32  # one may take as much memory as grammar_check.py allows it
NUM_COMPILERS = 2
MAX_MASK_THREADS = 8


log = logging.getLogger("tokenplane.engine")


class Guide(Protocol):
    """Where one sequence is in its grammar."""

    def consume(self, token_id: int) -> bool:
        """Advance by a generated token; False if the grammar does not allow it, then the guide is of no more use."""
        ...

    @property
    def error(self) -> str:
        """Why the guide is of no more use; "" as long as it is."""
        ...


class Grammars(Protocol):
    """Compiles grammars for one vocabulary."""

    def compile(self, grammar: Grammar) -> Future[Guide]:
        """A guide at the start of the grammar, or GrammarError. Returns at once."""
        ...

    def allowed(self, guides: Rows[Any]) -> I32:
        """i32 [m, vocab // 32 + 1]: what each guide allows next, a bit for each id, and bit `vocab`: the text may end.

        Bits above mean nothing. A guide that fails allows nothing, and says why in `error`.
        """
        ...

    def close(self) -> None: ...


# --- llguidance ---------------------------------------------------------------------------------------------


class LLGuide:
    """A Guide over an llguidance matcher."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self.matcher = matcher

    def consume(self, token_id: int) -> bool:
        return self.matcher.consume_token(token_id)

    @property
    def error(self) -> str:
        return first_lines(self.matcher.get_error()) if self.matcher.is_error() else ""


class LLGrammars:
    """Grammars over the tokenizer.json in a model folder, which is read with the first grammar."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self._tokenizer_file, self._vocab_size = folder / "tokenizer.json", vocab_size
        self._workers = ThreadPoolExecutor(NUM_COMPILERS, thread_name_prefix="grammar")
        self._checkers = threading.local()
        self._all_checkers: list[Checker] = []
        self._cache: OrderedDict[Grammar, Future[llguidance.LLMatcher]] = OrderedDict()
        self._lock = threading.Lock()
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._executor: llguidance.LLExecutor | None = None
        # With few cores, waking a second thread takes longer than the masks of a batch.
        self._num_threads = min(MAX_MASK_THREADS, _num_cores() // 2)

    def compile(self, grammar: Grammar) -> Future[Guide]:
        compiled = self._cache.pop(grammar, None)
        if compiled is None or _broke(compiled):
            compiled = self._workers.submit(self._compile, grammar)
            while len(self._cache) >= MAX_CACHED_GRAMMARS:
                self._cache.popitem(last=False)
        self._cache[grammar] = compiled
        guide: Future[Guide] = Future()
        compiled.add_done_callback(lambda done: _hand_over(done, guide))
        return guide

    def allowed(self, guides: Rows[LLGuide]) -> I32:
        from llguidance import LLExecutor
        from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask, fill_next_token_bitmask_par

        assert self._tokenizer is not None, "a guide comes from a tokenizer"
        words: I32 = allocate_token_bitmask(len(guides), self._tokenizer.vocab_size)
        if self._num_threads > 1 and len(guides) > 1:
            self._executor = self._executor or LLExecutor(self._num_threads)
            fill_next_token_bitmask_par(self._executor, [(g.matcher, i) for i, g in enumerate(guides)], words)
        else:
            for i, guide in enumerate(guides):
                fill_next_token_bitmask(guide.matcher, words, i)
        for i, guide in enumerate(guides):
            if guide.matcher.is_error():
                words[i] = 0
        out = np.zeros((len(guides), self._vocab_size // 32 + 1), np.int32)
        width = min(out.shape[1], words.shape[1])
        out[:, :width] = words[:, :width]
        end = self._tokenizer.eos_token
        may_end = _bit(words, end)
        if end < self._vocab_size:  # one of the model's ids that no token has
            _clear_bit(out, end)
        _clear_bit(out, self._vocab_size)
        out[:, -1] |= np.where(may_end, _one_bit(self._vocab_size), 0)
        return out

    def close(self) -> None:
        self._workers.shutdown(wait=False, cancel_futures=True)
        for checker in self._all_checkers:
            checker.close()

    def _compile(self, grammar: Grammar) -> llguidance.LLMatcher:
        """In a worker thread. Raises GrammarError."""
        tokenizer = self._load_tokenizer()
        self._checker().check(grammar)
        return compile_grammar(grammar, tokenizer)

    def _checker(self) -> Checker:
        if not hasattr(self._checkers, "mine"):
            self._checkers.mine = Checker(self._tokenizer_file, self._vocab_size)
            self._all_checkers.append(self._checkers.mine)
        checker: Checker = self._checkers.mine
        return checker

    def _load_tokenizer(self) -> llguidance.LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = read_tokenizer(self._tokenizer_file, self._vocab_size)
            return self._tokenizer


def _num_cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not every system has it
        return os.cpu_count() or 1


def _broke(compiled: Future[llguidance.LLMatcher]) -> bool:
    """True if compiling ended, and not for a reason that lies in the grammar."""
    return compiled.done() and not isinstance(compiled.exception(), GrammarError | None)


def _hand_over(compiled: Future[llguidance.LLMatcher], guide: Future[Guide]) -> None:
    """Complete `guide` with a copy of what was compiled, or with its error."""
    if compiled.cancelled():
        guide.set_exception(GrammarError("the engine is shutting down"))
    elif _broke(compiled):
        log.error("compiling a grammar failed", exc_info=compiled.exception())
        guide.set_exception(GrammarError("the grammar's compiler does not work on this server; see its log"))
    elif (error := compiled.exception()) is not None:
        guide.set_exception(error)
    else:
        guide.set_result(LLGuide(compiled.result().deep_copy()))


# --- The masks of a step ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GuidedRow:
    """A row of a step that is drawn under a grammar."""

    row: int  # of the SamplingBatch
    guide: Guide
    stop_token_ids: Rows[int]  # that end this sequence, all below the vocabulary size
    banned_ids: Rows[int]  # that a logit bias of -inf bans
    may_stop: bool  # False: min_new_tokens bans the stop tokens still


@dataclass(frozen=True, slots=True)
class StepMasks:
    """The masks of one step, and the rows that can draw nothing. The latter draw anything, which is dropped."""

    words: U32  # u32 [m, ceil(vocab / 32)]
    finished: frozenset[int]  # rows of the SamplingBatch whose text is complete
    stuck: frozenset[int]  # rows that no token leads on


class PendingMasks:
    """The masks of one step, built when somebody first asks: the backend's sampler, which does so once the forward pass
    is launched, or the engine before it waits for the device. Until then, nobody may advance the guides.

    Not in a thread of its own: that would wait for the interpreter's lock longer than the work takes.
    """

    def __init__(self, grammars: Grammars, vocab_size: int, rows: Rows[GuidedRow]) -> None:
        self._grammars, self._vocab_size, self._rows = grammars, vocab_size, rows
        self._masks: StepMasks | None = None

    def token_mask(self) -> TokenMask:
        """For the backend."""
        return TokenMask(np.array([row.row for row in self._rows], np.int32), lambda: self.result().words)

    def result(self) -> StepMasks:
        if self._masks is None:
            self._masks = self._build()
        return self._masks

    def _build(self) -> StepMasks:
        words = self._grammars.allowed([row.guide for row in self._rows]).view(np.uint32)
        may_end = _bit(words, self._vocab_size)
        words = np.ascontiguousarray(words[:, : -(-self._vocab_size // 32)])
        if self._vocab_size % 32:
            words[:, -1] &= np.uint32((1 << self._vocab_size % 32) - 1)
        # A stop token that stands for text would end the answer in the middle.
        _set_bits(words, [row.stop_token_ids for row in self._rows], False)
        stops = [
            row.stop_token_ids if end and row.may_stop else () for row, end in zip(self._rows, may_end, strict=True)
        ]
        _set_bits(words, stops, True)
        _set_bits(words, [row.banned_ids for row in self._rows], False)
        lost = np.flatnonzero(~words.any(axis=1)).tolist()
        words[lost] = ~np.uint32(0)
        finished = frozenset(self._rows[i].row for i in lost if may_end[i])
        return StepMasks(words, finished, frozenset(self._rows[i].row for i in lost) - finished)


NO_MASKS = StepMasks(np.zeros((0, 0), np.uint32), frozenset(), frozenset())


def banned_by(params: SamplingParams) -> list[int]:
    """Ids that a logit bias bans."""
    return [token_id for token_id, bias in params.logit_bias.items() if bias == -np.inf]


def _bit(words: I32 | U32, index: int) -> np.ndarray:
    """bool [m]: one bit of each row."""
    bits: np.ndarray = (words[:, index // 32] >> (index % 32)) & 1 == 1
    return bits


def _one_bit(index: int) -> np.int32:
    """That of an id, in its word."""
    return np.uint32(1 << index % 32).astype(np.int32)


def _clear_bit(words: I32, index: int) -> None:
    words[:, index // 32] &= ~_one_bit(index)


def _set_bits(words: U32, ids: Rows[Rows[int]], value: bool) -> None:
    """Set the bits of each row's ids in u32 [m, w], in place."""
    rows = np.repeat(np.arange(len(words)), [len(of_row) for of_row in ids])
    if len(rows):
        flat = np.array([token_id for of_row in ids for token_id in of_row], np.int64)
        bits = np.uint32(1) << (flat % 32).astype(np.uint32)
        if value:
            np.bitwise_or.at(words, (rows, flat // 32), bits)
        else:
            np.bitwise_and.at(words, (rows, flat // 32), ~bits)
