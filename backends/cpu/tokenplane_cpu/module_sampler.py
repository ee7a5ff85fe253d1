"""Draws from the logits of a torch module with the native sampler."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenplane_core.backend.records import SamplingBatch
from tokenplane_torch.sampler import Drawn
from tokenplane_torch.slots import Histories

from . import sampler as host


class ModuleSampler:
    """The seam of tokenplane_torch around the sampler of programs."""

    fixed_shape = False

    def __init__(self) -> None:
        self._host = host.HostSampler()

    def describe(self) -> str:
        return self._host.describe()

    def draw(self, logits: Tensor, rows: NDArray[np.int64], batch: SamplingBatch, histories: Histories | None) -> Drawn:
        arrays = None if histories is None else as_arrays(histories)
        drawn = self._host.draw(logits.float().contiguous().numpy(), batch, arrays)
        rest = (drawn.logprobs, drawn.top_ids, drawn.top_logprobs)
        return Drawn(
            torch.from_numpy(drawn.token_ids).long(),
            *(None if array is None else torch.from_numpy(array) for array in rest),
        )

    def warm(self, logits: Tensor) -> Iterable[Drawn]:
        return ()


def as_arrays(histories: Histories) -> host.Histories:
    tensors = (histories.token_ids, histories.lengths, histories.num_prompt_tokens)
    return host.Histories(*(tensor.numpy().astype(np.int32) for tensor in tensors))
