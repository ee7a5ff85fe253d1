"""What a device plugin supplies to the kit. Imports no torch, so that a plugin module can import it anywhere."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tokenplane_core.backend.records import SAMPLING_FEATURES, Offer, SamplingCaps, ShapePolicy

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from tokenplane_core.backend.records import ModelSpec

    from .executors import StepExecutor
    from .kernels import AttentionKernels, LayerNeed
    from .kv_cache import LayerCache, LayerShape
    from .readback import StepClock
    from .runner import Runner
    from .sampler import Sampler


ONLY = "TOKENPLANE_ATTENTION"
"""Environment variable that names the one candidate for attention kernels to try: for some that crash instead of
failing."""


class TorchDevice(ABC):
    """One opened device. Made in `load`, after torch is there; the attributes are facts and never change.

    The defaults are those of a host: ragged steps, computed inside the call.
    """

    block_tokens: int = 32  # tokens in a KV block
    default_sequences: int = 64  # Limits.max_sequences unless the user wishes otherwise ...
    most_sequences: int = 1024  # ... and the most a wish can get
    default_step_tokens: int = 2048  # the same for Limits.max_step_tokens
    most_step_tokens: int = 32768
    async_depth: int = 0
    mixed: bool = True  # a prefill call may carry decode rows
    max_prefill_rows: int | None = None  # None: as many as there are sequences
    max_table_entries: int | None = None
    builds_kernels: bool = False  # ragged steps may meet a kernel that is not compiled yet
    tables_on_device: bool = False  # compiled steps look blocks up in a table that the device keeps
    serves_adapters: bool = True  # LoRA, beside the linear layers of transformers' modules
    sampling = SamplingCaps(SAMPLING_FEATURES)

    @property
    @abstractmethod
    def torch_device(self) -> torch.device:
        """Where weights, cache and activations live."""

    @abstractmethod
    def kernels(self, needs: Sequence[LayerNeed]) -> AttentionKernels:
        """The write and attend kernels for a loaded model's layers."""

    @abstractmethod
    def free_bytes(self) -> int:
        """Memory that this process could still take on the device, measured now."""

    @abstractmethod
    def total_bytes(self) -> int:
        """Memory this process could ever take on the device."""

    @abstractmethod
    def headroom_bytes(self) -> int:
        """What must stay free besides weights, cache and what a step was measured to need."""

    def allocate(self, shapes: Sequence[LayerShape], num_blocks: int) -> list[LayerCache]:
        """A cache in the layout that the kernels read, one entry per layer; not cleared."""
        from .kv_cache import allocate

        return allocate(shapes, num_blocks, self.block_tokens, self.torch_device)

    def block_bytes(self, shapes: Sequence[LayerShape]) -> int:
        """Memory of one block of it, over all layers."""
        from .kv_cache import block_bytes

        return block_bytes(shapes, self.block_tokens)

    def shapes(self, sequences: int, step_tokens: int, max_model_tokens: int) -> ShapePolicy:
        """Which shapes it runs, given the limits. Batches with a bucket go through the executor."""
        return ShapePolicy()

    def executor(self) -> StepExecutor:
        """Who runs padded steps; asked for once per allocated cache."""
        from .executors import EagerExecutor

        return EagerExecutor(self)

    def sampler(self) -> Sampler:
        from .sampler import TorchSampler

        return TorchSampler(self)

    def runner(self, module: PreTrainedModel, model: ModelSpec, policy: ShapePolicy, step_tokens: int) -> Runner:
        """Who serves a loaded model, checked to compute what the model computes by itself.

        Raises:
            UnsupportedModel, OutOfMemory: nobody can.
        """
        from .runner import checked_runner

        return checked_runner(module, model, self, policy, step_tokens)

    def fuse(self, module: torch.nn.Module) -> Mapping[str, str]:
        """Replace parts of a loaded model by fused ones that compute the same; which and why, for the kernels' list."""
        return {}

    def upload(self, array: NDArray[Any]) -> torch.Tensor:
        """A host array on the device, in order with what is launched after it. The array is not written to again."""
        import torch

        return torch.from_numpy(array).to(self.torch_device)

    def clock(self) -> StepClock:
        """Begin a step: times it and brings its results back."""
        from .readback import HostClock

        return HostClock()

    def peak_bytes(self) -> int | None:
        """Most memory taken since the last call, above what is taken now; None where nobody counts.

        With it, `load` measures what a full step needs instead of guessing.
        """
        return None

    def taken_bytes(self) -> int | None:
        """Memory that is taken on the device as its driver counts, or None; what captured graphs keep shows here."""
        return None

    def close(self) -> None:  # noqa: B027 (most devices have nothing to do)
        """Give memory back. May be called twice."""


def decode_sizes(sequences: int) -> list[int]:
    """Batch sizes whose decode step a GPU captures: 1, 2, 4, then every 8th up to 64, every 16th up to 256, every 32nd
    beyond. Padding then costs less than half of a small batch, and little of a large one.
    """
    most = min(sequences, 1024)  # beyond, a step's launches no longer matter
    sizes = (1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, 1024, 32))
    return [*(size for size in sizes if size < most), most]


def gpu_offer(memory_total_bytes: int) -> Offer:
    """What a GPU does unless told otherwise. 4 % of the card stay free, at least 512 MiB."""
    return Offer(256, 8192, max(512 << 20, memory_total_bytes // 25), len(decode_sizes(256)))


def powers_of_two(first: int, last: int) -> Sequence[int]:
    """first, 2 * first, ... and `last` at the end."""
    sizes = []
    while first < last:
        sizes.append(first)
        first *= 2
    return [*sizes, last]
