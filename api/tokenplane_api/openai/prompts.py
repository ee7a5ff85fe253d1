"""What the model reads of a completion request: prompts as text or token ids. Conversations: chat_prompt.py."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import invalid
from ..service import Service


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
