"""Rows laid out for vendors' functions: ragged and captured steps, and what a library is asked beforehand."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from tokenplane_core.backend.errors import ContractViolation
from tokenplane_core.kit.checkpoint import reference_greedy, write_tiny_llama
from tokenplane_core.kit.runner import LocalEngine
from tokenplane_core.model import describe_model
from tokenplane_torch.choice import Candidate, Unavailable, choose
from tokenplane_torch.composed import Composed, PlainKernels
from tokenplane_torch.fixed_kernels import FixedKernels
from tokenplane_torch.kernels import LayerNeed
from tokenplane_torch.probing import Serves, library, require_version
from tokenplane_torch.step import Rows, plan_step
from tokenplane_torch.testing.graphs import HostGpuBackend, HostGpuDevice, pinned_memory_is_memory
from tokenplane_torch.testing.paged import NEEDS, attend_rows, install
from tokenplane_torch.varlen import Varlen, VarlenCall, pack, page_lists

BLOCK_TOKENS = 4


def by_rows(call: VarlenCall) -> None:
    """A library's function: it reads lengths where it may, and computes in fixed shapes in a captured step."""
    if call.rows.host is None:
        FixedKernels().attend_decode(call.query, call.cache, call.rows, call.rule, call.out)
        return
    packed = call.packed
    result = attend_rows(
        call.query,
        call.cache.key,
        call.cache.value,
        packed.query_starts,
        packed.key_lengths,
        call.rows.tables,
        call.rule.scaling,
        call.window,
        call.softcap,
        call.rule.sinks,
    )
    call.out.copy_(result)


def kernels() -> Composed:
    attend = Varlen(by_rows).attend
    return Composed(PlainKernels().write_kv, attend, attend, {"attention": "varlen", "write_kv": "torch"})


CANDIDATE = Candidate("varlen", lambda needs, device: kernels())


@pytest.mark.parametrize("need", NEEDS)
@pytest.mark.parametrize("block_tokens", [4, 16, 64])
def test_attention_of_packed_rows_is_attention(need: str, block_tokens: int) -> None:
    chosen = choose([CANDIDATE], [NEEDS[need]], HostGpuDevice(block_tokens=block_tokens))
    assert chosen.describe()["attention"] == "varlen"


def test_a_model_is_served_in_captured_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned_memory_is_memory(monkeypatch)
    write_tiny_llama(tmp_path)
    engine = LocalEngine(lambda: HostGpuBackend([CANDIDATE]), describe_model(tmp_path, dtype="float32"))
    prompts: Sequence[list[int]] = [[1, 2, 3], [7] * 40, [5]]
    assert engine.generate(prompts, 6) == [reference_greedy(tmp_path, prompt, 6) for prompt in prompts]
    assert engine.capabilities.shapes.mode == "soft" and engine.engine.stats.compiled_shapes == 0


def rows_of(new: list[int], context: list[int]) -> Rows:
    """Its rows of several tokens; each row has blocks of its own."""
    most = -(-max(n + c for n, c in zip(new, context, strict=True)) // BLOCK_TOKENS)
    plan = plan_step(
        np.zeros(sum(new), np.int32),
        np.array(new, np.int32),
        np.array(context, np.int32),
        np.arange(1, len(new) * most + 1, dtype=np.int32).reshape(len(new), most),
        np.ones(len(new), np.bool_),
        BLOCK_TOKENS,
        torch.from_numpy,
    )
    assert plan.prefill is not None
    return plan.prefill


def test_rows_side_by_side_are_a_slice_and_others_an_index() -> None:
    together, apart = pack(rows_of([1, 3, 2], [0, 4, 0])), pack(rows_of([3, 1, 2], [4, 0, 0]))
    assert together.tokens == slice(1, 6)
    assert isinstance(apart.tokens, torch.Tensor) and apart.tokens.tolist() == [0, 1, 2, 4, 5]
    for packed in (together, apart):
        assert packed.query_starts.tolist() == [0, 3, 5] and packed.key_lengths.tolist() == [7, 2]


def test_layers_share_the_layout() -> None:
    rows = rows_of([3, 2], [4, 0])
    assert pack(rows) is pack(rows)


def test_page_lists_name_the_blocks_in_use() -> None:
    lists = page_lists(rows_of([3, 1, 2, 8], [5, 0, 0, 1]))
    assert lists.query_starts.tolist() == [0, 3, 5, 13]
    assert lists.page_starts.tolist() == [0, 2, 3, 6]
    assert lists.pages.tolist() == [1, 2, 7, 10, 11, 12]
    assert lists.last_page_tokens.tolist() == [4, 2, 1]


def test_prefill_steps_of_a_fixed_shape_are_refused() -> None:
    from dataclasses import replace

    fixed = replace(rows_of([3, 2], [4, 0]), host=None)
    for layout in (pack, page_lists):
        with pytest.raises(ContractViolation, match="fixed shape"):
            layout(fixed)


# --- Asking a library ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("serves", "need", "reason"),
    [
        (Serves(), NEEDS["float32"], "it computes in bfloat16 and float16, not in float32"),
        (Serves(), NEEDS["large heads"], "head size 512: it takes multiples of 8 up to 256"),
        (Serves(dim_multiple=32), NEEDS["plain"], "head size 16: it takes multiples of 32 up to 256"),
        (Serves(), NEEDS["unlike dims"], "keys of 24 and values of 16: it takes one size"),
        (Serves(windows=False), NEEDS["window"], "it has no sliding windows"),
        (Serves(softcap=False), NEEDS["softcap"], "it has no soft caps"),
        (Serves(), NEEDS["sinks"], "it has no attention sinks"),
        (Serves(block_multiple=64), NEEDS["plain"], "its blocks are multiples of 64 tokens, these have 32"),
        (Serves(block_sizes=(16, 64)), NEEDS["plain"], "its blocks have 16, 64 tokens, these have 32"),
    ],
)
def test_a_need_that_a_library_does_not_serve_is_named(serves: Serves, need: LayerNeed, reason: str) -> None:
    with pytest.raises(Unavailable) as refusal:
        serves.require([NEEDS["grouped"], need], block_tokens=32)
    assert str(refusal.value) == reason


def test_a_library_that_is_not_there_is_told_from_one_that_breaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_kernels.py").write_text("raise OSError('libbroken.so: no such file\\nmore')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Unavailable, match=r"^no_such_kernels is not installed$"):
        library("no_such_kernels.attention")
    with pytest.raises(Unavailable, match=r"^broken_kernels cannot be imported: OSError: libbroken\.so: no such file$"):
        library("broken_kernels")
    install(monkeypatch, "half_kernels", __path__=[])
    with pytest.raises(Unavailable, match=r"^the installed half_kernels has no module half_kernels\.attention$"):
        library("half_kernels.attention")
    assert "half_kernels" in sys.modules


def test_versions_are_compared_as_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("0.10", "0.7.2.post1", "1.0+cu128"):
        assert require_version(install(monkeypatch, "kernels_x", __version__=version), (0, 7)) == version
    for version in ("0.6.18", "unknown"):
        with pytest.raises(Unavailable, match=f"version {version} is installed"):
            require_version(install(monkeypatch, "kernels_x", __version__=version), (0, 7))
