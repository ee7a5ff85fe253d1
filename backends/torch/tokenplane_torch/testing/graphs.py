"""torch.cuda as a GPU would have it, on the host: streams, events, pinned memory, and graphs that really replay.

A graph records every operation and runs it again on the same tensors. Reading a value, or allocating by one, while it
records is refused as a driver refuses it. So what a captured step may not do fails here too, and a capture that failed
leaves behind what torch leaves: another error, and its stream as the current one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import pytest
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

from tokenplane_core.backend.hookspecs import hookimpl
from tokenplane_core.backend.records import DetectReport, Device, LoadOptions

from ..backend import TorchBackend
from ..choice import Candidate
from ..gpu import GpuDevice

READS_VALUES = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select", "equal", "allclose", "unique"}


def tensors_in(values: Any) -> list[torch.Tensor]:
    """The tensors that an operation was given or returns: by themselves and in lists, no deeper.

    torch's own walk over any tree takes longer than most of the operations here.
    """
    values = values if isinstance(values, tuple | list) else (values,)
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += [part for part in value if isinstance(part, torch.Tensor)]
    return found


class HostGraph:
    """What CUDAGraph is: `replay` runs what was recorded."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.num_replays = 0

    @torch.inference_mode()
    def replay(self) -> None:
        self.num_replays += 1
        for function, args, kwargs, out in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tensors_in(out), tensors_in(again), strict=True):
                # Views and in-place operations lead to the recorded memory by themselves.
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, graph: HostGraph) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in READS_VALUES:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        out = func(*args, **(kwargs or {}))
        self._graph.calls.append((func, args, kwargs or {}, out))
        return out


class _RefusesToWait(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """torch.cuda.set_sync_debug_mode("error")."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in READS_VALUES:
            raise RuntimeError("called a synchronizing CUDA operation")
        return func(*args, **(kwargs or {}))


class _Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self._at_s = 0.0

    def record(self) -> None:
        self._at_s = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: _Event) -> float:
        return (end._at_s - self._at_s) * 1e3


class _Stream:
    def __init__(self, device: Any = None) -> None:
        pass

    def wait_stream(self, other: _Stream) -> None:
        pass


class HostGpu:
    """Stands in for the module torch.cuda."""

    Event, Stream, CUDAGraph = _Event, _Stream, HostGraph

    def __init__(self, total_bytes: int = 8 << 30) -> None:
        self.total_bytes = total_bytes
        self.is_capturing = False
        self.streams: set[_Stream] = set()  # all that work was put on
        self._current = _Stream()
        self._watching = ExitStack()

    def set_device(self, index: int) -> None:
        pass

    def current_stream(self) -> _Stream:
        return self._current

    @contextmanager
    def stream(self, stream: _Stream) -> Iterator[None]:
        before, self._current = self._current, stream
        self.streams.add(stream)
        try:
            yield
        finally:
            self._current = before

    def set_sync_debug_mode(self, mode: Literal["default", "error"]) -> None:
        self._watching.close()
        if mode == "error":
            self._watching.enter_context(_RefusesToWait())  # type: ignore[no-untyped-call]

    def graph_pool_handle(self) -> object:
        return object()

    @contextmanager
    def graph(self, graph: HostGraph, pool: object, stream: _Stream) -> Iterator[None]:
        before, self._current = self._current, stream
        self.is_capturing = True
        try:
            with _Recorder(graph):
                yield
        except RuntimeError:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture") from None
        finally:
            self.is_capturing = False
        self._current = before

    def mem_get_info(self, device: Any) -> tuple[int, int]:
        return self.total_bytes, self.total_bytes

    def memory_reserved(self, device: Any) -> int:
        return 0

    memory_allocated = max_memory_allocated = memory_reserved

    def synchronize(self, device: Any) -> None:
        pass

    reset_peak_memory_stats = synchronize

    def empty_cache(self) -> None:
        pass


class HostGpuDevice(GpuDevice):
    """A GpuDevice whose card is the host."""

    default_step_tokens = 256
    default_sequences = 16

    def __init__(self, candidates: Sequence[Candidate] = (), block_tokens: int = 32) -> None:
        self.api = HostGpu()
        self.block_tokens = block_tokens
        self._device = torch.device("cpu")
        self.candidates = candidates

    def upload(self, array: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(array).clone()


class HostGpuBackend(TorchBackend):
    """The host as the one GPU of a plugin with these candidates."""

    name, version = "host-gpu", "0"

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        super().__init__()
        self._candidates = candidates

    @hookimpl
    def detect(self) -> DetectReport:
        return DetectReport("found", (Device("cuda", 0, "host", "any", 8 << 30, ("float32",), 0),))

    def open_device(self, device: Device, options: LoadOptions) -> HostGpuDevice:
        return HostGpuDevice(self._candidates)


def pinned_memory_is_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to pin without a card."""
    empty = torch.empty
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory=False, **kwargs: empty(*args, **kwargs))
