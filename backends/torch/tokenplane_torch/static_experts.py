"""Mixtures of experts for devices that compile: every expert computes every token, the router's weights pick.

Which expert a token goes to is a value; transformers' other ways make shapes of it, or copy an expert's weights
for each token. This one costs as many times the arithmetic as there are experts for each one chosen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "tokenplane_static"


def use_static_experts(module: PreTrainedModel) -> bool:
    """Have the model's experts computed so, if it has any that transformers lets us choose for; whether it has."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, static_experts)
    if not any(hasattr(type(part), "_apply_gate") for part in module.modules()):
        return False
    module.set_experts_implementation(NAME)
    return True


def static_experts(self: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """[t, hidden] -> [t, hidden]; `self` is the module that holds the experts' weights.

    Shapes:
        top_k_index i64 [t, k] experts of each token, top_k_weights [t, k].
    """
    weights = top_k_weights.new_zeros((len(hidden), self.num_experts)).scatter_add(1, top_k_index, top_k_weights)
    inner = _linear(self, hidden, "gate_up_proj" if self.has_gate else "up_proj")  # [experts, t, inner]
    inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
    out = _linear(self, inner, "down_proj")
    if self.has_post_expert_norm:
        out = self.post_expert_norm(out)
    return torch.einsum("eth,te->th", out, weights.to(out.dtype)).to(hidden.dtype)


def _linear(experts: Any, inputs: Tensor, name: str) -> Tensor:
    """[t, in] or [experts, t, in] -> [experts, t, out]"""
    weight = getattr(experts, name)
    out = torch.matmul(inputs, weight if experts.is_transposed else weight.transpose(1, 2))
    return out + getattr(experts, name + "_bias")[:, None] if experts.has_bias else out
