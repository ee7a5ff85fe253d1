"""The engine process and its client: start, limits, death, silence and return. No HTTP, no torch."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tokenplane_core import client as client_module
from tokenplane_core.backend.errors import (
    BackendNotFound,
    ConfigError,
    EngineFailed,
    EngineNotReady,
    InvalidRequest,
    QueueFull,
)
from tokenplane_core.backend.records import ModelSpec
from tokenplane_core.client import EngineClient
from tokenplane_core.config import EngineConfig
from tokenplane_core.kit.simulated import oracle
from tokenplane_core.messages import SamplingParams, Submit
from tokenplane_core.trials import SUSPECT_AFTER

VOCAB = 89
MODEL = ModelSpec("m", "", None, "", {}, 1, 1, 1, 8, VOCAB, 256, "float32")


@asynccontextmanager
async def engine(
    max_requests: int = 128, backend: str = "simulated-cuda", **options: object
) -> AsyncIterator[EngineClient]:
    client = EngineClient(EngineConfig(model=MODEL, backend=backend, **options), max_requests)  # type: ignore[arg-type]
    await client.start()
    try:
        yield client
    finally:
        await client.close()


async def text(client: EngineClient, request_id: str, prompt: list[int], num_tokens: int) -> list[int]:
    out: list[int] = []
    async for event in client.submit(Submit(request_id, prompt, num_tokens)):
        out += event.token_ids
    return out


async def until(condition: object, limit_s: float = 20) -> None:
    async with asyncio.timeout(limit_s):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("backend", ["simulated-cuda", "simulated-tpu", "simulated-gaudi", "simulated-neuron"])
async def test_many_requests_at_once_get_their_texts(backend: str) -> None:
    async with engine(backend=backend) as client:
        prompts = [[i % VOCAB, 3, 7] * (1 + i % 9) for i in range(64)]
        texts = await asyncio.gather(*(text(client, f"r{i}", prompt, 20) for i, prompt in enumerate(prompts)))
        assert texts == [oracle(prompt, 20, VOCAB) for prompt in prompts]
        assert client.num_live == 0


async def test_limits_are_refused_at_the_door_naming_field_and_limit() -> None:
    async with engine(max_requests=1, kv_cache_tokens=128) as client:
        for request, field in [
            (Submit("a", [], 5), "token_ids"),
            (Submit("a", [VOCAB], 5), "token_ids"),
            (Submit("a", [1] * 257, 5), "token_ids"),
            (Submit("a", [1], 0), "max_new_tokens"),
            (Submit("a", [1] * 100, 29), "max_new_tokens"),
        ]:
            with pytest.raises(InvalidRequest) as caught:
                client.submit(request)
            assert caught.value.field == field
        stream = client.submit(Submit("a", [1], 100))
        with pytest.raises(QueueFull, match="the limit is 1"):
            client.submit(Submit("b", [1], 5))
        stream.cancel()
        assert await text(client, "c", [1], 5) == oracle([1], 5, VOCAB)


async def test_cancel_gives_blocks_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENPLANE_SIMULATED_STEP_MS", "20")
    async with engine() as client:
        stream = client.submit(Submit("a", [1] * 40, 200))
        await anext(stream)
        await until(lambda: client.stats.blocks_used > 0)
        stream.cancel()
        stream.cancel()
        with pytest.raises(StopAsyncIteration):
            while True:
                await anext(stream)
        await until(lambda: client.stats.num_running == 0 and client.stats.blocks_used == 0)
        assert client.num_live == 0


async def test_a_killed_engine_comes_back_and_streams_go_on_with_the_same_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TOKENPLANE_SIMULATED_STEP_MS", "5")
    async with engine() as client:
        prompts = [[i, 2, 3] for i in range(16)]
        tasks = [asyncio.create_task(text(client, f"r{i}", p, 100)) for i, p in enumerate(prompts)]
        await until(lambda: client.num_live == 16)
        await asyncio.sleep(0.2)
        pid = client.engine_pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await until(lambda: not client.is_ready, 5)
        with pytest.raises(EngineNotReady):
            client.submit(Submit("late", [1], 5))
        assert await asyncio.gather(*tasks) == [oracle(prompt, 100, VOCAB) for prompt in prompts]
        assert client.is_ready and client.num_restarts == 1 and client.engine_pid != pid
        assert await text(client, "after", [9], 5) == oracle([9], 5, VOCAB)


async def test_a_request_that_outlives_too_many_engines_is_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENPLANE_SIMULATED_STEP_MS", "50")
    monkeypatch.setattr(client_module, "FIRST_BACKOFF_S", 0.01)
    async with engine() as client:
        task = asyncio.create_task(text(client, "poison", [1], 200))
        for death in range(1, SUSPECT_AFTER + 2):
            await until(lambda: client.is_ready)
            await asyncio.sleep(0.1)
            assert client.engine_pid is not None
            os.kill(client.engine_pid, signal.SIGKILL)
            await until(lambda death=death: client.num_restarts == death)
        with pytest.raises(EngineFailed, match="died 3 times"):
            await task
        await until(lambda: client.is_ready)
        assert await text(client, "innocent", [2], 2) == oracle([2], 2, VOCAB)


async def test_a_hung_engine_is_replaced() -> None:
    async with engine(hang_timeout_s=2.0) as client:
        pid = client.engine_pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        await until(lambda: client.num_restarts == 1 and client.is_ready)
        assert await text(client, "a", [4], 3) == oracle([4], 3, VOCAB)


async def test_seeded_sampling_goes_on_after_a_crash_with_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENPLANE_SIMULATED_STEP_MS", "5")
    sampling = SamplingParams(temperature=1.0, seed=11, frequency_penalty=0.5)
    results = []
    async with engine() as client:
        for kill in (False, True):
            out: list[int] = []
            async for event in client.submit(Submit(f"kill-{kill}", [5, 6], 60, sampling=sampling)):
                out += event.token_ids
                if kill and len(out) == 20:
                    assert client.engine_pid is not None
                    os.kill(client.engine_pid, signal.SIGKILL)
            results.append(out)
        assert client.num_restarts == 1
    assert results[0] == results[1] and len(results[0]) == 60


@pytest.mark.parametrize(
    ("options", "kind", "reason"),
    [
        ({"backend": "no-such-card"}, BackendNotFound, "no backend plugin is called 'no-such-card'"),
        ({"kv_cache_tokens": 10**12}, ConfigError, "--max-batch-total-tokens is 1000000000000"),
    ],
)
async def test_a_start_that_fails_says_why(options: dict[str, object], kind: type[Exception], reason: str) -> None:
    with pytest.raises(kind, match=reason):
        async with engine(**options):  # type: ignore[arg-type]
            raise AssertionError("it started")


async def test_the_engine_ends_with_its_supervisor() -> None:
    async with engine() as client:
        pid = client.engine_pid
        assert pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_a_restart_that_fails_for_lack_of_descriptors_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENPLANE_SIMULATED_STEP_MS", "20")
    async with engine() as client:
        stream = client.submit(Submit("a", [1, 2], 200))
        await anext(stream)
        hogs, limits = [], resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, limits[1]))
        try:
            with contextlib.suppress(OSError):
                while True:
                    hogs.append(os.open("/dev/null", os.O_RDONLY))
            assert client.engine_pid is not None
            os.kill(client.engine_pid, signal.SIGKILL)
            await until(lambda: client.num_restarts >= 2)
        finally:
            for hog in hogs:
                os.close(hog)
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        with pytest.raises(EngineFailed):
            async for _ in stream:
                pass
        await until(lambda: client.is_ready)
        assert await text(client, "after", [3], 3) == oracle([3], 3, VOCAB)


async def test_a_cancelled_id_may_be_used_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Late events of the cancelled request never reach the new one."""
    async with engine() as client:
        for i in range(30):
            first = client.submit(Submit("same", [i, 1], 100))
            await anext(first)
            first.cancel()
            assert await text(client, "same", [i, 2], 5) == oracle([i, 2], 5, VOCAB)


async def test_a_request_that_cannot_be_encoded_was_never_submitted() -> None:
    async with engine() as client:
        with pytest.raises(InvalidRequest):
            client.submit(Submit("a", [1], 5, sampling=SamplingParams(seed=2**64)))
        assert client.num_live == 0
