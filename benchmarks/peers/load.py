"""A closed-loop load: so many clients, each sends its next request when its last has ended.

Prompts are words that the tokenizer keeps whole, so every server counts the same prompt tokens. Greedy, fixed output
length, streamed, a new connection for each request; output tokens are the server's own `usage`.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import aiohttp

COMPLETION_TOKENS = re.compile(rb'"completion_tokens":\s*(\d+)')
TIMEOUT_S = 900


@dataclass(frozen=True)
class Case:
    """One load. Of each prompt, the first `shared_tokens` are the same for all requests."""

    name: str
    concurrency: int
    requests: int
    prompt_tokens: int = 128
    output_tokens: int = 64
    shared_tokens: int = 0


@dataclass(frozen=True)
class Measured:
    """Output tokens per second of wall time; medians over requests: time to the first event, time per token after."""

    tokens_per_s: float
    first_token_ms: float
    token_ms: float


@dataclass(frozen=True)
class Answer:
    start_s: float
    first_s: float
    end_s: float
    tokens: int


class Prompts:
    """Endless prompts of random words; the same for the same seed."""

    def __init__(self, folder: Path, seed: int) -> None:
        vocab = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
        # "\u0120" is the space of byte-level tokenizers.
        self.words = sorted(" " + token[1:] for token in vocab if re.fullmatch("\u0120[a-z]{3,}", token))
        self.random = random.Random(seed)
        self.shared: list[str] = []

    def next(self, case: Case) -> str:
        self.shared += self.random.choices(self.words, k=case.shared_tokens - len(self.shared))
        return "".join(self.shared) + "".join(
            self.random.choices(self.words, k=case.prompt_tokens - case.shared_tokens)
        )


async def ask(client: aiohttp.ClientSession, url: str, body: dict[str, object]) -> Answer:
    """One streamed answer. Parses no JSON: the clients run on the server's machine and should cost little."""
    start_s = time.perf_counter()
    first_s, tail = 0.0, b""
    async with client.post(url, json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"the server answered {response.status}: {(await response.text())[:300]}")
        async for data in response.content.iter_any():
            first_s = first_s or time.perf_counter()
            tail = (tail + data)[-4000:]
    counts = COMPLETION_TOKENS.findall(tail)
    if not counts:
        raise RuntimeError(f"the stream ended without usage: {tail[-300:]!r}")
    return Answer(start_s, first_s, time.perf_counter(), int(counts[-1]))


async def drive(
    url: str, fields: dict[str, object], concurrency: int, prompts: list[str]
) -> tuple[float, list[Answer]]:
    """Wall seconds and the answers."""
    bodies = iter([{**fields, "prompt": prompt} for prompt in prompts])
    answers: list[Answer] = []

    async def work(client: aiohttp.ClientSession) -> None:
        for body in bodies:
            answers.append(await ask(client, url, body))

    # llama-server drops a connection after a stream without saying so: no connection is used twice.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(TIMEOUT_S)) as client:
        start_s = time.perf_counter()
        await asyncio.gather(*(work(client) for _ in range(min(concurrency, len(prompts)))))
        return time.perf_counter() - start_s, answers


def measure(base_url: str, fields: dict[str, object], folder: Path, case: Case, seed: int) -> Measured:
    """Warm up with one request of its own words, then the case. Raises RuntimeError for a refused or short answer.

    fields: what this server's requests need besides: the model's name, and how it is told to go on past the end.
    """
    url = base_url + "/v1/completions"
    fields = fields | {
        "max_tokens": case.output_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    prompts = Prompts(folder, seed)
    asyncio.run(drive(url, fields, 1, [Prompts(folder, seed + 1_000_000).next(case)]))
    wall_s, answers = asyncio.run(
        drive(url, fields, case.concurrency, [prompts.next(case) for _ in range(case.requests)])
    )
    short = [answer.tokens for answer in answers if answer.tokens != case.output_tokens]
    if short:
        raise RuntimeError(f"asked for {case.output_tokens} tokens, got {short[:8]}")
    return Measured(
        tokens_per_s=sum(answer.tokens for answer in answers) / wall_s,
        first_token_ms=1000 * statistics.median(answer.first_s - answer.start_s for answer in answers),
        token_ms=1000 * statistics.median((a.end_s - a.first_s) / (a.tokens - 1) for a in answers),
    )
