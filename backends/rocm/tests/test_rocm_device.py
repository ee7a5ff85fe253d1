"""Detection of AMD GPUs on recorded machines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from helpers import machines
from helpers.machines import CPU_TORCH, CUDA_TORCH, Machine, kfd_gpu, pci
from tokenplane_core.backend.records import DetectReport
from tokenplane_rocm.device import detect

GIB = 1 << 30
Look = Callable[[Machine], DetectReport]


@pytest.fixture
def look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Look:
    return lambda machine: detect(machine.build(tmp_path, monkeypatch), machine.environ, machine.torch)


def test_seven_of_eight_cards_one_of_them_nearly_full(look: Look) -> None:
    report = look(machines.eight_mi300x())
    assert report.status == "found" and [device.index for device in report.devices] == list(range(7))
    first, second = report.devices[:2]
    assert (first.name, first.arch, first.kind) == ("AMD Instinct MI300X OAM", "gfx942", "rocm")
    assert (first.memory_total_bytes, first.memory_free_bytes) == (192 * GIB, 12 * GIB)
    assert first.notes == "used by pid 812 (sglang), amdgpu 6.12.12, NUMA node 0"
    assert first.uuid == "GPU-0000000000001002"
    assert second.memory_free_bytes == 192 * GIB and second.score == 100 and second.dtypes[0] == "bfloat16"


def test_a_card_of_two_parts_is_two_devices(look: Look) -> None:
    devices = look(machines.mi250()).devices
    assert [(device.arch, device.memory_total_bytes) for device in devices] == [("gfx90a", 64 * GIB)] * 2


def test_partitions_of_a_card_have_their_own_memory_and_no_figure_for_what_is_free(look: Look) -> None:
    """amdgpu counts the memory of the card as one."""
    parts = [kfd_gpu(node, "0000:05:00.0", 90402, 48, "AMD Instinct MI300X OAM", minor=128 + node) for node in (1, 2)]
    machine = machines.amd(parts, machines.EPYC)
    machine.files["sys/bus/pci/devices/0000:05:00.0/mem_info_vram_total"] = f"{192 * GIB}\n"
    for device in look(machine).devices:
        assert (device.memory_total_bytes, device.memory_free_bytes) == (48 * GIB, None)
        assert "one of 2 parts of 0000:05:00.0" in device.notes


@pytest.mark.parametrize(
    ("environ", "uuids"),
    [
        ({"ROCR_VISIBLE_DEVICES": "2,0"}, ["1003", "1001"]),
        ({"ROCR_VISIBLE_DEVICES": "GPU-0000000000001002"}, ["1002"]),
        ({"HIP_VISIBLE_DEVICES": "1"}, ["1002"]),
        ({"HIP_VISIBLE_DEVICES": "", "CUDA_VISIBLE_DEVICES": "2"}, ["1003"]),
        ({"ROCR_VISIBLE_DEVICES": "2,0", "HIP_VISIBLE_DEVICES": "1"}, ["1001"]),
        ({"HIP_VISIBLE_DEVICES": "0", "CUDA_VISIBLE_DEVICES": "2"}, ["1001"]),
    ],
)
def test_the_environment_chooses_and_orders_cards(look: Look, environ: dict[str, str], uuids: list[str]) -> None:
    cards = [kfd_gpu(i + 1, f"0000:{5 + i:02x}:00.0", 90402, 192, "MI300X") for i in range(3)]
    report = look(machines.amd(cards, machines.EPYC).told(**environ))
    assert [device.uuid[-4:] for device in report.devices] == uuids


@pytest.mark.parametrize("variable", ["ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"])
def test_hidden_cards_are_absent_and_the_variable_is_named(look: Look, variable: str) -> None:
    report = look(machines.mi250().told(**{variable: "-1"}))
    assert report.status == "absent" and f"{variable}='-1' hides every AMD GPU" in report.reason


def without_kfd(driver: str = "") -> Machine:
    return machines.EPYC + pci("0000:05:00.0", 0x1002, 0x74A1, 0x1200, driver)


def in_a_container() -> Machine:
    """The kernel shows the topology's folder, and no node that this process may read."""
    return without_kfd("amdgpu") + Machine({"sys/class/kfd/kfd/topology/nodes/0/gpu_id": "0\n"})


def without_render_node() -> Machine:
    machine = machines.mi250()
    del machine.nodes["dev/kfd"]
    return machine


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        (machines.no_render_group(), ["gfx1100", "no permission to open /dev/kfd"]),
        (without_render_node(), ["/dev/kfd is missing", "--device /dev/kfd"]),
        (without_kfd(), ["no kernel driver", "modprobe amdgpu"]),
        (without_kfd("vfio-pci"), ["held by the kernel driver vfio-pci"]),
        (without_kfd("amdgpu"), ["without its compute driver"]),
        (in_a_container(), ["shows this process no GPU", "--device /dev/dri"]),
        (replace(machines.mi250(), torch=CUDA_TORCH), ["built for CUDA 12.8", "ROCm build"]),
        (replace(machines.mi250(), torch=CPU_TORCH), ["built for the CPU only"]),
    ],
    ids=lambda value: "" if isinstance(value, Machine) else value[0],
)
def test_what_cannot_be_used_says_why_and_what_to_do(look: Look, machine: Machine, words: list[str]) -> None:
    report = look(machine)
    assert report.status == "broken" and [word for word in words if word not in report.reason] == []


def test_a_card_without_its_render_node_is_broken_and_the_other_is_not(look: Look) -> None:
    machine = machines.mi250()
    machine.nodes["dev/dri/renderD128"] = 0o600
    first, second = look(machine).devices
    assert first.state == "broken" and "/dev/dri/renderD128" in first.notes
    assert second.state == "ok"


@pytest.mark.parametrize(("gfx_version", "arch", "has_bf16"), [(90006, "gfx906", False), (100300, "gfx1030", False)])
def test_older_cards_have_no_bfloat16(look: Look, gfx_version: int, arch: str, has_bf16: bool) -> None:
    card = kfd_gpu(1, "0000:03:00.0", gfx_version, 16, "AMD Radeon")
    (device,) = look(machines.amd([card], machines.LAPTOP)).devices
    assert device.arch == arch and ("bfloat16" in device.dtypes) is has_bf16


def test_the_display_part_of_a_processor_scores_below_any_card(look: Look) -> None:
    parts = [
        kfd_gpu(1, "0000:e6:00.0", 100306, 1, ""),
        kfd_gpu(2, "0000:03:00.0", 110000, 24, "AMD Radeon RX 7900 XTX"),
    ]
    integrated, card = look(machines.amd(parts, machines.LAPTOP)).devices
    assert integrated.name == "AMD GPU gfx1036" and "integrated" in integrated.notes
    assert integrated.score == 20 and card.score == 100


def test_nothing_is_absent(look: Look) -> None:
    assert look(machines.XEON).reason == "no AMD GPU"


def test_a_display_gpu_that_kfd_does_not_know_is_nothing_to_repair(look: Look) -> None:
    report = look(machines.LAPTOP + pci("0000:e6:00.0", 0x1002, 0x15D8, 0x0300, "amdgpu"))
    assert report.status == "absent" and "0000:e6:00.0" in report.reason
