"""The plugin as the core meets it, and models whose attention is more than plain."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from habana_stand_in import CARD, Runtime, StandInBackend

import tokenplane_gaudi
from tokenplane_core.backend.errors import BackendUnavailable, OutOfMemory
from tokenplane_core.backend.hookspecs import hookimpl
from tokenplane_core.backend.records import DetectReport, KVLayout, LoadOptions, ModelSpec
from tokenplane_core.kit.laws import Subject
from tokenplane_core.model import describe_model
from tokenplane_gaudi.device import detect
from tokenplane_gaudi.plugin import GaudiBackend
from tokenplane_torch.static_sampler import STATIC_SAMPLING
from tokenplane_torch.testing import make_checkpoint, reference_greedy

WITHOUT_TORCH = """
import sys
for name in ("torch", "transformers", "habana_frameworks", "optimum"):
    sys.modules[name] = None  # importing it raises ImportError
from tokenplane_gaudi.plugin import GaudiBackend
print(GaudiBackend().detect().status)
"""


def test_detection_works_without_torch_and_without_intels_software() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("absent", "found", "broken")


def test_capabilities_state_the_facts(model: ModelSpec) -> None:
    plugin = StandInBackend()
    facts = plugin.load(model, LoadOptions())
    assert (facts.backend, facts.version, facts.device) == ("gaudi", tokenplane_gaudi.__version__, CARD)
    assert (facts.mixed, facts.async_depth) == (False, 1)
    assert (facts.shapes.mode, facts.shapes.pad_rows, facts.shapes.context_rule) == ("hard", True, "total")
    assert (facts.limits.max_sequences, facts.limits.max_prefill_rows) == (16, 4)
    assert (facts.kv.kind, facts.kv.block_tokens) == ("paged", 128)
    assert facts.sampling == STATIC_SAMPLING
    assert facts.kernels["attention"].startswith("prefill: FusedSDPA") and "not " not in facts.kernels["attention"]
    assert facts.kv.budget_bytes == plugin.runtime.free_bytes - sum(facts.reserved_bytes.values())
    assert facts.reserved_bytes["headroom"] == CARD.memory_total_bytes // 5
    assert plugin.environ["HABANA_VISIBLE_MODULES"] == CARD.uuid
    plugin.close()


def test_the_users_wishes_are_honoured_within_reason(model: ModelSpec) -> None:
    plugin = StandInBackend()
    limits = plugin.load(model, LoadOptions(max_sequences=5, max_step_tokens=300)).limits
    assert (limits.max_sequences, limits.max_step_tokens) == (5, 300)
    limits = plugin.load(model, LoadOptions(max_sequences=10**6, max_step_tokens=10**9)).limits
    assert (limits.max_sequences, limits.max_step_tokens) == (256, 4 * 512)  # prompts are no longer than 512
    plugin.close()


def test_a_machine_without_a_card_gets_a_reason(model: ModelSpec, tmp_path: Path) -> None:
    class NoCard(GaudiBackend):
        @hookimpl
        def detect(self) -> DetectReport:
            return detect(tmp_path, {})

    with pytest.raises(BackendUnavailable, match=r"gaudi: there is no device 0; no Intel Gaudi card"):
        NoCard().load(model, LoadOptions())


def test_a_cache_that_does_not_fit_is_refused(model: ModelSpec) -> None:
    plugin = StandInBackend(Runtime(free_bytes=1 << 30))
    facts = plugin.load(model, LoadOptions())
    assert facts.kv.budget_bytes == 0  # the headroom alone is more
    blocks = (1 << 30) // facts.kv.block_bytes + 1
    with pytest.raises(OutOfMemory, match=f"KV cache of {blocks} blocks"):
        plugin.kv_alloc(KVLayout(blocks, 128, 4, 4))
    plugin.close()


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "mistral", "deepseek_v3"])
def test_soft_caps_sinks_windows_and_latent_attention_equal_transformers(family: str, tmp_path: Path) -> None:
    """Greedy tokens in float32, from batches of mixed lengths, a second time over shared blocks."""
    folder = make_checkpoint(family, tmp_path)
    model = replace(describe_model(folder, dtype="float32"), max_model_tokens=256)
    rng = random.Random(family)
    prompts = [[rng.randrange(3, 320) for _ in range(length)] for length in (1, 9, 40, 127, 128, 140)]
    engine = Subject("gaudi", StandInBackend, model).engine(max_sequences=4, max_step_tokens=1024)
    expected = [reference_greedy(folder, prompt, 5) for prompt in prompts]
    assert engine.generate(prompts, 5) == expected
    assert engine.generate(prompts, 5) == expected
    assert engine.engine.stats.compiled_shapes == 0
    engine.close()
