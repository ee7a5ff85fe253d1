"""Chat answers: messages with text, thoughts and tool calls, whole or in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..generation import FinishReason, GeneratedToken, Generation, Output, Piece
from ..streaming import encode_line
from ..text.answer_parser import AnswerParser
from ..text.tokenizer import TextTokenizer
from ..text.tool_calls import CallDelta, Delta
from .convert import Prepared
from .render import FINISH, Head, Renderer, number


class ChatRenderer(Renderer):
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def __init__(
        self, head: Head, generations: Sequence[Generation], prepared: Prepared, tokenizer: TextTokenizer
    ) -> None:
        super().__init__(head, generations, prepared, tokenizer)
        self._parsed = [_ParsedChoice(prepared.new_parser()) for _ in generations] if prepared.new_parser else None

    def _choice(self, index: int, output: Output) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": output.text, "refusal": None}
        finish_reason: str = FINISH[output.finish_reason]
        if self._prepared.new_parser is not None:
            found = ParsedAnswer.of(self._prepared.new_parser(), output.text)
            message["content"] = found.content if found.content or not found.calls else None
            if found.reasoning:
                message["reasoning_content"] = found.reasoning
            if found.calls:
                message["tool_calls"] = [_tool_call(call) for call in found.calls]
            finish_reason = _finish(output.finish_reason, len(found.calls))
        return {
            "index": index,
            "message": message,
            "logprobs": self._whole_logprobs(output),
            "finish_reason": finish_reason,
        }

    def _chunks(self, index: int, frame: bytes, piece: Piece, tokens: list[GeneratedToken], is_first: bool) -> bytes:
        if self._parsed is not None:
            return self._parsed_chunks(self._parsed[index], frame, piece, tokens, is_first)
        events = []
        if is_first:
            events.append(self._chunk(frame, b'"delta":{"role":"assistant","content":""}', b"null", None))
        if piece.text or tokens:
            logprobs = encode_line(self._logprobs(tokens)) if tokens else b"null"
            events.append(self._chunk(frame, b'"delta":{"content":%b}' % encode_line(piece.text), logprobs, None))
        if piece.finish_reason:
            events.append(self._chunk(frame, b'"delta":{}', b"null", FINISH[piece.finish_reason]))
        return b"".join(events)

    def _parsed_chunks(
        self, choice: _ParsedChoice, frame: bytes, piece: Piece, tokens: list[GeneratedToken], is_first: bool
    ) -> bytes:
        """Tokens of text that is held back wait with it; each chunk has those that have come up to it."""
        deltas = choice.parser.push(piece.text)
        if piece.finish_reason:
            deltas += choice.parser.flush()
        choice.tokens += tokens
        events = [self._chunk(frame, b'"delta":{"role":"assistant"}', b"null", None)] if is_first else []
        for delta in deltas:
            choice.num_calls += isinstance(delta, CallDelta) and delta.name is not None
            events.append(self._chunk(frame, b'"delta":%b' % _delta(delta), choice.take_logprobs(self), None))
        if piece.finish_reason:
            finish_reason = _finish(piece.finish_reason, choice.num_calls)
            events.append(self._chunk(frame, b'"delta":{}', choice.take_logprobs(self), finish_reason))
        return b"".join(events)

    def logprobs_line(self, tokens: Sequence[GeneratedToken]) -> bytes:
        return encode_line(self._logprobs(tokens)) if tokens else b"null"

    def _logprobs(self, tokens: Sequence[GeneratedToken]) -> dict[str, Any]:
        content = []
        for token in tokens:
            best = [self._logprob(token_id, logprob) for token_id, logprob in token.top_logprobs]
            content.append({**self._logprob(token.id, token.logprob), "top_logprobs": best})
        return {"content": content, "refusal": None}

    def _logprob(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        raw = self._tokenizer.token_bytes(token_id)
        return {"token": self._tokenizer.token_text(token_id), "logprob": number(logprob), "bytes": list(raw)}


class _ParsedChoice:
    """A choice of a stream that is more than text."""

    def __init__(self, parser: AnswerParser) -> None:
        self.parser = parser
        self.num_calls = 0
        self.tokens: list[GeneratedToken] = []  # whose log-probabilities are still to be sent

    def take_logprobs(self, renderer: ChatRenderer) -> bytes:
        tokens, self.tokens = self.tokens, []
        return renderer.logprobs_line(tokens)


@dataclass(slots=True)
class ParsedAnswer:
    """A whole answer, taken apart. Each call: its first delta, with all of the arguments."""

    content: str = ""
    reasoning: str = ""
    calls: list[CallDelta] = field(default_factory=list)

    @classmethod
    def of(cls, parser: AnswerParser, text: str) -> ParsedAnswer:
        found = cls()
        for delta in parser.push(text) + parser.flush():
            if isinstance(delta, CallDelta):
                if delta.name is not None:
                    found.calls.append(delta)
                else:
                    begun = found.calls[delta.index]
                    found.calls[delta.index] = replace(begun, arguments=begun.arguments + delta.arguments)
            elif delta.is_reasoning:
                found.reasoning += delta.text
            else:
                found.content += delta.text
        return found


def _tool_call(call: CallDelta) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _delta(delta: Delta) -> bytes:
    """As JSON. The index is what clients put the pieces of a call together by."""
    if isinstance(delta, CallDelta):
        if delta.name is not None:
            return encode_line({"tool_calls": [{"index": delta.index, **_tool_call(delta)}]})
        arguments = encode_line(delta.arguments)
        return b'{"tool_calls":[{"index":%d,"function":{"arguments":%b}}]}' % (delta.index, arguments)
    name = b"reasoning_content" if delta.is_reasoning else b"content"
    return b'{"%b":%b}' % (name, encode_line(delta.text))


def _finish(reason: FinishReason, num_calls: int) -> str:
    return "tool_calls" if num_calls and reason != "length" else FINISH[reason]
