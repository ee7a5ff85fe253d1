"""The cache layout against torch-xla's own reference of its kernel, and the kernel as far as it goes without a TPU."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
import torch
import torch_xla
import torch_xla.experimental.custom_kernel  # registers the operation
from torch_xla.experimental.pallas_kernels import ragged_paged_attention_v2

from tokenplane_torch.attention import AttentionRule
from tokenplane_torch.kv_cache import LayerShape
from tokenplane_torch.step import Rows
from tokenplane_tpu.attention import LANES, PagedCache, RaggedKernels, kernel, page_dim, twin

DEVICE = torch_xla.device()
BLOCK_TOKENS, HEADS, KV_HEADS, DIM = 8, 4, 2, 16


@pytest.mark.parametrize("rule", [{}, {"window": 6}, {"softcap": 3.0}])
def test_the_twin_equals_the_vendors_reference(rule: dict[str, Any]) -> None:
    """Pages written by us, read by torch-xla's `ragged_paged_attention` without the kernel, on mixed rows."""
    torch.manual_seed(0)
    new, context = np.array([5, 1, 3], np.int32), np.array([4, 20, 0], np.int32)
    tables = np.arange(1, 13, dtype=np.int32).reshape(3, 4)
    first = (np.cumsum(new) - new).astype(np.int32)
    rows = Rows(*map(torch.from_numpy, (first, new, context, tables)), BLOCK_TOKENS, 9, 32)
    shape = LayerShape(KV_HEADS, DIM, DIM, torch.float32)
    cache = PagedCache(torch.zeros(13, BLOCK_TOKENS, 2 * KV_HEADS, page_dim(shape, DIM)))
    everywhere = torch.arange(BLOCK_TOKENS, 13 * BLOCK_TOKENS)
    key, value = torch.randn(2, len(everywhere), KV_HEADS, DIM)
    RaggedKernels(use_kernel=False).write_kv(cache, key, value, everywhere)
    query = torch.randn(9, HEADS, DIM)
    ours = twin(query, cache.pages, rows, AttentionRule(scaling=0.2, **rule), torch.zeros(9, HEADS, DIM))
    lengths, starts, count = context + new, np.array([0, 5, 6, 9], np.int32), np.array([3], np.int32)
    theirs = torch.ops.xla.ragged_paged_attention(
        query.to(DEVICE),
        cache.pages.to(DEVICE),
        *(torch.from_numpy(array).to(DEVICE) for array in (lengths, tables, starts, count)),
        sm_scale=0.2,
        sliding_window=rule.get("window"),
        soft_cap=rule.get("softcap"),
        use_kernel=False,
    )
    torch.testing.assert_close(ours, theirs.cpu(), atol=1e-5, rtol=1e-5)


class ForTpu:
    """jax.jit that lowers for a TPU on a machine without one."""

    def __init__(self, function: Any, **options: Any) -> None:
        self._jit = JIT(function, **options)

    def __call__(self, *arguments: Any) -> Any:
        return self._jit(*arguments)

    def lower(self, *arguments: Any, **options: Any) -> Any:
        return self._jit.trace(*arguments, **options).lower(lowering_platforms=("tpu",))


JIT = jax.jit


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch_xla.experimental.pallas_kernels")
@pytest.mark.parametrize(
    ("rows", "tokens", "heads", "kv_heads", "head_dim", "dtype", "rule"),
    [
        (8, 8, 32, 8, 128, torch.bfloat16, {}),  # Llama 3 8B, decode
        (64, 2048, 32, 8, 128, torch.bfloat16, {}),  # and its largest prompt step
        (16, 16, 14, 2, 64, torch.bfloat16, {}),  # Qwen2 0.5B: heads padded
        (16, 16, 28, 4, 128, torch.bfloat16, {"window": 4096}),
        (16, 64, 8, 4, 256, torch.bfloat16, {"window": 4096, "softcap": 50.0}),  # Gemma 2 2B
        (8, 16, 4, 2, 16, torch.float32, {}),
    ],
)
def test_the_kernel_takes_our_steps_and_lowers_for_a_tpu(
    rows: int,
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    rule: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Down to the Mosaic call in the graph: its shape rules hold. Compiling and running it needs a TPU."""
    monkeypatch.setattr(jax, "jit", ForTpu)
    monkeypatch.setattr(ragged_paged_attention_v2, "get_tpu_version", lambda: 6)
    blocks = 64
    shape = LayerShape(kv_heads, head_dim, head_dim, dtype)
    pages = torch.zeros(blocks + 1, 128, 2 * kv_heads, page_dim(shape, LANES), dtype=dtype, device=DEVICE)
    sizes = torch.ones(rows, dtype=torch.int32, device=DEVICE)
    step = Rows(sizes, sizes, sizes, sizes[:, None].expand(-1, blocks), 128, tokens, blocks * 128)
    query = torch.zeros(tokens, heads, head_dim, dtype=dtype, device=DEVICE)
    out = kernel(query, pages, step, AttentionRule(scaling=head_dim**-0.5, **rule), query)
    graph = torch_xla._XLAC._get_xla_tensors_hlo([out])
    assert out.shape == (tokens, heads, head_dim)
    assert 'custom_call_target="tpu_custom_call"' in graph and "scatter" not in graph
    torch_xla._XLAC._clear_pending_irs(str(DEVICE))
