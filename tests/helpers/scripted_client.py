"""An engine client whose answers the test writes: everything around it, the engine process included, is real."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from helpers.live_server import LiveServer, live_server
from helpers.model_folder import make_text_model
from tokenplane_core.client import EngineClient
from tokenplane_core.messages import FinishReason, Submit, TokenEvent
from tokenplane_core.validation import check_request

MARKS = ("<tool_call>", "</tool_call>", "<think>", "</think>")
"""Added to the vocabulary as ordinary tokens, as Qwen has them."""

DEEPSEEK_MARKS = tuple(f"<｜tool▁{name}｜>" for name in ("calls▁begin", "call▁begin", "sep", "call▁end", "calls▁end"))
HARMONY_MARKS = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>")
SPECIAL_MARKS = ("[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", *DEEPSEEK_MARKS, *HARMONY_MARKS)
"""Added as special tokens, as Mistral, Llama, DeepSeek and gpt-oss have them."""


TOOLS_TEMPLATE = """\
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content }}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>' + call.function.name + ' ' + (call.function.arguments | tojson) + '</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
"""
"""Describes tools and calls, and lets the request switch thinking off."""

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}\n</tool_call>'


class ScriptedClient(EngineClient):
    """Answers every request with `text`, a few tokens at a time. Set from the test's thread, between requests."""

    text = ""
    tokens_per_event = 1
    finish_reason: FinishReason = "stop_token"
    failure: Exception | None = None  # raised instead of the end
    tokenizer: Tokenizer

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.submitted: list[Submit] = []

    def submit(self, request: Submit) -> Any:
        check_request(request, self.info)
        self.submitted.append(request)
        ids = self.tokenizer.encode(self.text, add_special_tokens=False).ids
        return _Stream(request, ids, self.tokens_per_event, self.finish_reason, self.failure)

    @property
    def last_prompt(self) -> str:
        prompt: str = self.tokenizer.decode(self.submitted[-1].token_ids, skip_special_tokens=False)
        return prompt


class _Stream:
    def __init__(
        self, request: Submit, ids: list[int], per_event: int, finish_reason: FinishReason, failure: Exception | None
    ) -> None:
        self._failure = failure
        bundles = [ids[i : i + per_event] for i in range(0, len(ids), per_event)]
        wants_logprobs = request.sampling.num_logprobs >= 0
        self._events = [TokenEvent(request.request_id, b, [-0.5] * len(b) if wants_logprobs else None) for b in bundles]
        end = request.stop_token_ids[:1] if finish_reason == "stop_token" else []
        logprobs = [-0.5] * len(end) if wants_logprobs else None
        self._events.append(TokenEvent(request.request_id, end, logprobs, finish_reason=finish_reason))

    async def __anext__(self) -> TokenEvent:
        await asyncio.sleep(0)
        if len(self._events) == 1 and self._failure is not None:
            raise self._failure
        if not self._events:
            raise StopAsyncIteration
        return self._events.pop(0)

    def cancel(self) -> None:
        self._events.clear()


def make_marked_model(folder: Path, chat_template: str, marks: tuple[str, ...] = ()) -> Path:
    """A text model with more tokens in its vocabulary; the device knows nothing of them."""
    make_text_model(folder, chat_template=chat_template)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in marks if mark not in SPECIAL_MARKS])
    tokenizer.add_special_tokens([AddedToken(mark, normalized=False) for mark in marks if mark in SPECIAL_MARKS])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["vocab_size"] += len(marks)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@contextlib.contextmanager
def scripted_server(folder: Path, **settings: Any) -> Iterator[tuple[LiveServer, ScriptedClient]]:
    with live_server(folder, client_type=ScriptedClient, **settings) as live:
        client = live.service.engine
        assert isinstance(client, ScriptedClient)
        client.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        yield live, client
