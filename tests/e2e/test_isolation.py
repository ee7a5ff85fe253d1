"""Of many requests in an engine that dies again and again, only the one that kills it is failed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.poison import poison_engines
from tokenplane_core import client as client_module
from tokenplane_core.backend.errors import EngineFailed, QueueFull
from tokenplane_core.backend.records import ModelSpec
from tokenplane_core.client import EngineClient
from tokenplane_core.config import EngineConfig
from tokenplane_core.kit.simulated import oracle
from tokenplane_core.messages import Submit
from tokenplane_core.trials import SUSPECT_AFTER

VOCAB = 89
POISON = 66
MODEL = ModelSpec("m", "", None, "", {}, 1, 1, 1, 8, VOCAB, 256, "float32")


@pytest.fixture(autouse=True)
def poisoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PYTHONPATH", poison_engines(tmp_path / "site", POISON))
    monkeypatch.setenv("TOKENPLANE_SIMULATED_STEP_MS", "2")
    monkeypatch.setattr(client_module, "MAX_BACKOFF_S", 0.05)
    yield


async def text(client: EngineClient, name: str, prompt: list[int], num_tokens: int) -> list[int]:
    out: list[int] = []
    async for event in client.submit(Submit(name, prompt, num_tokens)):
        out += event.token_ids
    return out


async def started(**options: float) -> EngineClient:
    client = EngineClient(EngineConfig(model=MODEL, backend="simulated-cuda"), **options)  # type: ignore[arg-type]
    await client.start()
    return client


async def test_only_the_culprit_fails_and_the_others_get_their_texts() -> None:
    client = await started()
    try:
        prompts = [[i, 2, 3] for i in range(8)]
        innocents = [asyncio.create_task(text(client, f"innocent-{i}", p, 150)) for i, p in enumerate(prompts)]
        await asyncio.sleep(0.1)  # they run
        culprit = asyncio.create_task(text(client, "culprit", [1, POISON, POISON, POISON, 4], 20))
        with pytest.raises(EngineFailed, match=f"died {SUSPECT_AFTER + 1} times .* while it held no other"):
            await culprit
        assert await asyncio.gather(*innocents) == [oracle(prompt, 150, VOCAB) for prompt in prompts]
        assert client.num_restarts == SUSPECT_AFTER + 1
        assert client.num_live == 0
    finally:
        await client.close()


async def test_several_culprits_cost_one_death_each_once_they_are_suspects() -> None:
    client = await started()
    try:
        prompt = [POISON] * 4
        culprits = [asyncio.create_task(text(client, f"culprit-{i}", [*prompt, i], 20)) for i in range(3)]
        innocent = asyncio.create_task(text(client, "innocent", [5], 100))
        answers = await asyncio.gather(*culprits, return_exceptions=True)
        assert [type(answer) for answer in answers] == [EngineFailed] * 3
        assert await innocent == oracle([5], 100, VOCAB)
        assert client.num_restarts == SUSPECT_AFTER + 3
    finally:
        await client.close()


async def test_a_suspect_that_leaves_holds_nobody_up() -> None:
    client = await started()
    try:
        stream = client.submit(Submit("culprit", [POISON] * 4, 20))
        innocent = asyncio.create_task(text(client, "innocent", [5], 100))
        async with asyncio.timeout(20):
            while client.num_restarts < SUSPECT_AFTER:
                await asyncio.sleep(0.01)
        stream.cancel()
        assert await innocent == oracle([5], 100, VOCAB)
        assert client.num_restarts <= SUSPECT_AFTER + 1
    finally:
        await client.close()


async def test_who_waits_too_long_in_the_queue_is_told_when_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENPLANE_SIMULATED_STEP_MS", "20")
    client = EngineClient(
        EngineConfig(model=MODEL, backend="simulated-cuda", max_sequences=1), max_requests=8, max_queue_s=0.3
    )
    await client.start()
    try:
        running = asyncio.create_task(text(client, "long", [1], 40))
        await asyncio.sleep(0.1)
        with pytest.raises(QueueFull, match=r"waited 0\.3 s in the queue.*--queue-timeout-s") as caught:
            await text(client, "late", [2], 5)
        assert 1 <= caught.value.retry_after_s <= 60
        assert await running == oracle([1], 40, VOCAB)  # longer than the limit, but not in the queue
        async with asyncio.timeout(20):
            while client.stats.num_waiting or client.stats.blocks_used:
                await asyncio.sleep(0.05)
    finally:
        await client.close()
