"""The one file that calls Intel's bridge, habana_frameworks.torch. Thin, and not yet run on hardware.

Where a call was read: [doc] docs.habana.ai, "Run Inference Using HPU Graphs" and "Intel Gaudi PyTorch Python API";
[bridge] HabanaAI/gaudi-pytorch-bridge at release 1.19.0, python_packages/habana_frameworks/torch/...; [vllm]
vllm-project/vllm-gaudi, August 2026, which serves with the bridge of release 1.24.

Knows no batches, no cache and no model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenplane_core.backend.errors import BackendUnavailable
from tokenplane_torch.readback import Arriving, ReadBack

DEVICE = "hpu"  # the bridge gives a process one card, so there is no index

# Read when the bridge is imported. HPU graphs exist in lazy mode alone [bridge hpu/__init__.py], whose default differs
# between releases; weight sharing wraps parameters in a way that servers switch off [vllm platform.py].
SETTINGS = {"PT_HPU_LAZY_MODE": "1", "PT_HPU_WEIGHT_SHARING": "0"}


class Bridge:
    """The bridge, imported, and the card it has opened. `module` is the card's number on its board ("" for any)."""

    def __init__(self, module: str, environ: MutableMapping[str, str] = os.environ) -> None:
        """Raises BackendUnavailable: the bridge is missing, does not fit the torch here, or is set to eager mode."""
        for name, value in SETTINGS.items():
            environ.setdefault(name, value)
        if environ["PT_HPU_LAZY_MODE"] == "0":
            raise BackendUnavailable(
                "gaudi: PT_HPU_LAZY_MODE is 0, and HPU graphs exist only in lazy mode; unset it or set it to 1"
            )
        if module:
            environ["HABANA_VISIBLE_MODULES"] = module  # [bridge hpu/_utils.py]
        try:
            import habana_frameworks.torch as htorch
            import habana_frameworks.torch.core as core  # registers "hpu" with torch
            from habana_frameworks.torch.hpex.kernels import FusedSDPA
        except (ImportError, OSError, AssertionError) as error:  # it asserts that torch is the build it was made for
            raise BackendUnavailable(
                f"gaudi: Intel's PyTorch bridge does not load ({type(error).__name__}: {error}); use the torch and"
                " habana-torch-plugin of one Gaudi software release, as in Intel's images"
            ) from error
        self._hpu, self._core, self._fused_sdpa = htorch.hpu, core, FusedSDPA
        self._copies: Any = None
        self.device = torch.device(DEVICE)

    # --- Memory: mem_get_info, memory_allocated, max_memory_allocated, reset_peak_memory_stats [bridge hpu/memory.py]

    def free_bytes(self) -> int:
        return int(self._hpu.mem_get_info()[0])

    def total_bytes(self) -> int:
        return int(self._hpu.mem_get_info()[1])

    def peak_bytes(self) -> int:
        """Most bytes taken since the last call, above those taken now."""
        self._hpu.synchronize()
        peak = self._hpu.max_memory_allocated() - self._hpu.memory_allocated()
        self._hpu.reset_peak_memory_stats()
        return max(0, int(peak))

    # --- Launching ------------------------------------------------------------------------------------------

    def launch(self) -> None:
        """Hand what was computed lazily so far to the card. What lies between two calls is compiled as one piece."""
        self._core.mark_step()  # [bridge core/step_closure.py]

    def upload(self, array: NDArray[Any]) -> Tensor:
        """Without waiting, as [vllm hpu_model_runner.py] uploads its batches: the bridge keeps the source alive."""
        self.launch()
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    def capture(self, run: Callable[[], Tensor]) -> Graph:
        """Run once and record: fixed shapes, no host values, no update of a view in place [doc].

        On the default stream with the tensors kept, like wrap_in_hpu_graph [bridge hpu/graphs.py].
        """
        hpu = self._hpu
        hpu.synchronize()
        graph = hpu.HPUGraph()
        with hpu.stream(hpu.default_stream()):
            graph.capture_begin()
            try:
                result = run()
            finally:
                graph.capture_end()
        hpu.synchronize()
        return Graph(graph, result)

    # --- Results --------------------------------------------------------------------------------------------

    def event(self) -> Any:
        """An event recorded behind what was launched. elapsed_time gives milliseconds [bridge hpu/events.py]."""
        self.launch()
        event = self._hpu.Event(enable_timing=True)
        event.record()
        return event

    def download(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Begin to copy to the host, behind what was launched, on a stream of its own [vllm hpu_model_runner.py].

        A copy must outlive the next replay of the graph that made its source, so it has a source of its own.
        """
        own = [tensor.clone() for tensor in tensors]
        self.launch()
        hpu = self._hpu
        if self._copies is None:
            self._copies = hpu.Stream()
        self._copies.wait_stream(hpu.current_stream())
        with hpu.stream(self._copies):
            return [tensor.to("cpu", non_blocking=True) for tensor in own]

    def event_after_copies(self) -> Any:
        with self._hpu.stream(self._copies):
            event = self._hpu.Event(enable_timing=True)
            event.record()
        return event

    # --- Kernels --------------------------------------------------------------------------------------------

    def fused_sdpa(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None, lengths: Tensor | None
    ) -> Tensor:
        """Intel's fused attention [bridge hpex/kernels/FusedSDPA.py], in the variant that keeps no scores.

        Either a mask or, for causal attention of a prompt over itself, the number of real tokens of each row, which
        stand in front. What comes out behind them means nothing.

        Shapes:
            query [n, heads, w, dim], key and value [n, kv_heads, l, dim]; mask of query's dtype [n, 1, w, l], 0 or
            -inf, added; lengths i32 [n]. Returns [n, heads, w, dim].
        """
        causal, dropout, exact_softmax, recompute = mask is None, 0.0, "None", True
        arguments = (mask, dropout, causal, scale, exact_softmax, recompute, lengths, "right")
        attended: Tensor = self._fused_sdpa.apply(query, key, value, *arguments)
        return attended


@dataclass(frozen=True, slots=True)
class Graph:
    """A captured run: replays with what its inputs hold by then, into the same result."""

    graph: Any
    result: Tensor

    def replay(self) -> Tensor:
        self.graph.replay()
        return self.result


class GaudiClock:
    """Device time between two events; results through a stream of their own."""

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge
        self._begin = bridge.event()

    def read_back(self, tensors: Sequence[Tensor]) -> ReadBack:
        hosts = self._bridge.download(tensors)
        return Arriving(hosts, self._begin, self._bridge.event_after_copies())
