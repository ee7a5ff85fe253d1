"""Intel GPUs, from their PCI ids and what i915 or xe show in /sys. Opens no device.

A device is a card, or one tile of a card with two in Level Zero's default (flat) hierarchy. torch leaves integrated
GPUs out where a card is present (pytorch PR 144378), and so does this. Indices count what ZE_AFFINITY_MASK and then
ONEAPI_DEVICE_SELECTOR leave. Used memory is not in /sys, so none is reported as free.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tokenplane_core.backend.hardware import is_discrete_intel, pci_cards
from tokenplane_core.backend.probe import (
    ACCELERATOR_SCORE,
    GIB,
    INTEGRATED_SCORE,
    PciDevice,
    TorchBuild,
    addresses,
    found,
    hidden,
    join_notes,
    meminfo_bytes,
    node_problem,
    read_number,
    read_text,
    torch_build,
    torch_problem,
)
from tokenplane_core.backend.records import DetectReport, Device
from tokenplane_torch.device import gpu_offer

DRIVERS = ("i915", "xe")
LEVEL_ZERO = ("usr/lib/*/libze_intel_gpu.so.1", "usr/lib*/libze_intel_gpu.so.1", "usr/local/lib*/libze_intel_gpu.so.1")
MEMORY_BAR = 2
SMALL_BAR_BYTES = 256 << 20  # the window without Resizable BAR: says nothing about the memory behind it


@dataclass(frozen=True, slots=True)
class Model:
    name: str
    memory_gib: int
    tiles: int = 1


# PCI ids from Linux (include/drm/intel/pciids.h); names and memory as Intel publishes them for each product. The
# driver does not report memory in /sys everywhere; an A770 may have 8 GiB, which its memory window then shows.
MODELS = {
    0x0BD5: Model("Intel Data Center GPU Max 1550", 128, tiles=2),
    0x0BD6: Model("Intel Data Center GPU Max 1550", 128, tiles=2),
    0x0BD9: Model("Intel Data Center GPU Max 1100", 48),
    0x0BDA: Model("Intel Data Center GPU Max 1100", 48),
    0x0BDB: Model("Intel Data Center GPU Max 1100", 48),
    0x56A0: Model("Intel Arc A770", 16),
    0x56A1: Model("Intel Arc A750", 8),
    0x56A2: Model("Intel Arc A580", 8),
    0x56A5: Model("Intel Arc A380", 6),
    0x56A6: Model("Intel Arc A310", 4),
    0x5690: Model("Intel Arc A770M", 16),
    0x5691: Model("Intel Arc A730M", 12),
    0x56C0: Model("Intel Data Center GPU Flex 170", 16),
    0x56C1: Model("Intel Data Center GPU Flex 140", 6),
    0xE20B: Model("Intel Arc B580", 12),
    0xE20C: Model("Intel Arc B570", 10),
    0xE211: Model("Intel Arc Pro B60", 24),
    0xE212: Model("Intel Arc Pro B50", 16),
}

ARCHITECTURES = {0x0B: "xe-hpc", 0x56: "xe-hpg", 0xE2: "xe2-hpg"}
CORE_ULTRA = {0x7D: "xe-lpg", 0x64: "xe2-lpg", 0xB0: "xe3-lpg"}  # integrated GPUs that torch's XPU build supports


def detect(
    root: Path = Path("/"), environ: Mapping[str, str] = os.environ, torch: TorchBuild | None = None
) -> DetectReport:
    """What is here. torch: what the installed one was built for, unless given."""
    gpus = pci_cards(root, "xpu")
    cards = [gpu for gpu in gpus if is_discrete_intel(gpu)] or gpus
    if not cards:
        return DetectReport("absent", reason="no Intel GPU")
    devices = [device for card in cards for device in _devices(root, card, environ)]
    devices, hidden_by = _chosen(devices, environ)
    if not devices:
        return hidden(hidden_by, "Intel GPU", len(cards))
    if problem := torch_problem(torch or torch_build(), "XPU"):
        if not any(is_discrete_intel(gpu) for gpu in gpus):
            # Nearly every Intel processor has a display part: not a trace of an accelerator somebody would miss.
            return DetectReport("absent", reason=f"only the integrated {devices[0].name}, and {problem}")
        return DetectReport("broken", reason=f"{len(devices)} x {devices[0].name}: {problem}")
    left_out = [gpu for gpu in gpus if gpu not in cards]
    note = f"the integrated GPU at {addresses(left_out)} is left out: torch hides it beside a card" if left_out else ""
    return found(devices, note)


def _devices(root: Path, card: PciDevice, environ: Mapping[str, str]) -> list[Device]:
    """The card as Level Zero shows it: one device, or one for each tile."""
    discrete = is_discrete_intel(card)
    high = card.device >> 8
    model = MODELS.get(card.device, Model(f"Intel {'' if discrete else 'integrated '}GPU 8086:{card.device:04x}", 0))
    problem = _card_problem(root, card)
    supported = discrete or high in CORE_ULTRA
    total = _memory_bytes(card, model) if discrete else meminfo_bytes(root).get("MemTotal", 0)
    device = Device(
        kind="xpu",
        index=0,
        name=model.name,
        arch=ARCHITECTURES.get(high) or CORE_ULTRA.get(high, "gen"),
        memory_total_bytes=total,
        dtypes=("bfloat16", "float16", "float32") if supported else ("float16", "float32"),
        score=ACCELERATOR_SCORE if discrete else INTEGRATED_SCORE if supported else 0,
        notes=join_notes(
            problem,
            "" if discrete else "integrated, shares the host's memory",
            "" if supported else "older than torch's XPU build supports, never chosen unasked",
            f"driver {card.driver}" if card.driver else "",
            "" if any(next(root.glob(library), None) for library in LEVEL_ZERO) else "Level Zero driver not seen",
            card.numa_note,
        ),
        offer=gpu_offer(total),
        uuid=card.address,
        state="broken" if problem else "ok",
    )
    if model.tiles == 1 or environ.get("ZE_FLAT_DEVICE_HIERARCHY", "FLAT").upper() != "FLAT":
        return [device]
    memory_bytes = device.memory_total_bytes // model.tiles
    return [
        replace(
            device,
            memory_total_bytes=memory_bytes,
            uuid=f"{card.address}/{tile}",
            notes=join_notes(f"tile {tile} of {card.address}", device.notes),
        )
        for tile in range(model.tiles)
    ]


def _card_problem(root: Path, card: PciDevice) -> str:
    if not card.driver:
        return "no kernel driver holds it: sudo modprobe xe (older cards: i915), and see dmesg"
    if card.driver not in DRIVERS:
        return f"held by the kernel driver {card.driver}, not by xe or i915"
    render = next((node.name for node in card.folder.glob("drm/renderD*")), "")
    return node_problem(root, f"dev/dri/{render or 'renderD128'}")


def _memory_bytes(card: PciDevice, model: Model) -> int:
    """What the driver says (some i915 builds do), else the published size, cut to what the memory window shows."""
    for file in card.folder.glob("drm/card*/lmem_total_bytes"):
        return read_number(file) or 0
    published = model.memory_gib * GIB
    window = _bar_bytes(card)
    if window <= SMALL_BAR_BYTES:
        return published
    return min(published, window) if published else window


def _bar_bytes(card: PciDevice) -> int:
    """/sys/.../resource: a line of first address, last address and flags for each BAR."""
    lines = read_text(card.folder / "resource").splitlines()
    if len(lines) <= MEMORY_BAR:
        return 0
    first, last = (int(number, 0) for number in re.findall(r"0x[0-9a-f]+", lines[MEMORY_BAR])[:2])
    return last - first + 1 if last else 0


def _chosen(devices: list[Device], environ: Mapping[str, str]) -> tuple[list[Device], str]:
    """The devices the environment leaves visible, and the variable that leaves none."""
    for name, shows in (("ZE_AFFINITY_MASK", _mask_shows), ("ONEAPI_DEVICE_SELECTOR", _selector_shows)):
        if value := environ.get(name, "").lower():
            devices = [device for i, device in enumerate(devices) if shows(value, i)]
            if not devices:
                return [], f"{name}={environ[name]!r}"
    return devices, ""


def _mask_shows(mask: str, index: int) -> bool:
    """`0,1.0`: device numbers. Of `1.0`, a tile in the composite hierarchy, the whole device counts."""
    return str(index) in {entry.strip().split(".")[0] for entry in mask.split(",")}


def _selector_shows(selector: str, index: int) -> bool:
    """`level_zero:0,1;!level_zero:1`: terms that accept, all if there is none, then terms that discard."""
    accepts: list[bool] = []
    discards: list[bool] = []
    for term in selector.split(";"):
        backend, _, entries = term.strip().partition(":")
        names = {entry.strip().split(".")[0] for entry in entries.split(",")}
        matches = backend.lstrip("!") in ("level_zero", "*") and bool(names & {"*", "gpu", str(index)})
        (discards if backend.startswith("!") else accepts).append(matches)
    return (any(accepts) or not accepts) and not any(discards)
