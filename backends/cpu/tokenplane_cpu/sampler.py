"""Draws from logits on the host, natively where the library is there; the law is tokenplane_core/backend/sampling.py.

Every row is drawn by one thread, with no sort of a vocabulary: native/kernels/filters.h.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenplane_core.backend.errors import BackendError
from tokenplane_core.backend.records import F32, I32, SamplingBatch
from tokenplane_core.backend.sampling import uniforms
from tokenplane_torch import sampler as kit
from tokenplane_torch.device import TorchDevice
from tokenplane_torch.slots import Histories

from .native import isa, library

MOST_LOGPROBS = 1024  # TP_MOST_LOGPROBS

_PARAMETERS = ("temperature", "top_k", "top_p", "typical_p", "min_p")
_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
_HISTORIES = ("history_rows", "history_ids", "history_lengths", "history_prompts")
_POINTERS = (
    *("masks", "mask_rows", "bias_starts", "bias_ids", "bias_values", *_PARAMETERS, "uniforms"),
    *("num_logprobs", "processed_logprobs", *_PENALTIES, *_HISTORIES),
)


class SamplingStruct(ctypes.Structure):
    """tp_sampling."""

    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("rows", ctypes.c_int32),
        ("vocab", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("history_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("token_ids", "logprobs", "top_ids", "top_logprobs")),
        ("width", ctypes.c_int32),
    )


@dataclass(frozen=True, slots=True)
class Drawn:
    """Fields as in StepOutput."""

    token_ids: I32
    logprobs: F32 | None = None
    top_ids: I32 | None = None
    top_logprobs: F32 | None = None


class HostSampler:
    """Takes and gives numpy arrays. Not for two threads at once."""

    def __init__(self, device: TorchDevice) -> None:
        self._torch = kit.TorchSampler(device)
        self._library = library()
        self._workspace = np.empty(0, np.uint8)
        if self._library is not None:
            self._library.tp_sampling_workspace_bytes.restype = ctypes.c_size_t

    def describe(self) -> str:
        return f"native ({isa()})" if self._library is not None else self._torch.describe()

    def draw(self, logits: F32, batch: SamplingBatch, histories: Histories | None) -> Drawn:
        """Draw a token for each row of f32 [n, vocab]; histories: of the rows that `needs_history` names.

        Raises:
            BackendError: the logits of a row are nothing to draw from: all NaN or -inf, or one of them inf.
        """
        if self._library is not None and batch.num_logprobs.max(initial=-1) <= MOST_LOGPROBS:
            return self._draw(self._library, logits, batch, histories)
        with torch.inference_mode():
            drawn = self._torch.draw(torch.from_numpy(logits), np.arange(len(logits)), batch, histories)
        rest = (drawn.logprobs, drawn.top_ids, drawn.top_logprobs)
        token_ids = drawn.token_ids.to(torch.int32).numpy()
        return Drawn(token_ids, *(None if tensor is None else tensor.numpy() for tensor in rest))

    def _draw(self, native: ctypes.CDLL, logits: F32, batch: SamplingBatch, histories: Histories | None) -> Drawn:
        rows, vocab = logits.shape
        drawn = _room(rows, int(batch.num_logprobs.max(initial=-1)))
        if rows == 0:
            return drawn
        wanted = native.tp_sampling_workspace_bytes(vocab) + 64
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
        native.tp_sample(ctypes.byref(struct), ctypes.c_void_p((self._workspace.ctypes.data + 63) // 64 * 64))
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
    penalised = np.flatnonzero(kit.needs_history(batch))
    history_rows = np.full(len(batch), -1, np.int32)
    history_rows[penalised] = np.arange(len(penalised))
    tensors = (histories.token_ids, histories.lengths, histories.num_prompt_tokens)
    arrays = (np.ascontiguousarray(tensor.numpy(), np.int32) for tensor in tensors)
    return dict(zip(_HISTORIES, (history_rows, *arrays), strict=True))


class ModuleSampler:
    """The same for logits of a torch module."""

    fixed_shape = False

    def __init__(self, device: TorchDevice) -> None:
        self._host = HostSampler(device)

    def describe(self) -> str:
        return self._host.describe()

    def draw(
        self, logits: Tensor, rows: NDArray[np.int64], batch: SamplingBatch, histories: Histories | None
    ) -> kit.Drawn:
        drawn = self._host.draw(logits.float().contiguous().numpy(), batch, histories)
        rest = (drawn.logprobs, drawn.top_ids, drawn.top_logprobs)
        return kit.Drawn(
            torch.from_numpy(drawn.token_ids).long(),
            *(None if array is None else torch.from_numpy(array) for array in rest),
        )

    def warm(self, logits: Tensor) -> Iterable[kit.Drawn]:
        return ()
