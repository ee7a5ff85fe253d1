"""The paged attention kernels, in Triton's interpreter, against attention written out in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from tokenplane_core.backend.errors import UnsupportedModel
from tokenplane_torch.attention import AttentionRule
from tokenplane_torch.kv_cache import LayerCache, LayerShape, allocate
from tokenplane_torch.step import Rows
from tokenplane_torch.triton.kernels import TritonKernels
from tokenplane_torch.triton.limits import INTERPRETER, DeviceLimits
from tokenplane_torch.triton.tiles import choose_splits, choose_tile
from tokenplane_torch.triton.tiles import shared_bytes as needed_bytes

UNTOUCHED = 77.0


@pytest.fixture(autouse=True)
def bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.7's interpreter keeps bfloat16 as integers and multiplies those; here they become float32 before."""
    create_dot = InterpreterBuilder.create_dot

    def floats(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def fixed(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: object) -> TensorHandle:
        return create_dot(self, floats(a), floats(b), *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", fixed)


TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}

MIXED = ([5, 1, 9, 2], [0, 20, 33, 70])  # new tokens and cached tokens of each row
DECODE = ([1, 1, 1], [0, 40, 17])


PLAIN = AttentionRule(scaling=0.15)


@dataclass(frozen=True)
class Case:
    new: list[int]
    context: list[int]
    heads: int = 4
    kv_heads: int = 2
    key_dim: int = 64
    value_dim: int = 64
    dtype: torch.dtype = torch.float32
    block_tokens: int = 16
    rule: AttentionRule = PLAIN


class Scene:
    """A cache full of NaN with the rows' keys and values in scattered blocks, and queries among other tokens."""

    def __init__(self, case: Case, kernels: TritonKernels) -> None:
        generator = torch.Generator().manual_seed(3)

        def random(tokens: int, heads: int, dim: int) -> Tensor:
            # As models make them: [1, heads, tokens, dim], of which the attention function sees a transposed view.
            whole = torch.randn((1, heads, tokens, dim), generator=generator, dtype=torch.float32)
            return whole.to(case.dtype)[0].transpose(0, 1)

        new, context = np.array(case.new, np.int32), np.array(case.context, np.int32)
        lengths = new + context
        used = -(-lengths // case.block_tokens)
        blocks = np.random.default_rng(4).permutation(np.arange(1, used.sum() + 1)).astype(np.int32)
        tables = np.zeros((len(new), used.max() + 1), np.int32)
        for row, (count, end) in enumerate(zip(used, used.cumsum(), strict=True)):
            tables[row, :count] = blocks[end - count : end]
        shape = LayerShape(case.kv_heads, case.key_dim, case.value_dim, case.dtype)
        (self.cache,) = allocate([shape], int(used.sum()) + 1, case.block_tokens, torch.device("cpu"))
        self.cache.key.fill_(torch.nan)
        self.cache.value.fill_(torch.nan)
        self.keys = [random(n, case.kv_heads, case.key_dim) for n in lengths]
        self.values = [random(n, case.kv_heads, case.value_dim) for n in lengths]
        places = [row[np.arange(n) // case.block_tokens] * case.block_tokens + np.arange(n) % case.block_tokens
                  for row, n in zip(tables, lengths, strict=True)]  # fmt: skip
        index = torch.from_numpy(np.concatenate(places)).long()
        kernels.write_kv(self.cache, torch.cat(self.keys), torch.cat(self.values), index)

        self.first = 2 + new.cumsum() - new  # two tokens before and three behind belong to other calls
        self.query = random(int(new.sum()) + 5, case.heads, case.key_dim)
        self.out = torch.full((len(self.query), case.heads, case.value_dim), UNTOUCHED, dtype=case.dtype)
        self.rows = Rows(
            torch.from_numpy(self.first.astype(np.int32)),
            torch.from_numpy(new),
            torch.from_numpy(context),
            torch.from_numpy(tables),
            case.block_tokens,
            most_tokens=int(new.max()),
            most_keys=int(lengths.max()),
        )
        self.case = case

    def check(self) -> None:
        owned = torch.zeros(len(self.out), dtype=torch.bool)
        for row, (first, new) in enumerate(zip(self.first, self.case.new, strict=True)):
            owned[first : first + new] = True
            want = dense(self.query[first : first + new], self.keys[row], self.values[row], self.case.rule)
            tolerance = TOLERANCE[self.case.dtype]
            torch.testing.assert_close(
                self.out[first : first + new].double(), want, rtol=tolerance, atol=tolerance, msg=lambda m: f"{m}"
            )
        assert bool((self.out[~owned] == UNTOUCHED).all())


def dense(query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule) -> Tensor:
    """[n, heads, key_dim], [m, kv_heads, key_dim], [m, kv_heads, value_dim] of one row: the last n of m tokens ask."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (t.double().repeat_interleave(repeats, 1) for t in (key, value))
    scores = torch.einsum("nhd,mhd->hnm", query.double(), key) * rule.scaling
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    distance = torch.arange(len(key) - len(query), len(key))[:, None] - torch.arange(len(key))
    hidden = distance < 0 if rule.window is None else (distance < 0) | (distance >= rule.window)
    scores = scores.masked_fill(hidden, -torch.inf)
    if rule.sinks is not None:
        scores = torch.cat([scores, rule.sinks.double()[:, None, None].expand(-1, len(query), 1)], -1)
    return torch.einsum("hnm,mhd->nhd", scores.softmax(-1)[..., : len(key)], value)


def attend(case: Case) -> Scene:
    kernels = TritonKernels(torch.device("cpu"))
    scene = Scene(case, kernels)
    call = kernels.attend_decode if max(case.new) == 1 else kernels.attend_prefill
    call(scene.query, scene.cache, scene.rows, case.rule, scene.out)
    return scene


SINKS = torch.tensor([-1.0, 0.5, 3.0, 1.0])
RULES: dict[str, Callable[[], AttentionRule]] = {
    "window": lambda: AttentionRule(scaling=0.15, window=7),
    "window_of_one": lambda: AttentionRule(scaling=0.15, window=1),
    "softcap": lambda: AttentionRule(scaling=0.5, softcap=2.0),
    "sinks": lambda: AttentionRule(scaling=0.15, sinks=SINKS),
    "everything": lambda: AttentionRule(scaling=0.3, window=40, softcap=3.0, sinks=SINKS),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("step", [MIXED, DECODE], ids=["prefill", "decode"])
def test_rules_hold(step: tuple[list[int], list[int]], rule: str) -> None:
    attend(Case(*step, rule=RULES[rule]())).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("step", [MIXED, DECODE], ids=["prefill", "decode"])
def test_types_hold(step: tuple[list[int], list[int]], dtype: torch.dtype) -> None:
    attend(Case(*step, dtype=dtype)).check()


@pytest.mark.parametrize(
    ("key_dim", "value_dim"), [(64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (192, 128), (40, 72)]
)
@pytest.mark.parametrize("step", [([5, 2], [0, 37]), DECODE], ids=["prefill", "decode"])
def test_head_sizes_hold(step: tuple[list[int], list[int]], key_dim: int, value_dim: int) -> None:
    attend(Case(*step, key_dim=key_dim, value_dim=value_dim, dtype=torch.float16)).check()


@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(3, 3), (4, 1), (14, 2), (20, 1)], ids=["mha", "mqa", "groups_of_7", "mqa_of_20"]
)
@pytest.mark.parametrize("step", [([5, 2], [0, 37]), DECODE], ids=["prefill", "decode"])
def test_head_groups_hold(step: tuple[list[int], list[int]], heads: int, kv_heads: int) -> None:
    """Groups of 20 are larger than a float32 tile: they take two."""
    attend(Case(*step, heads=heads, kv_heads=kv_heads)).check()


@pytest.mark.parametrize("block_tokens", [1, 32, 128])
def test_block_sizes_hold(block_tokens: int) -> None:
    attend(Case([3, 1], [50, 140], block_tokens=block_tokens)).check()


@pytest.mark.parametrize("new", [[1, 1], [3, 2]], ids=["decode", "few_tokens"])
@pytest.mark.parametrize("rule", ["sinks", "everything"])
def test_long_contexts_are_split_and_put_together_again(new: list[int], rule: str) -> None:
    """One row is long, the other leaves most splits nothing to do."""
    case = Case(new, [280, 5], kv_heads=1, rule=replace(RULES[rule](), window=None), block_tokens=32)
    tile = choose_tile(4 * max(new), 64, 64, torch.float32, INTERPRETER)
    assert choose_splits(2, 280, tile, INTERPRETER) == 4
    attend(case).check()


def test_a_window_is_split_by_what_it_shows() -> None:
    attend(Case([1], [280], kv_heads=1, rule=AttentionRule(scaling=0.15, window=200))).check()


def test_rows_of_padding_are_left_alone() -> None:
    """As in a captured graph: more rows, and bounds that no row reaches."""
    scene = Scene(Case([4, 1], [9, 30]), TritonKernels(torch.device("cpu")))

    def pad(tensor: Tensor, fill: int) -> Tensor:
        return torch.cat([tensor, tensor.new_full((2, *tensor.shape[1:]), fill)])

    rows = scene.rows
    scene.rows = replace(
        rows,
        first_tokens=pad(rows.first_tokens, 0),
        num_tokens=pad(rows.num_tokens, 0),
        context_lens=pad(rows.context_lens, 0),
        tables=pad(rows.tables, 0),
        most_tokens=8,
        most_keys=600,
    )
    TritonKernels(torch.device("cpu")).attend_prefill(scene.query, scene.cache, scene.rows, scene.case.rule, scene.out)
    scene.check()


def test_strided_queries_are_read_through_their_strides() -> None:
    case = Case(*MIXED)
    kernels = TritonKernels(torch.device("cpu"))
    scene = Scene(case, kernels)
    fused = torch.randn(len(scene.query), 3, case.heads, case.key_dim)  # query, key, value from one projection
    fused[:, 1] = scene.query
    scene.query = fused[:, 1]
    kernels.attend_prefill(scene.query, scene.cache, scene.rows, case.rule, scene.out)
    scene.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_write_reaches_its_rows_of_the_cache_and_no_others(dtype: torch.dtype) -> None:
    (cache,) = allocate([LayerShape(3, 96, 40, dtype)], 9, 16, torch.device("cpu"))
    cache.key.fill_(torch.nan)
    cache.value.fill_(torch.nan)
    fused = torch.randn(5, 3 * (96 + 40), dtype=torch.float32).to(dtype)
    key, value = fused[:, : 3 * 96].view(5, 3, 96), fused[:, 3 * 96 :].view(5, 3, 40)
    index = torch.tensor([16, 143, 17, 80, 31])
    TritonKernels(torch.device("cpu")).write_kv(cache, key, value, index)
    assert torch.equal(cache.key_tokens[index], key.flatten(1))
    assert torch.equal(cache.value_tokens[index], value.flatten(1))
    for tokens in (cache.key_tokens, cache.value_tokens):
        assert (~tokens.isnan().any(1)).nonzero().flatten().tolist() == sorted(index.tolist())


@pytest.mark.parametrize("shared_bytes", [64 << 10, 99 << 10, 163 << 10, 227 << 10])
@pytest.mark.parametrize("compiler", ["cuda", "hip", "xpu"])
def test_tiles_fit_the_shared_memory(shared_bytes: int, compiler: str) -> None:
    limits = DeviceLimits(shared_bytes, 100, compiler)
    for dtype in (torch.bfloat16, torch.float32):
        for dim in (64, 80, 128, 256):
            for rows in (1, 8, 33, 4096):
                tile = choose_tile(rows, dim, dim, dtype, limits)
                width = 64 if dim == 64 else 256 if dim == 256 else 128
                assert needed_bytes(tile, width, width, dtype.itemsize, compiler) <= shared_bytes
                assert tile.rows >= 16 and tile.keys >= 16


def test_a_full_device_is_not_split_and_an_idle_one_is() -> None:
    limits = DeviceLimits(160 << 10, 100, "cuda")
    tile = choose_tile(8, 128, 128, torch.bfloat16, limits)
    assert choose_splits(200, 100_000, tile, limits) == 1
    assert choose_splits(1, 100_000, tile, limits) == 64
    assert choose_splits(1, 200, tile, limits) == 1


def test_too_large_heads_are_refused_with_the_limit() -> None:
    with pytest.raises(UnsupportedModel, match=r"head size is 576.*256"):
        choose_tile(16, 576, 512, torch.bfloat16, INTERPRETER)


def test_a_workspace_is_never_moved() -> None:
    """A captured graph reads and writes where it was when captured."""
    kernels = TritonKernels(torch.device("cpu"))
    first = kernels._workspace.take("partial", (3, 5), torch.device("cpu"))
    kernels._workspace.take("partial", (100, 5), torch.device("cpu"))
    assert kernels._workspace.take("partial", (2, 8), torch.device("cpu")).data_ptr() == first.data_ptr()


def test_a_cache_of_more_than_two_billion_elements_is_addressed() -> None:
    """The memory is reserved, not touched, but for the blocks in use."""
    block = 2**31 // (16 * 2 * 64) + 5
    whole = torch.empty((block + 1, 16, 2, 64), dtype=torch.float16)
    cache = LayerCache(whole, whole[:, :, :, :])
    kernels = TritonKernels(torch.device("cpu"))
    key = torch.randn(3, 2, 64).half()
    index = torch.arange(block * 16, block * 16 + 3)
    kernels.write_kv(cache, key, key, index)
    assert torch.equal(cache.key_tokens[index], key.flatten(1))
