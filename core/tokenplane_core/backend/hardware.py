"""Which backend a card on the PCI bus is for, so that hardware whose plugin is not installed can be named.

Only looks at PCI ids and device files: it does not know whether a driver works. That is for the plugin's `detect`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from .probe import GIB, PciDevice, addresses, pci_devices, read_number

# Vendor 0x1d0f, device ids from aws-neuron-driver (neuron_device.h, neuron_pci.c).
NEURON_IDS = {
    0x7064: "Inferentia",
    0x7065: "Inferentia",
    0x7066: "Inferentia",
    0x7067: "Inferentia",
    0x7164: "Trainium1",
    0x7264: "Inferentia2",
    0x7364: "Trainium2",
    0x7564: "Trainium3",
    0x7565: "Trainium3",
}

# Vendor 0x1ae0, device ids from google/cloud-accelerator-diagnostics (tpu_info/device.py). v2 and v3 share one.
TPU_IDS = {0x0027: "v2/v3", 0x005E: "v4", 0x0062: "v5p", 0x0063: "v5e", 0x006F: "v6e", 0x0076: "7x"}

# Vendor 0x1da3, device ids from Linux (habanalabs_drv.c); Gaudi 3's from Supermicro's manual of the HL-325L.
GAUDI_IDS = {0x1000: "GAUDI", 0x1010: "GAUDI", 0x1020: "GAUDI2", 0x1060: "GAUDI3"}

# High bytes of Intel's discrete cards (Linux, include/drm/intel/pciids.h): Max, Arc A and Flex, Arc B.
INTEL_DISCRETE = {0x0B, 0x56, 0xE2}

SMALL_MEMORY_BYTES = 4 * GIB
"""An AMD GPU with less of its own is taken for the display part of a processor: no language model is served on it."""


def is_discrete_intel(card: PciDevice) -> bool:
    """Intel's integrated GPUs sit on bus 0 beside the processor; cards do not."""
    return card.device >> 8 in INTEL_DISCRETE or card.address[5:7] != "00"


def _is_amd_accelerator(card: PciDevice) -> bool:
    """Instinct cards have no display output, which shows in the class; others are told by their memory."""
    instinct = card.pci_class == 0x0380 or card.pci_class >> 8 == 0x12
    return instinct or (read_number(card.folder / "mem_info_vram_total") or 0) >= SMALL_MEMORY_BYTES


def _is_display(card: PciDevice) -> bool:
    return card.pci_class >> 8 == 0x03


@dataclass(frozen=True, slots=True)
class Kind:
    backend: str
    name: str  # for people
    vendor: int
    matches: Callable[[PciDevice], bool]  # given that the vendor is right
    is_accelerator: Callable[[PciDevice], bool] = lambda _card: True  # False: there to drive a display
    nodes: str = ""  # device files that only this hardware has, where /sys shows no PCI bus


KINDS = (
    Kind("cuda", "NVIDIA GPU", 0x10DE, _is_display, nodes="nvidia[0-9]*"),
    Kind("rocm", "AMD GPU", 0x1002, lambda c: _is_display(c) or c.pci_class >> 8 == 0x12, _is_amd_accelerator),
    Kind("xpu", "Intel GPU", 0x8086, _is_display, is_discrete_intel),
    Kind("gaudi", "Intel Gaudi", 0x1DA3, lambda c: c.device in GAUDI_IDS, nodes="hl[0-9]*"),
    Kind("neuron", "AWS Neuron device", 0x1D0F, lambda c: c.device in NEURON_IDS, nodes="neuron[0-9]*"),
    Kind("tpu", "Google TPU chip", 0x1AE0, lambda c: c.device in TPU_IDS, nodes="accel[0-9]*"),
)


def pci_cards(root: Path, backend: str, accelerators_only: bool = False) -> list[PciDevice]:
    """The PCI devices that are for a backend of this project, by address."""
    (kind,) = (kind for kind in KINDS if kind.backend == backend)
    cards = [card for card in pci_devices(root) if card.vendor == kind.vendor and kind.matches(card)]
    return [card for card in cards if kind.is_accelerator(card)] if accelerators_only else cards


@dataclass(frozen=True, slots=True)
class Hardware:
    """Hardware of one kind that is plainly there."""

    backend: str
    what: str  # 8 x NVIDIA GPU at 0000:1b:00.0 and 7 more
    is_accelerator: bool  # False: display parts of a processor, which nobody would miss

    @property
    def install(self) -> str:
        return f'pip install "tokenplane[{self.backend}]"'


def without_plugin(installed: Collection[str], root: Path = Path("/")) -> list[Hardware]:
    """The hardware on this machine whose plugin is not among the installed names."""
    found = []
    for kind in KINDS:
        if kind.backend in installed:
            continue
        cards = pci_cards(root, kind.backend)
        nodes = sorted(f"/dev/{node.name}" for node in (root / "dev").glob(kind.nodes)) if kind.nodes else []
        if cards:
            accelerators = pci_cards(root, kind.backend, accelerators_only=True)
            shown = accelerators or cards
            what = f"{len(shown)} x {kind.name} at {addresses(shown)}{'' if accelerators else ', for display'}"
            found.append(Hardware(kind.backend, what, bool(accelerators)))
        elif nodes:
            found.append(Hardware(kind.backend, f"{kind.name} ({nodes[0]})", True))
    return found
