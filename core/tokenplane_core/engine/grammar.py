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

import functools
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

    def copy(self) -> Guide:
        """Another at the same place; what becomes of it does not concern this one."""
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

    def copy(self) -> LLGuide:
        return LLGuide(self.matcher.deep_copy())

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
        assert self._tokenizer is not None, "a guide comes from a tokenizer"
        num_tokens, end = self._tokenizer.vocab_size, self._tokenizer.eos_token
        words = np.zeros((len(guides), max(num_tokens, self._vocab_size) // 32 + 1), np.int32)
        self._fill(words, guides, -(-num_tokens // 32) * 4)
        for i, guide in enumerate(guides):
            if guide.matcher.is_error():
                words[i] = 0
        may_end = _bit(words, end)
        if end < self._vocab_size:  # one of the model's ids that no token has
            _clear_bit(words, end)
        _clear_bit(words, self._vocab_size)
        words[:, self._vocab_size // 32] |= np.where(may_end, _one_bit(self._vocab_size), 0)
        return words[:, : self._vocab_size // 32 + 1]

    def _fill(self, words: I32, guides: Rows[LLGuide], row_bytes: int) -> None:
        """The first `row_bytes` of each row. By address: llguidance's helper for a row takes as long as many a mask."""
        start, stride = words.ctypes.data, words.strides[0]
        if self._num_threads > 1 and len(guides) > 1:
            from llguidance import LLExecutor

            self._executor = self._executor or LLExecutor(self._num_threads)
            exact = words if stride == row_bytes else np.zeros((len(guides), row_bytes // 4), np.int32)
            matchers = [(guide.matcher, i) for i, guide in enumerate(guides)]
            self._executor.unsafe_compute_mask_ptr(matchers, exact.ctypes.data, row_bytes, len(guides))
            words[:, : row_bytes // 4] = exact
            return
        for i, guide in enumerate(guides):
            guide.matcher.unsafe_compute_mask_ptr(start + i * stride, row_bytes)

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
    """A draw of a step that is under a grammar."""

    row: int  # entry of the SamplingBatch
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
        rows_of: dict[tuple[int, ...], list[int]] = {}
        for i, row in enumerate(self._rows):
            rows_of.setdefault(tuple(row.stop_token_ids), []).append(i)
        for stop_ids, rows in rows_of.items():
            # A stop token that stands for text would end the answer in the middle.
            _set_bits(words, rows, stop_ids, False)
            _set_bits(words, [i for i in rows if may_end[i] and self._rows[i].may_stop], stop_ids, True)
        for i, row in enumerate(self._rows):
            _set_bits(words, [i], tuple(row.banned_ids), False)
        lost = np.flatnonzero(~words.any(axis=1)).tolist()
        words[lost] = ~np.uint32(0)
        finished = frozenset(self._rows[i].row for i in lost if may_end[i])
        return StepMasks(words, finished, frozenset(self._rows[i].row for i in lost) - finished)


def guesses(guide: Guide, drafts: Rows[int]) -> list[Guide]:
    """Where the sequence would be after each of the drafts, up to the first that the grammar does not allow: what is
    drawn behind that one is dropped, so it needs no mask.

    Copies, as a matcher that has failed cannot be rolled back; a copy takes as long as a mask.
    """
    out: list[Guide] = []
    for token_id in drafts:
        guide = guide.copy()
        if not guide.consume(token_id):
            break
        out.append(guide)
    return out


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


def _set_bits(words: U32, rows: list[int], ids: tuple[int, ...], value: bool) -> None:
    """Set the bits of the ids in these rows of u32 [m, w], in place."""
    if rows and ids:
        columns, bits = _places(ids)
        at = (np.array(rows)[:, None], columns)
        words[at] = words[at] | bits if value else words[at] & ~bits


@functools.lru_cache(256)
def _places(ids: tuple[int, ...]) -> tuple[np.ndarray, U32]:
    """The words that the ids are in, each once, and their bits there."""
    bits_in: dict[int, int] = {}
    for token_id in ids:
        bits_in[token_id // 32] = bits_in.get(token_id // 32, 0) | 1 << token_id % 32
    return np.array(list(bits_in)), np.array(list(bits_in.values()), np.uint32)
