"""AMD GPUs, as the kernel's compute driver (KFD) and amdgpu describe them in /sys. Opens no device.

A device is a KFD node with SIMD units: a card, one half of an MI250, or a partition of a split MI300. Indices count
what ROCR_VISIBLE_DEVICES and then HIP_VISIBLE_DEVICES leave, in their order, as the HIP runtime counts them.
Sources: Linux (kfd_topology.c, kfd_topology.h), ROCR-Runtime (amd_filter_device.cpp), ROCm's page on GPU isolation.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenplane_core.backend.hardware import SMALL_MEMORY_BYTES, pci_cards
from tokenplane_core.backend.probe import (
    ACCELERATOR_SCORE,
    INTEGRATED_SCORE,
    PciDevice,
    TorchBuild,
    addresses,
    found,
    hidden,
    join_notes,
    node_problem,
    read_number,
    read_properties,
    read_text,
    torch_build,
    torch_problem,
    users_note,
    visible,
)
from tokenplane_core.backend.records import DetectReport, Device
from tokenplane_torch.device import gpu_offer

TOPOLOGY = "sys/class/kfd/kfd/topology/nodes"
PROCESSES = "sys/class/kfd/kfd/proc"
VRAM_HEAPS = (1, 2)  # HSA_MEM_HEAP_TYPE_FB_PUBLIC and FB_PRIVATE

# HIP reads the first of these that is not empty, after ROCR_VISIBLE_DEVICES has been applied, which hides all if empty.
# From ROCm's pages on environment variables; the order among the three was not tried on a machine.
HIP_VARIABLES = ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")


@dataclass(frozen=True, slots=True)
class Node:
    number: int
    gpu_id: int
    properties: Mapping[str, int]
    vram_bytes: int

    @property
    def address(self) -> str:
        """location_id is bus, device and function in 8, 5 and 3 bits."""
        place, domain = self.properties.get("location_id", 0), self.properties.get("domain", 0)
        return f"{domain:04x}:{place >> 8 & 0xFF:02x}:{place >> 3 & 0x1F:02x}.{place & 7}"

    @property
    def gfx_version(self) -> tuple[int, int, int]:
        version = self.properties.get("gfx_target_version", 0)
        return version // 10000, version // 100 % 100, version % 100

    @property
    def gfx(self) -> str:
        """90402 -> gfx942, 90010 -> gfx90a."""
        major, minor, stepping = self.gfx_version
        return f"gfx{major}{minor:x}{stepping:x}"

    @property
    def has_bfloat16(self) -> bool:
        """Matrix units of CDNA (gfx908 and later) and of RDNA 3 and later."""
        return (9, 0, 8) <= self.gfx_version < (10, 0, 0) or self.gfx_version >= (11, 0, 0)

    @property
    def uuid(self) -> str:
        unique_id = self.properties.get("unique_id", 0)
        return f"GPU-{unique_id:016x}" if unique_id else ""


def detect(
    root: Path = Path("/"), environ: Mapping[str, str] = os.environ, torch: TorchBuild | None = None
) -> DetectReport:
    """What is here. torch: what the installed one was built for, unless given."""
    cards = {card.address: card for card in pci_cards(root, "rocm")}
    nodes = list(_nodes(root))
    if not nodes:
        return _nothing(root)
    chosen, hidden_by = _chosen(nodes, environ)
    if not chosen:
        return hidden(hidden_by, "AMD GPU", len(nodes))
    if problem := node_problem(root, "dev/kfd") or torch_problem(torch or torch_build(), "ROCm"):
        return DetectReport("broken", reason=f"{len(chosen)} x AMD GPU ({chosen[0].gfx}): {problem}")
    shared = Counter(node.address for node in nodes)
    return found([_device(root, node, cards.get(node.address), shared[node.address]) for node in chosen])


def _nothing(root: Path) -> DetectReport:
    """Why KFD shows no GPU. Display parts of a processor that it does not know are nothing to repair."""
    cards = pci_cards(root, "rocm", accelerators_only=True)
    if not cards:
        display = pci_cards(root, "rocm")
        only = f"only the display GPU at {addresses(display)}, which KFD does not know" if display else "no AMD GPU"
        return DetectReport("absent", reason=only)
    where = f"the AMD GPU at {addresses(cards)}"
    if driver := next((card.driver for card in cards if card.driver not in ("", "amdgpu")), ""):
        return DetectReport("broken", reason=f"{where} is held by the kernel driver {driver}, not by amdgpu")
    if not any(card.driver for card in cards):
        return DetectReport("broken", reason=f"{where} has no kernel driver: sudo modprobe amdgpu, and see dmesg")
    if (root / TOPOLOGY).is_dir():
        # Where a container's device rules forbid a card, its node reads as empty.
        return DetectReport(
            "broken",
            reason=f"{where}: the compute driver (KFD) shows this process no GPU; in a container, pass it in with"
            " --device /dev/kfd --device /dev/dri; otherwise the driver is too old for the card",
        )
    return DetectReport("broken", reason=f"{where}: amdgpu runs without its compute driver (KFD), see dmesg")


def _nodes(root: Path) -> Iterator[Node]:
    """The GPUs among the topology's nodes, in order; nodes of the processors have no SIMD units."""
    folders = [folder for folder in (root / TOPOLOGY).glob("[0-9]*") if folder.name.isdigit()]
    for folder in sorted(folders, key=lambda folder: int(folder.name)):
        properties = read_properties(folder / "properties")
        if properties.get("simd_count"):
            banks = [read_properties(file) for file in folder.glob("mem_banks/*/properties")]
            vram = sum(bank.get("size_in_bytes", 0) for bank in banks if bank.get("heap_type") in VRAM_HEAPS)
            yield Node(int(folder.name), read_number(folder / "gpu_id") or 0, properties, vram)


