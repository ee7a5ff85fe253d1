"""What the model reads: chat messages through the template, completion prompts as text or token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import TEMPLATE, ApiError, invalid
from ..service import Service
from .schemas import ChatRequest, Message

RESERVED_VARIABLES = frozenset(
    {"self", "messages", "tools", "bos_token", "eos_token", "add_generation_prompt", "continue_final_message"}
)
"""What a template gets from the server, so that `chat_template_kwargs` must not set it."""


def render_chat(request: ChatRequest, service: Service) -> str:
    """The prompt text of a conversation; a final assistant message is continued unless the request says otherwise."""
    if service.chat_template is None:
        raise ApiError(
            TEMPLATE,
            "the model has no chat template; use /v1/completions, or start the server with --tokenizer-config-path",
            "messages",
            "template_error",
        )
    if not request.messages:
        raise invalid("`messages` is empty; at least one message is needed", "messages")
    variables = request.chat_template_kwargs or {}
    for name in variables:
        if name in RESERVED_VARIABLES:
            raise invalid(f"`chat_template_kwargs` must not set {name!r}: the server does", "chat_template_kwargs")
    continues = request.continue_final_message
    if continues is None:
        continues = request.messages[-1].role == "assistant" and not request.add_generation_prompt
    elif continues and request.add_generation_prompt:
        raise invalid(
            "`continue_final_message` and `add_generation_prompt` exclude each other", "add_generation_prompt"
        )
    return service.chat_template.render(
        [_message(message, i) for i, message in enumerate(request.messages)],
        bos_token=service.tokenizer.bos_token,
        eos_token=service.tokenizer.eos_token,
        add_generation_prompt=request.add_generation_prompt is not False,
        continue_final_message=continues,
        **variables,
    )


def _message(message: Message, index: int) -> dict[str, Any]:
    """As templates want it: content is one string, `developer` is the newer word for `system`."""
    here = f"messages[{index}]"
    for name in ("tool_calls", "function_call", "audio"):
        if getattr(message, name) not in (None, []):
            raise invalid(f"`{here}.{name}` is not supported", f"{here}.{name}", "unsupported_value")
    if message.content is None and message.refusal is None:
        raise invalid(f"`{here}.content` is missing", f"{here}.content", "missing_required_parameter")
    content = message.content if message.content is not None else message.refusal
    if not isinstance(content, str):
        for j, part in enumerate(content or ()):
            if part.type != "text":
                field = f"{here}.content[{j}].type"
                raise invalid(f"`{field}` is {part.type!r}; this model takes only 'text'", field, "unsupported_value")
            if part.text is None:
                raise invalid(f"`{here}.content[{j}].text` is missing", f"{here}.content[{j}].text")
        content = "".join(part.text or "" for part in content or ())
    found: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role, "content": content}
    if message.name is not None:
        found["name"] = message.name
    if message.tool_call_id is not None:
        found["tool_call_id"] = message.tool_call_id
    return found


async def encode_prompts(prompt: str | list[str | int | list[int]], service: Service) -> list[tuple[str, list[int]]]:
    """(text, token ids) of each prompt; the text is "" where the client sent ids."""
    prompts: Sequence[str | list[int]]
    if isinstance(prompt, str):
        prompts = [prompt]
    elif not prompt:
        raise invalid("`prompt` is an empty list", "prompt")
    elif all(isinstance(item, int) for item in prompt):
        prompts = [[item for item in prompt if isinstance(item, int)]]
    else:
        prompts = [item for item in prompt if not isinstance(item, int)]
        if len({type(item) for item in prompt}) > 1:
            raise invalid(
                "`prompt` mixes strings and token ids; send a list of only one kind", "prompt", "invalid_type"
            )
    most = service.settings.max_client_batch_size
    if len(prompts) > most:
        raise invalid(f"`prompt` holds {len(prompts)} prompts, the limit is {most} (--max-client-batch-size)", "prompt")
    return [
        (item, await service.encode(item)) if isinstance(item, str) else ("", _checked_ids(item, service))
        for item in prompts
    ]


def _checked_ids(ids: list[int], service: Service) -> list[int]:
    size = service.engine.info.vocab_size
    for token_id in ids:
        if not 0 <= token_id < size:
            raise invalid(f"`prompt` has the token id {token_id}; ids of this model are 0 to {size - 1}", "prompt")
    return ids
