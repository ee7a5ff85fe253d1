"""Which backend and which device are served: what was asked for, or the best, and nothing slower in silence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from helpers import machines
from tokenplane_core.backend import choice, plugins
from tokenplane_core.backend.errors import BackendNotFound, BackendUnavailable, ConfigError
from tokenplane_core.backend.hardware import Hardware
from tokenplane_core.backend.records import CONTRACT_VERSION, DetectReport, Device


def answer(name: str, report: DetectReport) -> plugins.PluginAnswer:
    return plugins.PluginAnswer(name, "", "", CONTRACT_VERSION, report, 0.0)


GIB = 1 << 30


def device(
    score: int, index: int = 0, free_gib: int = 0, state: Literal["ok", "busy", "broken"] = "ok", notes: str = ""
) -> Device:
    return Device("x", index, "a card", "", 96 * GIB, ("float32",), score, free_gib * GIB, notes, state=state)


def test_the_best_found_wins_and_simulated_devices_never_do() -> None:
    slow = answer("cpu", DetectReport("found", (device(1),)))
    fast = answer("card", DetectReport("found", (device(100), device(50))))
    simulated = answer("simulated", DetectReport("found", (device(0),)))
    absent = answer("other", DetectReport("absent", reason="no such card"))
    assert choice.best([slow, simulated, absent]).name == "cpu"
    assert choice.best([slow, fast, simulated]).name == "card"
    with pytest.raises(BackendUnavailable, match="other: absent: no such card"):
        choice.best([simulated, absent])
    with pytest.raises(BackendNotFound, match="tokenplane\\[cpu\\]"):
        choice.best([])


def test_a_broken_device_is_never_replaced_by_a_slower_one_in_silence() -> None:
    cpu = answer("cpu", DetectReport("found", (device(1),)))
    broken = answer("card", DetectReport("broken", reason="driver 470 is too old, 525 is needed"))
    with pytest.raises(BackendUnavailable, match="driver 470 is too old") as caught:
        choice.best([cpu, broken])
    assert "--backend cpu" in str(caught.value)


def test_among_equals_the_most_free_memory_wins() -> None:
    full = answer("first", DetectReport("found", (device(100, free_gib=3),)))
    free = answer("second", DetectReport("found", (device(100, free_gib=2), device(100, 1, free_gib=40))))
    host = answer("cpu", DetectReport("found", (device(1, free_gib=900),)))
    assert choice.best([host, full, free]).name == "second"


def test_a_busy_accelerator_is_never_replaced_by_a_slower_one_in_silence() -> None:
    cpu = answer("cpu", DetectReport("found", (device(1),)))
    taken = (device(100, 0, state="busy", notes="used by pid 7"), device(100, 1, state="broken", notes="lost"))
    with pytest.raises(BackendUnavailable) as caught:
        choice.best([cpu, answer("card", DetectReport("found", taken))])
    assert "device 0 is busy: used by pid 7; device 1 is broken: lost" in str(caught.value)
    assert "--backend cpu" in str(caught.value)


CARD = Hardware("rocm", "2 x AMD GPU at 0000:05:00.0 and 1 more", is_accelerator=True)
DISPLAY = Hardware("xpu", "1 x Intel GPU at 0000:00:02.0, for display", is_accelerator=False)


def test_an_accelerator_without_its_plugin_is_never_replaced_by_the_cpu_in_silence() -> None:
    cpu = answer("cpu", DetectReport("found", (device(1),)))
    with pytest.raises(BackendUnavailable) as caught:
        choice.best([cpu], [CARD, DISPLAY])
    message = str(caught.value)
    assert '2 x AMD GPU at 0000:05:00.0 and 1 more: pip install "tokenplane[rocm]"' in message
    assert "--backend cpu" in message and "Intel" not in message
    with pytest.raises(BackendNotFound, match=r"tokenplane\[rocm\]"):
        choice.best([], [CARD])


def test_another_accelerator_or_a_display_gpu_changes_nothing() -> None:
    cpu = answer("cpu", DetectReport("found", (device(1),)))
    card = answer("cuda", DetectReport("found", (device(100),)))
    assert choice.best([cpu, card], [CARD]).name == "cuda"
    assert choice.best([cpu], [DISPLAY]).name == "cpu"


def test_hardware_another_plugin_has_answered_for_is_not_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = machines.two_kinds().build(tmp_path, monkeypatch)
    rocm = Device("rocm", 0, "a card", "gfx90a", 1, ("float32",), 100)
    answers = [
        answer("acme-amd", DetectReport("found", (rocm,))),
        answer("cuda", DetectReport("absent", reason="hidden")),
    ]
    assert choice.missing_hardware(answers, root) == []
    assert [hardware.backend for hardware in choice.missing_hardware(answers[:1], root)] == ["cuda"]


MIXED = (
    device(100, 0, free_gib=2),
    device(100, 1, free_gib=90, state="busy", notes="used by pid 7"),
    device(100, 2, free_gib=80),
    device(100, 3, free_gib=80),
    device(100, 4, free_gib=96, state="broken", notes="fallen off the bus"),
)


@pytest.mark.parametrize(
    ("devices", "index", "why"),
    [
        (MIXED, 2, "the most free memory of 3; passed over: 1 is busy, 4 is broken"),
        (MIXED[2:4], 2, "the first of 2 alike"),
        (MIXED[:1], 0, "the only one"),
        (MIXED[:2], 0, "the only one; passed over: 1 is busy"),
        ((device(20, 0, free_gib=90), device(100, 1, free_gib=8)), 1, "the best of 2"),
    ],
)
def test_without_an_index_the_best_device_that_is_ok_is_taken(
    devices: tuple[Device, ...], index: int, why: str
) -> None:
    chosen, reason = choice.choose_device(answer("card", DetectReport("found", devices)))
    assert (chosen.index, reason) == (index, why)


def test_a_few_bytes_do_not_decide_between_idle_cards() -> None:
    cards = (
        replace(device(100, 0), memory_free_bytes=79 * GIB),
        replace(device(100, 1), memory_free_bytes=79 * GIB + 5),
    )
    assert choice.choose_device(answer("card", DetectReport("found", cards)))[0].index == 0


def test_a_named_device_is_taken_refused_or_unknown() -> None:
    card = answer("card", DetectReport("found", MIXED))
    assert choice.choose_device(card, 0) == (MIXED[0], "as asked for")
    assert choice.choose_device(card, 1) == (MIXED[1], "as asked for, though it is busy: used by pid 7")
    with pytest.raises(BackendUnavailable, match="--device-index is 4, and card device 4 is broken: fallen off"):
        choice.choose_device(card, 4)
    with pytest.raises(ConfigError, match=r"--device-index is 9, but card has 5 device\(s\): 0, 1, 2, 3, 4"):
        choice.choose_device(card, 9)


def test_a_named_backend_without_a_device_that_is_ok_says_what_each_has() -> None:
    with pytest.raises(
        BackendUnavailable, match="card has no device that can be used: device 1 is busy: used by pid 7"
    ):
        choice.choose_device(answer("card", DetectReport("found", MIXED[1:2])))
