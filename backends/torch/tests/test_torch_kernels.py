"""The torch twins against attention written out token by token in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tokenplane_torch.attention import AttentionRule
from tokenplane_torch.kernels import TorchKernels
from tokenplane_torch.kv_cache import LayerCache, LayerShape, allocate
from tokenplane_torch.step import PagedStep, StepPlan, plan_step

BLOCK_TOKENS, NUM_BLOCKS = 4, 40
HEADS, KV_HEADS, KEY_DIM, VALUE_DIM = 6, 2, 8, 5

RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 5},
    "window_of_one": {"window": 1},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": torch.linspace(-1, 2, HEADS)},
    "everything": {"window": 6, "softcap": 3.0, "sinks": torch.linspace(-1, 2, HEADS)},
}
# New tokens and cached tokens of each row.
STEPS = {
    "decode": ([1, 1, 1, 1], [0, 3, 17, 8]),
    "decode_of_equal_lengths": ([1, 1], [6, 6]),
    "prefill": ([5, 9, 2], [0, 0, 0]),
    "chunks": ([5, 9, 2], [4, 0, 13]),
    "mixed": ([1, 6, 1, 3], [11, 2, 0, 0]),
}


def cache_of(value_dim: int = VALUE_DIM) -> LayerCache:
    """A cache where reading what nobody wrote shows: it is full of NaN."""
    shape = LayerShape(KV_HEADS, KEY_DIM, value_dim, torch.float32)
    (cache,) = allocate([shape], NUM_BLOCKS, BLOCK_TOKENS, torch.device("cpu"))
    cache.key.fill_(torch.nan)
    cache.value.fill_(torch.nan)
    return cache


def plan_of(new: list[int], context: list[int], seed: int = 0) -> StepPlan:
    blocks = np.random.default_rng(seed).permutation(np.arange(1, NUM_BLOCKS))
    tables = np.zeros((len(new), 8), np.int32)
    for i, (n, c) in enumerate(zip(new, context, strict=True)):
        used = -(-(n + c) // BLOCK_TOKENS)
        tables[i, :used], blocks = blocks[:used], blocks[used:]
    return plan_step(
        np.zeros(sum(new), np.int32),
        np.array(new, np.int32),
        np.array(context, np.int32),
        tables,
        np.ones(len(new), np.bool_),
        BLOCK_TOKENS,
        torch.from_numpy,
    )


def run(new: list[int], context: list[int], rule: AttentionRule, kernels: TorchKernels, value_dim: int) -> None:
    """Write the context as a step of its own, then run the step and compare every token of it."""
    torch.manual_seed(1)
    lengths = [n + c for n, c in zip(new, context, strict=True)]
    queries, keys, values = (
        [torch.randn(length, heads, dim) for length in lengths]
        for heads, dim in ((HEADS, KEY_DIM), (KV_HEADS, KEY_DIM), (KV_HEADS, value_dim))
    )
    cache = cache_of(value_dim)
    if any(context):
        rows = [i for i, c in enumerate(context) if c]
        first = plan_of(new, context)
        for i in rows:
            table = tables_of(first, i)
            index = torch.from_numpy(table[: context[i]])
            kernels.write_kv(cache, keys[i][: context[i]], values[i][: context[i]], index)
    step = PagedStep(plan_of(new, context), [cache], kernels)
    query, key, value = (
        torch.cat([part[c:] for part, c in zip(parts, context, strict=True)]) for parts in (queries, keys, values)
    )
    out = step.attend(0, query, key, value, rule, None)
    want = torch.cat([by_hand(q, k, v, rule)[c:] for q, k, v, c in zip(queries, keys, values, context, strict=True)])
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


def tables_of(plan: StepPlan, row: int) -> np.ndarray:
    """Cache rows of all positions of a row, found through the plan's own groups."""
    by_token = {}
    for group in (plan.decode, plan.prefill):
        for i in range(len(group) if group is not None else 0):
            by_token[int(group.first_tokens[i])] = (group, i)
    group, i = by_token[sorted(by_token)[row]]
    length = int(group.context_lens[i] + group.num_tokens[i])
    return group.host.cache_index(i, np.arange(length), BLOCK_TOKENS)


def by_hand(query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule) -> Tensor:
    out = torch.empty(query.shape[0], HEADS, value.shape[2], dtype=torch.float64)
    for t in range(len(query)):
        first = 0 if rule.window is None else max(0, t - rule.window + 1)
        for h in range(HEADS):
            kv = h * KV_HEADS // HEADS
            scores = key[first : t + 1, kv].double() @ query[t, h].double() * rule.scaling
            if rule.softcap is not None:
                scores = rule.softcap * torch.tanh(scores / rule.softcap)
            if rule.sinks is not None:
                scores = torch.cat([scores, rule.sinks[h : h + 1].double()])
            weights = scores.softmax(0)[: t + 1 - first]
            out[t, h] = weights @ value[first : t + 1, kv].double()
    return out.float()


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("value_dim", [KEY_DIM, VALUE_DIM])
def test_attention_over_the_paged_cache_is_attention(step: str, rule: str, value_dim: int) -> None:
    run(*STEPS[step], AttentionRule(scaling=0.4, **RULES[rule]), TorchKernels(), value_dim)


def test_decode_rows_cut_into_parts_give_the_same() -> None:
    kernels = TorchKernels()
    kernels.gather_tokens = 20  # one long row, or two short ones
    run([1] * 5, [17, 3, 8, 9, 0], AttentionRule(scaling=0.4), kernels, VALUE_DIM)


def test_a_step_writes_its_own_tokens_and_nothing_else() -> None:
    new, context = [1, 6], [4, 2]
    plan, cache = plan_of(new, context), cache_of()
    key, value = torch.randn(7, KV_HEADS, KEY_DIM), torch.randn(7, KV_HEADS, VALUE_DIM)
    TorchKernels().write_kv(cache, key, value, plan.write_index)
    written = ~cache.key_tokens.isnan().any(1)
    assert written.nonzero().flatten().tolist() == sorted(plan.write_index.tolist())
    assert torch.equal(cache.key_tokens[plan.write_index], key.flatten(1))
    assert torch.equal(cache.value_tokens[plan.write_index], value.flatten(1))
    assert not written[:BLOCK_TOKENS].any()  # PAD_BLOCK


def test_what_layers_share_is_made_once() -> None:
    """Index lists and masks belong to the step, not to the layer."""
    plan, kernels = plan_of([1, 6], [4, 2]), TorchKernels()
    step = PagedStep(plan, [cache_of(), cache_of()], kernels)
    query, key, value = torch.randn(7, HEADS, KEY_DIM), torch.randn(7, KV_HEADS, KEY_DIM), torch.randn(7, KV_HEADS, 5)
    step.attend(0, query, key, value, AttentionRule(scaling=1.0), None)
    assert plan.decode is not None and plan.prefill is not None
    made: list[object] = plan.decode.once(("decode", None), list)
    step.attend(1, query, key, value, AttentionRule(scaling=1.0), None)
    assert plan.decode.once(("decode", None), list) is made and made
