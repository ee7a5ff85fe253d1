"""From rows of a batch to what the model and the kernels need, once per step and shared by all layers.

This file plans ragged steps: packed back to back, as long as they come. Steps of a fixed shape are padded.py's.
Works on host arrays and uploads each result once. Knows no records of the core and no model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tokenplane_core.backend.records import I32, Bool

from .attention import AttentionRule
from .kv_cache import LayerCache

if TYPE_CHECKING:
    from .kernels import AttentionKernels
    from .lora import AdaptedStep

T = TypeVar("T")
Upload = Callable[[NDArray[Any]], Tensor]


@dataclass(frozen=True, slots=True)
class HostRows:
    """The arrays of `Rows` on the host, for kernels that plan there. Only ragged steps have them."""

    first_tokens: I32
    num_tokens: I32
    context_lens: I32
    tables: I32
    upload: Upload

    def cache_index(self, row: int | slice, positions: NDArray[np.int64], block_tokens: int) -> NDArray[np.int64]:
        """Where positions lie in the cache seen as one row per token; positions [p] or [rows, p]."""
        tables = self.tables[row]
        blocks = np.take_along_axis(tables, positions // block_tokens, axis=-1).astype(np.int64)
        return blocks * block_tokens + positions % block_tokens


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of a step, as a kernel reads them. Row i owns the tokens `first_tokens[i]` and up of the step."""

    first_tokens: Tensor  # i32 [n] where the row's first token lies among the step's tokens
    num_tokens: Tensor  # i32 [n] new tokens; 0 in a padding row of a prefill, 1 in one of a decode step
    context_lens: Tensor  # i32 [n] tokens in the cache before this step
    tables: Tensor  # i32 [n, blocks] block ids; entries behind a row's last block name PAD_BLOCK or nothing
    block_tokens: int
    most_tokens: int  # no row has more new tokens
    most_keys: int  # no row sees more keys, its own new ones included
    host: HostRows | None = None
    fresh: bool = False  # True: known to have nothing in the cache before this step, none of them
    extra: Mapping[str, Tensor] = field(default_factory=dict)  # a padded step's inputs, an executor's own among them
    _memo: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.first_tokens)

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """What a kernel derives from the rows (index lists, masks, plans): made by the first layer that asks."""
        if key not in self._memo:
            self._memo[key] = make()
        return cast(T, self._memo[key])


@dataclass(frozen=True, slots=True)
class StepPlan:
    """A step of `t` tokens."""

    token_ids: Tensor  # i32 [t], TOKEN_ON_DEVICE where the device knows better
    positions: Tensor  # i64 [t]
    write_index: Tensor  # i64 [t] where each token's K and V go, in the cache seen as one row per token
    logits_index: Tensor  # i64 [s] the tokens after which a token is sampled
    decode: Rows | None  # rows of one token
    prefill: Rows | None  # rows of more


def plan_step(
    token_ids: I32,
    num_new_tokens: I32,
    context_lens: I32,
    tables: I32,
    num_draws: NDArray[np.integer[Any]] | Bool,
    block_tokens: int,
    upload: Upload,
) -> StepPlan:
    """Plan a ragged step.

    Shapes:
        token_ids i32 [t] packed, num_new_tokens and context_lens i32 [n], tables i32 [n, blocks]; num_draws of integers
        or bool [n], after how many of each row's last tokens one is sampled.
    """
    ends = np.cumsum(num_new_tokens, dtype=np.int32)
    starts = ends - num_new_tokens
    row_of_token = np.repeat(np.arange(len(num_new_tokens)), num_new_tokens)
    positions = np.arange(len(token_ids)) - starts[row_of_token] + context_lens[row_of_token]
    blocks = tables[row_of_token, positions // block_tokens].astype(np.int64)

    def rows(chosen: Bool) -> Rows | None:
        if not chosen.any():
            return None
        most_keys = int((context_lens + num_new_tokens)[chosen].max())
        host = HostRows(
            starts[chosen],
            num_new_tokens[chosen],
            context_lens[chosen],
            np.ascontiguousarray(tables[chosen, : -(-most_keys // block_tokens)]),
            upload,
        )
        return Rows(
            first_tokens=upload(host.first_tokens),
            num_tokens=upload(host.num_tokens),
            context_lens=upload(host.context_lens),
            tables=upload(host.tables),
            block_tokens=block_tokens,
            most_tokens=int(host.num_tokens.max()),
            most_keys=most_keys,
            host=host,
            fresh=not host.context_lens.any(),
        )

    return StepPlan(
        token_ids=upload(token_ids),
        positions=upload(positions),
        write_index=upload(blocks * block_tokens + positions % block_tokens),
        logits_index=upload(_last_tokens(ends, num_draws.astype(np.int64))),
        decode=rows(num_new_tokens == 1),
        prefill=rows(num_new_tokens > 1),
    )


def _last_tokens(ends: I32, counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The last counts[i] tokens of rows that end before ends[i], row after row."""
    so_far = np.cumsum(counts)
    return np.repeat(ends - so_far, counts) + np.arange(counts.sum())


class PagedStep:
    """The step that the attention function reads in service: writes K and V, then attends through the tables."""

    def __init__(
        self,
        plan: StepPlan,
        layers: list[LayerCache],
        kernels: AttentionKernels,
        adapters: AdaptedStep | None = None,
    ) -> None:
        self.plan, self.layers, self.kernels, self.adapters = plan, layers, kernels, adapters

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule, mask: object
    ) -> Tensor:
        cache = self.layers[layer]
        self.kernels.write_kv(cache, key, value, self.plan.write_index)
        # A padded prefill has tokens of no row, and what they hold goes through the rest of the model.
        prefill = self.plan.prefill
        some_unowned = prefill is not None and prefill.host is None
        new = query.new_zeros if some_unowned else query.new_empty
        out = new((*query.shape[:2], value.shape[2]))
        if self.plan.decode is not None:
            self.kernels.attend_decode(query, cache, self.plan.decode, rule, out)
        if self.plan.prefill is not None:
            self.kernels.attend_prefill(query, cache, self.plan.prefill, rule, out)
        return out
