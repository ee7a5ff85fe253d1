"""The opened card: what it is good for, and which pieces of this plugin serve it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenplane_core.backend.records import ShapePolicy
from tokenplane_torch.choice import Candidate, choose
from tokenplane_torch.device import TorchDevice
from tokenplane_torch.executors import StepExecutor
from tokenplane_torch.fixed_kernels import FixedKernels
from tokenplane_torch.kernels import AttentionKernels, LayerNeed
from tokenplane_torch.readback import StepClock
from tokenplane_torch.sampler import Sampler
from tokenplane_torch.static_sampler import STATIC_SAMPLING, StaticSampler

from .attention import GaudiKernels
from .bridge import Bridge, GaudiClock
from .buckets import BLOCK_TOKENS, PREFILL_ROWS, shape_policy
from .executor import GraphExecutor


class GaudiCard(TorchDevice):
    block_tokens = BLOCK_TOKENS
    default_sequences = 64
    most_sequences = 256
    default_step_tokens = 2048
    most_step_tokens = 8192
    async_depth = 1
    serves_adapters = False
    mixed = False
    max_prefill_rows = PREFILL_ROWS
    sampling = STATIC_SAMPLING

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge

    @property
    def torch_device(self) -> torch.device:
        return self._bridge.device

    def kernels(self, needs: Sequence[LayerNeed]) -> AttentionKernels:
        candidates = (
            Candidate("FusedSDPA and flat paged attention", lambda needs, device: GaudiKernels(self._bridge)),
            Candidate("fixed-shape reference", lambda needs, device: FixedKernels()),
        )
        return choose(candidates, needs, self)

    def shapes(self, sequences: int, step_tokens: int, max_model_tokens: int) -> ShapePolicy:
        return shape_policy(sequences, step_tokens, max_model_tokens)

    def executor(self) -> StepExecutor:
        return GraphExecutor(self._bridge)

    def sampler(self) -> Sampler:
        return StaticSampler(self, exact_sums=False)  # the card has no float64

    def free_bytes(self) -> int:
        return self._bridge.free_bytes()

    def total_bytes(self) -> int:
        return self._bridge.total_bytes()

    def headroom_bytes(self) -> int:
        """A fifth of the card: captured graphs with their logits, compiled programs, the flat list's gathered blocks.

        A guess on the safe side, as much as vLLM's Gaudi plugin keeps back by default.
        """
        return self.total_bytes() // 5

    def peak_bytes(self) -> int | None:
        return self._bridge.peak_bytes()

    def upload(self, array: NDArray[Any]) -> Tensor:
        return self._bridge.upload(array)

    def clock(self) -> StepClock:
        return GaudiClock(self._bridge)
