"""Detection of Gaudi cards on recorded machines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import machines
from helpers.machines import Machine, gaudi_card, pci
from tokenplane_core.backend.records import DetectReport
from tokenplane_gaudi.device import detect

GIB = 1 << 30
Look = Callable[[Machine], DetectReport]


@pytest.fixture
def look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Look:
    return lambda machine: detect(machine.build(tmp_path, monkeypatch), machine.environ)


def test_eight_cards_one_taken_one_in_reset_one_failed(look: Look) -> None:
    report = look(machines.eight_gaudi2())
    states = {device.index: device.state for device in report.devices if device.state != "ok"}
    assert len(report.devices) == 8 and states == {0: "busy", 2: "busy", 6: "broken"}
    taken, free, resetting, failed = (report.devices[i] for i in (0, 1, 2, 6))
    assert taken.notes == "used by pid 1234 (python3), module 3, habanalabs 1.21.0-abc, NUMA node 0"
    assert (free.name, free.arch, free.uuid) == ("Intel Gaudi 2", "gaudi2", "2")
    assert free.memory_total_bytes == 96 * GIB and free.memory_free_bytes is None and free.score == 100
    assert "In reset after device release" in resetting.notes and "wait" in resetting.notes
    assert "'Disabled'" in failed.notes and "hl-smi --reset" in failed.notes


@pytest.mark.parametrize(
    ("device_type", "device", "name", "memory_gib"),
    [
        ("GAUDI SEC", 0x1010, "Intel Gaudi", 32),
        ("GAUDI2C", 0x1020, "Intel Gaudi 2", 96),
        ("GAUDI3", 0x1060, "Intel Gaudi 3", 128),
        ("a name of a later driver", 0x1060, "Intel Gaudi 3", 128),
    ],
)
def test_every_generation_has_its_name_and_memory(
    look: Look, device_type: str, device: int, name: str, memory_gib: int
) -> None:
    (found,) = look(gaudi_card(0, device_type, device, 0)).devices
    assert (found.name, found.memory_total_bytes) == (name, memory_gib * GIB)


def test_the_class_of_older_drivers_is_read_too(look: Look) -> None:
    files = {f"sys/class/habanalabs/hl{i}/device_type": "GAUDI\n" for i in (0, 10, 2)}
    report = look(Machine(files, nodes={f"dev/hl{i}": 0o666 for i in (0, 2, 10)}))
    assert [(device.index, device.arch) for device in report.devices] == [(0, "gaudi"), (1, "gaudi"), (2, "gaudi")]


def test_other_drivers_of_the_accel_class_are_passed_over(look: Look) -> None:
    npu = Machine({"sys/class/accel/accel0/device/npu_busy_time_us": "1\n"}, nodes={"dev/accel/accel0": 0o666})
    assert look(npu).status == "absent"


def test_the_environment_chooses_modules(look: Look) -> None:
    report = look(machines.eight_gaudi2().told(HABANA_VISIBLE_MODULES="0,2"))
    assert [(device.index, device.uuid) for device in report.devices] == [(0, "2"), (1, "0")]
    assert len(look(machines.eight_gaudi2().told(HABANA_VISIBLE_MODULES="all")).devices) == 8


def test_hidden_cards_are_absent_and_the_variable_is_named(look: Look) -> None:
    report = look(machines.gaudi3().told(HABANA_VISIBLE_MODULES="7"))
    assert report.status == "absent" and "HABANA_VISIBLE_MODULES='7' hides every Gaudi card" in report.reason


def test_a_container_has_the_cards_it_was_given(look: Look) -> None:
    machine = machines.eight_gaudi2()
    for i in (0, 1, 2, 3, 4, 6):
        del machine.nodes[f"dev/accel/accel{i}"]
    assert [device.uuid for device in look(machine).devices] == ["6", "4"]


def test_a_container_that_was_given_none_says_how(look: Look) -> None:
    machine = machines.gaudi3()
    machine.nodes.clear()
    report = look(machine)
    assert report.status == "broken" and "--device /dev/accel/accel0" in report.reason


def test_without_permission_a_card_is_broken(look: Look) -> None:
    machine = machines.gaudi3()
    machine.nodes["dev/accel/accel0"] = 0o660
    assert "no permission to open /dev/accel/accel0" in look(machine).devices[0].notes


@pytest.mark.parametrize(("driver", "word"), [("", "modprobe habanalabs"), ("vfio-pci", "held by vfio-pci")])
def test_a_card_without_its_driver_is_broken(look: Look, driver: str, word: str) -> None:
    report = look(pci("0000:19:00.0", 0x1DA3, 0x1060, 0x1200, driver))
    assert report.status == "broken" and word in report.reason


def test_nothing_is_absent(look: Look) -> None:
    assert look(machines.XEON).reason == "no Intel Gaudi card"
