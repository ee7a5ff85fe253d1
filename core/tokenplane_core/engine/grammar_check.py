"""Compiling a grammar where it can do no harm: in a child process, within limits of time and memory.

Some small grammars take the compiler minutes or gigabytes ("multipleOf": 123456789), and a thread cannot be stopped. So
every new grammar is compiled in a child first; what passes is compiled once more in the engine.

    python -m tokenplane_core.engine.grammar_check TOKENIZER_JSON VOCAB_SIZE

reads a Grammar as JSON per line and answers each with a line: its problem as a JSON string, "" if it has none.
"""

from __future__ import annotations

import contextlib
import json
import resource
import select
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ..messages import Grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

COMPILE_LIMIT_S = 5.0
START_LIMIT_S = 60.0
MEMORY_LIMIT_BYTES = 256 << 20


def llguidance_source(grammar: Grammar) -> str:
    """The grammar in llguidance's own terms. Raises ValueError if it is not even one."""
    from llguidance import LLMatcher, regex_to_lark

    if grammar.kind == "json_schema":
        return LLMatcher.grammar_from_json_schema(grammar.source)
    if grammar.kind == "regex":
        # \d and \w mean ASCII, as in JSON Schema, and as TGI's users know them.
        return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(grammar.source, 'dw')}/")
    return LLMatcher.grammar_from_lark(grammar.source)


def parser_limits() -> LLParserLimits:
    """Bounds on what a grammar may cost while it is compiled and in each step (units: llguidance's documentation)."""
    from llguidance import LLParserLimits

    return LLParserLimits(max_lexer_states=50_000, verbose_errors=False)


class GrammarError(Exception):
    """The grammar cannot be used; the message is for the client."""


def read_tokenizer(file: Path, vocab_size: int) -> LLTokenizer:
    """For masks of at least vocab_size ids. Its `eos_token`, behind all tokens it has, stands for the end of the text.

    So no real token is taken for the end: which tokens stop a sequence is said by its request.

    Raises:
        GrammarError: this tokenizer cannot guide.
    """
    from llguidance import LLTokenizer

    try:
        tokenizer = json.loads(file.read_text(encoding="utf-8"))
        vocab, added = tokenizer["model"]["vocab"], tokenizer["added_tokens"]
    except (OSError, ValueError, LookupError, TypeError):
        raise GrammarError("this model has no readable tokenizer.json, which grammars need") from None
    known = {*(vocab.values() if isinstance(vocab, dict) else range(len(vocab))), *(token["id"] for token in added)}
    end = max(known) + 1
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    for token_id in sorted({*range(end + 1)} - known):  # llguidance wants no gaps either
        added.append({"id": token_id, "content": f"<no token {token_id}>", **flags})
    try:
        # The model may have logits for fewer ids than there are tokens, or for more.
        return LLTokenizer(json.dumps(tokenizer), n_vocab=max(end + 1, vocab_size), eos_token=end)
    except ValueError as error:
        raise GrammarError(f"this model's tokenizer cannot follow grammars: {first_lines(str(error))}") from None


def compile_grammar(grammar: Grammar, tokenizer: LLTokenizer) -> LLMatcher:
    """A matcher at the start of the grammar.

    Raises:
        GrammarError: with the compiler's message.
    """
    from llguidance import LLMatcher

    try:
        matcher = LLMatcher(tokenizer, llguidance_source(grammar), log_level=0, limits=parser_limits())
        problem = matcher.get_error()
    except ValueError as error:
        problem = str(error)
    if problem:
        raise GrammarError(f"the grammar cannot be compiled: {first_lines(problem)}")
    return matcher


def first_lines(message: str, most_chars: int = 500) -> str:
    """A compiler's message without the state it dumps behind it, in one line."""
    text = " ".join(message.partition("<state>")[0].split())
    return text if len(text) <= most_chars else text[: most_chars - 3] + "..."


class Checker:
    """One child process, started when it is first needed and replaced when it had to be ended. Not thread-safe."""

    def __init__(self, tokenizer_file: Path, vocab_size: int) -> None:
        self._command = [sys.executable, "-m", __name__, str(tokenizer_file), str(vocab_size)]
        self._process: subprocess.Popen[bytes] | None = None

    def check(self, grammar: Grammar) -> None:
        """Takes COMPILE_LIMIT_S at most, and a start.

        Raises:
            GrammarError: the grammar cannot be compiled, or not within the limits.
        """
        problem = self._problem(grammar)
        if problem:
            raise GrammarError(problem)

    def _problem(self, grammar: Grammar) -> str:
        process = self._process or self._start()
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(msgspec.json.encode(grammar) + b"\n")
            process.stdin.flush()
        answer = self._read_line(process, COMPILE_LIMIT_S)
        if answer is None:
            return f"the grammar takes longer to compile than {COMPILE_LIMIT_S:g} s, the limit; make it simpler"
        if not answer:
            limit = f"{MEMORY_LIMIT_BYTES >> 20} MiB"
            return f"the grammar's compiler ended early, probably for lack of memory ({limit}); make it simpler"
        return msgspec.json.decode(answer, type=str)

    def close(self) -> None:
        """End the child."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]

    def _start(self) -> subprocess.Popen[bytes]:
        process = self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        if not self._read_line(process, START_LIMIT_S):
            raise RuntimeError("the process that checks grammars does not start; see its log above")
        return process

    def _read_line(self, process: subprocess.Popen[bytes], limit_s: float) -> bytes | None:
        """The child's next line; None after the limit, b"" if it has died. In both cases the child is gone."""
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], limit_s)
        line = process.stdout.readline() if ready else None
        if not line:
            self.close()
        return line


def main() -> None:
    """Entry point of the child: answers until its input ends."""
    tokenizer = read_tokenizer(Path(sys.argv[1]), int(sys.argv[2]))
    with contextlib.suppress(OSError):  # no /proc: then only the time is limited
        mapped_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped_bytes + MEMORY_LIMIT_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = sys.stdout.buffer
    answers.write(b"ready\n")
    answers.flush()
    for line in sys.stdin.buffer:
        # Should the engine be killed meanwhile, nobody else ends a compilation that never does.
        used_s = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        resource.setrlimit(resource.RLIMIT_CPU, (int(used_s + 2 * COMPILE_LIMIT_S), resource.RLIM_INFINITY))
        problem = ""
        try:
            compile_grammar(msgspec.json.decode(line, type=Grammar), tokenizer)
        except GrammarError as error:
            problem = str(error)
        answers.write(msgspec.json.encode(problem) + b"\n")
        answers.flush()


if __name__ == "__main__":
    main()
