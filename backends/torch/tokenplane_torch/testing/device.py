"""The host as a device, with as much memory as a test wants, and made to behave like devices of fixed shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from tokenplane_core.backend.records import Bucket, ShapePolicy

from ..device import TorchDevice, powers_of_two
from ..fixed_kernels import FixedKernels
from ..kernels import AttentionKernels, LayerNeed, TorchKernels


class PlainDevice(TorchDevice):
    def __init__(self, free_bytes: int = 1 << 40) -> None:
        self._free_bytes = free_bytes

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cpu")

    def kernels(self, needs: Sequence[LayerNeed]) -> AttentionKernels:
        return TorchKernels()

    def free_bytes(self) -> int:
        return self._free_bytes

    def total_bytes(self) -> int:
        return self._free_bytes

    def headroom_bytes(self) -> int:
        return 0


class PaddedDevice(PlainDevice):
    """Fixed shapes on the host, run eagerly.

    packed: hard buckets of packed tokens, decode rows among them. rectangle: hard buckets of equal rows, decode
    apart.
    """

    default_step_tokens = 128  # a step is computed to its full width in every row, whatever is in it
    default_sequences = 10  # as many as the laws' batches need, and no power of two
    async_depth = 1

    def __init__(self, kind: Literal["packed", "rectangle"]) -> None:
        super().__init__()
        self._kind = kind
        self.mixed = kind != "rectangle"
        self.max_prefill_rows = 4 if kind == "rectangle" else None

    def kernels(self, needs: Sequence[LayerNeed]) -> AttentionKernels:
        return FixedKernels()

    def shapes(self, sequences: int, step_tokens: int, max_model_tokens: int) -> ShapePolicy:
        decode = [Bucket("decode", rows, rows) for rows in powers_of_two(2, sequences)]
        if self._kind == "packed":
            prefill = [Bucket("prefill", sequences, tokens) for tokens in powers_of_two(16, step_tokens)]
            return ShapePolicy("hard", tuple(prefill + decode))
        prefill = [
            Bucket("prefill", rows, rows * width)
            for rows in (1, 4)
            for width in powers_of_two(16, step_tokens // rows)
            if rows <= sequences
        ]
        return ShapePolicy("hard", tuple(prefill + decode), pad_rows=True)
