"""The process of apart.py: `python -m tokenplane_cpu.load_process FD PARENT`, a Request as msgpack on standard input.

Answers on that file descriptor, then ends. PARENT is the process that asked. What takes long to import waits until
it is certain that this process ends with its parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from .apart import Request

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of a terminal's processes; the parent decides ...
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # ... and takes this one along when it ends
    pipe_number, parent = int(sys.argv[1]), int(sys.argv[2])
    if os.getppid() != parent:  # it ended before the line above
        return
    os.set_inheritable(pipe_number, False)  # else what this process starts would keep it open
    with contextlib.suppress(BrokenPipeError), open(pipe_number, "wb") as pipe:
        answer(sys.stdin.buffer.read(), pipe)


def answer(request: bytes, pipe: BinaryIO) -> None:
    import msgspec

    from tokenplane_core import logs

    from .apart import Request

    asked = msgspec.msgpack.decode(request, type=Request)
    logs.configure(os.environ.get("LOG_LEVEL", "info"), asked.json_log)
    load(asked, pipe)


def load(request: Request, pipe: BinaryIO) -> None:
    from dataclasses import replace

    from tokenplane_core.backend.errors import TokenplaneError

    from .apart import Failed, NoProgram, PackedAnswer, write_message
    from .decoder import NotPlain
    from .packed import outline, send_pieces
    from .plugin import CpuBackend
    from .program_runner import ProgramRunner

    backend = CpuBackend(programs_only=True)
    try:
        capabilities = backend.load(request.model, replace(request.options, own_process=False))
    except NotPlain as error:
        return write_message(pipe, NoProgram(str(error)))
    except TokenplaneError as error:
        return write_message(pipe, Failed(type(error).__name__, str(error)))
    runner = backend.loaded_runner()
    assert isinstance(runner, ProgramRunner)
    packed = runner.program.packed
    write_message(pipe, PackedAnswer(capabilities, outline(packed)))
    send_pieces(packed, pipe)


if __name__ == "__main__":
    main()
