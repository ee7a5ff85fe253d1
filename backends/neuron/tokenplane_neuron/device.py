"""AWS Neuron devices, as the aws-neuronx driver describes them in /sys. Opens no device.

A device is a chip with several NeuronCores; its index is the driver's number (/dev/neuron0 ...). A process takes whole
cores, and a model usually all of a chip's, so a chip that somebody has open counts as busy. Sources: aws-neuron-driver
(neuron_pci.c, neuron_dhal_v*.c, neuron_sysfs_metrics.c), Neuron sysfs user guide, NeuronX runtime configuration.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenplane_core.backend.hardware import NEURON_IDS, pci_cards
from tokenplane_core.backend.probe import (
    ACCELERATOR_SCORE,
    GIB,
    PciDevice,
    addresses,
    hidden,
    holders,
    join_notes,
    node_problem,
    number_list,
    read_number,
    read_text,
    users_note,
)
from tokenplane_core.backend.records import DetectReport, Device, Offer

SYSFS = "sys/devices/virtual/neuron_device"


@dataclass(frozen=True, slots=True)
class Chip:
    arch: str  # as AWS numbers NeuronCores
    cores: int
    memory_gib: int  # as AWS publishes it for each instance type; the driver's /sys has no total
    cores_per_logical: int = 1  # the runtime's default grouping


CHIPS = {
    "Inferentia": Chip("neuroncore-v1", 4, 8),
    "Trainium1": Chip("neuroncore-v2", 2, 32),
    "Inferentia2": Chip("neuroncore-v2", 2, 32),
    "Trainium2": Chip("neuroncore-v3", 8, 96, cores_per_logical=2),
    "Trainium3": Chip("neuroncore-v4", 8, 144, cores_per_logical=2),
}


def detect(root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> DetectReport:
    cards = pci_cards(root, "neuron")
    numbers = sorted(int(node.name[6:]) for node in (root / "dev").glob("neuron[0-9]*") if node.name[6:].isdigit())
    if not cards and not numbers:
        return DetectReport("absent", reason="no AWS Neuron device")
    if not numbers:
        chips = f"{len(cards)} x {NEURON_IDS[cards[0].device]} at {addresses(cards)}"
        if (root / SYSFS).is_dir():
            return DetectReport("broken", reason=f"{chips}: {node_problem(root, 'dev/neuron0')}")
        why = "the driver is not loaded: install aws-neuronx-dkms, sudo modprobe neuron, and see dmesg"
        return DetectReport("broken", reason=f"{chips}: {why}")
    name = _name(root, cards)
    shown = _visible(numbers, name, environ)
    if not shown:
        setting = f"NEURON_RT_VISIBLE_CORES={environ['NEURON_RT_VISIBLE_CORES']!r}"
        return hidden(setting, "Neuron device", len(numbers))
    users = holders(root, [f"dev/neuron{number}" for number in shown])
    devices = (_device(root, n, name, cards, users[f"dev/neuron{n}"], cores) for n, cores in shown.items())
    return DetectReport("found", tuple(devices))


def _name(root: Path, cards: list[PciDevice]) -> str:
    """A machine has chips of one kind. Containers may see device files without the PCI bus."""
    if cards:
        return NEURON_IDS[cards[0].device]
    return read_text(root / SYSFS / "neuron0/info/architecture/device_name") or "Neuron device"


def _visible(numbers: list[int], name: str, environ: Mapping[str, str]) -> dict[int, str]:
    """Chip -> the logical cores of it that NEURON_RT_VISIBLE_CORES leaves, for a note; all chips if it is not set."""
    wanted = environ.get("NEURON_RT_VISIBLE_CORES")
    if wanted is None:
        return dict.fromkeys(numbers, "")
    per_chip = _logical_cores(name, environ)
    cores = set(number_list(wanted))
    shown = {}
    for number in numbers:
        own = [core for core in range(number * per_chip, (number + 1) * per_chip) if core in cores]
        if own:
            shown[number] = f"cores {', '.join(map(str, own))} visible" if len(own) < per_chip else ""
    return shown


def _logical_cores(name: str, environ: Mapping[str, str]) -> int:
    chip = CHIPS.get(name, Chip("", 2, 0))
    group = environ.get("NEURON_LOGICAL_NC_CONFIG") or environ.get("NEURON_RT_VIRTUAL_CORE_SIZE") or ""
    return chip.cores // (int(group) if group.isdigit() and int(group) else chip.cores_per_logical)


def _device(root: Path, number: int, name: str, cards: list[PciDevice], pids: list[int], cores_note: str) -> Device:
    chip = CHIPS.get(name, Chip("unknown", 0, 0))
    folder, node = root / SYSFS / f"neuron{number}", f"dev/neuron{number}"
    problem = node_problem(root, node)
    cores = len(list(folder.glob("neuron_core[0-9]*"))) or chip.cores
    total = chip.memory_gib * GIB
    used = [read_number(file) for file in folder.glob("neuron_core[0-9]*/stats/memory_usage/device_mem/present")]
    driver = read_text(root / "sys/module/neuron/version")
    numa = cards[number].numa_note if number < len(cards) else ""
    return Device(
        kind="neuron",
        index=number,
        name=f"AWS {name}",
        arch=chip.arch,
        memory_total_bytes=total,
        dtypes=("bfloat16", "float16", "float32") if chip.arch != "neuroncore-v1" else ("bfloat16", "float16"),
        score=ACCELERATOR_SCORE,
        offer=Offer(decode_graphs=None),  # compiled programs
        memory_free_bytes=max(0, total - sum(n or 0 for n in used)) if used and total else None,
        notes=join_notes(
            problem,
            users_note(root, pids),
            f"{cores} NeuronCores" if cores else "",
            cores_note,
            f"driver {driver}" if driver else "",
            numa,
        ),
        uuid=read_text(folder / "info/serial_number"),
        state="broken" if problem else "busy" if pids else "ok",
    )
