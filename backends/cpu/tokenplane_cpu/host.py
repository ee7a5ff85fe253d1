"""The opened device: the host. Plain decoders run as one native program, all other models through torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tokenplane_core.backend.errors import ConfigError, OutOfMemory, UnsupportedModel
from tokenplane_core.backend.records import I32, ModelSpec, ShapePolicy
from tokenplane_torch.checks import TRIAL_BLOCKS, Packed, compare, survey
from tokenplane_torch.device import TorchDevice
from tokenplane_torch.failures import first_line
from tokenplane_torch.kernels import AttentionKernels, LayerNeed
from tokenplane_torch.kv_cache import LayerCache, LayerShape
from tokenplane_torch.loader import refused
from tokenplane_torch.sampler import TorchSampler

from . import native
from .attention import NativeKernels, choose
from .cache import Cache
from .conditions import why_no_program
from .decoder import NoProducts, NotPlain, read_decoder, watched
from .device import COMPUTED_IN, headroom_bytes, read_memory
from .module_sampler import ModuleSampler
from .packing import pack
from .positions import as_turned
from .program import Program
from .program_runner import ProgramRunner
from .quantization import computing_as_stored, forms
from .sampler import CAPABILITIES, HostSampler

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tokenplane_torch.runner import Runner
    from tokenplane_torch.sampler import Sampler

ROUNDING = 0.2
"""How far a program's logits may be off in bfloat16, see `compare`. Measured: 0.07 at 30 layers of random weights."""


class HostDevice(TorchDevice):
    """Computes with `num_threads` threads of this process from the moment it is made.

    Args:
        programs_only: `runner` raises NotPlain instead of running a model through torch.
        no_program: why there is none, where that is known already.
    """

    sampling = CAPABILITIES if native.is_built() else TorchDevice.sampling

    def __init__(self, num_threads: int, *, programs_only: bool = False, no_program: str | None = None) -> None:
        torch.set_num_threads(num_threads)
        self._num_threads = num_threads
        self._kernels: AttentionKernels | None = None  # for what goes through torch
        self._cache_dtype: torch.dtype | None = None  # None: the layers' own
        self._programs_only, self._no_program = programs_only, no_program
        if native.library() is not None:
            native.use_threads(num_threads)

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cpu")

    def runner(self, module: PreTrainedModel, model: ModelSpec, policy: ShapePolicy, step_tokens: int) -> Runner:
        if model.kv_dtype and model.dtype != COMPUTED_IN:
            raise ConfigError(
                f"--kv-cache-dtype is {model.kv_dtype}, which goes with {COMPUTED_IN}; --dtype is {model.dtype}"
            )
        self._cache_dtype = getattr(torch, model.kv_dtype) if model.kv_dtype else None
        self._no_program = self._no_program or why_no_program(model)
        if self._no_program is None:
            try:
                return self._program_runner(module, model, step_tokens)
            except (OutOfMemory, ConfigError):
                raise
            except Exception as error:  # the reader asks much of code that nobody here knows; torch asks less
                if model.quantize is not None and isinstance(error, UnsupportedModel):
                    raise
                self._no_program = _reason(error)
        if model.quantize is not None:
            way = "its weights cannot be quantized while they load, as no native program can run it"
            raise refused(model, f"{way}: {self._no_program}")
        if self._programs_only:
            raise NotPlain(self._no_program)
        return super().runner(module, model, policy, step_tokens)

    def fuse(self, module: torch.nn.Module) -> Mapping[str, str]:
        return {"step": f"torch, layer by layer (no native program: {self._no_program or 'LoRA adapters'})"}

    def _program_runner(self, module: PreTrainedModel, model: ModelSpec, step_tokens: int) -> Runner:
        """
        Raises:
            NotPlain: the module, or what was asked for, is nothing for a program; the message says what.
            Exception: any other, too: the module is not what it looked like.
        """
        with watched(module) as seen, NoProducts():
            needs = survey(module, model)
        # The trial below has a few tokens even where no sequence may have so many.
        decoder = read_decoder(module, seen, needs, max(model.max_model_tokens, self.block_tokens))
        decoder = replace(decoder, layers=as_turned(module, decoder.layers, model.max_model_tokens))
        max_tokens = max(step_tokens, 2 * self.block_tokens)  # the trial below has more than a block's
        program = Program(pack(decoder, model.dtype, max_tokens, self._num_threads, model.quantize, model.kv_dtype))
        cache = Cache(program.block_bytes())
        try:
            quantized = computing_as_stored(decoder, *forms(model.dtype, model.quantize))
            with torch.no_grad(), quantized if model.quantize else nullcontext():
                compare(module, model, self.block_tokens, _steps(program, cache), ROUNDING)
        except UnsupportedModel as error:
            raise NotPlain(f"it computes something else: {first_line(error)}") from error
        return ProgramRunner(program, cache, HostSampler(), model.max_model_tokens)

    def kernels(self, needs: Sequence[LayerNeed]) -> AttentionKernels:
        self._kernels = choose(needs, self._cache_dtype)
        return self._kernels

    def allocate(self, shapes: Sequence[LayerShape], num_blocks: int) -> list[LayerCache]:
        if isinstance(self._kernels, NativeKernels):
            return self._kernels.allocate(shapes, num_blocks)
        return super().allocate(shapes, num_blocks)

    def block_bytes(self, shapes: Sequence[LayerShape]) -> int:
        if isinstance(self._kernels, NativeKernels):
            return self._kernels.block_bytes(shapes)
        return super().block_bytes(shapes)

    def sampler(self) -> Sampler:
        return TorchSampler(self) if native.library() is None else ModuleSampler()

    def free_bytes(self) -> int:
        return read_memory().free_bytes

    def total_bytes(self) -> int:
        return read_memory().total_bytes

    def headroom_bytes(self) -> int:
        return headroom_bytes(self.total_bytes())


def _reason(error: Exception) -> str:
    """Why there is no program, in a line."""
    if isinstance(error, NotPlain | UnsupportedModel):
        return first_line(error)
    return f"it could not be read ({type(error).__name__}: {first_line(error)})"


def _steps(program: Program, cache: Cache) -> Packed:
    """A program's steps as the load-time check calls them, over a small cache of its own."""
    cache.allocate(TRIAL_BLOCKS)

    def packed(token_ids: I32, new: I32, context: I32, tables: I32) -> Tensor:
        program.attach(cache.addresses(), tables)
        every = np.arange(len(token_ids), dtype=np.int32)
        logits = program.step(token_ids, np.arange(len(new), dtype=np.int32), context, new, every, len(every))
        return torch.from_numpy(logits.copy())

    return packed
