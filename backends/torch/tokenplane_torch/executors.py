"""Who runs a padded step's program: the interface, and the plain executor that calls it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from .device import TorchDevice
from .padded import PaddedStep, StepShape


class Program(Protocol):
    """A `padded.StepProgram`."""

    def state(self) -> list[Tensor]:
        """What it changes."""
        ...

    def __call__(self, shape: StepShape, inputs: Mapping[str, Tensor]) -> Tensor: ...


class StepExecutor(Protocol):
    """Made anew for each cache: what it has compiled or captured may hold the cache's addresses."""

    @property
    def compiled(self) -> int:
        """Shapes compiled or captured so far. A device of hard shapes adds none after warm-up."""
        ...

    def run(self, program: Program, step: PaddedStep) -> Tensor:
        """Run the program for the step's shape, compiling it first if this shape is new; logits [rows, vocab].

        The result may be overwritten by the next run: what is needed longer must be on its way by then.
        """
        ...


class EagerExecutor:
    """Calls the program. Counts shapes all the same, so that a missing bucket shows on any machine."""

    def __init__(self, device: TorchDevice) -> None:
        self.compiled = 0
        self._device = device
        self._known: set[StepShape] = set()

    def run(self, program: Program, step: PaddedStep) -> Tensor:
        if step.shape not in self._known:
            self._known.add(step.shape)
            self.compiled += 1
        return program(step.shape, {name: self._device.upload(array) for name, array in step.inputs.items()})
