"""What plugins read of a machine without its driver: lists of visible devices, device files, who uses them, torch."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from helpers.machines import Machine, pci, user
from tokenplane_core.backend import probe

NAMES = ["GPU-aa11", "GPU-aa22", "GPU-bb33"]


@pytest.mark.parametrize(
    ("wanted", "shown"),
    [
        ("0,1,2", [0, 1, 2]),
        ("2, 0", [2, 0]),
        ("GPU-bb,0", [2, 0]),
        ("gpu-AA22", [1]),
        ("0,2,-1,1", [0, 2]),  # the example of CUDA's programming guide
        ("0,7,1", [0]),
        ("GPU-aa", []),  # the beginning of two names
        ("1,1,0", [1]),
        ("", []),
        ("none", []),
    ],
)
def test_a_list_of_visible_devices_ends_at_its_first_invalid_entry(wanted: str, shown: list[int]) -> None:
    assert probe.visible(wanted, NAMES) == shown


def test_only_the_first_names_may_have_an_index() -> None:
    assert probe.visible("GPU-bb33,1", NAMES, num_indexed=2) == [2, 1]
    assert probe.visible("2", NAMES, num_indexed=2) == []


@pytest.mark.parametrize(
    ("text", "numbers"), [("0-3,8", [0, 1, 2, 3, 8]), ("5\n", [5]), ("", []), ("x,2-y,1", [1]), ("1 - 2", [1, 2])]
)
def test_number_lists_of_the_kernel(text: str, numbers: list[int]) -> None:
    assert list(probe.number_list(text)) == numbers


@pytest.mark.parametrize(
    ("text", "number"), [("12\n", 12), ("0x1da3", 0x1DA3), ("-1", None), ("", None), ("many", None)]
)
def test_numbers_of_the_kernel(tmp_path: Path, text: str, number: int | None) -> None:
    (tmp_path / "file").write_text(text)
    assert probe.read_number(tmp_path / "file") == number
    assert probe.read_number(tmp_path / "no such file") is None


def test_pci_devices_come_by_address_with_driver_and_numa_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = pci("0000:65:00.0", 0x10DE, 0x2330, 0x0302, "nvidia", numa=1) + pci(
        "0000:02:00.0", 0x8086, 1, 0x0200, numa=-1
    )
    machine.files["sys/bus/pci/devices/0000:99:00.0/vendor"] = "damaged"
    first, second = probe.pci_devices(machine.build(tmp_path, monkeypatch))
    assert (first.address, first.driver, first.numa_note) == ("0000:02:00.0", "", "")
    assert (second.vendor, second.device, second.pci_class) == (0x10DE, 0x2330, 0x0302)
    assert (second.driver, second.numa_note) == ("nvidia", "NUMA node 1")
    assert probe.addresses([first]) == "0000:02:00.0"
    assert probe.addresses([first, second]) == "0000:02:00.0 and 1 more"


def test_a_device_file_that_may_be_opened_is_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Machine(nodes={"dev/kfd": 0o666}).build(tmp_path, monkeypatch)
    assert probe.node_problem(root, "dev/kfd") == ""
    assert "--device /dev/dri/renderD128" in probe.node_problem(root, "dev/dri/renderD128")


def test_without_permission_the_group_to_join_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Machine(nodes={"dev/kfd": 0o660}).build(tmp_path, monkeypatch)
    group_id = 54321 if os.geteuid() == 0 else os.getegid()  # an ordinary user cannot give files away
    os.chown(root / "dev/kfd", -1, group_id)
    problem = probe.node_problem(root, "dev/kfd")
    assert "no permission to open /dev/kfd" in problem
    assert "usermod -aG" in problem and f"--group-add {group_id}" in problem


def test_who_holds_a_device_is_read_from_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = user(9, "python3", "dev/neuron0", "dev/null") + user(7, "bash") + user(12, "vllm", "dev/neuron0")
    machine.files["proc/self/comm"] = "me\n"
    root = machine.build(tmp_path, monkeypatch)
    assert probe.holders(root, ["dev/neuron0", "dev/neuron1"]) == {"dev/neuron0": [9, 12], "dev/neuron1": []}
    assert probe.users_note(root, [9, 12]) == "used by pid 9 (python3) and 1 more"
    assert probe.users_note(root, [4000]) == "used by pid 4000"
    assert probe.users_note(root, []) == ""


def test_this_process_is_seen_holding_a_file(tmp_path: Path) -> None:
    file = tmp_path / "node"
    with file.open("w"):
        assert os.getpid() in probe.holders(Path("/"), [str(file).lstrip("/")])[str(file).lstrip("/")]


def test_torch_is_described_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "torch/version.py").write_text(
        "from typing import Optional\n__all__ = ['__version__', 'cuda', 'hip']\n__version__ = '2.9.1+rocm6.4'\n"
        "debug = False\ncuda: Optional[str] = None\nhip: Optional[str] = '6.4.43484'\nxpu: Optional[str] = None\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "torch", raising=False)
    build = probe.torch_build()
    assert build == probe.TorchBuild("2.9.1+rocm6.4", hip="6.4.43484")
    assert probe.torch_problem(build, "ROCm") == ""
    assert "torch 2.9.1+rocm6.4 is built for ROCm 6.4.43484; install its CUDA build" in probe.torch_problem(
        build, "CUDA"
    )
    assert "built for the CPU only" in probe.torch_problem(probe.TorchBuild("2.9.1+cpu"), "XPU")
    assert probe.torch_problem(None, "CUDA") == "torch is not installed"
