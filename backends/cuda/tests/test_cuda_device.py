"""Detection of NVIDIA GPUs on recorded machines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers import machines
from helpers.machines import CPU_TORCH, CUDA_TORCH, Machine
from helpers.recorded_nvml import Gpu, RecordedNvml
from tokenplane_core.backend.probe import TorchBuild
from tokenplane_core.backend.records import DetectReport
from tokenplane_cuda.device import detect

GIB = 1 << 30
Look = Callable[[Machine], DetectReport]


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Look:
    def of(machine: Machine) -> DetectReport:
        return detect(machine.build(tmp_path, monkeypatch), machine.environ, machine.nvml, machine.torch)

    return of


def test_eight_cards_with_one_shared_one_taken_and_one_lost(report: Look) -> None:
    found = report(machines.eight_h100())
    assert found.status == "found" and [device.index for device in found.devices] == list(range(8))
    assert [device.state for device in found.devices] == ["ok", "ok", "ok", "busy", "ok", "broken", "ok", "ok"]
    first, taken, lost = found.devices[0], found.devices[3], found.devices[5]
    assert (first.name, first.arch, first.kind) == ("NVIDIA H100 80GB HBM3", "sm_90", "cuda")
    assert first.memory_total_bytes == int(79.6 * GIB) and first.memory_free_bytes == int(4.2 * GIB)
    assert first.notes == "used by pid 4711 (vllm), driver 580.95.05, NUMA node 0"
    assert first.uuid == "GPU-00000000-aaaa-bbbb-cccc-000000000000"
    assert first.dtypes[0] == "bfloat16" and first.score == 100
    assert taken.notes.startswith("exclusive to one process, used by pid 5150 (python3)")
    assert "fallen off the bus" in lost.notes and "reboot" in lost.notes
    assert found.devices[7].notes.endswith("NUMA node 1")


def test_a_split_card_is_its_instances(report: Look) -> None:
    large, small, unsplit = report(machines.mig_a100()).devices
    assert large.name.endswith("MIG 3g.20gb") and large.uuid.startswith("MIG-1111")
    assert small.memory_total_bytes == int(4.8 * GIB) and "used by pid 99" in small.notes
    assert unsplit.state == "broken" and "nvidia-smi mig -cgi" in unsplit.notes


def test_no_machine_gets_an_open_library_back(report: Look) -> None:
    machine = machines.mig_a100()
    report(machine)
    assert isinstance(machine.nvml, RecordedNvml) and not machine.nvml.is_open


@pytest.mark.parametrize(
    ("wanted", "uuids"),
    [
        ("1,0", ["GPU-a1", "GPU-a0"]),
        ("1,9,0", ["GPU-a1"]),
        ("GPU-a1", ["GPU-a1"]),
        ("0", ["GPU-a0"]),
    ],
)
def test_the_environment_chooses_and_orders_cards(report: Look, wanted: str, uuids: list[str]) -> None:
    machine = machines.nvidia([machines.a100(0), machines.a100(1)], 0x20B0, machines.EPYC)
    found = report(machine.told(CUDA_VISIBLE_DEVICES=wanted))
    assert [device.uuid[:6] for device in found.devices] == uuids
    assert [device.index for device in found.devices] == list(range(len(uuids)))


def test_the_environment_chooses_instances(report: Look) -> None:
    (small,) = report(machines.mig_a100().told(CUDA_VISIBLE_DEVICES="MIG-2222")).devices
    assert small.name.endswith("1g.5gb")


@pytest.mark.parametrize("wanted", ["", "-1", "none", "GPU-zz"])
def test_hidden_cards_are_absent_and_the_variable_is_named(report: Look, wanted: str) -> None:
    found = report(machines.eight_h100().told(CUDA_VISIBLE_DEVICES=wanted))
    assert found.status == "absent"
    assert f"CUDA_VISIBLE_DEVICES={wanted!r} hides every NVIDIA GPU" in found.reason and "8" in found.reason


def test_indices_of_unlike_cards_are_warned_about(report: Look) -> None:
    rtx = Gpu("NVIDIA GeForce RTX 3060", "GPU-3060", 12.0, 11.5, address="0000:41:00.0", capability=(8, 6))
    machine = machines.nvidia([machines.a100(0), rtx], 0x20B0, machines.EPYC).told(CUDA_VISIBLE_DEVICES="0")
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in report(machine).reason


def test_the_order_is_not_warned_about_where_it_is_set(report: Look) -> None:
    rtx = Gpu("NVIDIA GeForce RTX 3060", "GPU-3060", 12.0, 11.5, address="0000:41:00.0", capability=(8, 6))
    machine = machines.nvidia([machines.a100(0), rtx], 0x20B0, machines.EPYC)
    assert report(machine.told(CUDA_VISIBLE_DEVICES="0", CUDA_DEVICE_ORDER="PCI_BUS_ID")).reason == ""


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        (machines.old_driver(), ["driver 470.57.02 is too old", "CUDA 11.4", "needs CUDA 12.0", "driver 525"]),
        (machines.updated_driver(), ["different versions", "reboot"]),
        (machines.unprivileged_container(), ["no permission to open /dev/nvidiactl"]),
        (machines.nouveau(), ["0000:01:00.0", "nouveau", "libnvidia-ml.so.1", "install NVIDIA's driver"]),
        (replace(machines.nouveau(), nvml=RecordedNvml(init_code=9)), ["not loaded", "modprobe nvidia"]),
        (replace(machines.nouveau(), nvml=RecordedNvml(init_code=999)), ["restart the container"]),
        (replace(machines.nouveau(), nvml=RecordedNvml(init_code=77)), ["error 77"]),
        (Machine(nodes={"dev/nvidia0": 0o666}), ["/dev/nvidia*", "container toolkit"]),
        (replace(machines.eight_h100(), torch=CPU_TORCH), ["8 x NVIDIA H100", "2.9.1+cpu", "the CPU only"]),
        (replace(machines.eight_h100(), torch=TorchBuild("2.12.0+cu140", cuda="14.0")), ["needs CUDA 14.0"]),
    ],
    ids=lambda value: "" if isinstance(value, Machine) else value[0],
)
def test_what_cannot_be_used_says_why_and_what_to_do(report: Look, machine: Machine, words: list[str]) -> None:
    found = report(machine)
    assert found.status == "broken" and found.devices == ()
    assert [word for word in words if word not in found.reason] == []


def test_a_newer_minor_version_of_cuda_runs_on_an_older_driver(report: Look) -> None:
    machine = machines.nvidia([machines.a100(0)], 0x20B0, machines.EPYC, driver="525.60.13", cuda=12000)
    assert report(machine).status == "found"
    assert report(replace(machine, torch=TorchBuild("2.10.0+cu130", cuda="13.0"))).status == "broken"


def test_without_card_and_library_nothing_is_here(report: Look) -> None:
    assert report(machines.EPYC).status == "absent"


def test_a_library_without_a_card_is_no_fault(report: Look) -> None:
    for library in (RecordedNvml(init_code=9), RecordedNvml()):
        assert detect(Path("/nowhere"), {}, library, CUDA_TORCH).status == "absent"


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"compute_mode": 2}, "nvidia-smi -c DEFAULT"),
        ({"capability": (6, 1)}, "compute capability 6.1 is below 7.0"),
        ({"memory_code": 15}, "fallen off the bus"),
        ({"code": 4}, "no permission"),
    ],
)
def test_a_card_that_cannot_compute_is_broken_and_the_other_is_not(
    report: Look, changes: dict[str, Any], note: str
) -> None:
    machine = machines.nvidia([machines.a100(0, **changes), machines.a100(1)], 0x20B0, machines.EPYC)
    first, second = report(machine).devices
    assert first.state == "broken" and note in first.notes
    assert second.state == "ok"


def test_a_gpu_that_shares_the_hosts_memory_has_the_hosts(report: Look) -> None:
    gb10 = Gpu("NVIDIA GB10", "GPU-10", None, capability=(12, 1))
    (device,) = report(machines.nvidia([gb10], 0x2E12, machines.LAPTOP)).devices
    assert (device.memory_total_bytes, device.memory_free_bytes) == (32 * GIB, 20 * GIB)
    assert "shares the host's memory" in device.notes


def test_older_cards_have_no_bfloat16(report: Look) -> None:
    machine = replace(
        machines.old_driver(), nvml=RecordedNvml([Gpu("Tesla T4", "GPU-7", 15.0, 14.0, capability=(7, 5))])
    )
    (device,) = report(machine).devices
    assert (device.arch, device.dtypes) == ("sm_75", ("float16", "float32"))
