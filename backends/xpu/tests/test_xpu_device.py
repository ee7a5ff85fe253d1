"""Detection of Intel GPUs on recorded machines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from helpers import machines
from helpers.machines import CPU_TORCH, LEVEL_ZERO, XPU_TORCH, Machine, intel_card, pci
from tokenplane_core.backend.records import DetectReport
from tokenplane_xpu.device import detect

GIB = 1 << 30
Look = Callable[[Machine], DetectReport]


@pytest.fixture
def look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Look:
    return lambda machine: detect(machine.build(tmp_path, monkeypatch), machine.environ, machine.torch)


def one_card(device: int, bar_bytes: int) -> Machine:
    return replace(machines.XEON + intel_card("0000:03:00.0", device, "xe", 128, bar_bytes), torch=XPU_TORCH)


def test_a_card_of_two_tiles_is_two_devices(look: Look) -> None:
    devices = look(machines.max_1550()).devices
    assert [device.index for device in devices] == [0, 1, 2, 3]
    assert {device.memory_total_bytes for device in devices} == {64 * GIB}
    assert devices[1].name == "Intel Data Center GPU Max 1550" and devices[1].arch == "xe-hpc"
    assert devices[1].notes == "tile 1 of 0000:29:00.0, driver i915, NUMA node 0"
    assert devices[1].score == 100 and devices[1].state == "ok"


def test_in_the_composite_hierarchy_it_is_one(look: Look) -> None:
    devices = look(machines.max_1550().told(ZE_FLAT_DEVICE_HIERARCHY="COMPOSITE")).devices
    assert [device.memory_total_bytes for device in devices] == [128 * GIB] * 2


def test_beside_a_card_the_integrated_gpu_is_left_out(look: Look) -> None:
    report = look(machines.arc_desktop())
    (device,) = report.devices
    assert device.name == "Intel Arc B580" and "0000:00:02.0 is left out" in report.reason


def test_the_gpu_of_a_core_ultra_scores_between_processor_and_card(look: Look) -> None:
    (device,) = look(replace(machines.LAPTOP + machines.integrated_gpu(0x7D55), torch=XPU_TORCH)).devices
    assert 1 < device.score < 100 and device.memory_total_bytes == 32 * GIB
    assert "shares the host's memory" in device.notes


def test_an_integrated_gpu_torch_does_not_know_is_never_chosen_unasked(look: Look) -> None:
    (device,) = look(machines.old_integrated()).devices
    assert device.score == 0 and "never chosen unasked" in device.notes


@pytest.mark.parametrize(
    ("device", "bar_bytes", "memory_bytes"),
    [
        (0xE20B, 16 * GIB, 12 * GIB),  # the window is rounded up to a power of two
        (0x56A0, 8 * GIB, 8 * GIB),  # the A770 with half the memory
        (0x56A0, 256 << 20, 16 * GIB),  # no Resizable BAR
        (0xE2FF, 32 * GIB, 32 * GIB),  # a card newer than the table
    ],
)
def test_memory_is_the_published_one_as_far_as_the_window_shows_it(
    look: Look, device: int, bar_bytes: int, memory_bytes: int
) -> None:
    (found,) = look(one_card(device, bar_bytes)).devices
    assert found.memory_total_bytes == memory_bytes


def test_memory_the_driver_states_wins(look: Look) -> None:
    machine = one_card(0xE20B, 16 * GIB)
    machine.files["sys/bus/pci/devices/0000:03:00.0/drm/card0/lmem_total_bytes"] = f"{11 * GIB}\n"
    assert look(machine).devices[0].memory_total_bytes == 11 * GIB


@pytest.mark.parametrize(
    ("environ", "kept"),
    [
        ({"ZE_AFFINITY_MASK": "1,3"}, ["29:00.0/1", "3a:00.0/1"]),
        ({"ZE_AFFINITY_MASK": "2.0"}, ["3a:00.0/0"]),
        ({"ONEAPI_DEVICE_SELECTOR": "level_zero:0"}, ["29:00.0/0"]),
        ({"ONEAPI_DEVICE_SELECTOR": "opencl:cpu;level_zero:gpu;!level_zero:0,1"}, ["3a:00.0/0", "3a:00.0/1"]),
        ({"ONEAPI_DEVICE_SELECTOR": "!*:0"}, ["29:00.0/1", "3a:00.0/0", "3a:00.0/1"]),
        ({"ZE_AFFINITY_MASK": "2,3", "ONEAPI_DEVICE_SELECTOR": "*:1"}, ["3a:00.0/1"]),
    ],
)
def test_the_environment_chooses_devices(look: Look, environ: dict[str, str], kept: list[str]) -> None:
    devices = look(machines.max_1550().told(**environ)).devices
    assert [device.uuid.removeprefix("0000:") for device in devices] == kept
    assert [device.index for device in devices] == list(range(len(kept)))


@pytest.mark.parametrize(("variable", "value"), [("ZE_AFFINITY_MASK", "9"), ("ONEAPI_DEVICE_SELECTOR", "opencl:cpu")])
def test_hidden_cards_are_absent_and_the_variable_is_named(look: Look, variable: str, value: str) -> None:
    report = look(machines.max_1550().told(**{variable: value}))
    assert report.status == "absent" and f"{variable}={value!r} hides every Intel GPU" in report.reason


@pytest.mark.parametrize(
    ("machine", "note"),
    [
        (pci("0000:03:00.0", 0x8086, 0xE20B, 0x0300, "vfio-pci"), "held by the kernel driver vfio-pci"),
        (pci("0000:03:00.0", 0x8086, 0xE20B, 0x0300), "modprobe xe"),
        (pci("0000:03:00.0", 0x8086, 0xE20B, 0x0300, "xe"), "/dev/dri/renderD128 is missing"),
    ],
)
def test_a_card_that_cannot_be_opened_is_broken(look: Look, machine: Machine, note: str) -> None:
    (device,) = look(replace(machine + LEVEL_ZERO, torch=XPU_TORCH)).devices
    assert device.state == "broken" and note in device.notes


def test_a_missing_level_zero_driver_is_noted(look: Look) -> None:
    assert "Level Zero driver not seen" in look(one_card(0xE20B, 16 * GIB)).devices[0].notes


def test_another_torch_is_named(look: Look) -> None:
    report = look(replace(machines.max_1550(), torch=CPU_TORCH))
    assert report.status == "broken" and "built for the CPU only; install its XPU build" in report.reason


def test_an_integrated_gpu_alone_is_nothing_to_repair(look: Look) -> None:
    assert look(replace(machines.old_integrated(), torch=CPU_TORCH)).status == "absent"


def test_nothing_is_absent(look: Look) -> None:
    assert look(machines.EPYC).reason == "no Intel GPU"
