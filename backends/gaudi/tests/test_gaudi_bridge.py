"""The thin file over Intel's bridge: what it asks for, sets and refuses, over the stand-in."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from habana_stand_in import GIB, Refused, Runtime, open_bridge

from tokenplane_core.backend.errors import BackendUnavailable
from tokenplane_gaudi.bridge import Bridge, GaudiClock


@pytest.fixture
def runtime() -> Runtime:
    return Runtime()


@pytest.fixture
def bridge(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> Bridge:
    return open_bridge(monkeypatch, runtime, {})


def test_without_intels_software_the_message_says_what_is_missing() -> None:
    with pytest.raises(BackendUnavailable, match=r"does not load \(ModuleNotFoundError.*Intel's images"):
        Bridge("", {})


def test_eager_mode_is_refused(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendUnavailable, match=r"PT_HPU_LAZY_MODE is 0.*unset it"):
        open_bridge(monkeypatch, runtime, {"PT_HPU_LAZY_MODE": "0"})


def test_a_bridge_for_another_torch_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mismatch:
        def find_spec(self, name: str, *_: object) -> None:
            if name.startswith("habana_frameworks"):
                raise AssertionError("Compile-time major/minor PyTorch version 2.10 differs from run-time 2.13")

    monkeypatch.setattr(sys, "meta_path", [Mismatch(), *sys.meta_path])
    with pytest.raises(BackendUnavailable, match=r"version 2\.10 differs"):
        Bridge("", {})


def test_settings_go_out_before_the_import_and_leave_the_users_alone(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = {"PT_HPU_WEIGHT_SHARING": "1"}
    open_bridge(monkeypatch, runtime, environ, module="5")
    assert environ == {"PT_HPU_WEIGHT_SHARING": "1", "PT_HPU_LAZY_MODE": "1", "HABANA_VISIBLE_MODULES": "5"}


def test_a_card_without_a_number_takes_any(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    environ: dict[str, str] = {}
    open_bridge(monkeypatch, runtime, environ)
    assert "HABANA_VISIBLE_MODULES" not in environ


def test_memory_is_what_the_bridge_counts(bridge: Bridge) -> None:
    assert (bridge.free_bytes(), bridge.total_bytes()) == (90 * GIB, 96 * GIB)
    assert bridge.peak_bytes() == 4 * GIB  # 5 at most, 1 of them taken now
    assert bridge.peak_bytes() == 0


def test_results_come_back_as_they_were_when_they_were_asked_for(bridge: Bridge) -> None:
    buffer = torch.arange(4)
    clock = GaudiClock(bridge)
    pending = clock.read_back([buffer, buffer.float()])
    buffer.zero_()  # as the next replay would
    assert not pending.done()
    with pytest.raises(Refused, match="before the event was waited for"):
        pending.seconds()
    first, second = pending.arrays()
    assert pending.done()
    assert first.tolist() == [0, 1, 2, 3] and second.dtype == np.float32
    assert pending.seconds() == pytest.approx(1e-3)  # one tick of the stand-in's clock is a millisecond
