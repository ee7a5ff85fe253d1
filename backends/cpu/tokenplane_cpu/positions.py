"""Whether positions do to what a layer attends with what RoPE does, by the tables that were read, or nothing.

Some models leave layers unturned (SmolLM3, EXAONE 4), turn other pairs of dimensions (GLM, Ernie 4.5), or scale queries
once a sequence passes thousands of tokens (Ministral 3). A short comparison of logits in bfloat16 may see none of it;
what a token attends with at far positions shows it in every type. Knows no program and no cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokenplane_torch.attention import AttentionRule

from .decoder import Layer, NotPlain

PLACES = 4  # positions looked at besides the first, evenly up to the last
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""How far a head may be off, in parts of its length. Measured: 1e-6 and 1e-2; without turning, more than 1."""


Attended = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values, f32 [tokens, heads, dim]."""


class _Noted:
    """Notes what each layer attends with, and computes nothing: so no token sees another."""

    def __init__(self) -> None:
        self.seen: list[
            tuple[Tensor, Tensor, Tensor]
        ] = []  # queries, keys and values [tokens, heads, dim] of each layer

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule, mask: object
    ) -> Tensor:
        self.seen.append((query.float(), key.float(), value.float()))
        return query.new_zeros((*query.shape[:2], value.shape[2]))


@torch.inference_mode()
def as_turned(module: PreTrainedModel, layers: Sequence[Layer], max_model_tokens: int) -> list[Layer]:
    """The layers, with tables that turn nothing where nothing is turned.

    Runs one token at positions up to the last: a layer's queries and keys must be those of the first position, turned
    as its tables say or not at all, and its values the same everywhere.

    Raises:
        NotPlain: in some layer they are something else.
    """
    positions = torch.linspace(0, max_model_tokens - 1, PLACES + 1).long()
    noted: Any = _Noted()
    token_ids = torch.full_like(positions, module.get_input_embeddings().num_embeddings // 2)
    module(input_ids=token_ids[None], position_ids=positions[None], use_cache=False, tokenplane_step=noted)
    unturned = torch.ones_like(layers[0].rotary[0]), torch.zeros_like(layers[0].rotary[1])
    read = []
    for i, (layer, attended) in enumerate(zip(layers, noted.seen, strict=True)):
        ways = [replace(layer, rotary=rotary) for rotary in (layer.rotary, unturned)]
        unlike = [_unlike(way.rotary, positions, attended, ROUNDING[module.dtype]) for way in ways]
        if all(unlike):
            raise NotPlain(f"the {unlike[0]} of its layer {i} depend on the position in other ways than RoPE")
        read.append(ways[unlike.index(None)])
    return read


def _unlike(rotary: tuple[Tensor, Tensor], positions: Tensor, attended: Attended, limit: float) -> str | None:
    """Which of queries, keys and values are not those of the first position, turned by these tables."""
    cos, sin = (table[positions][:, None] for table in rotary)
    query, key, value = attended
    wanted = (_turned(query[:1], cos, sin), _turned(key[:1], cos, sin), value[:1])
    for what, found, expected in zip(("queries", "keys", "values"), attended, wanted, strict=True):
        errors = (found - expected).norm(dim=-1) / found[:1].norm(dim=-1).mean()
        if not float(errors.max()) <= limit:
            return what
    return None


def _turned(first: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads [1, heads, dim] at position 0, where nothing turns (but some tables scale), as they are at others.

    cos, sin: f32 [positions, 1, n].
    """
    n = cos.shape[-1]
    a, b, rest = torch.split(first, [n, n, first.shape[-1] - 2 * n], dim=-1)
    a, b = a / cos[:1], b / cos[:1]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest.expand(len(cos), -1, -1)), dim=-1)
