"""The library that comes with an Acme card. An imaginary one: numpy and a thread stand in for the hardware.

It behaves as such libraries do, and is as strict:

* Memory on the card is a handle. The host sees what is in it by reading it back, and in no other way.
* A program is compiled for shapes, and runs in those and no others.
* A launch returns at once. Launches run one after another, in the order they were made.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Arrays = Mapping[str, Array]
Program = Callable[[Arrays, Arrays], dict[str, Array]]
"""Gets the memory it was compiled with, which it may write to, and its inputs; returns its outputs."""


class CardError(Exception):
    """The card gave up in the middle of a launch; nothing on it can be trusted."""


class OutOfCardMemory(Exception):
    pass


class ShapeRefused(Exception):
    """A launch whose inputs do not have the shapes the program was compiled for."""


class Buffer:
    """Memory on the card."""

    def __init__(self, array: Array) -> None:
        self.__array = array  # only the card may look inside
        self.nbytes = array.nbytes

    def _on_card(self) -> Array:
        return self.__array


@dataclass(frozen=True)
class Executable:
    program: Program
    memory: Mapping[str, Buffer]
    shapes: Mapping[str, tuple[tuple[int, ...], str]]


class Launch:
    """A program that runs, or will when those before it are done."""

    def __init__(self, future: Future[tuple[dict[str, Array], float]]) -> None:
        self._future = future

    def done(self) -> bool:
        return self._future.done()

    def read(self, name: str) -> Array:
        """Wait for the launch, and copy one output to the host. Raises CardError."""
        return self._outcome()[0][name].copy()

    def busy_s(self) -> float:
        """Wait for the launch; the seconds the card spent on it."""
        return self._outcome()[1]

    def _outcome(self) -> tuple[dict[str, Array], float]:
        try:
            return self._future.result()
        except Exception as error:
            raise CardError(f"the program failed on the card: {type(error).__name__}: {error}") from error


class Card:
    """An opened card with `memory_bytes` of memory."""

    def __init__(self, memory_bytes: int) -> None:
        self.free_bytes = memory_bytes
        self._queue = ThreadPoolExecutor(1, "acme-card")

    def upload(self, array: Array) -> Buffer:
        """Copy an array to the card. Raises OutOfCardMemory."""
        self._take(array.nbytes)
        return Buffer(array.copy())

    def zeros(self, shape: tuple[int, ...], dtype: type[np.generic]) -> Buffer:
        """Cleared memory. Raises OutOfCardMemory."""
        self._take(int(np.prod(shape)) * np.dtype(dtype).itemsize)
        return Buffer(np.zeros(shape, dtype))

    def release(self, buffer: Buffer) -> None:
        self.free_bytes += buffer.nbytes

    def compile(self, program: Program, memory: Mapping[str, Buffer], inputs: Arrays) -> Executable:
        """Compile a program over some memory for inputs of these shapes; their values do not matter."""
        return Executable(program, memory, {name: _shape(array) for name, array in inputs.items()})

    def launch(self, executable: Executable, inputs: Arrays) -> Launch:
        """Queue a program. Raises ShapeRefused."""
        given = {name: _shape(array) for name, array in inputs.items()}
        if given != executable.shapes:
            raise ShapeRefused(f"compiled for {dict(executable.shapes)}, launched with {given}")
        return Launch(self._queue.submit(_run, executable, inputs))

    def close(self) -> None:
        """Finish what is queued, then let go of the card."""
        self._queue.shutdown()

    def _take(self, nbytes: int) -> None:
        if nbytes > self.free_bytes:
            raise OutOfCardMemory(f"{nbytes:,} bytes asked for, {self.free_bytes:,} are free on the card")
        self.free_bytes -= nbytes


def _shape(array: Array) -> tuple[tuple[int, ...], str]:
    return array.shape, array.dtype.name


def _run(executable: Executable, inputs: Arrays) -> tuple[dict[str, Array], float]:
    started_s = time.perf_counter()
    memory = {name: buffer._on_card() for name, buffer in executable.memory.items()}
    outputs = executable.program(memory, inputs)
    return outputs, time.perf_counter() - started_s
