"""The kernels against the kit's fixed-shape reference, on random batches over a cache full of NaN."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from habana_stand_in import Runtime, open_bridge
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tokenplane_gaudi.attention import GaudiKernels
from tokenplane_gaudi.executor import flat_blocks
from tokenplane_torch.attention import AttentionRule
from tokenplane_torch.fixed_kernels import FixedKernels
from tokenplane_torch.kernels import AttentionKernels
from tokenplane_torch.kv_cache import LayerCache, LayerShape, allocate
from tokenplane_torch.padded import PaddedStep, StepShape
from tokenplane_torch.step import Rows

SIZE, WIDTH = 128, 5  # tokens of a block, blocks of a table
HEADS = {"gqa": (6, 2), "mqa": (4, 1), "mha": (3, 3)}
RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 150},
    "window of one": {"window": 1},
    "soft cap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "everything": {"window": 140, "softcap": 3.0, "sinks": True},
}


@pytest.fixture
def runtime() -> Runtime:
    return Runtime()


@pytest.fixture
def kernels(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> GaudiKernels:
    return GaudiKernels(open_bridge(monkeypatch, runtime, {}))


@dataclass
class Case:
    """A padded step of `new` tokens after `context` tokens; the last row is padding. All K and V are in the cache."""

    rows: Rows
    query: Tensor
    cache: LayerCache
    rule: AttentionRule
    value_dim: int

    def run(self, kernels: AttentionKernels) -> Tensor:
        out = self.query.new_zeros((*self.query.shape[:2], self.value_dim))
        attend = kernels.attend_decode if self.rows.most_tokens == 1 else kernels.attend_prefill
        attend(self.query, self.cache, self.rows, self.rule, out)
        return out


def make_case(
    new: list[int],
    context: list[int],
    rule: str = "plain",
    heads: str = "gqa",
    dtype: torch.dtype = torch.float32,
    value_dim: int = 8,
    spare_blocks: int = 3,
) -> Case:
    torch.manual_seed(0)
    num_heads, kv_heads = HEADS[heads]
    decode, n, width = max(new) == 1, len(new) + 1, max(new)
    tables, ids = np.zeros((n, WIDTH), np.int32), iter(np.random.default_rng(0).permutation(np.arange(1, 60)))
    (cache,) = allocate([LayerShape(kv_heads, 8, value_dim, dtype)], 60, SIZE, torch.device("cpu"))
    cache.key.fill_(torch.nan), cache.value.fill_(torch.nan)
    for row, (count, before) in enumerate(zip(new, context, strict=True)):
        for block in range(-(-(count + before) // SIZE)):
            tables[row, block] = at = next(ids)
            tokens = min(SIZE, count + before - block * SIZE)
            cache.key[at, :tokens] = torch.randn(tokens, kv_heads, 8).to(dtype)
            cache.value[at, :tokens] = torch.randn(tokens, kv_heads, value_dim).to(dtype)
    cache.key[0, 0], cache.value[0, 0] = 0, 0  # where padding writes
    needed = int((tables != 0).sum())
    arrays = {
        "first_tokens": np.arange(n) * width,
        "num_tokens": np.array([*new, 1 if decode else 0]),
        "context_lens": np.array([*context, 0]),
        "tables": tables,
    }
    inputs = {name: array.astype(np.int32) for name, array in arrays.items()}
    shape = StepShape("decode" if decode else "prefill", n, n * width, width, WIDTH, needed + spare_blocks)
    inputs |= flat_blocks(PaddedStep(shape, inputs))
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    rows = Rows(*(tensors[name] for name in arrays), SIZE, width, WIDTH * SIZE, fresh=not any(context), extra=tensors)
    given = dict(RULES[rule])
    if given.pop("sinks", False):
        given["sinks"] = torch.linspace(-1, 2, num_heads).to(dtype)
    query = torch.randn(n * width, num_heads, 8).to(dtype)
    return Case(rows, query, cache, AttentionRule(scaling=0.4, **given), value_dim)


def require_same(got: Tensor, want: Tensor, rows: Rows, tolerance: float = 1e-5) -> None:
    """Compare the tokens that rows own; the others must at least be numbers."""
    assert torch.isfinite(got).all()
    at = torch.arange(rows.most_tokens)
    owned = (at < rows.num_tokens[:, None]).reshape(-1)
    owned[-rows.most_tokens :] = False  # the padding row
    torch.testing.assert_close(got[owned], want[owned], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("rule", RULES)
def test_flat_attention_equals_the_reference(kernels: GaudiKernels, rule: str, heads: str) -> None:
    case = make_case([1, 1, 1, 1], [0, 127, 128, 500], rule, heads)
    require_same(case.run(kernels), case.run(FixedKernels()), case.rows)


@pytest.mark.parametrize("spare_blocks", [0, 1, 40])
def test_blocks_that_fill_the_list_up_change_nothing(kernels: GaudiKernels, spare_blocks: int) -> None:
    case = make_case([1, 1], [300, 5], spare_blocks=spare_blocks)
    require_same(case.run(kernels), case.run(FixedKernels()), case.rows)


def test_without_a_list_all_of_the_tables_is_read(kernels: GaudiKernels) -> None:
    case = make_case([1, 1, 1], [300, 5, 128])
    listed = case.run(kernels)
    case.rows = replace(case.rows, extra={})
    require_same(case.run(kernels), listed, case.rows)


def test_scores_far_apart_stay_exact(kernels: GaudiKernels) -> None:
    """A block whose highest score lies hundreds below the row's must neither vanish into NaN nor weigh anything."""
    case = make_case([1, 1], [400, 300])
    case.query *= 300
    require_same(case.run(kernels), case.run(FixedKernels()), case.rows)


