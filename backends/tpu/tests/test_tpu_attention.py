"""The twin of the TPU's kernel against attention over the kit's own cache, and what the kernel cannot serve."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tokenplane_core.backend.errors import UnsupportedModel
from tokenplane_torch.attention import AttentionRule
from tokenplane_torch.fixed_kernels import FixedKernels
from tokenplane_torch.kernels import LayerNeed
from tokenplane_torch.kv_cache import LayerShape, allocate
from tokenplane_torch.step import Rows
from tokenplane_tpu.attention import PagedCache, RaggedKernels, page_dim, require_kernel_fits, token_bytes

BLOCK_TOKENS, NUM_BLOCKS, LANES = 4, 40, 16
HEADS, KV_HEADS, KEY_DIM, VALUE_DIM = 6, 2, 8, 5
SHAPE = LayerShape(KV_HEADS, KEY_DIM, VALUE_DIM, torch.float32)
RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 5},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": torch.linspace(-1, 2, HEADS)},
    "everything": {"window": 6, "softcap": 3.0, "sinks": torch.linspace(-1, 2, HEADS)},
}
# New tokens and cached tokens of each row; a row of none is padding.
STEPS = {
    "decode": ([1, 1, 1, 1], [0, 3, 17, 8]),
    "prompts": ([5, 9, 2, 0], [0, 0, 0, 0]),
    "chunks_beside_decodes": ([1, 6, 1, 3, 0, 0], [11, 2, 0, 13, 0, 0]),
}


def rows_of(new: list[int], context: list[int]) -> Rows:
    """Rows back to back over scattered blocks, in tables that are wider than needed."""
    blocks = np.random.default_rng(0).permutation(np.arange(1, NUM_BLOCKS))
    tables = np.zeros((len(new), 8), np.int32)
    for i, (n, c) in enumerate(zip(new, context, strict=True)):
        used = -(-(n + c) // BLOCK_TOKENS)
        tables[i, :used], blocks = blocks[:used], blocks[used:]
    first = np.cumsum([0, *new[:-1]]).astype(np.int32)
    host = (first, np.array(new, np.int32), np.array(context, np.int32), tables)
    return Rows(*map(torch.from_numpy, host), BLOCK_TOKENS, most_tokens=sum(new), most_keys=8 * BLOCK_TOKENS)


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_twin_equals_attention_over_separate_keys_and_values(
    step: tuple[list[int], list[int]], rule: dict[str, Any]
) -> None:
    """Both caches are full of NaN where nobody wrote."""
    torch.manual_seed(0)
    new, context = step
    rows, tokens = rows_of(new, context), sum(new) + 3  # the last three are padding
    (plain,) = allocate([SHAPE], NUM_BLOCKS, BLOCK_TOKENS, torch.device("cpu"))
    plain.key.fill_(torch.nan)
    plain.value.fill_(torch.nan)
    paged = PagedCache(torch.full((NUM_BLOCKS, BLOCK_TOKENS, 2 * KV_HEADS, page_dim(SHAPE, LANES)), torch.nan))
    written = [row * 100 + p for row, (n, c) in enumerate(zip(new, context, strict=True)) for p in range(n + c)]
    index = torch.tensor([_cell(rows.tables[at // 100], at % 100) for at in written])
    key, value = torch.randn(len(written), KV_HEADS, KEY_DIM), torch.randn(len(written), KV_HEADS, VALUE_DIM)
    kernels = RaggedKernels(use_kernel=False)
    FixedKernels().write_kv(plain, key, value, index)
    kernels.write_kv(paged, key, value, index)
    query, weighing = torch.randn(tokens, HEADS, KEY_DIM), AttentionRule(scaling=0.3, **rule)
    want, got = torch.zeros(tokens, HEADS, VALUE_DIM), torch.zeros(tokens, HEADS, VALUE_DIM)
    FixedKernels().attend_prefill(query, plain, rows, weighing, want)
    kernels.attend_prefill(query, paged, rows, weighing, got)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert got[: sum(new)].abs().sum(dim=(1, 2)).min() > 0 and (got[sum(new) :] == 0).all()


def _cell(table: Tensor, position: int) -> int:
    return int(table[position // BLOCK_TOKENS]) * BLOCK_TOKENS + position % BLOCK_TOKENS


def test_heads_are_padded_to_whole_lanes_and_that_is_counted() -> None:
    shape = LayerShape(8, 192, 128, torch.bfloat16)
    assert page_dim(shape, 128) == 256 and page_dim(LayerShape(8, 64, 64, torch.bfloat16), 128) == 128
    assert token_bytes(shape, 128) == 2 * 8 * 256 * 2


@pytest.mark.parametrize(("kv_heads", "dtype"), [(1, torch.bfloat16), (8, torch.bfloat16), (4, torch.float32)])
def test_common_layers_fit_the_kernel(kv_heads: int, dtype: torch.dtype) -> None:
    require_kernel_fits([LayerNeed(8, LayerShape(kv_heads, 128, 128, dtype))])


@pytest.mark.parametrize(
    ("need", "reason"),
    [
        (LayerNeed(9, LayerShape(3, 64, 64, torch.bfloat16)), "layer 0 has 3 KV heads of torch.bfloat16"),
        (LayerNeed(8, LayerShape(8, 64, 64, torch.bfloat16), sinks=True), "attention sinks"),
    ],
)
def test_a_layer_that_the_kernel_cannot_serve_is_refused(need: LayerNeed, reason: str) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        require_kernel_fits([need])