def _chosen(nodes: list[Node], environ: Mapping[str, str]) -> tuple[list[Node], str]:
    """The nodes the environment leaves visible, and the variable that leaves none."""
    for name in ("ROCR_VISIBLE_DEVICES", next((name for name in HIP_VARIABLES if environ.get(name)), "")):
        if name in environ:
            nodes = [nodes[i] for i in visible(environ[name], [node.uuid or "-" for node in nodes])]
            if not nodes:
                return [], f"{name}={environ[name]!r}"
    return nodes, ""


def _device(root: Path, node: Node, card: PciDevice | None, nodes_on_card: int) -> Device:
    total, free = node.vram_bytes, None
    if card and nodes_on_card == 1:  # amdgpu counts a card's memory as one, whatever its partitions
        total = read_number(card.folder / "mem_info_vram_total") or total
        free = max(0, total - (read_number(card.folder / "mem_info_vram_used") or 0))
    users = [
        int(file.parent.name)
        for file in (root / PROCESSES).glob(f"[0-9]*/vram_{node.gpu_id}")
        if read_number(file) and file.parent.name.isdigit()
    ]
    problem = node_problem(root, f"dev/dri/renderD{node.properties.get('drm_render_minor', 0)}")
    integrated = total < SMALL_MEMORY_BYTES
    driver = read_text(root / "sys/module/amdgpu/version")
    return Device(
        kind="rocm",
        index=0,
        name=(read_text(card.folder / "product_name") if card else "") or f"AMD GPU {node.gfx}",
        arch=node.gfx,
        memory_total_bytes=total,
        dtypes=("bfloat16", "float16", "float32") if node.has_bfloat16 else ("float16", "float32"),
        score=INTEGRATED_SCORE if integrated else ACCELERATOR_SCORE,
        memory_free_bytes=free,
        notes=join_notes(
            problem,
            "integrated, shares the host's memory" if integrated else "",
            f"one of {nodes_on_card} parts of {node.address}" if nodes_on_card > 1 else "",
            users_note(root, sorted(users)),
            f"amdgpu {driver}" if driver else "",
            card.numa_note if card else "",
        ),
        offer=gpu_offer(total),
        uuid=node.uuid,
        state="broken" if problem else "ok",
    )
