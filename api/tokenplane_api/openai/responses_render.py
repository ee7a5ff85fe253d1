"""Answers of /v1/responses: items of output, whole or as typed events while they grow."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec

from ..errors import ApiError
from ..generation import FinishReason, Generation, Output, merge
from ..streaming import encode_line
from ..text.answer_parser import AnswerParser
from ..text.tokenizer import TextTokenizer
from ..text.tool_calls import CallDelta, Delta, TextDelta
from .convert import Prepared
from .render import Head
from .responses_schemas import ResponsesRequest

Event = tuple[str, dict[str, Any]]
"""Its type, and its fields but for type and sequence_number."""


class ResponseRenderer:
    """One object for each request."""

    def __init__(
        self,
        head: Head,
        generation: Generation,
        prepared: Prepared,
        tokenizer: TextTokenizer,
        request: ResponsesRequest,
    ) -> None:
        self._generation = generation
        self._tokenizer = tokenizer
        self._parser = prepared.new_parser() if prepared.new_parser else AnswerParser(None, None)
        self._items = _Items(head.request_id)
        self._num_events = 0
        self._fields = _fields(head, request)

    @property
    def num_prompt_chars(self) -> int:
        return len(self._generation.spec.prompt_text)

    def answer(self, output: Output) -> bytes:
        for delta in [*self._parser.push(output.text), *self._parser.flush()]:
            self._items.add(delta)
        self._items.close(_status(output.finish_reason))
        return msgspec.json.encode(self._response(output.finish_reason))

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """From response.created to response.completed or response.incomplete; there is no [DONE]."""
        begun = {"response": {**self._fields, "status": "in_progress", "output": [], "usage": None}}
        yield self._encode([("response.created", begun), ("response.in_progress", begun)])
        async with aclosing(merge([self._generation])) as pieces:
            async for _, piece in pieces:
                events = self._add(self._parser.push(piece.text))
                if piece.finish_reason is not None:
                    events += self._add(self._parser.flush())
                    events += self._items.close(_status(piece.finish_reason))
                    status = _status(piece.finish_reason)
                    events.append((f"response.{status}", {"response": self._response(piece.finish_reason)}))
                if events:
                    yield self._encode(events)

    def error_event(self, error: ApiError) -> bytes:
        fields = {"code": error.code, "message": error.message, "param": error.param}
        return self._encode([("error", fields)])

    def _add(self, deltas: list[Delta]) -> list[Event]:
        return [event for delta in deltas for event in self._items.add(delta)]

    def _encode(self, events: list[Event]) -> bytes:
        lines = []
        for kind, fields in events:
            data = encode_line({"type": kind, "sequence_number": self._num_events, **fields})
            lines.append(b"event: %b\ndata: %b\n\n" % (kind.encode(), data))
            self._num_events += 1
        return b"".join(lines)

    def _response(self, finish_reason: FinishReason) -> dict[str, Any]:
        status = _status(finish_reason)
        return {
            **self._fields,
            "status": status,
            "incomplete_details": None if status == "completed" else {"reason": "max_output_tokens"},
            "output": self._items.done,
            "usage": self._usage(),
        }

    def _usage(self) -> dict[str, Any]:
        generation = self._generation
        num_input, num_output = len(generation.spec.prompt_ids), generation.num_tokens
        num_reasoning = len(self._tokenizer.encode(self._items.thoughts, add_special_tokens=False))
        return {
            "input_tokens": num_input,
            "input_tokens_details": {"cached_tokens": generation.num_cached_tokens},
            "output_tokens": num_output,
            "output_tokens_details": {"reasoning_tokens": num_reasoning},
            "total_tokens": num_input + num_output,
        }


class _Items:
    """The items of one answer: those that are done, and the one that grows."""

    def __init__(self, request_id: str) -> None:
        self.done: list[dict[str, Any]] = []
        self.thoughts = ""
        self._request_id = request_id
        self._item: dict[str, Any] | None = None
        self._pieces: list[str] = []

    def add(self, delta: Delta) -> list[Event]:
        if isinstance(delta, TextDelta):
            kind = "reasoning" if delta.is_reasoning else "message"
            begins = self._item is None or self._item["type"] != kind
            events = [*self.close("completed"), *self._begin(kind)] if begins else []
            self._pieces.append(delta.text)
            name = "response.reasoning_text.delta" if delta.is_reasoning else "response.output_text.delta"
            return [*events, (name, {**self._place(), **_logprobs(kind), "delta": delta.text})]
        return self._add_call(delta)

    def close(self, status: str) -> list[Event]:
        """End the item that grows, if there is one."""
        item = self._item
        if item is None:
            return []
        text = "".join(self._pieces)
        item["status"] = status
        kind = item["type"]
        if kind == "function_call":
            item["arguments"] = text
            events: list[Event] = [("response.function_call_arguments.done", {**self._place(), "arguments": text})]
        else:
            if kind == "reasoning":
                self.thoughts += text
            part = _part(kind, text)
            item["content"] = [part]
            name = "response.reasoning_text.done" if kind == "reasoning" else "response.output_text.done"
            events = [
                (name, {**self._place(), **_logprobs(kind), "text": text}),
                ("response.content_part.done", {**self._place(), "part": part}),
            ]
        events.append(("response.output_item.done", {"output_index": len(self.done), "item": item}))
        self.done.append(item)
        self._item = None
        return events

    def _add_call(self, delta: CallDelta) -> list[Event]:
        events: list[Event] = []
        if delta.name is not None:
            events = self.close("completed")
            self._item = self._new("function_call", call_id=delta.id, name=delta.name, arguments="")
            events.append(self._added())
        if delta.arguments:
            self._pieces.append(delta.arguments)
            events.append(("response.function_call_arguments.delta", {**self._place(), "delta": delta.arguments}))
        return events

    def _begin(self, kind: str) -> list[Event]:
        if kind == "reasoning":
            self._item = self._new(kind, summary=[], content=[])
        else:
            self._item = self._new(kind, role="assistant", content=[])
        part = ("response.content_part.added", {**self._place(), "part": _part(kind, "")})
        return [self._added(), part]

    def _new(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._pieces = []
        prefix = {"reasoning": "rs", "message": "msg", "function_call": "fc"}[kind]
        item_id = f"{prefix}_{self._request_id}{len(self.done)}"
        return {"id": item_id, "type": kind, "status": "in_progress", **fields}

    def _added(self) -> Event:
        assert self._item is not None
        return "response.output_item.added", {"output_index": len(self.done), "item": dict(self._item)}

    def _place(self) -> dict[str, Any]:
        assert self._item is not None
        place = {"item_id": self._item["id"], "output_index": len(self.done)}
        return place if self._item["type"] == "function_call" else {**place, "content_index": 0}


def _part(kind: str, text: str) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _logprobs(kind: str) -> dict[str, Any]:
    """Clients expect the field with text, though this route gives none."""
    return {"logprobs": []} if kind == "message" else {}


def _status(finish_reason: FinishReason) -> str:
    return "incomplete" if finish_reason == "length" else "completed"


def _fields(head: Head, request: ResponsesRequest) -> dict[str, Any]:
    """What a response says of its request."""
    text = request.text.format if request.text and request.text.format else {"type": "text"}
    return {
        "id": f"resp_{head.request_id}",
        "object": "response",
        "created_at": head.created,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata or {},
        "model": head.model,
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": request.reasoning.effort if request.reasoning else None, "summary": None},
        "store": False,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "text": {"format": text},
        "tool_choice": request.tool_choice or "auto",
        "tools": request.tools or [],
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "truncation": "disabled",
        "user": request.user,
    }
