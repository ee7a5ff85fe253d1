"""Attention functions of vendors' libraries that take rows of unlike lengths and a block table.

FlashAttention, AITER and Intel's kernels share the idea and differ in the names of arguments. A plugin says how its
library is called, in one `VarlenFunction`; this file lays the rows out for it, once for all layers of a step. Knows
no library.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokenplane_core.backend.errors import ContractViolation

from .attention import AttentionRule
from .kv_cache import LayerCache
from .step import HostRows, Rows


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Where the rows' tokens lie among the step's, and how long the rows are once they lie back to back."""

    tokens: slice | Tensor  # a slice where the rows follow one another: it costs no copy
    query_starts: Tensor  # i32 [n + 1]
    key_lengths: Tensor  # i32 [n] new tokens included

    def take(self, query: Tensor) -> Tensor:
        """The rows' queries, contiguous [t, heads, key_dim]."""
        return query[self.tokens].contiguous()


def pack(rows: Rows) -> PackedRows:
    """Rows of a ragged step, or of a decode step of a fixed shape.

    Raises:
        ContractViolation: a prefill step of a fixed shape, where how many tokens a row has is not known here.
    """
    return rows.once("packed", lambda: _pack_ragged(rows, rows.host) if rows.host else _pack_fixed(rows))


def _pack_ragged(rows: Rows, host: HostRows) -> PackedRows:
    starts = np.concatenate(([0], np.cumsum(host.num_tokens))).astype(np.int32)
    first, tokens = int(host.first_tokens[0]), int(starts[-1])
    together = bool((host.first_tokens == starts[:-1] + first).all())
    row_of_token = np.repeat(np.arange(len(rows)), host.num_tokens)
    scattered = (host.first_tokens - starts[:-1])[row_of_token] + np.arange(tokens)
    return PackedRows(
        slice(first, first + tokens) if together else host.upload(scattered.astype(np.int64)),
        host.upload(starts),
        host.upload(host.context_lens + host.num_tokens),
    )


def _pack_fixed(rows: Rows) -> PackedRows:
    """In a decode step row i has the token i (padded.py), so that nothing needs to be read."""
    if rows.most_tokens != 1:
        raise ContractViolation("these kernels serve no prefill steps of a fixed shape")
    starts = torch.arange(len(rows) + 1, dtype=torch.int32, device=rows.context_lens.device)
    return PackedRows(slice(0, len(rows)), starts, rows.context_lens + 1)


@dataclass(frozen=True, slots=True)
class PageLists:
    """The blocks of each row one after another, as libraries without block tables take them. On the host."""

    query_starts: Tensor  # i32 [n + 1]
    page_starts: Tensor  # i32 [n + 1]
    pages: Tensor  # i32 [page_starts[-1]] block ids
    last_page_tokens: Tensor  # i32 [n] in each row's last block


def page_lists(rows: Rows, host: HostRows) -> PageLists:
    """The lists of a ragged step."""
    lengths = host.context_lens + host.num_tokens
    used = -(-lengths // rows.block_tokens)
    columns = np.arange(host.tables.shape[1])

    def starts(counts: np.ndarray) -> Tensor:
        return torch.from_numpy(np.concatenate(([0], np.cumsum(counts))).astype(np.int32))

    return PageLists(
        starts(host.num_tokens),
        starts(used),
        torch.from_numpy(host.tables[columns < used[:, None]]),
        torch.from_numpy(((lengths - 1) % rows.block_tokens + 1).astype(np.int32)),
    )


@dataclass(frozen=True, slots=True)
class VarlenCall:
    """One call of a library's function: causal attention of the rows over their keys in the cache."""

    query: Tensor  # [t, heads, key_dim] contiguous
    cache: LayerCache
    packed: PackedRows
    rows: Rows
    rule: AttentionRule

    @property
    def window(self) -> tuple[int, int]:
        """Keys to the left and to the right of a query's own that it sees; -1: all that causality leaves."""
        return (-1, -1) if self.rule.window is None else (self.rule.window - 1, 0)


VarlenFunction = Callable[[VarlenCall], Tensor]
"""Returns [t, heads, value_dim]."""


class Varlen:
    """Attention through one function of a library, for prompts and decode rows alike."""

    def __init__(self, function: VarlenFunction) -> None:
        self._function = function

    def attend(self, query: Tensor, cache: LayerCache, rows: Rows, rule: AttentionRule, out: Tensor) -> None:
        packed = pack(rows)
        out[packed.tokens] = self._function(VarlenCall(packed.take(query), cache, packed, rows, rule))
