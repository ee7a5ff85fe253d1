"""Google TPU chips of a Cloud TPU VM, from the PCI bus, their device files and the machine's metadata. Opens no device.

A device is a chip. Up to v4 chips are /dev/accel0 ..., later ones /dev/vfio/GROUP. One process holds a chip, so one
that somebody has open is busy. Sources: google/cloud-accelerator-diagnostics (tpu_info/device.py), Cloud TPU pages.
"""

from __future__ import annotations

import http.client
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenplane_core.backend.hardware import TPU_IDS, pci_cards
from tokenplane_core.backend.probe import (
    ACCELERATOR_SCORE,
    GIB,
    PciDevice,
    found,
    hidden,
    holders,
    join_notes,
    node_problem,
    read_number,
    users_note,
    visible,
)
from tokenplane_core.backend.records import DetectReport, Device, Offer

METADATA_HOST = "169.254.169.254"  # fixed on Google's machines; GCE_METADATA_HOST names another, as in their libraries
METADATA_TIMEOUT_S = 0.5
ACCELERATOR_TYPE = "/computeMetadata/v1/instance/attributes/accelerator-type"

V2_SUBSYSTEM = 0x004E  # v2 and v3 share a device id


@dataclass(frozen=True, slots=True)
class Chip:
    memory_gib: int  # as Google publishes it for each version; no file of the driver says it
    parts: int = 1  # devices that XLA shows of one chip, each with its part of the memory


CHIPS = {
    "v2": Chip(16, 2),
    "v3": Chip(32, 2),
    "v4": Chip(32),
    "v5e": Chip(16),
    "v5p": Chip(95),
    "v6e": Chip(32),
    "7x": Chip(192, 2),
}
OWN_NODES = ("v2", "v3", "v4")  # /dev/accelN; the others are handed out by VFIO


def detect(root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> DetectReport:
    """What is here. Asks the metadata server, for half a second at most, and only where a chip is."""
    cards = pci_cards(root, "tpu")
    if not cards:
        return DetectReport("absent", reason="no TPU chip on the PCI bus")
    version = _version(cards[0])
    nodes = [_node(card, version, i) for i, card in enumerate(cards)]
    there = [i for i, node in enumerate(nodes) if (root / node).exists()]
    if not there:
        return DetectReport("broken", reason=f"{len(cards)} x TPU {version}: {node_problem(root, nodes[0])}")
    variable = next((name for name in ("TPU_VISIBLE_CHIPS", "TPU_VISIBLE_DEVICES") if environ.get(name)), "")
    if variable:
        there = [there[i] for i in visible(environ[variable], [nodes[i] for i in there])]
    if not there:
        return hidden(f"{variable}={environ[variable]!r}", "TPU chip", len(cards))
    users = holders(root, [nodes[i] for i in there])
    slice_note = _slice_note(environ, len(cards))
    return found([_device(root, cards[i], version, nodes[i], users[nodes[i]], slice_note) for i in there])


def _version(card: PciDevice) -> str:
    version = TPU_IDS[card.device]
    if version == "v2/v3":
        return "v2" if read_number(card.folder / "subsystem_device") == V2_SUBSYSTEM else "v3"
    return version


def _node(card: PciDevice, version: str, index: int) -> str:
    if version in OWN_NODES:
        return f"dev/accel{index}"
    try:
        return f"dev/vfio/{(card.folder / 'iommu_group').readlink().name}"
    except OSError:
        return f"dev/vfio/{index}"


def _slice_note(environ: Mapping[str, str], chips_here: int) -> str:
    """`v5litepod-16, 8 chips here`: a slice may span machines, and this one serves with its own chips."""
    kind = environ.get("TPU_ACCELERATOR_TYPE") or _metadata(environ.get("GCE_METADATA_HOST", METADATA_HOST))
    return f"{kind}, {chips_here} chips here" if kind else ""


def _metadata(host: str) -> str:
    """The accelerator type the machine was made with; "" if nobody answers. Goes round proxies."""
    connection = http.client.HTTPConnection(host, timeout=METADATA_TIMEOUT_S)
    try:
        connection.request("GET", ACCELERATOR_TYPE, headers={"Metadata-Flavor": "Google"})
        answer = connection.getresponse()
        return answer.read(64).decode(errors="replace").strip() if answer.status == 200 else ""
    except (OSError, http.client.HTTPException):
        return ""
    finally:
        connection.close()


def _device(root: Path, card: PciDevice, version: str, node: str, pids: list[int], slice_note: str) -> Device:
    chip = CHIPS[version]
    problem = node_problem(root, node)
    return Device(
        kind="tpu",
        index=0,
        name="Google TPU7x" if version == "7x" else f"Google TPU {version}",
        arch=version,
        memory_total_bytes=chip.memory_gib * GIB,
        dtypes=("bfloat16", "float32"),
        score=ACCELERATOR_SCORE,
        offer=Offer(decode_graphs=None),  # compiled programs
        notes=join_notes(
            problem,
            users_note(root, pids),
            f"{chip.parts} devices of {chip.memory_gib // chip.parts} GiB" if chip.parts > 1 else "",
            slice_note,
            card.numa_note,
        ),
        uuid=card.address,
        state="broken" if problem else "busy" if pids else "ok",
    )
