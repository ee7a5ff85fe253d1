#!/usr/bin/env python3
"""What the engine process costs apart from the device: a null device under the real engine, over a real socket.

The device draws the same token for ever and its hooks' own time is taken off, so what is left is receiving, scheduling,
batching, committing and publishing. CPU time of the one thread, so a busy machine disturbs little. Two loads: `steady`,
every sequence decodes; `churn`, in each step one in `--churn` sequences ends and another takes its place. Also prints
what a waiting request keeps in memory besides its token ids.

    python benchmarks/core_overhead.py --sequences 64 256 1024 4096 --shapes soft
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import socket
import tempfile
import tracemalloc
from collections.abc import Iterable, Iterator
from pathlib import Path
from time import thread_time

import numpy as np

from tokenplane_core.backend.hookspecs import hookimpl
from tokenplane_core.backend.plugins import Backend
from tokenplane_core.backend.records import (
    CONTRACT_VERSION,
    Bucket,
    Capabilities,
    DecodeBatch,
    DetectReport,
    Device,
    FinishedStep,
    KVLayout,
    KVSpec,
    Limits,
    LoadOptions,
    ModelSpec,
    PrefillBatch,
    SamplingBatch,
    ShapePolicy,
    StepOutput,
)
from tokenplane_core.config import EngineConfig
from tokenplane_core.engine.engine import Engine
from tokenplane_core.engine.startup import size_cache
from tokenplane_core.garbage import settle
from tokenplane_core.messages import Events, FrameReader, SamplingParams, Submit, frame, from_engine_decoder
from tokenplane_core.process import EngineServer

BLOCK_TOKENS = 32
MAX_MODEL_TOKENS = 4096
VOCAB = 32_000
PROMPT_TOKENS = 100
DEVICE = Device("null", 0, "null", "none", 0, ("float32",), 0)


class NullDevice:
    """Paged, mixes, one step ahead; takes no time. `after_launch` runs outside of what is measured."""

    contract = CONTRACT_VERSION

    def __init__(self, sequences: int, shapes: str) -> None:
        self._sequences = sequences
        sizes = [2**i for i in range(13) if 2**i <= sequences] if shapes == "soft" else []
        self._shapes = ShapePolicy("soft" if sizes else "ragged", tuple(Bucket("decode", n, n) for n in sizes))
        self._drawn = np.full(sequences, 7, np.int32)
        self.hook_s = 0.0

    @hookimpl
    def detect(self) -> DetectReport:
        return DetectReport("found", (DEVICE,))

    @hookimpl
    def load(self, model: ModelSpec, options: LoadOptions) -> Capabilities:
        budget = 4 * BLOCK_TOKENS * (self._sequences * MAX_MODEL_TOKENS // BLOCK_TOKENS + 2)
        return Capabilities(
            contract=CONTRACT_VERSION,
            backend="null",
            version="0",
            device=DEVICE,
            dtype=model.dtype,
            limits=Limits(self._sequences, max(8192, 4 * self._sequences), MAX_MODEL_TOKENS, self._sequences),
            kv=KVSpec("paged", BLOCK_TOKENS, 4 * BLOCK_TOKENS, budget),
            shapes=self._shapes,
            mixed=True,
            async_depth=1,
        )

    @hookimpl
    def kv_alloc(self, layout: KVLayout) -> bool:
        return True

    @hookimpl
    def prefill(self, batch: PrefillBatch, sampling: SamplingBatch) -> FinishedStep:
        return self._step(batch.head.step, len(sampling))

    @hookimpl
    def decode(self, batch: DecodeBatch, sampling: SamplingBatch) -> FinishedStep:
        return self._step(batch.head.step, len(sampling))

    def _step(self, step: int, num_drawn: int) -> FinishedStep:
        start_s = thread_time()
        handle = FinishedStep(StepOutput(step, self._drawn[:num_drawn]))
        self.hook_s += thread_time() - start_s
        return handle


class Rig:
    """The real engine and the real socket server in this thread, and the API's end of the socket."""

    def __init__(self, sequences: int, shapes: str) -> None:
        model = ModelSpec("null", "", None, "", {}, 1, 1, 1, 8, VOCAB, MAX_MODEL_TOKENS, "float32")
        self.device = NullDevice(sequences, shapes)
        backend = Backend("null", self.device)
        capabilities = backend.load(model, LoadOptions())
        layout = size_cache(capabilities, EngineConfig(model=model, backend="null"))
        backend.kv_alloc(layout)
        self._folder = tempfile.TemporaryDirectory()
        path = str(Path(self._folder.name) / "socket")
        self._server = EngineServer(path)
        self._api = socket.socket(socket.AF_UNIX)
        self._api.connect(path)
        self._api.setblocking(False)
        self._server.accept_supervisor(1.0)
        self._reader = FrameReader()
        self.engine = Engine(backend, capabilities, layout, VOCAB, self._server.receive, self._server.publish)
        self._server.engine = self.engine
        self._ids = itertools.count()
        settle()

    def submit(self, prompt_tokens: int, new_tokens: int) -> None:
        rng = random.Random(number := next(self._ids))
        token_ids = [rng.randrange(VOCAB) for _ in range(prompt_tokens)]
        sampling = SamplingParams(temperature=0.8, top_p=0.95, seed=number)
        message = frame(Submit(f"chatcmpl-{number:024x}#{number}", token_ids, new_tokens, sampling=sampling))
        self._api.sendall(message)

    def step(self) -> float:
        """CPU seconds of one engine step without the device's hooks."""
        self.device.hook_s, start_s = 0.0, thread_time()
        self.engine.step()
        return thread_time() - start_s - self.device.hook_s

    def read(self) -> Iterator[Events]:
        """What the engine has sent since."""
        while True:
            try:
                data = self._api.recv(1 << 20)
            except BlockingIOError:
                return
            for body in self._reader.feed(data):
                message = from_engine_decoder.decode(body)
                if isinstance(message, Events):
                    yield message

    def turn(self, replacement: tuple[int, int]) -> float:
        """A step; who ends is replaced by a request of that many prompt and new tokens. Returns its CPU seconds."""
        cost_s = self.step()
        for message in self.read():
            for event in message.events:
                if event.finish_reason is not None:
                    self.submit(*replacement)
        return cost_s

    def fill(self, shapes: Iterable[tuple[int, int]], replacement: tuple[int, int]) -> None:
        """Submit requests of those prompt and new tokens and let the engine read them all."""
        for number, (prompt_tokens, new_tokens) in enumerate(shapes):
            self.submit(prompt_tokens, new_tokens)
            if number % 16 == 0:
                self.turn(replacement)
        self.turn(replacement)

    def close(self) -> None:
        self._server.close()
        self._api.close()
        self._folder.cleanup()


