"""What GPUs driven through torch.cuda (NVIDIA, AMD) and torch.xpu (Intel) share: memory, copies, captured graphs.

Prefill steps run as they come; decode steps are captured once per batch size and replayed, so that a step costs one
launch instead of hundreds. Steps are launched without waiting for the one before (async depth 1): everything goes to
one stream, in order. Knows no vendor's library and no card.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenplane_core.backend.records import Bucket, ShapePolicy

from .choice import Candidate, choose
from .device import TorchDevice, decode_sizes, gpu_offer
from .executors import Program, StepExecutor
from .kernels import AttentionKernels, LayerNeed
from .padded import PaddedStep, StepShape
from .readback import Arriving, ReadBack, StepClock
from .sampler import FastDraw, Sampler, TorchSampler


class GpuDevice(TorchDevice):
    """One card. `kind` names the module of torch that drives it."""

    default_sequences = gpu_offer(0).max_sequences
    most_sequences = 4096
    default_step_tokens = gpu_offer(0).max_step_tokens
    async_depth = 1
    tables_on_device = True
    builds_kernels = True

    def __init__(self, kind: Literal["cuda", "xpu"], index: int, candidates: Sequence[Candidate]) -> None:
        self.api: Any = getattr(torch, kind)
        self._device = torch.device(kind, index)
        self.candidates = candidates
        self.api.set_device(index)

    @property
    def torch_device(self) -> torch.device:
        return self._device

    def kernels(self, needs: Sequence[LayerNeed]) -> AttentionKernels:
        return choose(self.candidates, needs, self)

    def sampler(self) -> Sampler:
        return TorchSampler(self, self.fast_draw())

    def fast_draw(self) -> FastDraw | None:
        """A kernel that draws without synchronising, if the platform has one."""
        return None

    # --- Shapes ---------------------------------------------------------------------------------------------

    def shapes(self, sequences: int, step_tokens: int, max_model_tokens: int) -> ShapePolicy:
        return ShapePolicy("soft", tuple(Bucket("decode", rows, rows) for rows in decode_sizes(sequences)))

    def executor(self) -> StepExecutor:
        return GraphExecutor(self)

    # --- Memory ---------------------------------------------------------------------------------------------

    def free_bytes(self) -> int:
        """What the driver says is free, and what torch holds of it without using it."""
        free, _ = self.api.mem_get_info(self._device)
        return int(free + self.api.memory_reserved(self._device) - self.api.memory_allocated(self._device))

    def total_bytes(self) -> int:
        return int(self.api.mem_get_info(self._device)[1])

    def headroom_bytes(self) -> int:
        return gpu_offer(self.total_bytes()).headroom_bytes

    def peak_bytes(self) -> int | None:
        self.api.synchronize(self._device)
        peak = self.api.max_memory_allocated(self._device) - self.api.memory_allocated(self._device)
        self.api.empty_cache()
        self.api.reset_peak_memory_stats(self._device)
        return int(peak)

    def taken_bytes(self) -> int | None:
        free, total = self.api.mem_get_info(self._device)
        return int(total - free)

    def close(self) -> None:
        gc.collect()
        self.api.empty_cache()

    # --- Copies and time ------------------------------------------------------------------------------------

    def upload(self, array: NDArray[Any]) -> Tensor:
        """From pinned memory, so that the host does not wait; torch keeps that memory until the copy is done."""
        return torch.from_numpy(array).pin_memory().to(self._device, non_blocking=True)

    def clock(self) -> StepClock:
        return GpuClock(self.api)


class GraphExecutor:
    """Captures each shape's program once and replays it. All graphs share one memory pool, and one buffer for logits:
    a buffer for each would add up to more than the graphs.
    """

    def __init__(self, device: GpuDevice) -> None:
        self.compiled = 0
        self._device = device
        self._api = device.api
        self._pool = self._api.graph_pool_handle()
        # One for all captures: cuBLAS keeps a workspace of its own for every stream it has seen.
        self._stream = self._api.Stream(device.torch_device)
        self._captured: dict[StepShape, _Captured] = {}
        self._logits: Tensor | None = None  # [rows, vocab] of the largest shape so far

    def run(self, program: Program, step: PaddedStep) -> Tensor:
        captured = self._captured.get(step.shape)
        if captured is None:
            captured = self._captured[step.shape] = self._capture(program, step)
            self.compiled += 1
        captured.fill(step)
        captured.graph.replay()
        return captured.logits

    def _capture(self, program: Program, step: PaddedStep) -> _Captured:
        api = self._api
        buffer = self._device.upload(_packed(step))
        parts = torch.split(buffer, [array.size for array in step.inputs.values()])
        inputs = {n: p.view(a.shape) for (n, a), p in zip(step.inputs.items(), parts, strict=True)}
        # Outside of capture first: libraries set themselves up, kernels are built. The step is the same when it runs
        # again: it writes the same tokens to the same places.
        self._stream.wait_stream(api.current_stream())
        with api.stream(self._stream):
            program(step.shape, inputs)
            with _no_waiting(api):
                logits = program(step.shape, inputs)
        api.current_stream().wait_stream(self._stream)
        if self._logits is None or len(self._logits) < len(logits):
            self._logits = torch.empty_like(logits)
        out = self._logits[: len(logits)]
        del logits
        graph = api.CUDAGraph() if hasattr(api, "CUDAGraph") else api.XPUGraph()
        failure: Exception | None = None
        try:
            # The outer context: a capture that fails to end does not give the current stream back.
            with api.stream(api.current_stream()), api.graph(graph, pool=self._pool, stream=self._stream):
                try:
                    out.copy_(program(step.shape, inputs))
                except Exception as error:
                    failure = error
                    raise
        except Exception as error:
            raise failure or error  # not that ending it failed too  # noqa: B904
        return _Captured(graph, buffer, out)


@contextmanager
def _no_waiting(api: Any) -> Iterator[None]:
    """Refuse what waits for the device, where the platform can tell: cheaper than a capture that fails halfway, after
    which torch's allocator never gives the memory of the pool back.
    """
    if not hasattr(api, "set_sync_debug_mode"):
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode does not see everything
        api.set_sync_debug_mode("error")
    try:
        yield
    finally:
        api.set_sync_debug_mode("default")


@dataclass(frozen=True, slots=True)
class _Captured:
    """One shape: the graph, the buffer i32 that its inputs are read from, the logits it writes."""

    graph: Any
    buffer: Tensor
    logits: Tensor

    def fill(self, step: PaddedStep) -> None:
        """In one copy. A replay still under way is not disturbed: the copy waits for it on the same stream."""
        self.buffer.copy_(torch.from_numpy(_packed(step)).pin_memory(), non_blocking=True)


def _packed(step: PaddedStep) -> NDArray[np.int32]:
    return np.concatenate([array.reshape(-1) for array in step.inputs.values()])


class GpuClock:
    """Device time between two events; results through pinned memory."""

    def __init__(self, api: Any) -> None:
        self._api = api
        self._begin = api.Event(enable_timing=True)
        self._begin.record()

    def read_back(self, tensors: Sequence[Tensor]) -> ReadBack:
        hosts = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
        for host, tensor in zip(hosts, tensors, strict=True):
            host.copy_(tensor, non_blocking=True)
        end = self._api.Event(enable_timing=True)
        end.record()
        return Arriving(hosts, self._begin, end)
