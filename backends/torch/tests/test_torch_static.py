"""What devices of fixed shapes share, on the host: their sampler and their experts, against the references."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from tokenplane_core.backend import sampling as reference
from tokenplane_core.messages import SamplingParams
from tokenplane_torch.static_experts import use_static_experts
from tokenplane_torch.static_sampler import STATIC_SAMPLING, StaticSampler, draw
from tokenplane_torch.testing import make_checkpoint
from tokenplane_torch.testing.device import PlainDevice
from tokenplane_torch.testing.driver import sampling_batch

ROWS, VOCAB = 16, 211
NOTHING = reference.History(np.zeros(0, np.int32), 0)


def random_params(rng: np.random.Generator) -> SamplingParams:
    return SamplingParams(
        temperature=float(rng.choice([0, 0.5, 1, 1.7])),
        top_k=int(rng.choice([0, 1, 5, 50, VOCAB, VOCAB + 5])),
        top_p=float(rng.choice([1, 0.9, 0.3, 1e-6])),
        min_p=float(rng.choice([0, 0.05, 0.5, 1])),
        seed=int(rng.integers(1 << 62)),
        num_logprobs=int(rng.choice([-1, 0])),
    )


@pytest.mark.parametrize("trial", range(30))
def test_every_row_is_drawn_as_the_reference_draws_it(trial: int) -> None:
    """Some rows of the logits, each with its own parameters; every third trial is full of ties."""
    rng = np.random.default_rng(trial)
    logits = (rng.normal(size=(ROWS, VOCAB)) * 3).astype(np.float32)
    if trial % 3 == 0:
        logits = np.round(logits)
    rows = np.sort(rng.choice(ROWS, 12, replace=False))
    batch = sampling_batch([random_params(rng) for _ in rows], rng.integers(1, 500, len(rows)).tolist())
    want = reference.sample(logits[rows], batch, [NOTHING] * len(rows))
    drawn = StaticSampler(PlainDevice()).draw(torch.from_numpy(logits), rows, batch, None)
    assert drawn.token_ids.shape == (ROWS,)
    assert drawn.token_ids.numpy()[rows].tolist() == want.token_ids.tolist()
    if want.logprobs is not None:
        assert drawn.logprobs is not None
        np.testing.assert_allclose(drawn.logprobs.numpy()[rows], want.logprobs, atol=1e-5)


@pytest.mark.parametrize("features", [{}, {"temperature": 1.0}, {"num_logprobs": 0}])
def test_it_declares_what_it_does(features: dict[str, float]) -> None:
    batch = sampling_batch([SamplingParams(**features)], [1])  # type: ignore[arg-type]
    assert batch.features <= STATIC_SAMPLING.features
    drawn = StaticSampler(PlainDevice()).draw(torch.zeros(1, 5), np.zeros(1, np.int64), batch, None)
    assert (drawn.logprobs is None) == ("num_logprobs" not in features)


def test_a_number_just_below_one_draws_an_id_that_has_a_chance() -> None:
    """In float32 the sums may stay below it."""
    logits = torch.full((1, 50_000), -20.0)
    logits[0, 40_000:] = -torch.inf
    parameters = torch.tensor([[1.0], [0.0], [1.0], [0.0], [1 - 2**-24], [-1.0]])
    for sums in (torch.float32, torch.float64):
        assert 39_000 < int(draw(logits, parameters, sums)) < 40_000


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_static_experts_compute_what_the_model_computes(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(family, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    token_ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        want = model(token_ids, use_cache=False).logits
        assert use_static_experts(model)
        got = model(token_ids, use_cache=False).logits
    assert model.get_experts_implementation()[""] == "tokenplane_static"
    torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)


def test_a_model_without_experts_is_left_alone(tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(make_checkpoint("llama", tmp_path))
    assert not use_static_experts(model)
