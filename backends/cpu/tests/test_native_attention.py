"""The native attention equals the torch twins in every tier, and what a token gets does not depend on its company."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tokenplane_core.backend.errors import ConfigError
from tokenplane_cpu.attention import NativeKernels, choose
from tokenplane_cpu.native import library, runnable_tiers, use_threads
from tokenplane_cpu.structs import BLOCK_TOKENS
from tokenplane_torch.attention import AttentionRule
from tokenplane_torch.device import ONLY
from tokenplane_torch.kernels import AttentionKernels, LayerNeed, TorchKernels
from tokenplane_torch.kv_cache import LayerCache, LayerShape, allocate
from tokenplane_torch.step import PagedStep, StepPlan, plan_step

LIBRARY = library()
RUNNABLE = runnable_tiers()
F32, BF16, INT8 = torch.float32, torch.bfloat16, torch.int8
# heads, KV heads, key size, value size
SHAPES = [
    (9, 3, 64, 64),
    (4, 4, 33, 17),
    (8, 1, 128, 128),
    (3, 1, 7, 5),
    (2, 1, 256, 256),
    (5, 1, 80, 96),
    (20, 1, 24, 40),
]
# New tokens and cached tokens of each row: within a span of 128 keys, up to its edge, beyond.
STEPS = [([1, 1], [300, 127]), ([20, 1, 5, 33], [120, 0, 13, 0])]
RULES: list[dict[str, Any]] = [{}, {"window": 40}, {"window": 200, "softcap": 3.0, "sinks": True}]
LIMITS = {F32: 1e-4, BF16: 2e-2, INT8: 4e-2}

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="tokenplane-cpu was installed without its native kernels")


@dataclass(frozen=True)
class Sequences:
    """Random queries, keys and values of whole sequences, one entry each."""

    shape: LayerShape
    query: list[Tensor]
    key: list[Tensor]
    value: list[Tensor]

    @property
    def lengths(self) -> list[int]:
        return [len(query) for query in self.query]

    def as_float(self) -> Sequences:
        shape = LayerShape(self.shape.kv_heads, self.shape.key_dim, self.shape.value_dim, F32)
        return Sequences(shape, *([part.float() for part in parts] for parts in (self.query, self.key, self.value)))

    def step(self, parts: list[Tensor], context: Sequence[int], new: Sequence[int]) -> Tensor:
        return torch.cat([part[c : c + n] for part, c, n in zip(parts, context, new, strict=True)])


def sequences(
    heads: int, kv_heads: int, key_dim: int, value_dim: int, dtype: torch.dtype, lengths: list[int]
) -> Sequences:
    random = torch.Generator().manual_seed(1)
    query, key, value = (
        [torch.randn((length, h, dim), generator=random).to(dtype) for length in lengths]
        for h, dim in ((heads, key_dim), (kv_heads, key_dim), (kv_heads, value_dim))
    )
    return Sequences(LayerShape(kv_heads, key_dim, value_dim, dtype), query, key, value)


def plan(lengths: Sequence[int], new: Sequence[int], context: Sequence[int]) -> tuple[StepPlan, int]:
    """A step of sequences that have room for `lengths`, in scattered blocks; and how many blocks there are."""
    blocks = [-(-length // BLOCK_TOKENS) for length in lengths]
    ids = iter(np.random.default_rng(0).permutation(np.arange(1, sum(blocks) + 1)))
    tables = np.zeros((len(blocks), max(blocks) + 1), np.int32)
    for row, count in zip(tables, blocks, strict=True):
        row[:count] = [next(ids) for _ in range(count)]
    counts, done = np.array(new, np.int32), np.array(context, np.int32)
    chosen = counts > 0
    token_ids = np.zeros(int(counts.sum()), np.int32)
    arrays = (counts[chosen], done[chosen], tables[chosen], np.ones(int(chosen.sum()), np.bool_))
    return plan_step(token_ids, *arrays, BLOCK_TOKENS, torch.from_numpy), sum(blocks) + 1


def empty_cache(kernels: AttentionKernels, shape: LayerShape, num_blocks: int) -> LayerCache:
    """What nobody wrote is a NaN, or a scale that is one."""
    if isinstance(kernels, NativeKernels):
        (cache,) = kernels.allocate([shape], num_blocks)
    else:
        (cache,) = allocate([shape], num_blocks, BLOCK_TOKENS, torch.device("cpu"))
    for tensor in cache.tensors():
        tensor.fill_(255 if tensor.dtype is torch.uint8 else torch.nan)
    return cache


def attend(
    kernels: AttentionKernels, s: Sequences, rule: AttentionRule, steps: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> Tensor:
    """Write and attend step by step; what the tokens of the last step get."""
    cache = None
    for new, context in steps:
        of_step, num_blocks = plan(s.lengths, new, context)
        cache = cache or empty_cache(kernels, s.shape, num_blocks)
        query, key, value = (s.step(parts, context, new) for parts in (s.query, s.key, s.value))
        out = PagedStep(of_step, [cache], kernels).attend(0, query, key, value, rule, None)
    return out


def run(kernels: AttentionKernels, s: Sequences, rule: AttentionRule, new: list[int], context: list[int]) -> Tensor:
    first = [((context, [0] * len(new)))] if any(context) else []
    return attend(kernels, s, rule, [*first, (new, context)])


def rule_of(
    heads: int, key_dim: int, window: int | None = None, softcap: float | None = None, sinks: bool = False
) -> AttentionRule:
    return AttentionRule(key_dim**-0.5, window, softcap, torch.linspace(-1, 2, heads) if sinks else None)


@dataclass(frozen=True)
class Trial:
    sequences: Sequences
    rule: AttentionRule
    new: list[int]
    context: list[int]
    want: Tensor


@functools.cache
def trials(shape: tuple[int, int, int, int], dtype: torch.dtype) -> list[Trial]:
    made = []
    for (new, context), fields in itertools.product(STEPS, RULES):
        s = sequences(*shape, dtype, [n + c for n, c in zip(new, context, strict=True)])
        rule = rule_of(shape[0], shape[2], **fields)
        made.append(Trial(s, rule, new, context, run(TorchKernels(), s.as_float(), rule, new, context)))
    return made


@pytest.mark.parametrize("cache_dtype", [F32, BF16, INT8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_torch_twins(tier: str, shape: tuple[int, int, int, int], cache_dtype: torch.dtype) -> None:
    for trial in trials(shape, F32 if cache_dtype is F32 else BF16):
        got = run(NativeKernels(cache_dtype), trial.sequences, trial.rule, trial.new, trial.context).float()
        torch.testing.assert_close(got, trial.want, rtol=0, atol=LIMITS[cache_dtype])


@pytest.mark.parametrize("cache_dtype", [F32, BF16, INT8])
@pytest.mark.parametrize(
    ("fields", "shape"),
    list(zip(RULES, [(6, 2, 64, 64), (6, 2, 64, 64), (20, 1, 33, 40)], strict=True)),
    ids=["plain", "window", "everything and odd sizes"],
)
def test_a_token_gets_the_same_bits_however_its_prompt_is_cut(
    tier: str, cache_dtype: torch.dtype, fields: dict[str, Any], shape: tuple[int, int, int, int]
) -> None:
    """Alone or among others, as one prompt, in chunks or token by token, with one thread or with several.

    What they get is float32 with every cache: bfloat16 would round most of a difference away.
    """
    length, cut = 300, 290
    s = sequences(*shape, F32, [length, 40])
    rule, kernels = rule_of(shape[0], shape[2], **fields), NativeKernels(cache_dtype)
    whole = attend(kernels, s, rule, [((length, 0), (0, 0))])[cut:]
    chunks = [((100, 7), (0, 0)), ((150, 1), (100, 7)), ((40, 9), (250, 8))]
    assert torch.equal(attend(kernels, s, rule, [*chunks, ((length - cut, 0), (cut, 0))]), whole)
    for threads in (1, 3):
        use_threads(threads)
        for at in range(cut, length):
            single = attend(kernels, s, rule, [((at, 20), (0, 0)), ((1, 1), (at, 20))])[:1]
            assert torch.equal(single[0], whole[at - cut])


@pytest.mark.parametrize("cache_dtype", [F32, BF16])
def test_a_window_wider_than_any_sequence_hides_nothing(tier: str, cache_dtype: torch.dtype) -> None:
    s, kernels = sequences(4, 1, 64, 64, F32, [150]), NativeKernels(cache_dtype)
    want = run(kernels, s, rule_of(4, 64), [30], [120])
    for window in (150, 2**31 - 1):
        assert torch.equal(run(kernels, s, rule_of(4, 64, window), [30], [120]), want)


def test_long_contexts_of_few_rows_are_shared_by_threads(tier: str) -> None:
    s = sequences(4, 1, 64, 64, F32, [1500])
    rule, kernels = rule_of(4, 64), NativeKernels(BF16)
    alone = run(kernels, s, rule, [1], [1499])
    use_threads(2)
    assert torch.equal(run(kernels, s, rule, [1], [1499]), alone)


def test_an_int8_block_takes_little_more_than_half_of_a_bf16_block() -> None:
    shape = LayerShape(8, 128, 128, BF16)
    half = NativeKernels(BF16).block_bytes([shape]) / 2
    assert half < NativeKernels(INT8).block_bytes([shape]) < 1.05 * half


def test_what_the_native_kernels_lack_is_served_by_torch_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ONLY, raising=False)
    half = LayerNeed(4, LayerShape(2, 64, 64, torch.float16))
    assert "not native: they compute in float32 and bfloat16" in choose([half]).describe()["attention"]
    full = LayerNeed(4, LayerShape(2, 64, 64, BF16))
    assert choose([full]).describe()["attention"].startswith("native")
    monkeypatch.setenv(ONLY, "torch")
    assert choose([full]).describe()["attention"].startswith("torch")
    monkeypatch.setenv(ONLY, "native")
    with pytest.raises(ConfigError, match="'native', which cannot serve here"):
        choose([half])
    monkeypatch.setenv(ONLY, "flash")
    with pytest.raises(ConfigError, match="'native' and 'torch'"):
        choose([full])
