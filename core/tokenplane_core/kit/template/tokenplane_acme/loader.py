"""Which models this backend runs, and their weights from disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tokenplane_core.backend.errors import UnsupportedModel
from tokenplane_core.backend.records import F32, ModelSpec


def check_supported(model: ModelSpec) -> None:
    """Raise UnsupportedModel, with a sentence for the user, unless model.py computes exactly this model.

    Yours: widen this as your model code learns more. What it does not refuse, it promises.
    """
    config, rope = model.config, rope_settings(model)
    if model.architecture != "LlamaForCausalLM":
        raise UnsupportedModel(
            f"acme runs LlamaForCausalLM only; {model.model_id} is {model.architecture or 'no name'}"
        )
    for name, expected in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if config.get(name, expected) != expected:
            raise UnsupportedModel(f"acme needs {name} {expected!r}; config.json says {config[name]!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UnsupportedModel(f"acme knows no rotary embedding of type {kind!r} (config.json)")


def rope_settings(model: ModelSpec) -> dict[str, object]:
    """What config.json says about rotary embeddings, under its newer or its older name."""
    return model.config.get("rope_parameters") or model.config.get("rope_scaling") or {}


def read_weights(folder: str) -> dict[str, F32]:
    """All tensors of a folder's *.safetensors as float32, by name.

    Yours: upload each tensor here, in the number format and layout your kernels want.
    """
    weights: dict[str, F32] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        data = np.memmap(file, np.uint8, "r")
        begin = 8 + int.from_bytes(data[:8].tobytes(), "little")  # length of the header, the header, the tensors
        header = json.loads(data[8:begin].tobytes())
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            weights[name] = _widened(data[begin + start : begin + end], entry["dtype"]).reshape(entry["shape"])
    return weights


def _widened(raw: NDArray[np.uint8], dtype: str) -> F32:
    """u8 [bytes] as f32 [numbers]."""
    if dtype == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)  # the upper half of a float32
    if dtype in ("F32", "F16"):
        return raw.view("<f4" if dtype == "F32" else "<f2").astype(np.float32)
    raise UnsupportedModel(f"acme reads weights in F32, F16 and BF16; the checkpoint has {dtype}")
