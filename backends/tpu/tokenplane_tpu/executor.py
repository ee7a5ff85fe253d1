"""Compiled steps: a program is traced once for each shape, and from then on its executable is called directly.

torch-xla's tensors are lazy: operations collect in a graph, and a graph that was seen before is not compiled again. But
tracing it again for each step takes about a millisecond per layer. So a step is recorded at warm-up, as torch.compile's
bridge to XLA does it (torch_xla/_dynamo/dynamo_bridge.py), only without Dynamo: which of the graph's parameters are
input, which are state (cache, slots), which are weights and constants. What a step changes is donated: XLA writes it
in place, and the tensor then takes over the output's memory. The calls below are private to torch-xla, whose last
release is the one this package pins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch_xla
from torch import Tensor
from torch_xla.debug import metrics
from torch_xla.utils.buffer_donor_context import alias_with_buffer_donor_config

from tokenplane_torch.device import TorchDevice
from tokenplane_torch.executors import Program
from tokenplane_torch.padded import PaddedStep, StepShape

_XLA = torch_xla._XLAC


class XlaExecutor:
    """One recorded step for each shape."""

    def __init__(self, device: TorchDevice) -> None:
        self._device = device
        self._steps: dict[StepShape, RecordedStep] = {}
        self._expected = compiled_graphs()

    @property
    def compiled(self) -> int:
        """Shapes recorded so far, and whatever else XLA has compiled in this process, such as the sampler's graphs."""
        return len(self._steps) + compiled_graphs() - self._expected

    def run(self, program: Program, step: PaddedStep) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():  # views of inference tensors fail on XLA
            arrays = step.inputs
            given = self._device.upload(np.concatenate([array.reshape(-1) for array in arrays.values()]))  # one copy
            recorded = self._steps.get(step.shape)
            if recorded is None:
                shapes = {name: array.shape for name, array in arrays.items()}
                before = compiled_graphs()
                recorded = RecordedStep(
                    lambda packed: program(step.shape, _unpacked(packed, shapes)), given, program.state()
                )
                self._expected += compiled_graphs() - before  # counted as the shape
                self._steps[step.shape] = recorded
            return recorded(given)


def _unpacked(packed: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Tensor]:
    parts = torch.split(packed, [math.prod(shape) for shape in shapes.values()])
    return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


class RecordedStep:
    """The executable of a function of one tensor that also reads and changes `state`."""

    def __init__(self, function: Callable[[Tensor], Tensor], given: Tensor, state: Sequence[Tensor]) -> None:
        """Trace and compile; `given` and the state keep their values."""
        torch_xla.sync(wait=True)
        places: dict[int, Tensor | None] = {tensor_id(tensor): tensor for tensor in state} | {tensor_id(given): None}
        before = {id(tensor): (tensor_id(tensor), tensor.clone()) for tensor in state}  # no copy yet: shares memory
        output = function(given)
        touched = _XLA._check_tensor_need_materialization(list(state))
        self._changed = [tensor for tensor, changed in zip(state, touched, strict=True) if changed]
        results = [*self._changed, output]
        ids, values = _XLA._get_tensors_xla_device_data_node(results)
        donated = {before[id(tensor)][0] for tensor in self._changed}
        # None: what is given. A state tensor: whatever it holds then. Else a weight or constant, as it is now.
        self._parameters = [places.get(number, value) for number, value in zip(ids, values, strict=True)]
        with alias_with_buffer_donor_config():
            for number, value in zip(ids, values, strict=True):
                if number in donated:
                    _XLA._set_buffer_donation(value, True)
            self._hash = _XLA._get_graph_hash(results)
            _XLA._xla_warm_up_cache(results, [])
        for tensor in self._changed:
            tensor.copy_(before[id(tensor)][1])
        _XLA._clear_pending_irs(str(output.device))

    def __call__(self, given: Tensor) -> Tensor:
        """Launch it; changes the state."""
        parameters = [given if place is None else place for place in self._parameters]
        results: list[Tensor] = _XLA._run_cached_graph(self._hash, parameters)
        for tensor, value in zip(self._changed, results[:-1], strict=True):
            tensor.copy_(value)  # takes the memory over
        return results[-1]


def tensor_id(tensor: Tensor) -> int:
    """What the tensor's present value is known by in a graph."""
    number: int = _XLA._xla_get_tensor_id(tensor)
    return number


def compiled_graphs() -> int:
    """Graphs that XLA has compiled in this process."""
    return metrics.counter_value("UncachedCompile") or 0
