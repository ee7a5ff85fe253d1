"""Attention functions of vendors' libraries that take rows of unlike lengths and a block table.

FlashAttention, AITER and Intel's kernels share the idea and differ in the names of arguments. A plugin says how its
library is called, in one `VarlenFunction`; this file lays the rows out for it, once for all layers of a step. Knows
no library.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenplane_core.backend.errors import ContractViolation
from tokenplane_core.backend.records import I32

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

    def place(self, out: Tensor) -> Tensor:
        """Where to write the rows' results; `put` then brings them where they belong."""
        if isinstance(self.tokens, slice):
            return out[self.tokens]
        return out.new_empty((len(self.tokens), *out.shape[1:]))

    def put(self, out: Tensor, results: Tensor) -> None:
        if not isinstance(self.tokens, slice):
            out[self.tokens] = results


def pack(rows: Rows) -> PackedRows:
    """Rows of a ragged step, or of a decode step of a fixed shape.

    Raises:
        ContractViolation: a prefill step of a fixed shape, where how many tokens a row has is not known here.
    """
    return rows.once("packed", lambda: _pack_ragged(rows, rows.host) if rows.host else _pack_fixed(rows))


def _pack_ragged(rows: Rows, host: HostRows) -> PackedRows:
    starts = _starts(host.num_tokens)
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

    query_starts: I32  # [n + 1]
    page_starts: I32  # [n + 1]
    pages: I32  # [page_starts[-1]] block ids
    last_page_tokens: I32  # [n] in each row's last block


def page_lists(rows: Rows) -> PageLists:
    """The lists of a ragged step.

    Raises:
        ContractViolation: the step has a fixed shape, and the host does not know its lengths.
    """
    host = rows.host
    if host is None:
        raise ContractViolation("these kernels plan on the host and cannot serve steps of a fixed shape")
    lengths = host.context_lens + host.num_tokens
    used = -(-lengths // rows.block_tokens)
    return PageLists(
        _starts(host.num_tokens),
        _starts(used),
        host.tables[np.arange(host.tables.shape[1]) < used[:, None]],
        ((lengths - 1) % rows.block_tokens + 1).astype(np.int32),
    )


def _starts(counts: I32) -> I32:
    return np.concatenate(([0], np.cumsum(counts))).astype(np.int32)


@dataclass(frozen=True, slots=True)
class VarlenCall:
    """One call of a library's function: causal attention of the rows over their keys in the cache."""

    query: Tensor  # [t, heads, key_dim] contiguous
    cache: LayerCache
    packed: PackedRows
    rows: Rows
    rule: AttentionRule
    out: Tensor  # [t, heads, value_dim]

    @property
    def window(self) -> tuple[int, int]:
        """Keys to the left and to the right of a query's own that it sees; -1: all that causality leaves."""
        return (-1, -1) if self.rule.window is None else (self.rule.window - 1, 0)

    @property
    def softcap(self) -> float:
        return self.rule.softcap or 0.0

    @property
    def arguments(self) -> dict[str, Any]:
        """What every library took over from FlashAttention by name."""
        return {
            "q": self.query,
            "cu_seqlens_q": self.packed.query_starts,
            "max_seqlen_q": self.rows.most_tokens,
            "softmax_scale": self.rule.scaling,
            "causal": True,
            "window_size": self.window,
        }

    @property
    def paged_arguments(self) -> dict[str, Any]:
        """The same and the cache, as vLLM's functions name it and those made for vLLM."""
        return self.arguments | {
            "k": self.cache.key,
            "v": self.cache.value,
            "seqused_k": self.packed.key_lengths,
            "max_seqlen_k": self.rows.most_keys,
            "block_table": self.rows.tables,
            "softcap": self.softcap,
        }


VarlenFunction = Callable[[VarlenCall], object]
"""Writes to the call's `out`; what it returns is not looked at."""


class Varlen:
    """Attention through one function of a library, for prompts and decode rows alike."""

    def __init__(self, function: VarlenFunction) -> None:
        self._function = function

    def attend(self, query: Tensor, cache: LayerCache, rows: Rows, rule: AttentionRule, out: Tensor) -> None:
        packed = pack(rows)
        results = packed.place(out)
        self._function(VarlenCall(packed.take(query), cache, packed, rows, rule, results))
        packed.put(out, results)
