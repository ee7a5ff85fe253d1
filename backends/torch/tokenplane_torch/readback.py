"""Results on their way from the device to the host."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray
from torch import Tensor

from tokenplane_core.backend.records import StepOutput


class ReadBack(Protocol):
    """Tensors that are being copied to the host."""

    def done(self) -> bool:
        """True when `arrays` returns without waiting."""
        ...

    def arrays(self) -> list[NDArray[Any]]:
        """Wait for the copies; the arrays are the caller's."""
        ...

    def seconds(self) -> float:
        """How long the device was busy, from the making of the clock to the last copy. After `arrays`."""
        ...


class StepClock(Protocol):
    """Made when a step begins."""

    def read_back(self, tensors: Sequence[Tensor]) -> ReadBack:
        """Start copying; called once, behind the last launch of the step."""
        ...


class HostClock:
    """Computes and copies while one waits."""

    def __init__(self) -> None:
        self._started_s = time.perf_counter()

    def read_back(self, tensors: Sequence[Tensor]) -> ReadBack:
        arrays = [tensor.cpu().numpy() for tensor in tensors]
        return _Arrived(arrays, time.perf_counter() - self._started_s)


class _Arrived:
    def __init__(self, arrays: list[NDArray[Any]], seconds: float) -> None:
        self._arrays, self._seconds = arrays, seconds

    def done(self) -> bool:
        return True

    def arrays(self) -> list[NDArray[Any]]:
        return self._arrays

    def seconds(self) -> float:
        return self._seconds


class Arriving:
    """Copies under way to host tensors, between two events of a device that times them (torch's Event)."""

    def __init__(self, hosts: list[Tensor], begin: Any, end: Any) -> None:
        self._hosts, self._begin, self._end = hosts, begin, end

    def done(self) -> bool:
        return bool(self._end.query())

    def arrays(self) -> list[NDArray[Any]]:
        self._end.synchronize()
        return [host.numpy() for host in self._hosts]

    def seconds(self) -> float:
        return float(self._begin.elapsed_time(self._end)) / 1e3


class TorchStep:
    """The contract's handle of a launched step: waits for the arrays and makes the output of them, once."""

    def __init__(self, pending: ReadBack, output: Callable[[list[NDArray[Any]], float], StepOutput]) -> None:
        self._pending, self._make = pending, output
        self._output: StepOutput | None = None

    def done(self) -> bool:
        return self._output is not None or self._pending.done()

    def result(self) -> StepOutput:
        if self._output is None:
            arrays = self._pending.arrays()
            self._output = self._make(arrays, self._pending.seconds())
        return self._output
