"""Detection of AWS Neuron devices on recorded machines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import machines
from helpers.machines import Machine, neuron_chips, pci
from tokenplane_core.backend.records import DetectReport
from tokenplane_neuron.device import detect

GIB = 1 << 30
Look = Callable[[Machine], DetectReport]


@pytest.fixture
def look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Look:
    return lambda machine: detect(machine.build(tmp_path, monkeypatch), machine.environ)


def test_sixteen_chips_of_which_one_is_taken(look: Look) -> None:
    report = look(machines.trn2())
    assert [device.index for device in report.devices] == list(range(16))
    taken, free = report.devices[:2]
    assert taken.state == "busy" and taken.notes.startswith("used by pid 77 (python3), 8 NeuronCores")
    assert taken.memory_free_bytes == 88 * GIB
    assert (free.name, free.arch, free.state) == ("AWS Trainium2", "neuroncore-v3", "ok")
    assert free.memory_total_bytes == free.memory_free_bytes == 96 * GIB
    assert free.uuid == "00000000000000a1" and free.score == 100
    assert report.devices[15].notes == "8 NeuronCores, driver 2.24.7.0, NUMA node 1"


@pytest.mark.parametrize(
    ("device", "cores", "name", "memory_gib"),
    [
        (0x7066, 4, "AWS Inferentia", 8),
        (0x7164, 2, "AWS Trainium1", 32),
        (0x7264, 2, "AWS Inferentia2", 32),
        (0x7564, 8, "AWS Trainium3", 144),
    ],
)
def test_every_chip_has_its_name_cores_and_memory(
    look: Look, device: int, cores: int, name: str, memory_gib: int
) -> None:
    (found,) = look(neuron_chips(1, device, cores)).devices
    assert (found.name, found.memory_total_bytes) == (name, memory_gib * GIB)
    assert f"{cores} NeuronCores" in found.notes


@pytest.mark.parametrize(
    ("environ", "indices", "note"),
    [
        ({"NEURON_RT_VISIBLE_CORES": "4-11"}, [1, 2], "8 NeuronCores, driver"),
        ({"NEURON_RT_VISIBLE_CORES": "0,2"}, [0], "cores 0, 2 visible"),
        ({"NEURON_RT_VISIBLE_CORES": "8", "NEURON_LOGICAL_NC_CONFIG": "1"}, [1], "cores 8 visible"),
        ({"NEURON_RT_VISIBLE_CORES": "8", "NEURON_RT_VIRTUAL_CORE_SIZE": "2"}, [2], "cores 8 visible"),
    ],
)
def test_the_environment_chooses_cores(look: Look, environ: dict[str, str], indices: list[int], note: str) -> None:
    """Of a Trainium2 the runtime makes four logical cores unless told otherwise."""
    report = look((machines.XEON + neuron_chips(4, 0x7364, 8)).told(**environ))
    assert [device.index for device in report.devices] == indices
    assert note in report.devices[0].notes


def test_hidden_chips_are_absent_and_the_variable_is_named(look: Look) -> None:
    report = look(machines.inf2().told(NEURON_RT_VISIBLE_CORES="64"))
    assert report.status == "absent" and "NEURON_RT_VISIBLE_CORES='64' hides every Neuron device" in report.reason


def test_a_chip_without_its_driver_is_broken(look: Look) -> None:
    report = look(pci("0000:10:1e.0", 0x1D0F, 0x7364, 0x0880))
    assert report.status == "broken"
    assert "Trainium2 at 0000:10:1e.0" in report.reason and "modprobe neuron" in report.reason


def test_a_container_that_was_given_no_chip_says_how(look: Look) -> None:
    machine = machines.inf2()
    machine.nodes.clear()
    assert "--device /dev/neuron0" in look(machine).reason


def test_without_permission_a_chip_is_broken(look: Look) -> None:
    machine = machines.inf2()
    machine.nodes["dev/neuron0"] = 0o600
    (device,) = look(machine).devices
    assert device.state == "broken" and "no permission to open /dev/neuron0" in device.notes


def test_device_files_are_enough_where_no_pci_bus_is_shown(look: Look) -> None:
    folder = "sys/devices/virtual/neuron_device/neuron0"
    files = {f"{folder}/info/architecture/device_name": "Inferentia2\n", f"{folder}/neuron_core0/uevent": ""}
    (device,) = look(Machine(files, nodes={"dev/neuron0": 0o666})).devices
    assert device.name == "AWS Inferentia2" and device.memory_total_bytes == 32 * GIB


def test_nothing_is_absent(look: Look) -> None:
    assert look(machines.XEON).reason == "no AWS Neuron device"
