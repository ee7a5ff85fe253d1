"""From rows of a batch to what the model and the kernels need, once per step and shared by all layers.

Works on host arrays only (numpy) and uploads each result once. Knows no records of the core and no model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenplane_core.backend.records import I32, Bool

from .attention import AttentionRule
from .kv_cache import LayerCache

if TYPE_CHECKING:
    from .kernels import AttentionKernels

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of a step, with what a kernel reads to attend for them.

    Row i owns the packed tokens `tokens[starts[i] : starts[i + 1]]`, at positions `context_lens[i]` and up.
    """

    tokens: I32 | None  # i32 [t] where the rows' tokens lie in the packed step; None: they are all of it, in order
    starts: I32  # i32 [n + 1]
    context_lens: I32  # i32 [n] tokens in the cache before this step
    tables: I32  # i32 [n, blocks] block ids, as many columns as the longest row needs
    block_tokens: int
    device: torch.device
    _memo: dict[Any, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.context_lens)

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """What a kernel derives from the rows (index lists, masks, plans): made by the first layer that asks."""
        if key not in self._memo:
            self._memo[key] = make()
        return cast(T, self._memo[key])

    def cache_index(self, row: int | slice, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where positions lie in the cache seen as one row per token; positions [p] or [rows, p]."""
        tables = self.tables[row]
        blocks = np.take_along_axis(tables, positions // self.block_tokens, axis=-1).astype(np.int64)
        return blocks * self.block_tokens + positions % self.block_tokens

    def upload(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self.device)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """A step of `t` tokens packed back to back, without padding."""

    token_ids: Tensor  # i64 [1, t]
    position_ids: Tensor  # i64 [1, t]
    write_index: Tensor  # i64 [t] where each token's K and V go, in the cache seen as one row per token
    logits_index: Tensor  # i64 [s] the packed tokens after which a token is sampled
    decode: Rows | None  # rows of one token
    prefill: Rows | None  # rows of more


def plan_step(
    token_ids: I32,
    num_new_tokens: I32,
    context_lens: I32,
    tables: I32,
    sample: Bool,
    block_tokens: int,
    device: torch.device,
) -> StepPlan:
    """Plan a step.

    Shapes:
        token_ids i32 [t] packed, num_new_tokens and context_lens i32 [n], tables i32 [n, blocks], sample bool [n].
    """
    starts = np.concatenate(([0], np.cumsum(num_new_tokens))).astype(np.int32)
    row_of_token = np.repeat(np.arange(len(num_new_tokens)), num_new_tokens)
    positions = np.arange(starts[-1]) - starts[row_of_token] + context_lens[row_of_token]
    blocks = tables[row_of_token, positions // block_tokens].astype(np.int64)

    def rows(chosen: Bool) -> Rows | None:
        if not chosen.any():
            return None
        whole = bool(chosen.all())
        longest = int((context_lens + num_new_tokens)[chosen].max())
        return Rows(
            tokens=None if whole else np.flatnonzero(chosen[row_of_token]).astype(np.int32),
            starts=np.concatenate(([0], np.cumsum(num_new_tokens[chosen]))).astype(np.int32),
            context_lens=context_lens[chosen],
            tables=tables[chosen, : -(-longest // block_tokens)],
            block_tokens=block_tokens,
            device=device,
        )

    def upload(array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(device)

    return StepPlan(
        token_ids=upload(token_ids).unsqueeze(0),
        position_ids=upload(positions).unsqueeze(0),
        write_index=upload(blocks * block_tokens + positions % block_tokens),
        logits_index=upload(starts[1:][sample] - 1),
        decode=rows(num_new_tokens == 1),
        prefill=rows(num_new_tokens > 1),
    )


class PagedStep:
    """The step that the attention function reads in service: writes K and V, then attends through the tables."""

    def __init__(self, plan: StepPlan, layers: list[LayerCache], kernels: AttentionKernels) -> None:
        self.plan, self.layers, self.kernels = plan, layers, kernels

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule, mask: object
    ) -> Tensor:
        cache = self.layers[layer]
        self.kernels.write_kv(cache, key, value, self.plan.write_index)
        out = query.new_empty((*query.shape[:2], cache.value.shape[3]))
        if self.plan.decode is not None:
            self.kernels.attend_decode(query, cache, self.plan.decode, rule, out)
        if self.plan.prefill is not None:
            self.kernels.attend_prefill(query, cache, self.plan.prefill, rule, out)
        return out
