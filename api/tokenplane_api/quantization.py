"""What --quantize and --kv-cache-dtype ask for, against what a backend offers. Knows no kernels."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

from tokenplane_core.backend.errors import ConfigError

log = logging.getLogger(__name__)

SAME = {"fbgemm_fp8": "fp8", "bitsandbytes-nf4": "bitsandbytes", "bitsandbytes-fp4": "bitsandbytes"}
"""Names for what config.json calls by another."""

AT_LOAD = {"int8": "int8", "int4": "int4", "eetq": "int8"}
"""Wish -> ModelSpec.quantize. EETQ is int8 weights with a scale for each output, which is what int8 is here."""


def saved_method(config: Mapping[str, Any]) -> str | None:
    """How the weights are stored, by config.json; None: not quantized."""
    section = config.get("quantization_config") or config.get("compression_config") or {}
    method = section.get("quant_method") if isinstance(section, dict) else None
    return SAME.get(str(method), str(method)) if method else None


def quantize_at_load(wish: str | None, config: Mapping[str, Any], backend: str, offered: Collection[str]) -> str | None:
    """To what the weights are to be quantized while they load; None: they stay as they are stored.

    Args:
        wish: of flags.QUANTIZERS; None: serve the checkpoint as it is.
        offered: what the device's backend can (Offer.quantizes).

    Raises:
        ConfigError: the checkpoint is stored in another way, or the backend cannot quantize.
    """
    saved = saved_method(config)
    if wish is None or saved == SAME.get(wish, wish):
        return None
    if saved is not None:
        raise ConfigError(
            f"--quantize is {wish}, but config.json says that the checkpoint is {saved}; leave the flag out"
        )
    if wish not in AT_LOAD:
        raise ConfigError(
            f"--quantize is {wish}, but the checkpoint is not quantized, and weights are quantized to"
            f" {wish} only beforehand; serve a checkpoint that is stored as {wish}, or try --quantize int8"
        )
    kind = AT_LOAD[wish]
    if kind not in offered:
        able = f"quantizes weights only to {', '.join(offered)}" if offered else "quantizes no weights"
        raise ConfigError(
            f"--quantize is {wish}, but backend {backend} {able} while they load; leave the flag out, or serve a"
            " checkpoint that is stored quantized"
        )
    if wish != kind:
        log.info("--quantize %s: weights become %s while they load, with a scale for each output", wish, kind)
    return kind


def kv_dtype_of(wish: str | None, backend: str, offered: Collection[str]) -> str | None:
    """ModelSpec.kv_dtype; None: the cache keeps the model's dtype.

    Args:
        wish: of flags.KV_CACHE_DTYPES.
        offered: what the device's backend can (Offer.kv_dtypes).

    Raises:
        ConfigError: the backend cannot.
    """
    if wish is None or wish == "auto":
        return None
    if wish not in offered:
        able = f"auto or {', '.join(offered)}" if offered else "auto only: the format of --dtype"
        raise ConfigError(f"--kv-cache-dtype is {wish}, but backend {backend} keeps its KV cache in {able}")
    return wish
