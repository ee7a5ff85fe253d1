"""The process of apart.py: `python -m tokenplane_cpu.load_process FD`, a Request as msgpack on standard input.

Answers on that file descriptor, then ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
import sys
from dataclasses import replace
from typing import BinaryIO

import msgspec

from tokenplane_core.backend.errors import TokenplaneError
from tokenplane_core.backend.records import Device, LoadOptions

from .apart import Failed, NoProgram, Packed, Request, write_message
from .decoder import NotPlain
from .device import default_threads
from .host import HostDevice
from .packed import PackedDecoder, outline, send_pieces
from .plugin import CpuBackend
from .program_runner import ProgramRunner

PR_SET_PDEATHSIG = 1  # linux/prctl.h


class ProgramsOnly(CpuBackend):
    """`load` raises NotPlain where there is no native program for a model."""

    def open_device(self, device: Device, options: LoadOptions) -> HostDevice:
        return HostDevice(options.num_threads or default_threads(), programs_only=True)

    def packed(self) -> PackedDecoder:
        assert isinstance(self._runner, ProgramRunner)
        return self._runner.program.packed


def answer(request: Request, pipe: BinaryIO) -> None:
    backend = ProgramsOnly()
    try:
        capabilities = backend.load(request.model, replace(request.options, own_process=False))
    except NotPlain as error:
        return write_message(pipe, NoProgram(str(error)))
    except TokenplaneError as error:
        return write_message(pipe, Failed(type(error).__name__, str(error)))
    packed = backend.packed()
    write_message(pipe, Packed(capabilities, outline(packed)))
    send_pieces(packed, pipe)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of a terminal's processes; the parent decides ...
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # ... and takes this one along when it ends
    request = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Request)
    with contextlib.suppress(BrokenPipeError), open(int(sys.argv[1]), "wb") as pipe:
        answer(request, pipe)


if __name__ == "__main__":
    main()
