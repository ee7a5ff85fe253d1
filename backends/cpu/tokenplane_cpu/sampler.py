"""Draws from logits on the host, natively; the law is tokenplane_core/backend/sampling.py.

Every row is drawn by one thread, with no sort of a vocabulary: native/kernels/filters.h. Imports no torch.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokenplane_core.backend.errors import BackendError, ContractViolation
from tokenplane_core.backend.records import F32, I32, SAMPLING_FEATURES, SamplingBatch, SamplingCaps
from tokenplane_core.backend.sampling import needs_history, uniforms

from .native import built_library, isa
from .structs import MOST_LOGPROBS, SamplingStruct

CAPABILITIES = SamplingCaps(SAMPLING_FEATURES, max_top_logprobs=MOST_LOGPROBS)

_PARAMETERS = ("temperature", "top_k", "top_p", "typical_p", "min_p")
_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
_HISTORIES = ("history_rows", "history_ids", "history_lengths", "history_prompts")


@dataclass(frozen=True, slots=True)
class Histories:
    """The tokens before each drawn one, for penalties. Entries from a row's length on mean nothing."""

    token_ids: I32  # [n, longest]
    lengths: I32  # [n]
    num_prompt_tokens: I32  # [n]


@dataclass(frozen=True, slots=True)
class Drawn:
    """Fields as in StepOutput."""

    token_ids: I32
    logprobs: F32 | None = None
    top_ids: I32 | None = None
    top_logprobs: F32 | None = None


class HostSampler:
    """Takes and gives numpy arrays. Not for two threads at once."""

    def __init__(self) -> None:
        self._library = built_library()
        self._workspace = np.empty(0, np.uint8)

    def describe(self) -> str:
        return f"native ({isa()})"

    def draw(self, logits: F32, batch: SamplingBatch, histories: Histories | None) -> Drawn:
        """Draw a token for each row of f32 [n, vocab]; histories: of the rows that `needs_history` names.

        Raises:
            BackendError: the logits of a row are nothing to draw from: all NaN or -inf, or one of them inf.
            ContractViolation: a row wants more log-probabilities than CAPABILITIES says.
        """
        rows, vocab = logits.shape
        most_logprobs = int(batch.num_logprobs.max(initial=-1))
        if most_logprobs > MOST_LOGPROBS:
            raise ContractViolation(f"num_logprobs is {most_logprobs}, declared was max_top_logprobs {MOST_LOGPROBS}")
        drawn = _room(rows, most_logprobs)
        if rows == 0:
            return drawn
        wanted = self._library.tp_sampling_workspace_bytes(vocab) + 64
        if self._workspace.size < wanted:
            self._workspace = np.empty(wanted, np.uint8)
        inputs = {"logits": logits} | _inputs(batch, histories)
        if histories is not None:
            inputs |= _history_inputs(batch, histories)
        outputs = {name: getattr(drawn, name) for name in Drawn.__dataclass_fields__}
        arrays = {name: array for name, array in (inputs | outputs).items() if array is not None}
        struct = SamplingStruct(
            stride=logits.strides[0] // 4,
            rows=rows,
            vocab=vocab,
            history_stride=0 if histories is None else histories.token_ids.shape[1],
            width=0 if drawn.top_ids is None else drawn.top_ids.shape[1],
            **{name: array.ctypes.data for name, array in arrays.items()},
        )
        self._library.tp_sample(ctypes.byref(struct), ctypes.c_void_p((self._workspace.ctypes.data + 63) // 64 * 64))
        lost = np.flatnonzero(drawn.token_ids < 0)
        if lost.size:
            raise BackendError(
                f"the model computed no finite highest logit for {lost.size} of {rows} sequences: its weights, or what "
                "they give in this dtype, overflow or are NaN; try --dtype float32 or another checkpoint"
            )
        return drawn


def _room(rows: int, width: int) -> Drawn:
    """Where the library writes."""
    token_ids = np.empty(rows, np.int32)
    if width < 0:
        return Drawn(token_ids)
    logprobs, top_logprobs = np.empty(rows, np.float32), np.empty((rows, width), np.float32)
    return Drawn(token_ids, logprobs, np.empty((rows, width), np.int32), top_logprobs)


def _inputs(batch: SamplingBatch, histories: Histories | None) -> dict[str, NDArray[np.generic]]:
    """What the batch uses, as the library reads it; arrays of a batch are dense already."""
    inputs: dict[str, NDArray[np.generic]] = {}
    if not batch.features:
        return inputs
    used = [name for name in _PARAMETERS if name in batch.features]
    if "temperature" in used:
        inputs["uniforms"] = uniforms(batch.seeds, batch.positions)
    if "logit_bias" in batch.features:
        used += ["bias_starts", "bias_ids", "bias_values"]
    if batch.num_logprobs.max(initial=-1) >= 0:
        used += ["num_logprobs", "processed_logprobs"]
    if histories is not None:
        used += _PENALTIES
    inputs |= {name: np.ascontiguousarray(getattr(batch, name)) for name in used}
    if batch.mask is not None:
        mask_rows = np.full(len(batch), -1, np.int32)
        mask_rows[batch.mask.rows] = np.arange(len(batch.mask.rows))
        inputs |= {"masks": np.ascontiguousarray(batch.mask.words()), "mask_rows": mask_rows}
    return inputs


def _history_inputs(batch: SamplingBatch, histories: Histories) -> dict[str, NDArray[np.generic]]:
    penalised = np.flatnonzero(needs_history(batch))
    history_rows = np.full(len(batch), -1, np.int32)
    history_rows[penalised] = np.arange(len(penalised))
    arrays = (histories.token_ids, histories.lengths, histories.num_prompt_tokens)
    return dict(zip(_HISTORIES, (history_rows, *(np.ascontiguousarray(a, np.int32) for a in arrays)), strict=True))
