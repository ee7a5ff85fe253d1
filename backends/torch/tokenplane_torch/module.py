"""A loaded decoder as one call: packed tokens in, logits of the wanted tokens out."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .attention import Step

if TYPE_CHECKING:
    from .lora import LoraLayers

MOST_SCORED_TOKENS = 64
"""Logits of so many tokens are held at a time where only log-probabilities are wanted: a whole prompt's could be
gigabytes."""


class DecoderModule:
    """`adapters`: those of its layers that LoRA adapters reach, if there is room for adapters."""

    def __init__(self, module: PreTrainedModel) -> None:
        self.module = module
        self.adapters: LoraLayers | None = None
        self._keeps_logits = "logits_to_keep" in inspect.signature(module.forward).parameters

    def logits(self, token_ids: Tensor, positions: Tensor, wanted: Tensor, step: Step) -> Tensor:
        """Logits [s, vocab] after the tokens `wanted`; the others' are not computed where the model allows.

        Shapes:
            token_ids i64 [t], positions i64 [t], wanted i64 [s] indices into the former.
        """
        if self.adapters is not None:
            self.adapters.now = getattr(step, "adapters", None)
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

    def logits_and_scores(
        self, token_ids: Tensor, positions: Tensor, wanted: Tensor, step: Step, after: Tensor, next_ids: Tensor, k: int
    ) -> tuple[Tensor, list[Tensor]]:
        """`logits`, and the log-probabilities f32 [p] of the tokens `next_ids` after the tokens `after`; for k > 0 also
        the k best there, ids i32 [p, k] and their log-probabilities f32 [p, k].

        The decoder runs once. The way from its output to logits, which models have in their own manner (scaled,
        capped), runs again for a piece of `after` at a time, with a decoder that answers what it has answered before.

        Shapes:
            as `logits`; after i64 [p] indices into token_ids, next_ids i64 [p].
        """
        with _remembering(self.module.get_decoder()):
            logits = self.logits(token_ids, positions, wanted, step)
            pieces = [
                _scores(self.logits(token_ids, positions, some, step), ids, k)
                for some, ids in zip(
                    torch.split(after, MOST_SCORED_TOKENS), torch.split(next_ids, MOST_SCORED_TOKENS), strict=True
                )
            ]
        return logits, [torch.cat(column) for column in zip(*pieces, strict=True)]


def _scores(logits: Tensor, ids: Tensor, k: int) -> list[Tensor]:
    """[p, vocab], i64 [p] -> f32 [p], and the k best: i32 [p, k], f32 [p, k]"""
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(1, ids[:, None])[:, 0]
    if k == 0:
        return [chosen]
    best = logprobs.topk(k)
    return [chosen, best.indices.int(), best.values]


@contextlib.contextmanager
def _remembering(decoder: torch.nn.Module) -> Iterator[None]:
    """Inside, the module computes once; whatever it is called with afterwards, it returns that."""
    compute = decoder.forward
    outputs: list[Any] = []

    def forward(*arguments: Any, **options: Any) -> Any:
        if not outputs:
            outputs.append(compute(*arguments, **options))
        return outputs[0]

    own = vars(decoder).get("forward")
    decoder.forward = forward
    try:
        yield
    finally:
        del decoder.forward
        if own is not None:
            decoder.forward = own
