"""From an adapter's file of weights to scaled matrices by layer, on the host. Knows peft's names, and no model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tokenplane_core.adapter_files import WEIGHTS
from tokenplane_core.backend.errors import UnsupportedAdapter
from tokenplane_core.backend.records import AdapterSpec

_NAME = re.compile(r"(?:base_model\.model\.)?(?P<layer>.+)\.lora_(?P<half>[AB])\.weight")


@dataclass(frozen=True, slots=True)
class LoraPart:
    """What an adapter does to one linear layer: adds (x @ down.T) @ up."""

    down: Tensor  # f32 [rank, in]
    up: Tensor  # f32 [rank, out], scaled

    @property
    def shape(self) -> tuple[int, int]:
        """As that of the layer's weight: (out, in)."""
        return self.up.shape[1], self.down.shape[1]


def read_parts(adapter: AdapterSpec) -> dict[str, LoraPart]:
    """By the name of the layer.

    Raises:
        UnsupportedAdapter: the file cannot be read, or holds something else than pairs of matrices.
    """
    file = Path(adapter.path) / WEIGHTS
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UnsupportedAdapter(f"{file} cannot be read: {error}") from error
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None or tensor.dim() != 2:
            raise UnsupportedAdapter(f"{WEIGHTS} holds {name}, which is no LoRA matrix of a linear layer")
        halves.setdefault(match["layer"], {})[match["half"]] = tensor.float()
    if not halves:
        raise UnsupportedAdapter(f"{WEIGHTS} holds no LoRA matrix")
    return {layer: _part(layer, pair, adapter.config) for layer, pair in halves.items()}


def _part(layer: str, pair: Mapping[str, Tensor], config: Mapping[str, Any]) -> LoraPart:
    if set(pair) != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
        raise UnsupportedAdapter(f"{WEIGHTS} does not hold a matching pair of matrices for {layer}")
    rank = len(pair["A"])
    return LoraPart(pair["A"], (pair["B"] * scaling(layer, rank, config)).T.contiguous())


def scaling(layer: str, rank: int, config: Mapping[str, Any]) -> float:
    """What the product of a layer's matrices is multiplied by: lora_alpha / r, by the root of r with rslora.

    alpha_pattern may name layers with an alpha of their own, by the end of their name as a regular expression.
    """
    patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
    own = next((key for key in patterns if re.fullmatch(rf"(.*\.)?({key})", layer)), None)
    alpha = float(config.get("lora_alpha", 8) if own is None else patterns[own])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)
