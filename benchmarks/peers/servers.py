"""The servers that are compared: how each is found, started, made ready and stopped.

Ours is this environment's. A peer is there if its path is given, by option or environment variable; README.md says how
each was installed. All get two limits that matter: KV memory for at least KV_TOKENS, at least 32 sequences at once.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from . import processes

KV_TOKENS = 32_768
START_LIMIT_S = 900
STOP_LIMIT_S = 20

Command = Callable[[Path, int], list[str]]  # model folder, port


@dataclass(frozen=True)
class Server:
    """One way to serve a model. `weights` says what it may be compared with: "bf16" or "int8" (8 bits of any kind)."""

    name: str
    weights: str
    command: Command = field(compare=False)
    environment: Mapping[str, str] = field(default_factory=dict, compare=False)
    fields: Mapping[str, object] = field(default_factory=lambda: {"ignore_eos": True}, compare=False)  # of each request
    is_peer: bool = True

    @property
    def weight_bytes(self) -> float:
        """Bytes read for each parameter; Q8_0 keeps a float16 scale for each 32."""
        return {"bf16": 2.0, "int8": 34 / 32 if self.is_peer else 1.0}[self.weights]


@dataclass
class Running:
    """A server that answers. `ready_s` from its start to its first 200 at /health."""

    process: subprocess.Popen[bytes]
    url: str
    model: str
    ready_s: float


def ours(name: str, flags: str) -> Server:
    """This environment's server, with further flags of `tokenplane serve`."""

    def command(folder: Path, port: int) -> list[str]:
        return [
            sys.executable, "-m", "tokenplane_api.cli", "serve", "--model-id", str(folder), "--served-model-name",
            str(folder), "--backend", "cpu", "--dtype", "bfloat16", "--hostname", "127.0.0.1", "--port", str(port),
            "--max-batch-total-tokens", str(KV_TOKENS), *shlex.split(flags),
        ]  # fmt: skip

    weights = "int8" if name == "int8" else "bf16"
    return Server(f"ours-{name}", weights, command, {"LOG_LEVEL": "warning"}, is_peer=False)


def vllm(executable: str, preload: str) -> Server:
    """vLLM's CPU build on all processors; `preload`: tcmalloc and libiomp5, as its documents advise."""

    def command(folder: Path, port: int) -> list[str]:
        return [
            executable, "serve", str(folder), "--dtype", "bfloat16", "--max-num-seqs", "64",
            "--host", "127.0.0.1", "--port", str(port),
        ]  # fmt: skip

    processors = f"0-{(os.cpu_count() or 1) - 1}"
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "VLLM_CPU_OMP_THREADS_BIND": processors,
        "VLLM_NO_USAGE_STATS": "1",
        "LD_PRELOAD": preload,
        "PATH": f"{Path(executable).parent}:{os.environ['PATH']}",
    }
    return Server("vllm", "bf16", command, environment)


def llama(executable: str, gguf: Path, kind: str) -> Server:
    """llama-server on GGUF/<model>-<kind>.gguf, one KV cache for all slots."""

    def command(folder: Path, port: int) -> list[str]:
        threads = str(os.cpu_count() or 1)
        return [
            executable, "-m", str(gguf / f"{folder.name}-{kind}.gguf"), "-a", str(folder), "-t", threads,
            "-tb", threads, "-np", "32", "-kvu", "-c", str(KV_TOKENS), "--host", "127.0.0.1", "--port", str(port),
        ]  # fmt: skip

    return Server(f"llama-{kind}", "int8" if kind == "q8_0" else "bf16", command)


def transformers(executable: str) -> Server:
    """transformers' own server, with continuous batching."""

    def command(folder: Path, port: int) -> list[str]:
        return [
            executable, "serve", str(folder), "--continuous-batching", "--device", "cpu", "--dtype", "bfloat16",
            "--cb-block-size", "32", "--cb-num-blocks", str(KV_TOKENS // 32),
            "--host", "127.0.0.1", "--port", str(port),
        ]  # fmt: skip

    return Server("transformers", "bf16", command, fields={})  # it refuses ignore_eos; these models never end anyway


@contextmanager
def running(server: Server, folder: Path, log: Path) -> Iterator[Running]:
    """Start the server, wait until /health answers, stop it and all its processes at the end.

    Raises RuntimeError with the end of its log if it ends before, or is not ready after START_LIMIT_S.
    """
    port = free_port()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **server.environment}
    start_s = time.perf_counter()
    with log.open("wb") as out:
        process = subprocess.Popen(server.command(folder, port), stdout=out, stderr=subprocess.STDOUT, env=environment)
    try:
        url = f"http://127.0.0.1:{port}"
        while not answers(url):
            if process.poll() is not None or time.perf_counter() - start_s > START_LIMIT_S:
                end = log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{server.name} did not become ready with {folder.name}: {end}")
            time.sleep(0.05)
        yield Running(process, url, str(folder), time.perf_counter() - start_s)
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the server to end, then end whatever is left of its processes."""
    left = processes.tree(process.pid)
    process.terminate()
    try:
        process.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pid in left[1:]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
