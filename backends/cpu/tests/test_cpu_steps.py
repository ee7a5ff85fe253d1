"""What a step does besides being right about tokens: sampling, slot state, and what it leaves alone."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from tokenplane_core.backend import sampling as reference
from tokenplane_core.backend.records import Capabilities
from tokenplane_core.messages import SamplingParams
from tokenplane_cpu.plugin import CpuBackend
from tokenplane_torch.testing import Driver
from tokenplane_torch.testing.driver import Live, sampling_batch

Loaded = tuple[CpuBackend, Capabilities]
CacheBlocks = Callable[[CpuBackend], list[NDArray[np.uint8]]]

PROMPT = [random.Random(5).randrange(3, 320) for _ in range(45)]
WARM = SamplingParams(temperature=0.9, seed=2**63 + 11)
PARAMS = {
    "greedy": SamplingParams(),
    "plain": WARM,
    "filters": SamplingParams(temperature=1.3, top_k=30, top_p=0.9, min_p=0.01, typical_p=0.95, seed=4),
    "penalties": SamplingParams(
        temperature=0.8, repetition_penalty=1.4, presence_penalty=1.5, frequency_penalty=0.7, seed=5
    ),
    "greedy_penalties": SamplingParams(presence_penalty=2.0, frequency_penalty=1.0, repetition_penalty=1.2),
    "bias": SamplingParams(temperature=0.7, logit_bias={7: 9.0, 8: float("-inf")}, seed=6),
}


def run(driver: Driver, live: Live, n: int) -> list[int]:
    driver.step({live: len(live.token_ids) - live.computed})
    while len(live.generated) < n:
        driver.step({live: 1})
    return live.generated


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_the_device_draws_what_the_reference_draws_from_its_logits(backend: Loaded, params: SamplingParams) -> None:
    want, driver = [], Driver(*backend)
    live = driver.open(PROMPT, params)
    for _ in range(12):
        output = driver.step({live: len(live.token_ids) - live.computed}, return_logits=True)
        assert output.logits is not None and output.logits.shape == (1, 320) and len(output.token_ids) == 0
        history = reference.History(np.array(live.token_ids, np.int32), len(PROMPT))
        batch = sampling_batch([params], [len(live.token_ids)])
        want.append(int(reference.sample(output.logits, batch, [history]).token_ids[0]))
        live.token_ids.append(want[-1])
    driver = Driver(*backend)
    assert run(driver, driver.open(PROMPT, params), 12) == want


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_preemption_by_recompute_changes_no_token(backend: Loaded, params: SamplingParams) -> None:
    """The tokens generated before come back as a prompt, and still count as generated."""
    driver = Driver(*backend)
    whole = list(run(driver, driver.open(PROMPT, params), 14))
    driver = Driver(*backend, seed=1)
    first = driver.open(PROMPT, params)
    half = run(driver, first, 6)
    driver.close(first)
    again = driver.open(PROMPT + half, params, num_prompt_tokens=len(PROMPT))
    driver.step({again: 20})
    assert run(driver, again, 14) == whole


def test_rows_with_unlike_parameters_do_not_touch_each_other(backend: Loaded) -> None:
    alone = []
    for params in PARAMS.values():
        driver = Driver(*backend)
        alone.append(run(driver, driver.open(PROMPT, params), 10))
    driver = Driver(*backend)
    lives = [driver.open(PROMPT, params) for params in PARAMS.values()]
    for live in lives:
        driver.step({live: len(PROMPT)})
    for _ in range(9):
        driver.step({live: 1 for live in lives})
    assert [live.generated for live in lives] == alone


def test_a_slot_forgets_its_last_sequence(backend: Loaded) -> None:
    """Penalties must not see the tokens of whoever lived in the slot before, nor its blocks."""
    params = PARAMS["greedy_penalties"]
    fresh = Driver(*backend, num_slots=1)
    want = run(fresh, fresh.open(PROMPT[:20], params), 10)
    used = Driver(*backend, num_slots=1)
    before = used.open(PROMPT[::-1], params)
    run(used, before, 30)
    used.close(before)
    assert run(used, used.open(PROMPT[:20], params), 10) == want


def test_tokens_of_a_prefix_hit_count_for_penalties(backend: Loaded) -> None:
    params = PARAMS["penalties"]
    driver = Driver(*backend)
    want = run(driver, driver.open(PROMPT, params), 10)
    driver = Driver(*backend)
    first = driver.open(PROMPT)
    driver.step({first: len(PROMPT)})
    second = driver.open(PROMPT, params, share=first)
    assert second.computed == 32
    assert run(driver, second, 10) == want


def test_logprobs_agree_with_the_logits(backend: Loaded) -> None:
    driver = Driver(*backend)
    live = driver.open(PROMPT)
    logits = driver.step({live: len(PROMPT)}, return_logits=True).logits
    assert logits is not None
    scores = reference.log_softmax(logits[0])
    driver = Driver(*backend)
    rows = [
        driver.open(PROMPT, SamplingParams(num_logprobs=4)),
        driver.open(PROMPT),
        driver.open(PROMPT, SamplingParams(temperature=0.5, top_k=3, num_logprobs=0, processed_logprobs=True, seed=1)),
    ]
    output = driver.step({live: len(PROMPT) for live in rows})
    assert output.logprobs is not None and output.top_ids is not None and output.top_logprobs is not None
    assert output.top_ids.shape == (3, 4)
    assert output.top_ids[0].tolist() == np.argsort(-scores)[:4].tolist()
    np.testing.assert_allclose(output.top_logprobs[0], np.sort(scores)[::-1][:4], atol=1e-4)
    assert output.logprobs[0] == pytest.approx(scores[output.token_ids[0]], abs=1e-4)
    assert np.isnan(output.logprobs[1]) and np.isnan(output.top_logprobs[1:]).all()
    best = np.sort(scores)[::-1][:3] / 0.5
    assert output.logprobs[2] == pytest.approx(
        (scores[output.token_ids[2]] / 0.5) - np.log(np.exp(best).sum()), abs=1e-3
    )


def test_a_step_of_unfinished_prompts_draws_nothing(backend: Loaded) -> None:
    driver = Driver(*backend)
    live = driver.open(PROMPT)
    output = driver.step({live: 20})
    assert output.token_ids.shape == (0,) and output.token_ids.dtype == np.int32 and output.logprobs is None
    assert live.token_ids == PROMPT


@pytest.mark.parametrize("hook", ["prefill", "decode"])
def test_a_step_writes_the_new_tokens_and_nothing_else(backend: Loaded, hook: str, cache_blocks: CacheBlocks) -> None:
    """Canaries in every block; padding rows and padding tokens leave no trace either."""
    driver = Driver(*backend)
    pieces = cache_blocks(backend[0])
    for piece in pieces:
        piece.fill(0x3C)
    lives = [driver.open(PROMPT), driver.open(PROMPT[:33])]
    driver.step({live: len(live.token_ids) for live in lives})
    before = [piece.copy() for piece in pieces]
    driver.step({live: 1 for live in lives}, padding=3, hook=hook)
    for piece, old in zip(pieces, before, strict=True):
        changed = (piece != old).sum(axis=1)
        assert set(changed.nonzero()[0].tolist()) == {live.blocks[-1] for live in lives}
        assert changed.max() <= 2 * 16 * 4  # of a token: KV heads, head_dim, float32


def test_a_decode_step_through_the_prefill_hook_is_the_same_step(backend: Loaded) -> None:
    tokens = []
    for hook in ("decode", "prefill"):
        driver = Driver(*backend)
        live = driver.open(PROMPT, WARM)
        driver.step({live: len(PROMPT)})
        for _ in range(8):
            driver.step({live: 1}, hook=hook)
        tokens.append(live.generated)
    assert tokens[0] == tokens[1]


def test_a_sequence_may_fill_the_longest_length(backend: Loaded) -> None:
    longest = backend[1].limits.max_model_tokens
    driver = Driver(*backend)
    live = driver.open([PROMPT[i % 45] for i in range(longest - 1)])
    driver.step({live: longest - 1})
    assert len(live.token_ids) == longest


def test_device_seconds_are_measured(backend: Loaded) -> None:
    driver = Driver(*backend)
    output = driver.step({driver.open(PROMPT): len(PROMPT)})
    assert 0 < output.device_s < 60 and output.compiled == 0