def overhead_us(sequences: int, shapes: str, steps: int, life_steps: int) -> float:
    """Microseconds per sequence and step, all steps together, if a sequence lives that many steps."""
    rig = Rig(sequences, shapes)
    rig.fill(
        ((PROMPT_TOKENS, life_steps - i % (life_steps // 2)) for i in range(sequences)), (PROMPT_TOKENS, life_steps)
    )
    while rig.engine.scheduler.num_waiting:
        rig.turn((PROMPT_TOKENS, life_steps))
    cost_s, num_rows = 0.0, 0
    for _ in range(steps):
        num_rows += len(rig.engine.scheduler.running)
        cost_s += rig.turn((PROMPT_TOKENS, life_steps))
    rig.close()
    return cost_s / num_rows * 1e6


def waiting_bytes(shapes: str, requests: int, prompt_tokens: int) -> float:
    """Bytes that the engine keeps for each waiting request, less 4 for each token of its prompt."""
    rig = Rig(1, shapes)
    rig.submit(100, 4000)
    rig.step()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    rig.fill(((prompt_tokens, 100) for _ in range(requests)), (0, 0))
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    rig.close()
    return (after - before) / requests - 4 * prompt_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, nargs="+", default=[64, 256, 1024, 4096])
    parser.add_argument("--shapes", choices=("ragged", "soft"), default="soft")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--churn", type=int, default=64, help="steps that a sequence lives in the load `churn`")
    parser.add_argument("--prompt-tokens", type=int, default=1000, help="of a waiting request")
    args = parser.parse_args()
    out = []
    for sequences in args.sequences:
        row: dict[str, float] = {"sequences": sequences}
        for name, life_steps in (("steady", MAX_MODEL_TOKENS - PROMPT_TOKENS), ("churn", args.churn)):
            row[f"{name}_us"] = round(overhead_us(sequences, args.shapes, args.steps, life_steps), 2)
        out.append(row)
        print(f"{sequences:5d} sequences: {row['steady_us']} us per sequence and step, {row['churn_us']} with churn")
    kept = round(waiting_bytes(args.shapes, 500, args.prompt_tokens))
    print(f"a waiting request of {args.prompt_tokens} tokens keeps {kept:,} bytes besides their ids")
    print(json.dumps({"shapes": args.shapes, "cpus": os.cpu_count(), "rows": out, "waiting_bytes": kept}))


if __name__ == "__main__":
    main()
