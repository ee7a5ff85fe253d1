"""Loads a model in a process of its own, and takes over what serving needs: the packed weights and the facts.

Reading a checkpoint takes torch, transformers and the module itself, which are hundreds of megabytes and a million
objects that a native program never touches. They end with that process.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO

import msgspec

from tokenplane_core import logs
from tokenplane_core.backend.errors import BackendError, OutOfMemory, revived
from tokenplane_core.backend.records import Capabilities, LoadOptions, ModelSpec
from tokenplane_torch.failures import as_out_of_memory

from . import native
from .cache import Cache
from .device import default_threads, read_memory
from .packed import Outline, PackedDecoder, receive_pieces
from .program import Program
from .program_runner import ProgramRunner
from .sampler import HostSampler
from .structs import BLOCK_TOKENS

_LENGTH_BYTES = 8
PIPE_BYTES = 1 << 20  # as much as Linux gives unasked


class Request(msgspec.Struct):
    model: ModelSpec
    options: LoadOptions
    json_log: bool


class PackedAnswer(msgspec.Struct, tag="packed"):
    """The memory of its pieces follows."""

    capabilities: Capabilities
    outline: Outline


class NoProgram(msgspec.Struct, tag="no_program"):
    """The model runs, but not as a native program."""

    reason: str


class Failed(msgspec.Struct, tag="failed"):
    kind: str  # class in the core's tree of errors
    message: str


Answer = PackedAnswer | NoProgram | Failed
_ANSWER: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)


class Host:
    """The opened device where there is no torch to open one for."""

    block_tokens = BLOCK_TOKENS

    def free_bytes(self) -> int:
        return read_memory().free_bytes

    def close(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class TakenOver:
    capabilities: Capabilities
    runner: ProgramRunner


def load_apart(model: ModelSpec, options: LoadOptions) -> TakenOver | NoProgram:
    """Load as `CpuBackend.load` does, in a process that ends before this returns.

    Raises:
        TokenplaneError: what loading raised there.
        OutOfMemory, BackendError: it could not be started, or ended without a word; or its weights do not fit here.
    """
    with _loader() as (process, pipe):
        _ask(process, Request(model, options, logs.is_json()))
        try:
            answer = _ANSWER.decode(_read_message(pipe))
            packed = _receive(answer.outline, pipe, model) if isinstance(answer, PackedAnswer) else None
        except EOFError:
            raise _ended(model, process) from None
    if isinstance(answer, NoProgram):
        return answer
    if isinstance(answer, Failed):
        raise revived(answer.kind, answer.message, otherwise=BackendError)
    assert packed is not None
    return _take_over(answer.capabilities, packed, model, options)


@contextlib.contextmanager
def _loader() -> Iterator[tuple[subprocess.Popen[bytes], BinaryIO]]:
    """The process and what it answers on; both are gone afterwards."""
    reading, writing = os.pipe()
    with open(reading, "rb", buffering=0) as pipe:
        try:
            with contextlib.suppress(OSError):  # a user who has used up what pipes may take
                fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
            command = [sys.executable, "-m", "tokenplane_cpu.load_process", str(writing), str(os.getpid())]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[writing])
        except OSError as error:
            raise BackendError(f"{sys.executable} cannot be started to load the model: {error}") from error
        finally:
            os.close(writing)
        try:
            yield process, pipe
        finally:
            process.kill()
            process.wait()


def _ask(process: subprocess.Popen[bytes], request: Request) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin:  # why it is broken shows where its answer is read
        process.stdin.write(msgspec.msgpack.encode(request))


def _receive(sent: Outline, pipe: BinaryIO, model: ModelSpec) -> PackedDecoder:
    with as_out_of_memory(f"{model.model_id}: its packed weights do not fit"):
        return receive_pieces(sent, pipe)


def _take_over(facts: Capabilities, packed: PackedDecoder, model: ModelSpec, options: LoadOptions) -> TakenOver:
    native.use_threads(options.num_threads or default_threads())
    program = Program(packed)
    runner = ProgramRunner(program, Cache(program.block_bytes()), HostSampler(), model.max_model_tokens)
    budget_bytes = read_memory().free_bytes - sum(facts.reserved_bytes.values())  # now that the loader is gone
    return TakenOver(replace(facts, kv=replace(facts.kv, budget_bytes=max(0, budget_bytes))), runner)


def _ended(model: ModelSpec, process: subprocess.Popen[bytes]) -> BackendError:
    """Why there was no answer; the pipe's end is closed, so the process has ended or is about to."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=5)
    if process.returncode == -signal.SIGKILL:
        return OutOfMemory(f"{model.model_id}: the process that loads it was killed, most likely for want of memory")
    return BackendError(
        f"{model.model_id}: the process that loads it ended with status {process.returncode}; see the log above"
    )


def write_message(pipe: BinaryIO, message: Answer) -> None:
    body = msgspec.msgpack.encode(message)
    pipe.write(len(body).to_bytes(_LENGTH_BYTES, "little") + body)


def _read_message(pipe: BinaryIO) -> bytes:
    """
    Raises:
        EOFError: the pipe ended first.
    """
    size = int.from_bytes(_read(pipe, _LENGTH_BYTES), "little")
    return _read(pipe, size)


def _read(pipe: BinaryIO, size_bytes: int) -> bytes:
    read = bytearray()
    while len(read) < size_bytes:
        some = pipe.read(size_bytes - len(read))
        if not some:
            raise EOFError
        read += some
    return bytes(read)
