"""Grammars in the engine process: a text goes on within its grammar after the process was killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tokenplane_core.backend.errors import InvalidRequest
from tokenplane_core.client import EngineClient
from tokenplane_core.config import EngineConfig
from tokenplane_core.messages import Grammar, SamplingParams, Submit
from tokenplane_core.model import describe_model

FOLDER = Path(__file__).parents[2] / "models" / "demo"
LIST = Grammar("regex", r"\[[0-9]{2}(, [0-9]{2}){30,40}\]")


async def text(client: EngineClient, request_id: str, kill_at: int = 0) -> list[int]:
    """The tokens of a guided request; kills the engine after `kill_at` of them."""
    out: list[int] = []
    sampling = SamplingParams(temperature=1.0, seed=5)
    async for event in client.submit(Submit(request_id, [5, 6], 200, sampling=sampling, grammar=LIST)):
        out += event.token_ids
        if kill_at and len(out) == kill_at:
            assert client.engine_pid is not None
            os.kill(client.engine_pid, signal.SIGKILL)
    return out


async def test_a_guided_text_goes_on_after_a_crash_with_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENPLANE_SIMULATED_STEP_MS", "2")
    client = EngineClient(EngineConfig(model=describe_model(FOLDER), backend="simulated-cuda"))
    await client.start()
    try:
        undisturbed = await text(client, "a")
        assert await text(client, "b", kill_at=30) == undisturbed
        assert client.num_restarts == 1
        with pytest.raises(InvalidRequest, match="unclosed group") as caught:
            async for _ in client.submit(Submit("c", [5], 9, grammar=Grammar("regex", "(a"))):
                pass
        assert caught.value.field == "grammar"
        with pytest.raises(InvalidRequest, match="the limit is"):
            client.submit(Submit("d", [5], 9, grammar=Grammar("regex", "a" * 300_000)))
        assert client.num_restarts == 1
    finally:
        await client.close()
    assert Tokenizer.from_file(str(FOLDER / "tokenizer.json")).decode(undisturbed).startswith("[")
