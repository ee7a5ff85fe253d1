"""From a stream of token ids to a stream of text. Knows nothing about stop strings or requests.

A character may be split over several tokens, and many decoders treat the first token of a sequence specially, so
tokens cannot be decoded one by one. Where tokens are bytes (byte-level vocabularies, and the byte tokens of others),
they go through an incremental UTF-8 decoder; all others are decoded behind the token before them, and what that
adds is sent. Either way the cost per token does not grow with the sequence.

`tokenizers.decoders.DecodeStream` was tried: it has no flush, raises where a stray byte follows a complete
character in a byte-fallback vocabulary, and its window grows as long as tokens end inside characters.
"""

from __future__ import annotations

import codecs
from collections.abc import Container, Sequence

from .tokenizer import TextTokenizer

# How many ids of the prompt set the scene: some are skipped, up to 3 are the start of a character.
_NUM_PROMPT_IDS = 16


class StreamDecoder:
    """Decodes one sequence, token by token.

    All texts that `push` and `flush` return, joined, are the decoded sequence. `push` never returns U+FFFD for a
    character that later tokens complete. Only next to bytes that are no UTF-8 may the text of a byte-fallback
    vocabulary differ from `TextTokenizer.decode`, which then drops the complete characters around them too.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        skip_special_tokens: bool = True,
        prompt_ids: Sequence[int] = (),
        shown_ids: Container[int] = (),
    ) -> None:
        """prompt_ids: what comes before, if the text continues it: the first token keeps its leading space, and a
        character that the prompt cut is completed. Only the last few are looked at. shown_ids: special tokens that
        are not skipped."""
        self._skips = skip_special_tokens
        self._is_special = tokenizer.is_special
        self._shown_ids = shown_ids
        self._decoder = _ByteDecoder(tokenizer) if tokenizer.is_byte_level else _PieceDecoder(tokenizer)
        for token_id in prompt_ids[-_NUM_PROMPT_IDS:]:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        """The text that this token completes; "" while a character is incomplete or if the token is skipped."""
        if self._skips and self._is_special(token_id) and token_id not in self._shown_ids:
            return ""
        return self._decoder.push(token_id)

    def flush(self) -> str:
        """What was held back, at the end of the sequence: U+FFFD for a character that nothing completed.

        Changes:
            Ends the sequence; do not push after it.
        """
        return self._decoder.flush()


class _ByteDecoder:
    """For byte-level vocabularies."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _PieceDecoder(_ByteDecoder):
    """For all other vocabularies: pieces of text, and possibly tokens for single bytes.

    Source: the prefix and read offsets of TGI's `Model.decode_token`.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        super().__init__(tokenizer)
        self._set_context([])

    def push(self, token_id: int) -> str:
        if not self._tokenizer.piece(token_id):
            return ""
        if token_id in self._tokenizer.byte_tokens:
            text = super().push(token_id)
        else:
            # No byte can complete a character any more.
            text = self.flush() + self._text_behind_context(token_id)
        self._set_context([token_id])
        return text

    def _text_behind_context(self, token_id: int) -> str:
        text = self._decode([*self._context, token_id])
        if text.startswith(self._context_text):
            return text[len(self._context_text) :]
        return self._decode([token_id])

    def _set_context(self, token_ids: list[int]) -> None:
        self._context = token_ids
        self._context_text = self._decode(token_ids)

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)
