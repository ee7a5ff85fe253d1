"""A whole decoder as one native program: one call for each step (native/program.h).

Steps take and give numpy arrays. Knows no torch, no slots, no sampling and no records.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenplane_core.backend.records import F32, I32

from .native import built_library, isa
from .packed import PackedDecoder
from .structs import DecoderStruct, StepStruct


class Program:
    """Computes with a packed decoder, which it keeps."""

    def __init__(self, packed: PackedDecoder) -> None:
        self.packed, self._lib = packed, built_library()
        self.vocab_size = packed.vocab_size
        self._layers = type(packed.layers).from_buffer_copy(packed.layers)  # with a cache, from `attach` on
        decoder = DecoderStruct.from_buffer_copy(packed.decoder)
        decoder.layers = self._layers
        self._handle = self._lib.tp_program_create(byref(decoder))
        self._stage(decoder.max_tokens)

    def _stage(self, max_tokens: int) -> None:
        """Arrays in fixed places, into which each step is copied: asking numpy for an address takes longer."""
        self._token_ids, self._wanted = np.zeros(max_tokens, np.int32), np.zeros(max_tokens, np.int32)
        self._slots, self._context_lens = np.zeros(max_tokens, np.int32), np.zeros(max_tokens, np.int32)
        self._num_new = np.zeros(max_tokens, np.int32)
        self._logits = np.empty((0, self.vocab_size), np.float32)
        self._step = StepStruct(
            token_ids=self._token_ids.ctypes.data,
            slots=self._slots.ctypes.data,
            context_lens=self._context_lens.ctypes.data,
            num_new=self._num_new.ctypes.data,
            wanted=self._wanted.ctypes.data,
        )
        self._step_address = byref(self._step)

    def describe(self) -> str:
        return f"one native call a step, {self.packed.form} weights, {isa()}"

    @property
    def weights_bytes(self) -> int:
        return self.packed.weights_bytes

    def workspace_bytes(self, draws: int) -> int:
        """Memory that the largest step and that many logits take while they are computed, bytes."""
        scratch: int = self._lib.tp_program_scratch_bytes(self._handle)
        return scratch + draws * self.vocab_size * 4

    def block_bytes(self) -> list[tuple[int, int]]:
        """Memory of one block of the cache: keys and values of each layer."""
        sizes = (self._lib.tp_key_block_bytes, self._lib.tp_value_block_bytes)
        return [(sizes[0](byref(layer.attention)), sizes[1](byref(layer.attention))) for layer in self._layers]

    def attach(self, caches: Sequence[tuple[int, int]], tables: I32) -> None:
        """Compute from now on over these caches (addresses of keys and values, for each layer) and i32 [slots, blocks]
        block tables, which the caller keeps and changes between steps.
        """
        for layer, (keys, values) in zip(self._layers, caches, strict=True):
            layer.attention.keys, layer.attention.values = keys, values
        self._tables = tables
        self._step.tables, self._step.table_stride = tables.ctypes.data, tables.shape[1]

    def step(
        self,
        token_ids: I32,
        slots: I32,
        context_lens: I32,
        num_new: I32 | int,
        wanted: NDArray[np.signedinteger[Any]],
        num_logits: int,
    ) -> F32:
        """Compute packed tokens i32 [t]; row i of them has num_new[i] tokens of the sequence in slots[i].

        wanted: indices of the tokens after which logits may be asked for.
        Returns f32 [num_logits, vocab] after the first of `wanted`, valid until the next call.
        """
        rows, tokens, step = len(slots), len(token_ids), self._step
        self._token_ids[:tokens] = token_ids
        self._slots[:rows] = slots
        self._context_lens[:rows] = context_lens
        self._num_new[:rows] = num_new
        self._wanted[: len(wanted)] = wanted
        step.tokens, step.rows, step.num_wanted, step.num_logits = tokens, rows, len(wanted), num_logits
        logits = self._logits_for(num_logits)
        self._lib.tp_program_step(self._handle, self._step_address)
        return logits

    def logits(self, first: int, count: int) -> F32:
        """f32 [count, vocab] after the tokens wanted[first] and on of the last step, valid until the next call."""
        logits = self._logits_for(count)
        self._lib.tp_program_logits(self._handle, first, count, self._step.logits)
        return logits

    def _logits_for(self, count: int) -> F32:
        if count > len(self._logits):
            self._logits = np.empty((count, self.vocab_size), np.float32)
            self._step.logits = self._logits.ctypes.data
        return self._logits[:count]

    def close(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            self._lib.tp_program_destroy(handle)

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self.close()
