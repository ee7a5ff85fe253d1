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
from dataclasses import dataclass, replace
from typing import BinaryIO

import msgspec

from tokenplane_core.backend.errors import BackendError, OutOfMemory, revived
from tokenplane_core.backend.records import Capabilities, LoadOptions, ModelSpec

from . import native
from .cache import Cache
from .device import default_threads, read_memory
from .packed import Outline, receive_pieces
from .program import Program
from .program_runner import ProgramRunner
from .sampler import HostSampler
from .structs import BLOCK_TOKENS

_LENGTH_BYTES = 8
PIPE_BYTES = 1 << 20  # as much as Linux gives unasked


class Request(msgspec.Struct):
    model: ModelSpec
    options: LoadOptions


class Packed(msgspec.Struct, tag="packed"):
    """The memory of its pieces follows."""

    capabilities: Capabilities
    outline: Outline


class NoProgram(msgspec.Struct, tag="no_program"):
    """The model runs, but not as a native program."""

    reason: str


class Failed(msgspec.Struct, tag="failed"):
    kind: str  # class in the core's tree of errors
    message: str


Answer = Packed | NoProgram | Failed
_ANSWER: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)


class Host:
    """The opened device where there is no torch to open one for."""

    block_tokens = BLOCK_TOKENS

    def free_bytes(self) -> int:
        return read_memory().free_bytes

    def close(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Loaded:
    capabilities: Capabilities
    runner: ProgramRunner


def load_apart(model: ModelSpec, options: LoadOptions) -> Loaded | NoProgram:
    """Load as `CpuBackend.load` does, in a process that ends before this returns.

    Raises:
        TokenplaneError: what loading raised there.
        OutOfMemory, BackendError: the process ended without a word, killed or otherwise.
    """
    reading, writing = os.pipe()
    with contextlib.suppress(OSError):  # a user who has used up what pipes may take
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    command = [sys.executable, "-m", "tokenplane_cpu.load_process", str(writing)]
    with open(reading, "rb", buffering=0) as pipe:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[writing])
        os.close(writing)
        try:
            _ask(process, Request(model, options))
            answer = _ANSWER.decode(_read_message(pipe))
            if isinstance(answer, Packed):
                return _take_over(answer, pipe, model, options)
        except EOFError:
            raise _ended(model, process.wait()) from None
        finally:
            process.kill()
            process.wait()
    if isinstance(answer, Failed):
        raise revived(answer.kind, answer.message, otherwise=BackendError)
    return answer


def _ask(process: subprocess.Popen[bytes], request: Request) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin:  # why it is broken shows where its answer is read
        process.stdin.write(msgspec.msgpack.encode(request))


def _take_over(answer: Packed, pipe: BinaryIO, model: ModelSpec, options: LoadOptions) -> Loaded:
    native.use_threads(options.num_threads or default_threads())
    program = Program(receive_pieces(answer.outline, pipe))
    runner = ProgramRunner(program, Cache(program.block_bytes()), HostSampler(), model.max_model_tokens)
    capabilities = answer.capabilities
    free_bytes = read_memory().free_bytes - sum(capabilities.reserved_bytes.values())  # now that loading is over
    return Loaded(replace(capabilities, kv=replace(capabilities.kv, budget_bytes=max(0, free_bytes))), runner)


def _ended(model: ModelSpec, status: int) -> BackendError:
    if status == -signal.SIGKILL:
        return OutOfMemory(f"{model.model_id}: the process that loads it was killed, most likely for want of memory")
    return BackendError(f"{model.model_id}: the process that loads it ended with status {status}; see the log above")


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