def test_values_of_another_size_than_keys(kernels: GaudiKernels) -> None:
    for new, context in (([1, 1], [200, 3]), ([20, 7], [200, 0])):
        case = make_case(new, context, value_dim=5)
        require_same(case.run(kernels), case.run(FixedKernels()), case.rows)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("context", [[0, 0, 0], [0, 128, 333]], ids=["fresh", "after context"])
def test_prefill_equals_the_reference(
    kernels: GaudiKernels, runtime: Runtime, context: list[int], rule: str, heads: str
) -> None:
    case = make_case([160, 9, 90], context, rule, heads)
    require_same(case.run(kernels), case.run(FixedKernels()), case.rows)
    fused = case.rule.softcap is None and case.rule.sinks is None
    # A window hides nothing from the prompts themselves only if it is as wide as they are.
    expected = "causal" if not any(context) and case.rule.window is None else "mask"
    assert runtime.sdpa_calls == ([expected] if fused else [])


@pytest.mark.parametrize(("new", "context"), [([1, 1], [200, 3]), ([130, 7], [0, 0]), ([130, 7], [200, 64])])
def test_bfloat16_differs_by_rounding(kernels: GaudiKernels, new: list[int], context: list[int]) -> None:
    case = make_case(new, context, dtype=torch.bfloat16)
    got = case.run(kernels)
    assert got.dtype == torch.bfloat16
    require_same(got.float(), case.run(FixedKernels()).float(), case.rows, tolerance=3e-2)


def test_writing_touches_only_the_named_tokens(kernels: GaudiKernels) -> None:
    cache = make_case([1], [5]).cache
    before = cache.key.clone()
    key, value = torch.randn(3, 2, 8), torch.randn(3, 2, 8)
    index = torch.tensor([7 * SIZE + 3, 9 * SIZE, 7 * SIZE + 4])
    kernels.write_kv(cache, key, value, index)
    assert torch.equal(cache.key_tokens[index], key.flatten(1))
    assert torch.equal(cache.value_tokens[index], value.flatten(1))
    cache.key[7, 3:5], cache.key[9, 0] = before[7, 3:5], before[9, 0]
    torch.testing.assert_close(cache.key, before, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize(("new", "context"), [([1, 1], [200, 3]), ([130, 7], [0, 0]), ([130, 7], [200, 64])])
def test_every_tensor_is_made_on_the_card(kernels: GaudiKernels, new: list[int], context: list[int]) -> None:
    """The stand-in computes on the host, where a tensor made on the wrong device does not show. Here it raises."""
    case = make_case(new, context, "window")
    kernels._bridge.fused_sdpa = lambda query, *_: query.clone()  # type: ignore[method-assign]
    key, index = torch.zeros(3, 2, 8), torch.arange(3)
    with FakeTensorMode():

        def on_card(tensor: Tensor) -> Tensor:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

        inputs = {name: on_card(tensor) for name, tensor in case.rows.extra.items()}
        fields = {name: inputs[name] for name in ("first_tokens", "num_tokens", "context_lens", "tables")}
        rows = replace(case.rows, **fields, extra=inputs)
        cache = LayerCache(on_card(case.cache.key), on_card(case.cache.value))
        kernels.write_kv(cache, on_card(key), on_card(key), on_card(index))
        got = Case(rows, on_card(case.query), cache, case.rule, 8).run(kernels)
        assert got.device.type == "meta" and got.shape == case.query.shape
