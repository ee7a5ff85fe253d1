"""Hardware that is plainly there is named even where its plugin is not installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import machines
from helpers.machines import MACHINES, Machine, pci
from tokenplane_core.backend.hardware import without_plugin

INSTALLED = ("cpu",)

KINDS = {
    "eight H100": ("cuda", "8 x NVIDIA GPU at 0000:1b:00.0 and 7 more"),
    "eight MI300X": ("rocm", "8 x AMD GPU at 0000:05:00.0 and 7 more"),
    "Intel Max 1550": ("xpu", "2 x Intel GPU at 0000:29:00.0 and 1 more"),
    "Arc desktop": ("xpu", "1 x Intel GPU at 0000:03:00.0"),
    "eight Gaudi 2": ("gaudi", "8 x Intel Gaudi at 0000:19:00.0 and 7 more"),
    "trn2": ("neuron", "16 x AWS Neuron device at 0000:10:1e.0 and 15 more"),
    "v5e-8": ("tpu", "8 x Google TPU chip at 0000:00:04.0 and 7 more"),
}


@pytest.mark.parametrize("name", KINDS)
def test_an_accelerator_without_its_plugin_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = MACHINES[name]().build(tmp_path, monkeypatch)
    backend, what = KINDS[name]
    (hardware,) = without_plugin(INSTALLED, root)
    assert (hardware.backend, hardware.what, hardware.is_accelerator) == (backend, what, True)
    assert hardware.install == f'pip install "tokenplane[{backend}]"'
    assert without_plugin((*INSTALLED, backend), root) == []


def test_a_machine_with_two_kinds_of_card_lacks_two_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = machines.two_kinds().build(tmp_path, monkeypatch)
    assert [hardware.backend for hardware in without_plugin(INSTALLED, root)] == ["cuda", "rocm"]
    assert [hardware.backend for hardware in without_plugin(("cuda",), root)] == ["rocm"]


@pytest.mark.parametrize(
    "machine",
    [
        machines.integrated_gpu(0x3E92),
        pci("0000:e6:00.0", 0x1002, 0x164E, 0x0300, "amdgpu", mem_info_vram_total=512 << 20),
    ],
    ids=["Intel", "AMD"],
)
def test_the_display_part_of_a_processor_is_no_accelerator(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (hardware,) = without_plugin(INSTALLED, machine.build(tmp_path, monkeypatch))
    assert not hardware.is_accelerator and hardware.what.endswith("for display")


def test_other_devices_of_the_same_vendors_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = [
        pci("0000:01:00.1", 0x10DE, 0x22BE, 0x0403),  # the sound device of a graphics card
        pci("0000:05:00.0", 0x10DE, 0x22A3, 0x0680),  # NVSwitch
        pci("0000:00:1f.6", 0x8086, 0x1A1D, 0x0200),  # network
        pci("0000:00:05.0", 0x1D0F, 0xEC20, 0x0200),  # Amazon's network
        pci("0000:00:03.0", 0x1AE0, 0x0042, 0x0200),  # Google's network
    ]
    assert without_plugin(INSTALLED, machines.merged(others).build(tmp_path, monkeypatch)) == []


def test_device_files_count_where_no_pci_bus_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Machine(nodes={"dev/nvidia0": 0o666, "dev/neuron0": 0o666}).build(tmp_path, monkeypatch)
    found = {hardware.backend: hardware.what for hardware in without_plugin(INSTALLED, root)}
    assert found == {"cuda": "NVIDIA GPU (/dev/nvidia0)", "neuron": "AWS Neuron device (/dev/neuron0)"}


def test_an_empty_machine_lacks_nothing(tmp_path: Path) -> None:
    assert without_plugin((), tmp_path) == []
