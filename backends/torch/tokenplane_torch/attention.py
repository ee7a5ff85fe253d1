"""The one attention function that every model of transformers is given, and what it hands on.

Models call it through transformers' attention interface with the packed tokens of the whole step, `[1, heads,
tokens, head_dim]`, rotary embedding applied. It reads the step from an extra keyword argument that `model(...)`
passes down unchanged, and leaves the work to it. It knows no cache layout and no kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface

from tokenplane_core.backend.errors import UnsupportedModel

# A neutral name: transformers runs checks of its own on names that contain "sdpa", "flash" or "flex_attention".
# It is not registered as a mask function, so that transformers builds no mask at all.
NAME = "tokenplane"


@dataclass(frozen=True, slots=True)
class AttentionRule:
    """How one layer weighs keys, apart from causality, which always holds."""

    scaling: float
    window: int | None = None  # a query at position p sees keys from position p - window + 1 on
    softcap: float | None = None  # scores become softcap * tanh(score / softcap)
    sinks: Tensor | None = None  # [heads] one extra score per head that takes weight and gives no value


class Step(Protocol):
    """What travels through the model as `tokenplane_step`."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule, mask: object
    ) -> Tensor:
        """Attention of one layer over the packed tokens of a step.

        Shapes:
            query [tokens, heads, key_dim], key [tokens, kv_heads, key_dim], value [tokens, kv_heads, value_dim];
            returns [tokens, heads, value_dim].
        mask: None in service; what the model prepared, while the load-time check looks at it.
        """
        ...


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object,
    *,
    tokenplane_step: Step | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The function under `NAME` in transformers' attention interface: [1, heads, t, d] -> [1, t, heads, d].

    Raises:
        UnsupportedModel: the layer asks for something the kernels do not have. The load-time check runs every
            layer once, so a served model does not raise here.
    """
    if tokenplane_step is None:
        raise UnsupportedModel("its layers do not pass extra arguments on to the attention function")
    if position_bias is not None:
        raise UnsupportedModel("its attention adds a position bias (ALiBi or relative positions)")
    if is_causal is False or (is_causal is None and getattr(module, "is_causal", True) is False):
        raise UnsupportedModel("its attention is not causal")
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise UnsupportedModel("its attention layers are not numbered (layer_idx)")
    rule = AttentionRule(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    out = tokenplane_step.attend(
        layer, query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1), rule, attention_mask
    )
    return out.unsqueeze(0), None


def register(name: str = NAME) -> None:
    """Make the function known to transformers. May be called again."""
    AttentionInterface.register(name, attention)
