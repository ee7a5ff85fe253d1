"""Guided decoding: grammars compiled off the hot path, and what they allow next.

llguidance does the work (it is imported with the first grammar). A grammar is compiled in a worker thread, after a
child process has compiled it within limits of time and memory (grammar_check.py); the result is cached, and every
sequence gets a copy of its own, a `Guide`. What becomes of guides in a step: masks.py.

The grammar is about the whole generated text. A request that outlives its engine brings its tokens along, which are
consumed again.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence as Rows
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..backend.records import U32
from ..messages import Grammar
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

    def ahead_by(self, token_id: int) -> Guide | None:
        """Another, which has consumed the token; None if the grammar does not allow it. This one stays where it is."""
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

    def allowed(self, guides: Rows[Any]) -> tuple[U32, list[bool]]:
        """u32 [m, ceil(vocab / 32)]: what each guide allows next, a bit for each id and none above them; and for each
        guide, whether its text may end here. A guide that fails allows nothing, and says why in `error`.
        """
        ...

    def close(self) -> None: ...


# --- llguidance ---------------------------------------------------------------------------------------------


class LLGuide:
    """A Guide over an llguidance matcher."""

    __slots__ = ("matcher",)

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self.matcher = matcher

    def consume(self, token_id: int) -> bool:
        return self.matcher.consume_token(token_id)

    def ahead_by(self, token_id: int) -> LLGuide | None:
        matcher = self.matcher.deep_copy()  # takes less time than its next mask
        # `consume_token` would take a hundred times as long to say no: it describes the state.
        return LLGuide(matcher) if matcher.try_consume_tokens([token_id]) == 1 else None

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
        self._room, self._address = np.empty((0, 0), np.uint32), 0
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

    def allowed(self, guides: Rows[LLGuide]) -> tuple[U32, list[bool]]:
        assert self._tokenizer is not None, "a guide comes from a tokenizer"
        matchers = [guide.matcher for guide in guides]
        words = self._masks(matchers, self._tokenizer.vocab_size)[:, : -(-self._vocab_size // 32)].copy()
        end = self._tokenizer.eos_token
        if end < self._vocab_size:  # one of the model's ids that no token has
            words[:, end // 32] &= ~np.uint32(1 << end % 32)
        if self._vocab_size % 32:
            words[:, -1] &= np.uint32((1 << self._vocab_size % 32) - 1)
        failed = [i for i, matcher in enumerate(matchers) if matcher.is_error()]
        if failed:
            words[failed] = 0
        return words, [matcher.is_accepting() for matcher in matchers]

    def _masks(self, matchers: list[llguidance.LLMatcher], num_tokens: int) -> U32:
        """u32 [m, ceil(num_tokens / 32)] of room that is used again. By address: llguidance's helper for a row takes as
        long as many a mask, and looking an address up as long as a few.
        """
        num_rows, row_bytes = len(matchers), -(-num_tokens // 32) * 4
        if len(self._room) < num_rows:
            self._room = np.empty((num_rows, row_bytes // 4), np.uint32)
            self._address = self._room.ctypes.data
        if self._num_threads > 1 and num_rows > 1:
            from llguidance import LLExecutor

            self._executor = self._executor or LLExecutor(self._num_threads)
            rows = [(matcher, i) for i, matcher in enumerate(matchers)]
            self._executor.unsafe_compute_mask_ptr(rows, self._address, row_bytes, num_rows)
        else:
            for i, matcher in enumerate(matchers):
                matcher.unsafe_compute_mask_ptr(self._address + i * row_bytes, row_bytes)
        return self._room[:num_rows]

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
