"""Prompts that arrive together and begin alike: the common part is computed once, whatever becomes of who does it."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.model_folder import make_text_model
from tokenplane_core.kit.runner import LocalEngine
from tokenplane_core.kit.simulated import SimulatedCuda, SimulatedGaudi, SimulatedTpu, oracle
from tokenplane_core.model import describe_model

COMMON = [7 * i % 500 for i in range(900)]


@pytest.fixture
def engine(tmp_path: Path) -> LocalEngine:
    return make(tmp_path)


def make(folder: Path, plugin: type = SimulatedCuda, prefix_cache: bool = True) -> LocalEngine:
    return LocalEngine(plugin, describe_model(make_text_model(folder)), prefix_cache=prefix_cache)


def prompts(count: int, common: int = 900, own: int = 100) -> list[list[int]]:
    return [COMMON[:common] + [(i * 31 + j) % 500 for j in range(own)] for i in range(count)]


def computed(engine: LocalEngine) -> int:
    """Tokens that steps have computed so far, without padding."""
    return engine.engine.stats.step_tokens


@pytest.mark.parametrize("plugin", [SimulatedCuda, SimulatedTpu, SimulatedGaudi])
def test_the_common_part_is_computed_once(plugin: type, tmp_path: Path) -> None:
    engine = make(tmp_path, plugin)
    wanted = prompts(8)
    texts = engine.generate(wanted, 4)
    assert texts == [oracle(prompt, 4, 512) for prompt in wanted]
    block = engine.engine.layout.block_tokens
    assert computed(engine) <= 900 + 8 * (100 + block + 4)
    engine.close()


def test_without_the_prefix_cache_everybody_computes(tmp_path: Path) -> None:
    engine = make(tmp_path, prefix_cache=False)
    engine.generate(prompts(8), 4)
    assert computed(engine) >= 8 * 1000


def test_a_short_common_part_is_not_waited_for(engine: LocalEngine) -> None:
    ids = [engine.submit(prompt, 4) for prompt in prompts(4, common=40, own=60)]
    engine.step()
    assert engine.engine.stats.num_waiting == 0, "all are in the first step"
    engine.run()
    assert all(len(engine.outcomes[i].token_ids) == 4 for i in ids)


def test_who_waits_goes_on_when_the_one_ahead_is_cancelled(engine: LocalEngine) -> None:
    first, *others = [engine.submit(prompt, 4) for prompt in prompts(3)]
    engine.step()
    assert engine.engine.stats.num_waiting == 2
    engine.cancel(first)
    engine.run()
    assert [engine.outcomes[i].token_ids for i in others] == [oracle(p, 4, 512) for p in prompts(3)[1:]]


def test_who_waits_may_be_cancelled(engine: LocalEngine) -> None:
    first, second, third = [engine.submit(prompt, 4) for prompt in prompts(3)]
    engine.step()
    engine.cancel(second)
    engine.run()
    assert not engine.outcomes[second].token_ids
    assert [engine.outcomes[i].finish_reason for i in (first, third)] == ["length", "length"]


def test_others_overtake_who_waits(engine: LocalEngine) -> None:
    for prompt in prompts(2):
        engine.submit(prompt, 4)
    other = engine.submit([5] * 50, 1)
    engine.step()
    engine.step()
    assert engine.outcomes[other].token_ids and computed(engine) == 1000 + 50
    engine.run()
