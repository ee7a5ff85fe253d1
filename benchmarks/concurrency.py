#!/usr/bin/env python3
"""How much faster a batch is than its requests one after another, through the real server.

Starts `tokenplane serve` on the demo model, sends the same requests first one at a time, then all at once, several
rounds in turn, and prints the median wall times and their ratio. Every request asks for the same number of tokens
(ignore_eos) from a prompt of its own; temperature 0, so both ways must give the same texts, which is checked.

    python benchmarks/concurrency.py --requests 32 --rounds 3
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[1]


def body(index: int, output_tokens: int) -> dict[str, object]:
    """Prompts differ from their first words on, so that the prefix cache has nothing to share."""
    content = f"{index} plus {index + 3} is what? Please explain Tokenplane to visitor number {index}."
    return {
        "model": "tgi",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }


async def ask(client: httpx.AsyncClient, index: int, output_tokens: int) -> str:
    response = await client.post("/v1/chat/completions", json=body(index, output_tokens))
    response.raise_for_status()
    answer = response.json()
    assert answer["usage"]["completion_tokens"] == output_tokens, answer["usage"]
    return str(answer["choices"][0]["message"]["content"])


async def one_after_another(client: httpx.AsyncClient, count: int, output_tokens: int) -> tuple[float, list[str]]:
    start_s = time.perf_counter()
    texts = [await ask(client, index, output_tokens) for index in range(count)]
    return time.perf_counter() - start_s, texts


async def all_at_once(client: httpx.AsyncClient, count: int, output_tokens: int) -> tuple[float, list[str]]:
    start_s = time.perf_counter()
    texts = await asyncio.gather(*(ask(client, index, output_tokens) for index in range(count)))
    return time.perf_counter() - start_s, list(texts)


async def measure(url: str, args: argparse.Namespace) -> dict[str, object]:
    limits = httpx.Limits(max_connections=args.requests)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        await all_at_once(client, args.requests, 4)  # warm
        serial_s, batched_s, different = [], [], 0
        for _ in range(args.rounds):
            seconds, serial_texts = await one_after_another(client, args.requests, args.output_tokens)
            serial_s.append(seconds)
            seconds, batched_texts = await all_at_once(client, args.requests, args.output_tokens)
            batched_s.append(seconds)
            different += sum(a != b for a, b in zip(serial_texts, batched_texts, strict=True))
    tokens = args.requests * args.output_tokens
    serial, batched = statistics.median(serial_s), statistics.median(batched_s)
    return {
        "requests": args.requests,
        "output_tokens": args.output_tokens,
        "rounds": args.rounds,
        "dtype": args.dtype,
        "serial_s": round(serial, 3),
        "batched_s": round(batched, 3),
        "serial_tok_s": round(tokens / serial, 1),
        "batched_tok_s": round(tokens / batched, 1),
        "different_texts": different,
        "ratio": round(serial / batched, 2),
    }


def wait_until_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    while True:
        if server.poll() is not None:
            raise SystemExit("the server ended before it was ready")
        try:
            if httpx.get(url + "/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models" / "demo"))
    parser.add_argument("--dtype", default="float32", help="float32 makes both ways comparable text by text")
    parser.add_argument("--port", type=int, default=8099)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    command = [
        sys.executable, "-m", "tokenplane_api.cli", "serve", "--model-id", args.model, "--backend", "cpu",
        "--dtype", args.dtype, "--hostname", "127.0.0.1", "--port", str(args.port),
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            url = f"http://127.0.0.1:{args.port}"
            wait_until_ready(url, server)
            result = asyncio.run(measure(url, args))
        finally:
            server.terminate()
    print(
        f"{result['requests']} requests of {result['output_tokens']} tokens: one after another {result['serial_s']} s,"
    )
    print(f"all at once {result['batched_s']} s: {result['ratio']} times faster")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
