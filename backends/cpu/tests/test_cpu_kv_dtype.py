"""A KV cache in int8: it takes half the room, the model says nearly the same, and what cannot have one is refused."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tokenplane_core.backend.errors import ConfigError, UnsupportedModel
from tokenplane_core.backend.records import F32, LoadOptions, ModelSpec
from tokenplane_core.memory import kv_token
from tokenplane_core.model import describe_model
from tokenplane_cpu import native
from tokenplane_cpu.plugin import CpuBackend
from tokenplane_torch.device import ONLY
from tokenplane_torch.testing import Driver, make_checkpoint

pytestmark = pytest.mark.skipif(not native.is_built(), reason="tokenplane-cpu was installed without its native kernels")

PROMPT = [random.Random(0).randrange(3, 320) for _ in range(200)]


def model_of(folder: Path, dtype: str = "bfloat16", kv_dtype: str | None = "int8") -> ModelSpec:
    return replace(describe_model(folder, dtype=dtype), kv_dtype=kv_dtype)


def logits_of(model: ModelSpec) -> tuple[F32, int]:
    """After a prompt whose last token comes in a step of its own; and what a token takes in the cache."""
    plugin = CpuBackend()
    capabilities = plugin.load(model, LoadOptions(num_threads=1))
    driver = Driver(plugin, capabilities)
    live = driver.open(PROMPT)
    driver.step({live: len(PROMPT) - 1})
    logits = driver.step({live: 1}, return_logits=True).logits
    plugin.close()
    assert logits is not None
    return logits[0], capabilities.kv.block_bytes // capabilities.kv.block_tokens


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_model_says_nearly_the_same_out_of_half_the_room(family: str, way: str, tmp_path: Path) -> None:
    folder = make_checkpoint(family, tmp_path)
    plain, quantized = model_of(folder, kv_dtype=None), model_of(folder)
    (want, full_bytes), (got, half_bytes) = logits_of(plain), logits_of(quantized)
    assert 0 < np.linalg.norm(got - want) < 0.1 * np.linalg.norm(want)
    assert (full_bytes, half_bytes) == (kv_token(plain).num_bytes, kv_token(quantized).num_bytes)
    assert half_bytes < full_bytes


def test_only_bfloat16_models_have_one(checkpoint: Path, way: str) -> None:
    with pytest.raises(ConfigError, match="--kv-cache-dtype is int8, which goes with bfloat16; --dtype is float32"):
        CpuBackend().load(model_of(checkpoint, "float32"), LoadOptions(num_threads=1))


def test_only_native_kernels_keep_one(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ONLY, "torch")
    with pytest.raises(ConfigError, match="only native kernels keep a KV cache in int8"):
        CpuBackend().load(model_of(checkpoint), LoadOptions(num_threads=1))


def test_adapters_and_other_dtypes_are_refused(checkpoint: Path) -> None:
    with pytest.raises(UnsupportedModel, match="beside LoRA adapters; leave --kv-cache-dtype out"):
        CpuBackend().load(model_of(checkpoint), LoadOptions(num_threads=1, max_adapters=1, max_adapter_rank=8))
    with pytest.raises(UnsupportedModel, match="a KV cache of int4 is not possible"):
        CpuBackend().load(model_of(checkpoint, kv_dtype="int4"), LoadOptions(num_threads=1))
