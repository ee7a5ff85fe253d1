"""The opened device: an XLA device of torch-xla, on a TPU chip or on the host."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from tokenplane_core.backend.errors import BackendUnavailable
from tokenplane_core.backend.records import Bucket, Device, ShapePolicy
from tokenplane_torch.device import TorchDevice, powers_of_two
from tokenplane_torch.executors import StepExecutor
from tokenplane_torch.kernels import AttentionKernels, LayerNeed
from tokenplane_torch.kv_cache import LayerCache, LayerShape
from tokenplane_torch.readback import ReadBack, StepClock
from tokenplane_torch.sampler import Sampler
from tokenplane_torch.static_experts import use_static_experts
from tokenplane_torch.static_sampler import STATIC_SAMPLING, StaticSampler

from . import host
from .attention import LANES, PagedCache, RaggedKernels, page_dim, require_kernel_fits, token_bytes

# Tables live in scalar memory, 1 MiB of it; half is left to lengths, starts and the compiler (as vLLM's Pallas backend
# reckons in get_max_num_seqs).
TABLE_ENTRIES = (1 << 20) // 2 // 4


def open_device(device: Device) -> TorchDevice:
    """Raises BackendUnavailable where torch-xla does not start."""
    on_host = device.arch == host.ARCH
    if on_host:
        host.compile_fast()
    else:
        os.environ.update(chip_environment(device.index, os.environ))
    try:
        import torch_xla
        from torch_xla.backends import set_mat_mul_precision

        handle = torch_xla.device()
        if not on_host:
            set_mat_mul_precision("highest")  # else float32 is multiplied as bfloat16
    except Exception as error:
        raise BackendUnavailable(f"torch-xla does not start on {device.name}: {error}") from error
    return XlaHostDevice(handle) if on_host else TpuDevice(handle)


def chip_environment(index: int, environ: Mapping[str, str]) -> dict[str, str]:
    """What makes torch-xla take one chip, the index-th of those visible, and leave the others to other processes.

    Source: docs/pjrt.md of pytorch/xla.
    """
    visible = (environ.get("TPU_VISIBLE_CHIPS") or environ.get("TPU_VISIBLE_DEVICES") or "").split(",")
    chip = visible[index].strip() if visible != [""] else str(index)
    return {
        "PJRT_DEVICE": "TPU",
        "TPU_VISIBLE_CHIPS": chip,
        "TPU_PROCESS_BOUNDS": "1,1,1",
        "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1",
    }


class XlaDevice(TorchDevice):
    """Steps of fixed shapes: decode rows, and packed tokens of prompts and decode rows together."""

    async_depth = 1
    serves_adapters = False
    sampling = STATIC_SAMPLING
    lanes: int  # heads in the cache are padded to multiples of this
    fewest_rows = 8
    fewest_tokens = 16

    def __init__(self, handle: torch.device) -> None:
        self._handle = handle

    @property
    def torch_device(self) -> torch.device:
        return self._handle

    def allocate(self, shapes: Sequence[LayerShape], num_blocks: int) -> list[LayerCache]:
        def pages(shape: LayerShape) -> Tensor:
            size = (num_blocks, self.block_tokens, 2 * shape.kv_heads, page_dim(shape, self.lanes))
            return torch.zeros(size, dtype=shape.dtype, device=self._handle)

        caches: list[Any] = [PagedCache(pages(shape)) for shape in shapes]
        self._finish()  # memory that is short is short now
        return caches

    def block_bytes(self, shapes: Sequence[LayerShape]) -> int:
        return self.block_tokens * sum(token_bytes(shape, self.lanes) for shape in shapes)

    def shapes(self, sequences: int, step_tokens: int, max_model_tokens: int) -> ShapePolicy:
        """Rows and tokens in powers of two. A prompt step has as many rows as there are sequences, or as tokens."""
        if self.max_table_entries is not None:
            sequences = min(sequences, max(1, self.max_table_entries // -(-max_model_tokens // self.block_tokens)))
        rows = powers_of_two(self.fewest_rows, max(self.fewest_rows, sequences))
        tokens = powers_of_two(self.fewest_tokens, max(self.fewest_tokens, step_tokens))
        prefill = [Bucket("prefill", min(rows[-1], count), count) for count in tokens]
        return ShapePolicy("hard", tuple(prefill + [Bucket("decode", count, count) for count in rows]))

    def fuse(self, module: torch.nn.Module) -> Mapping[str, str]:
        static = isinstance(module, PreTrainedModel) and use_static_experts(module)
        return {"experts": "torch: every expert computes every token"} if static else {}

    def executor(self) -> StepExecutor:
        from .executor import XlaExecutor

        return XlaExecutor(self)

    def clock(self) -> StepClock:
        return XlaClock()

    def _finish(self) -> None:
        """Wait for all that was launched."""
        import torch_xla

        torch_xla.sync(wait=True)


class TpuDevice(XlaDevice):
    """A TPU chip."""

    block_tokens = 128  # the kernel copies a block at a time
    default_sequences, most_sequences = 64, 512
    default_step_tokens, most_step_tokens = 2048, 16384
    max_table_entries = TABLE_ENTRIES
    lanes = LANES

    def kernels(self, needs: Sequence[LayerNeed]) -> AttentionKernels:
        require_kernel_fits(needs)
        return RaggedKernels(use_kernel=True)

    def sampler(self) -> Sampler:
        return StaticSampler(self, exact_sums=False)

    def free_bytes(self) -> int:
        memory = self._memory()
        return int(memory["bytes_limit"]) - int(memory["bytes_used"])

    def total_bytes(self) -> int:
        return int(self._memory()["bytes_limit"])

    def headroom_bytes(self) -> int:
        """1/10 of the memory: activations, logits and the compiled programs themselves."""
        return self.total_bytes() // 10

    def _memory(self) -> Any:
        from torch_xla.core import xla_model

        self._finish()
        return xla_model.get_memory_info(self._handle)


class XlaHostDevice(XlaDevice):
    """The host, with few and small shapes: each is compiled before anything is served."""

    default_sequences, most_sequences = 16, 64
    default_step_tokens, most_step_tokens = 128, 512
    lanes = 8

    def kernels(self, needs: Sequence[LayerNeed]) -> AttentionKernels:
        return RaggedKernels(use_kernel=False)

    def sampler(self) -> Sampler:
        return StaticSampler(self)

    def total_bytes(self) -> int:
        return host.memory_bytes()[0]

    def free_bytes(self) -> int:
        return host.memory_bytes()[1]

    def headroom_bytes(self) -> int:
        """1/4 of the memory: what compiling takes, and the rest of the machine."""
        return self.total_bytes() // 4


class XlaClock:
    """Launches what is pending; the results are computed and copied while the host goes on."""

    def __init__(self) -> None:
        self._started_s = time.perf_counter()

    def read_back(self, tensors: Sequence[Tensor]) -> ReadBack:
        import torch_xla

        torch_xla.sync()
        return _Pending(list(tensors), self._started_s)


class _Pending:
    def __init__(self, tensors: list[Tensor], started_s: float) -> None:
        self._tensors, self._started_s, self._seconds = tensors, started_s, 0.0

    def done(self) -> bool:
        return False  # torch-xla tells no earlier than by waiting

    def arrays(self) -> list[NDArray[Any]]:
        arrays = [tensor.cpu().numpy() for tensor in self._tensors]
        self._seconds = time.perf_counter() - self._started_s
        return arrays

    def seconds(self) -> float:
        return self._seconds
