"""What a batch costs on ragged, soft and hard devices, and how many blocks are asked for."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from tokenplane_core.backend.errors import ConfigError, OutOfMemory
from tokenplane_core.backend.records import Bucket, Capabilities, KVSpec, Limits, LoadOptions, ModelSpec, ShapePolicy
from tokenplane_core.config import EngineConfig
from tokenplane_core.engine.shapes import Extent, Phase, ShapeTable
from tokenplane_core.engine.startup import size_cache, within_share
from tokenplane_core.kit.simulated import PROFILES, Profile, SimulatedCuda, SimulatedNeuron
from tokenplane_core.memory import share_of

MODEL = ModelSpec("m", "", None, "", {}, 1, 1, 1, 8, 89, 256, "float32")
LIMITS = Limits(max_sequences=64, max_step_tokens=48, max_model_tokens=320, max_prefill_rows=64)


def extent(rows: int, tokens: int = 1, blocks: int = 1) -> Extent:
    out = Extent()
    for _ in range(rows):
        out = out.plus(tokens, blocks, tokens > 1)
    return out


def test_soft_shapes_pad_to_the_next_size_and_run_without_one_above_the_largest() -> None:
    buckets = tuple(Bucket("decode", n, n) for n in (1, 2, 4, 8, 16, 32, 64))
    table = ShapeTable(ShapePolicy("soft", buckets), LIMITS)
    assert [table.cost("decode", extent(n)) for n in (1, 3, 17, 33, 48)] == [1, 4, 32, 33, 48]
    assert table.cost("decode", extent(49)) is None  # the step limit


@pytest.mark.parametrize("profile", PROFILES.values(), ids=lambda profile: profile.name)
def test_the_cheapest_shape_that_holds_a_batch_is_found(profile: Profile) -> None:
    table = ShapeTable(profile.shapes(1024), replace(LIMITS, max_step_tokens=profile.max_step_tokens))
    rng = random.Random(0)
    listed = [b for b in table.policy.buckets if b.tokens <= profile.max_step_tokens]
    num_found = 0
    for _ in range(500):
        batch = Extent()
        phase: Phase = rng.choice(["prefill", "decode"])
        for _ in range(rng.randint(1, profile.max_sequences)):
            batch = batch.plus(1 if phase == "decode" else rng.randint(1, 60), rng.randint(1, 8), phase == "prefill")
        holders = [b for b in listed if b.phase == phase and table._holds(b, batch)]
        cheapest = min(holders, key=lambda b: (b.tokens, b.rows, b.context_blocks), default=None)
        assert table.bucket(phase, batch) == cheapest
        num_found += cheapest is not None
    assert num_found > 20


def test_hard_shapes_allow_nothing_that_is_not_listed() -> None:
    table = ShapeTable(ShapePolicy("hard", (Bucket("decode", 8, 8), Bucket("prefill", 4, 32))), LIMITS)
    assert table.cost("decode", extent(5)) == 8
    assert table.cost("decode", extent(9)) is None
    assert table.cost("prefill", extent(2, 9)) == 32
    assert table.cost("prefill", extent(5, 2)) is None
    assert table.room("prefill", extent(2, 9)) == 14


def test_rectangles_cost_their_padding() -> None:
    policy = ShapePolicy("hard", (Bucket("prefill", 2, 32), Bucket("prefill", 4, 48)), pad_rows=True)
    table = ShapeTable(policy, LIMITS)
    assert table.cost("prefill", Extent().plus(16, 1, True).plus(2, 1, True)) == 32
    assert table.cost("prefill", extent(3, 12)) == 48
    assert table.cost("prefill", extent(3, 13)) is None
    assert table.room("prefill", extent(1, 12)) == 16


@pytest.mark.parametrize(("rule", "fits"), [("none", 8), ("max_per_row", 8), ("total", 4)])
def test_context_rules_count_what_they_say(rule: str, fits: int) -> None:
    table = ShapeTable(ShapePolicy("hard", (Bucket("decode", 8, 8, 12),), context_rule=rule), LIMITS)  # type: ignore[arg-type]
    widest = max(n for n in range(1, 9) if table.cost("decode", extent(n, 1, 3)) is not None)
    assert widest == fits


def capabilities(card: type[SimulatedCuda], budget_bytes: int) -> Capabilities:
    loaded = card().load(MODEL, LoadOptions())
    kv = loaded.kv
    return replace(loaded, kv=KVSpec(kv.kind, kv.block_tokens, kv.block_bytes, budget_bytes))


def config(**options: int) -> EngineConfig:
    return EngineConfig(model=MODEL, backend="x", **options)


def test_the_cache_never_asks_for_more_than_the_budget() -> None:
    for card in (SimulatedCuda, SimulatedNeuron):
        caps = capabilities(card, budget_bytes=0)
        for blocks in (2, 3, 7, 10_000):
            layout = size_cache(replace(caps, kv=replace(caps.kv, budget_bytes=blocks * caps.kv.block_bytes)), config())
            assert layout.num_blocks <= blocks
            lines = layout.num_slots + 1 if caps.kv.kind == "slot" else layout.num_blocks
            assert lines <= blocks


def test_what_does_not_fit_is_refused_with_numbers_and_the_flag() -> None:
    caps = capabilities(SimulatedCuda, budget_bytes=64 * 5)
    with pytest.raises(ConfigError, match=r"--max-batch-total-tokens is 1000.*lower it to 64"):
        size_cache(caps, config(kv_cache_tokens=1000))
    with pytest.raises(OutOfMemory, match="lower --max-total-tokens"):
        size_cache(capabilities(SimulatedCuda, budget_bytes=64), config())
    for flag, name in (
        ("--max-batch-total-tokens", "kv_cache_tokens"),
        ("--max-batch-size", "max_sequences"),
        ("--max-batch-prefill-tokens", "max_step_tokens"),
    ):
        with pytest.raises(ConfigError, match=f"{flag} is 0; at least 1"):
            size_cache(caps, config(**{name: 0}))


def test_a_share_of_the_memory_holds_weights_reserves_and_cache() -> None:
    """`--cuda-memory-fraction`: the cache gets what weights and reserves leave of the share, or of what is free."""
    caps = capabilities(SimulatedCuda, budget_bytes=600)
    caps = replace(
        caps, weights_bytes=200, reserved_bytes={"graphs": 50}, device=replace(caps.device, memory_total_bytes=1000)
    )
    budgets = {share: within_share(caps, share).kv.budget_bytes for share in (1, 0.9, 0.5, 0.25, 0.1)}
    assert budgets == {1: 600, 0.9: 600, 0.5: 250, 0.25: 0, 0.1: 0}


def test_the_plan_of_a_share_sees_a_smaller_device() -> None:
    device = replace(capabilities(SimulatedCuda, 64).device, memory_total_bytes=1000, memory_free_bytes=700)
    assert share_of(device, 1) is device
    assert share_of(device, 0.5).memory_free_bytes == 500
    assert share_of(device, 0.9).memory_free_bytes == 700
    assert share_of(replace(device, memory_free_bytes=None), 0.9).memory_free_bytes == 900
    with pytest.raises(ConfigError, match=r"--cuda-memory-fraction is 0\.5"):
        share_of(replace(device, memory_total_bytes=0), 0.5)
