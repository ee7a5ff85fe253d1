"""Whether a checkpoint is quantized as --quantize says. Knows no kernels: a backend loads it, or refuses it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenplane_core.backend.errors import ConfigError

SAME = {"fbgemm_fp8": "fp8", "bitsandbytes-nf4": "bitsandbytes", "bitsandbytes-fp4": "bitsandbytes"}
"""Names for what config.json calls by another."""


def saved_method(config: Mapping[str, Any]) -> str | None:
    """How the weights are stored, by config.json; None: not quantized."""
    section = config.get("quantization_config") or config.get("compression_config") or {}
    method = section.get("quant_method") if isinstance(section, dict) else None
    return SAME.get(str(method), str(method)) if method else None


def require_quantization(wish: str | None, config: Mapping[str, Any]) -> None:
    """Raises ConfigError unless the checkpoint is stored as `wish` (of flags.QUANTIZERS) says; None: as it is."""
    if wish is None:
        return
    saved = saved_method(config)
    if saved == SAME.get(wish, wish):
        return
    if saved is not None:
        raise ConfigError(
            f"--quantize is {wish}, but config.json says that the checkpoint is {saved}; leave the flag out"
        )
    raise ConfigError(
        f"--quantize is {wish}, but the checkpoint is not quantized, and weights are not quantized while they load;"
        f" serve a checkpoint that is stored as {wish}, or halve float32 weights with --dtype bfloat16"
    )
