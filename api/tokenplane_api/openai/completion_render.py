"""Completions: plain text, behind the prompt if the client wants it echoed."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from ..generation import GeneratedToken, Generation, Output, Piece, PromptToken, prompt_tokens
from ..streaming import encode_line
from ..text.tokenizer import TextTokenizer
from .convert import Prepared
from .render import FINISH, Head, Renderer, number


class CompletionRenderer(Renderer):
    object = chunk_object = "text_completion"
    id_prefix = "cmpl"
    tells_stop_token = True  # as OpenAI does: evaluation harnesses count on one entry for each generated token

    def __init__(
        self, head: Head, generations: Sequence[Generation], prepared: Prepared, tokenizer: TextTokenizer
    ) -> None:
        super().__init__(head, generations, prepared, tokenizer)
        self._told_prompts: dict[int, dict[str, Any]] = {}

    @property
    def num_completion_tokens(self) -> int:
        return 0 if self._prepared.is_prompt_only else super().num_completion_tokens

    def _choice(self, index: int, output: Output) -> dict[str, Any]:
        logprobs = self._whole_logprobs(output)
        text, finish_reason = output.text, FINISH[output.finish_reason]
        if self._prepared.is_prompt_only:
            text, finish_reason, logprobs = "", "length", logprobs and self._logprobs([])
        if self._prepared.echoes is not None:
            candidate = self._generations.index(output.generation)
            echo = self._prepared.echoes[candidate]
            text = echo + text
            if logprobs is not None:
                logprobs = _joined(self._echo_logprobs(candidate), logprobs, len(echo))
        return {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }

    def _chunks(self, index: int, frame: bytes, piece: Piece, tokens: list[GeneratedToken], is_first: bool) -> bytes:
        text = piece.text
        finish_reason = FINISH[piece.finish_reason] if piece.finish_reason else None
        if self._prepared.is_prompt_only:
            text, tokens, finish_reason = "", [], finish_reason and "length"
        logprobs = self._logprobs(tokens) if tokens else None
        if self._prepared.echoes is not None:
            echo = self._prepared.echoes[index]
            if logprobs is not None:
                logprobs["text_offset"] = [len(echo) + offset for offset in logprobs["text_offset"]]
            if is_first:
                text = echo + text
                if self._prepared.wants_logprobs:
                    logprobs = _joined(self._echo_logprobs(index), logprobs or self._logprobs([]), 0)
        if not (text or logprobs or finish_reason):
            return b""
        line = b"null" if logprobs is None else encode_line(logprobs)
        return self._chunk(frame, b'"text":%b' % encode_line(text), line, finish_reason)

    def _echo_logprobs(self, candidate: int) -> dict[str, Any]:
        """Of a candidate's prompt, in the same four lists: made once for all candidates, as it may be long."""
        prompt = candidate // self._prepared.num_candidates
        if prompt not in self._told_prompts:
            self._told_prompts[prompt] = self._prompt_logprobs(self._generations[candidate])
        return self._told_prompts[prompt]

    def _prompt_logprobs(self, generation: Generation) -> dict[str, Any]:
        """Nothing is known of the first token."""
        tokens = prompt_tokens(generation, self._tokenizer)
        texts = [token.text for token in tokens]
        return {
            "tokens": texts,
            "token_logprobs": [None if token.logprob is None else number(token.logprob) for token in tokens],
            "top_logprobs": [None if token.logprob is None else self._alternatives(token) for token in tokens],
            "text_offset": list(itertools.accumulate((len(text) for text in texts[:-1]), initial=0)) if texts else [],
        }

    def _alternatives(self, token: PromptToken) -> dict[str, float]:
        """By their texts; the prompt's own under the one that `tokens` has, as clients look whether it was the best.

        Another that has the same, as where `tokens` shows a whole character at its last part, goes by its id.
        """
        others = [(i, value) for i, value in token.top_logprobs if i != token.id]
        best = self._by_text(others)
        if token.text in best:
            hidden = next(i for i, _ in others if self._tokenizer.token_text(i) == token.text)
            best[f"token_id:{hidden}"] = best[token.text]
        best[token.text] = number(token.logprob)
        return best

    def _by_text(self, best: Iterable[tuple[int, float | None]]) -> dict[str, float]:
        """The first of those that are alike as text, as parts of a character are."""
        out: dict[str, float] = {}
        for token_id, logprob in best:
            out.setdefault(self._tokenizer.token_text(token_id), number(logprob))
        return out

    def _logprobs(self, tokens: Sequence[GeneratedToken]) -> dict[str, Any]:
        """The older format: four lists side by side. The drawn token is always among its top_logprobs."""
        return {
            "tokens": [self._tokenizer.token_text(token.id) for token in tokens],
            "token_logprobs": [number(token.logprob) for token in tokens],
            "top_logprobs": [self._by_text([*token.top_logprobs, (token.id, token.logprob)]) for token in tokens],
            "text_offset": [token.start for token in tokens],
        }


def _joined(echo: dict[str, Any], logprobs: dict[str, Any], num_echo_chars: int) -> dict[str, Any]:
    shifted = {**logprobs, "text_offset": [num_echo_chars + offset for offset in logprobs["text_offset"]]}
    return {name: column + shifted[name] for name, column in echo.items()}
