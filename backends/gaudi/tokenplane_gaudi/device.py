"""Intel Gaudi cards, as the habanalabs driver describes them in /sys. Opens no device.

A card belongs to one process at a time, so one that somebody has open is busy. `Device.uuid` is the module id, the
card's place in the machine: HABANA_VISIBLE_MODULES takes those, and hl-smi shows them. HABANA_VISIBLE_DEVICES is read
by the container runtime only; what it hid has no device file here. Attributes: Linux (habanalabs/common/sysfs.c).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tokenplane_core.backend.hardware import GAUDI_IDS, pci_cards
from tokenplane_core.backend.probe import (
    ACCELERATOR_SCORE,
    GIB,
    PciDevice,
    addresses,
    found,
    hidden,
    holders,
    join_notes,
    node_problem,
    number_list,
    read_text,
    users_note,
)
from tokenplane_core.backend.records import DetectReport, Device, Offer

# Memory of a card as published (and as hl-smi shows it: 32768, 98304 and 131072 MiB); the driver's /sys has no figure.
MEMORY_GIB = {"GAUDI": 32, "GAUDI2": 96, "GAUDI3": 128}

# The driver's status, in lower case. Anything else ("disabled", "needs reset", "malfunction") needs a person.
READY, PASSING = "operational", ("in reset", "in device creation", "in reset after device release")


@dataclass(frozen=True, slots=True)
class Card:
    """One card the driver has taken."""

    node: str  # dev/accel/accel0, of older drivers dev/hl0
    attributes: Path
    pci: PciDevice | None

    def read(self, name: str) -> str:
        return read_text(self.attributes / name)

    @property
    def generation(self) -> str:
        """GAUDI, GAUDI2 or GAUDI3: the driver adds variants (GAUDI SEC, GAUDI2B, GAUDI2C ...)."""
        said = self.read("device_type").upper()
        known = GAUDI_IDS.get(self.pci.device, "") if self.pci else ""
        return next((name for name in ("GAUDI3", "GAUDI2", "GAUDI") if said.startswith(name)), known)


def detect(root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> DetectReport:
    pci = pci_cards(root, "gaudi")
    cards = _cards(root, {card.address: card for card in pci})
    if not cards:
        if not pci:
            return DetectReport("absent", reason="no Intel Gaudi card")
        held = f" (held by {pci[0].driver})" if pci[0].driver not in ("", "habanalabs") else ""
        why = f"the Gaudi card at {addresses(pci)} has no driver{held}: sudo modprobe habanalabs, and see dmesg"
        return DetectReport("broken", reason=why)
    mounted = [card for card in cards if (root / card.node).exists()]
    if not mounted:
        return DetectReport("broken", reason=f"{len(cards)} x Gaudi: {node_problem(root, cards[0].node)}")
    users = holders(root, [card.node for card in mounted])
    devices = [_device(root, card, users[card.node]) for card in mounted]
    wanted = environ.get("HABANA_VISIBLE_MODULES", "all")
    if wanted not in ("", "all"):
        modules = {str(module) for module in number_list(wanted)}
        devices = [device for device in devices if device.uuid in modules]
    if not devices:
        return hidden(f"HABANA_VISIBLE_MODULES={wanted!r}", "Gaudi card", len(mounted))
    return found(devices)


def _cards(root: Path, pci: Mapping[str, PciDevice]) -> list[Card]:
    """From kernel 6.2 on the driver sits in the accel class, before in one of its own."""
    cards = []
    for pattern, node in (("accel/accel[0-9]*", "dev/accel"), ("habanalabs/hl[0-9]*", "dev")):
        for folder in (root / "sys/class").glob(pattern):
            for attributes in (folder / "device", folder):
                if (attributes / "device_type").exists() and folder.name.lstrip("acelh").isdigit():
                    address = read_text(attributes / "pci_addr")
                    cards.append(Card(f"{node}/{folder.name}", attributes, pci.get(address)))
                    break
    return sorted(cards, key=lambda card: int(card.node.rsplit("l", 1)[1]))


def _device(root: Path, card: Card, pids: list[int]) -> Device:
    generation, status, module = card.generation, card.read("status"), card.read("module_id")
    problem = node_problem(root, card.node)
    state: Literal["ok", "busy", "broken"] = "ok"
    if status.lower() in PASSING:
        problem, state = problem or f"the driver says {status!r}: wait for it", "busy"
    elif status and status.lower() != READY:
        problem = problem or f"the driver says {status!r}: sudo hl-smi --reset, or reboot"
    if problem and state == "ok":
        state = "broken"
    elif pids:
        state = "busy"
    driver = read_text(root / "sys/module/habanalabs/version")
    return Device(
        kind="gaudi",
        index=0,
        name=f"Intel Gaudi {generation[5:]}".rstrip() if generation else "Intel Gaudi (unknown)",
        arch=generation.lower() or "unknown",
        memory_total_bytes=MEMORY_GIB.get(generation, 0) * GIB,
        dtypes=("bfloat16", "float32"),
        score=ACCELERATOR_SCORE,
        offer=Offer(decode_graphs=None),  # compiled programs
        notes=join_notes(
            problem,
            users_note(root, pids),
            f"module {module}" if module else "",
            f"habanalabs {driver}" if driver else "",
            card.pci.numa_note if card.pci else "",
        ),
        uuid=module,
        state=state,
    )
