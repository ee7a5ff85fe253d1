"""A loaded decoder as one call: packed tokens in, logits of the wanted tokens out."""

from __future__ import annotations

import inspect

from torch import Tensor
from transformers import PreTrainedModel

from .attention import Step


class DecoderModule:
    def __init__(self, module: PreTrainedModel) -> None:
        self.module = module
        self._keeps_logits = "logits_to_keep" in inspect.signature(module.forward).parameters

    def logits(self, token_ids: Tensor, positions: Tensor, wanted: Tensor, step: Step) -> Tensor:
        """Logits [s, vocab] after the tokens `wanted`; the others' are not computed where the model allows.

        Shapes:
            token_ids i64 [t], positions i64 [t], wanted i64 [s] indices into the former.
        """
        arguments = {"logits_to_keep": wanted} if self._keeps_logits else {}
        out = self.module(
            input_ids=token_ids[None],
            position_ids=positions[None],
            use_cache=False,
            tokenplane_step=step,
            **arguments,
        )
        logits: Tensor = out.logits[0]
        return logits if self._keeps_logits else logits[wanted]
