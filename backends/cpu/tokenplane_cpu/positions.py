"""Whether a position does more to what a layer attends with than turn it, as RoPE does.

Some models scale queries once a sequence passes thousands of tokens (Llama 4's attention scale, in Ministral 3). A
short comparison of logits cannot see that; a few tokens at far positions can. Knows no program and no cache.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokenplane_torch.attention import AttentionRule

from .decoder import NotPlain

PLACES = 4  # positions looked at besides the first, evenly up to the last


class _Norms:
    """Notes the norms of each layer's queries and keys, and computes nothing: so no token sees another."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, str, Tensor]] = []  # layer, of what, [tokens, heads]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule, mask: object
    ) -> Tensor:
        for what, rows in (("queries", query), ("keys", key), ("values", value)):
            self.seen.append((layer, what, rows.float().norm(dim=-1)))
        return query.new_zeros((*query.shape[:2], value.shape[2]))


@torch.inference_mode()
def require_same_at_all_positions(module: PreTrainedModel, max_model_tokens: int) -> None:
    """Run one token at positions up to the last: RoPE keeps the norms of queries and keys, and leaves values.

    Raises:
        NotPlain: some layer has others at some position.
    """
    positions = torch.linspace(0, max_model_tokens - 1, PLACES + 1).long()[None]
    norms = _Norms()
    token_ids = torch.full_like(positions, module.get_input_embeddings().num_embeddings // 2)
    module(input_ids=token_ids, position_ids=positions, use_cache=False, tokenplane_step=norms)
    tolerance = 1e-4 if module.dtype == torch.float32 else 1e-2  # ten times what RoPE in that type was seen to do
    for layer, what, found in norms.seen:
        if not torch.allclose(found, found[:1].expand_as(found), rtol=tolerance, atol=tolerance * float(found.max())):
            raise NotPlain(f"the {what} of its layer {layer} depend on the position in other ways than RoPE")
