#!/usr/bin/env python3
"""What the HTTP API costs per token: a real server over a simulated device whose steps take no time.

Starts `tokenplane serve --backend simulated-cuda` on the demo model's folder (no weights are read), keeps `--streams`
clients streaming chat answers, and prints tokens per second, the time between a stream's tokens, and the API process's
CPU seconds per 1,000 tokens. Tokens per second depend on what else runs on the machine; CPU seconds much less, so
compare those.

    python benchmarks/api_overhead.py --streams 64 --output-tokens 400 --rounds 3
    python benchmarks/api_overhead.py --streams 1 --rounds 9
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[1]
VLLM_TOKENS_PER_S = 4_400
"""vLLM 0.32's CPU build with a model that costs next to nothing, 64 streams, on two quiet cores (2026-11-20)."""

TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def cpu_s(pid: int) -> float:
    """User and system time of one process, without its children."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


def child_of(pid: int) -> int:
    """The engine process."""
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


async def stream(port: int, index: int, output_tokens: int) -> int:
    """One streamed answer over a raw connection; returns its tokens. Parses no JSON, so as to cost little itself."""
    body = json.dumps(
        {
            "model": "tgi",
            "messages": [{"role": "user", "content": f"{index} plus {index + 3} is what?"}],
            "max_tokens": output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.encode() + body)
    tail = b""
    while data := await reader.read(1 << 16):
        tail = (tail + data)[-2000:]
    writer.close()
    usage = tail.rpartition(b'"usage":')[2]
    tokens = int(usage.partition(b'"completion_tokens":')[2].partition(b",")[0])
    assert tokens == output_tokens, tail
    return tokens


async def round_of(port: int, streams: int, output_tokens: int) -> int:
    return sum(await asyncio.gather(*(stream(port, index, output_tokens) for index in range(streams))))


def wait_until_ready(port: int, server: subprocess.Popen[bytes]) -> None:
    while server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise SystemExit("the server ended before it was ready")


def measure(port: int, server: subprocess.Popen[bytes], args: argparse.Namespace) -> dict[str, float]:
    asyncio.run(round_of(port, args.streams, 16))  # warm
    rates, api_costs, engine_costs = [], [], []
    for _ in range(args.rounds):
        api_s, engine_s, start_s = cpu_s(server.pid), cpu_s(child_of(server.pid)), time.perf_counter()
        tokens = asyncio.run(round_of(port, args.streams, args.output_tokens))
        rates.append(tokens / (time.perf_counter() - start_s))
        api_costs.append((cpu_s(server.pid) - api_s) / tokens * 1000)
        engine_costs.append((cpu_s(child_of(server.pid)) - engine_s) / tokens * 1000)
    return {
        "tokens_per_s": round(statistics.median(rates)),
        "ms_between_tokens": round(1000 * args.streams / statistics.median(rates), 3),
        "api_cpu_s_per_1000_tokens": round(statistics.median(api_costs), 4),
        "engine_cpu_s_per_1000_tokens": round(statistics.median(engine_costs), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models" / "demo"))
    parser.add_argument("--port", type=int, default=8098)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("flags", nargs="*", help="further flags for `tokenplane serve`, after --")
    args = parser.parse_args()
    command = [
        sys.executable, "-m", "tokenplane_api.cli", "serve", "--model-id", args.model, "--backend", "simulated-cuda",
        "--hostname", "127.0.0.1", "--port", str(args.port), *args.flags,
    ]  # fmt: skip
    environment = {**os.environ, "TOKENPLANE_SIMULATED_STEP_MS": "0", "LOG_LEVEL": "error"}
    with subprocess.Popen(command, env=environment) as server:
        try:
            wait_until_ready(args.port, server)
            result = measure(args.port, server, args)
        finally:
            server.terminate()
    print(f"{args.streams} streams of {args.output_tokens} tokens: {result['tokens_per_s']:,} tokens/s,")
    print(f"in each stream {result['ms_between_tokens']} ms between two tokens,")
    print(f"API {result['api_cpu_s_per_1000_tokens']} CPU seconds per 1,000 tokens")
    if args.streams == 64:
        print(f"{result['tokens_per_s'] / VLLM_TOKENS_PER_S:.1f} times vLLM's {VLLM_TOKENS_PER_S:,} tokens/s")
    print(json.dumps({"streams": args.streams, "output_tokens": args.output_tokens, "rounds": args.rounds, **result}))


if __name__ == "__main__":
    main()
