"""Buckets: whatever the core may propose fits one, and there are few enough to capture them all."""

from __future__ import annotations

import random

import pytest

from tokenplane_core.backend.records import Limits, ShapePolicy
from tokenplane_core.engine.shapes import Extent, ShapeTable
from tokenplane_gaudi.buckets import MOST_BLOCKS, blocks_for, shape_policy, spaced
from tokenplane_gaudi.executor import variants
from tokenplane_torch.padded import step_shape


def table(sequences: int, step_tokens: int, longest: int) -> ShapeTable:
    policy = shape_policy(sequences, step_tokens, longest)
    most = max(bucket.tokens for bucket in policy.buckets)
    return ShapeTable(policy, Limits(sequences, most, longest, 4))


@pytest.mark.parametrize("sequences", [1, 3, 16, 64, 256])
@pytest.mark.parametrize("longest", [100, 512, 8192, 131072])
def test_every_single_sequence_finds_a_shape_all_its_life(sequences: int, longest: int) -> None:
    shapes = table(sequences, 2048, longest)
    for tokens in {1, 100, min(128, longest), min(129, longest), longest // 2, longest}:
        blocks = blocks_for(tokens)
        assert shapes.bucket("decode", Extent().plus(1, blocks, False)), f"no decode shape for {tokens} tokens"
        new = min(tokens, shapes.room("prefill", Extent()))
        assert shapes.bucket("prefill", Extent().plus(new, blocks, True)), f"no prefill shape for {tokens} tokens"


def test_all_rows_decode_together_up_to_the_bound() -> None:
    shapes = table(64, 2048, 8192)
    rng = random.Random(0)
    for _ in range(200):
        extent = Extent()
        for _ in range(rng.randint(1, 64)):
            extent = extent.plus(1, rng.randint(1, 64), False)
        bucket = shapes.bucket("decode", extent)
        assert bucket is not None
        assert bucket.rows < 4 * extent.rows or bucket.rows == 1
        assert bucket.context_blocks < 2 * extent.total_blocks or bucket.context_blocks == bucket.rows


def test_blocks_of_a_step_are_bounded_unless_one_sequence_has_more() -> None:
    assert max(bucket.context_blocks for bucket in shape_policy(256, 2048, 32768).buckets) == MOST_BLOCKS
    assert max(bucket.context_blocks for bucket in shape_policy(4, 2048, 1 << 20).buckets) == blocks_for(1 << 20)


@pytest.mark.parametrize(("longest", "most"), [(512, 32), (8192, 80), (32768, 100), (131072, 120)])
def test_warm_up_stays_short(longest: int, most: int) -> None:
    policy = shape_policy(64, 2048, longest)
    captured = [graph for bucket in policy.buckets for graph in variants(_shape(policy, bucket, longest))]
    assert len(set(captured)) == len(captured) <= most


@pytest.mark.parametrize("step_tokens", [1, 2, 16, 48, 500, 8192])
@pytest.mark.parametrize("sequences", [1, 5, 256])
def test_wishes_give_sound_policies(sequences: int, step_tokens: int) -> None:
    policy = shape_policy(sequences, step_tokens, 2000)
    assert len(set(policy.buckets)) == len(policy.buckets)
    assert max(b.rows for b in policy.buckets if b.phase == "decode") == sequences
    prefill = [b for b in policy.buckets if b.phase == "prefill"]
    assert max(b.tokens for b in prefill) <= step_tokens
    assert {b.rows for b in prefill} == ({1, 4} if sequences > 1 and step_tokens >= 4 else {1})
    assert all(b.tokens % b.rows == 0 and b.context_blocks >= b.rows for b in policy.buckets)


def test_only_the_smallest_context_is_captured_for_fresh_prompts() -> None:
    policy = shape_policy(16, 512, 1024)
    fresh = {}
    for bucket in policy.buckets:
        shape = _shape(policy, bucket, 1024)
        kinds = [variant.fresh for variant in variants(shape)]
        assert kinds in ([False], [False, True])
        if kinds == [False, True]:
            fresh[shape.rows, shape.row_tokens] = shape.total_blocks
    assert fresh == {
        (rows, tokens): rows * blocks_for(tokens) for rows, tokens in ((1, 128), (1, 256), (1, 512), (4, 128))
    }


def test_spacing() -> None:
    assert list(spaced(1, 1, 4)) == [1]
    assert list(spaced(1, 48, 4)) == [1, 4, 16, 48]
    assert list(spaced(3, 24, 2)) == [3, 6, 12, 24]


def _shape(policy: ShapePolicy, bucket, longest):  # type: ignore[no-untyped-def]
    return step_shape(bucket, policy.pad_rows, blocks_for(longest), policy.context_rule)
