"""What only this package can show. Its texts are judged by `pytest --tokenplane-backend acme`."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from acme_runtime import Card, CardError, ShapeRefused

from tokenplane_acme import device
from tokenplane_acme.plugin import AcmeBackend, buckets
from tokenplane_acme.runner import AcmeStep
from tokenplane_core.backend.errors import BackendUnavailable, DeviceLost, OutOfMemory, UnsupportedModel
from tokenplane_core.backend.plugins import ask
from tokenplane_core.backend.records import KVLayout, LoadOptions, ModelSpec
from tokenplane_core.kit.checkpoint import write_tiny_llama
from tokenplane_core.kit.runner import LocalEngine
from tokenplane_core.model import describe_model

ONE = {"x": np.ones(3, np.float32)}


@pytest.fixture
def model(tmp_path: Path) -> ModelSpec:
    return describe_model(write_tiny_llama(tmp_path))


@pytest.fixture
def card() -> Iterator[Card]:
    card = Card(1 << 20)
    yield card
    card.close()


def test_it_is_installed_and_finds_its_device() -> None:
    answer = ask("acme")
    assert answer.report.status == "found", answer.report.reason
    assert answer.report.devices[0].kind == "acme"


@pytest.mark.parametrize(("cards", "status"), [("2", "found"), ("0", "absent"), ("two", "broken")])
def test_detection_says_found_absent_or_broken(cards: str, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACME_CARDS", cards)
    report = device.detect()
    assert report.status == status
    assert len(report.devices) == (2 if status == "found" else 0)
    assert bool(report.reason) != (status == "found")
    with pytest.raises(BackendUnavailable, match="no device 5"):
        device.find(5)


def test_importing_the_plugin_leaves_the_runtime_alone() -> None:
    code = "import sys, tokenplane_acme.plugin as p; p.AcmeBackend(); sys.exit('acme_runtime' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_model_it_cannot_run_is_refused_with_a_sentence(model: ModelSpec) -> None:
    with pytest.raises(UnsupportedModel, match="MambaForCausalLM"):
        AcmeBackend().load(replace(model, architecture="MambaForCausalLM"), LoadOptions())


def test_a_cache_that_does_not_fit_is_refused_and_a_smaller_one_still_fits(model: ModelSpec) -> None:
    backend = AcmeBackend()
    caps = backend.load(model, LoadOptions())
    too_many = device.MEMORY_BYTES // caps.kv.block_bytes + 1
    with pytest.raises(OutOfMemory, match="does not fit"):
        backend.kv_alloc(KVLayout(too_many, caps.kv.block_tokens, 4, 32))
    assert backend.kv_alloc(KVLayout(20, caps.kv.block_tokens, 4, 32))
    backend.close()


def test_there_is_a_bucket_for_every_batch_the_limits_allow() -> None:
    for max_sequences in (1, 3, 4, 16, 40):
        found = buckets(max_sequences, 512, 64)
        assert max(b.rows for b in found if b.phase == "decode") == max_sequences
        assert {b.context_blocks for b in found} == {16, 64}


def test_memory_on_the_card_cannot_be_read_from_the_host(card: Card) -> None:
    with pytest.raises(AttributeError):
        card.upload(ONE["x"]).__array  # type: ignore[attr-defined]  # noqa: B018


def test_a_shape_that_was_not_compiled_is_refused(card: Card) -> None:
    executable = card.compile(lambda memory, inputs: {"y": inputs["x"] * 2}, {}, ONE)
    assert card.launch(executable, ONE).read("y").tolist() == [2, 2, 2]
    with pytest.raises(ShapeRefused):
        card.launch(executable, {"x": np.ones(4, np.float32)})


def test_a_launch_returns_before_the_card_is_done(card: Card) -> None:
    may_go_on = threading.Event()

    def waits(memory: object, inputs: object) -> dict[str, np.ndarray]:
        may_go_on.wait(30)
        return {"y": np.zeros(1)}

    launch = card.launch(card.compile(waits, {}, ONE), ONE)
    assert not launch.done()
    may_go_on.set()
    assert launch.read("y").tolist() == [0] and launch.done()


def test_a_program_that_fails_is_a_lost_device(card: Card) -> None:
    launch = card.launch(card.compile(lambda memory, inputs: {"y": memory["none"]}, {}, ONE), ONE)
    with pytest.raises(CardError, match="KeyError"):
        launch.read("y")
    with pytest.raises(DeviceLost, match="KeyError"):
        AcmeStep(1, launch, np.zeros(1, np.int64), wants_logits=False, compiled=0).result()


def test_the_core_launches_a_step_before_it_reads_the_last(model: ModelSpec) -> None:
    """Two decode steps are in flight at once: the second takes its token where the first leaves it, on the card."""
    engine = LocalEngine(AcmeBackend, model)
    engine.submit([3, 5, 7], 6)
    for _ in range(3):
        engine.step()
    assert len(engine.engine._in_flight) == 1
    engine.run()
    engine.close()
