"""Recorded machines: what /proc, /sys and /dev hold there, the environment, and NVIDIA's library as it answered.

The trees are as short as detection allows. Values follow the drivers' documentation and public listings of such
machines; they were not copied off machines of ours.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from tokenplane_core.backend.probe import TorchBuild

from .recorded_nvml import GIB, Gpu, RecordedNvml, Unit, no_library

CUDA_TORCH = TorchBuild("2.9.1+cu128", cuda="12.8")
ROCM_TORCH = TorchBuild("2.9.1+rocm6.4", hip="6.4.43484")
XPU_TORCH = TorchBuild("2.9.1+xpu", xpu="20250201")
CPU_TORCH = TorchBuild("2.9.1+cpu")


@dataclass
class Machine:
    files: dict[str, str] = field(default_factory=dict)  # path below the root -> content
    links: dict[str, str] = field(default_factory=dict)  # path -> where it points
    nodes: dict[str, int] = field(default_factory=dict)  # device file -> mode; what others may do counts for us
    environ: dict[str, str] = field(default_factory=dict)
    nvml: Callable[[], Any] = no_library
    torch: TorchBuild = CPU_TORCH

    def __add__(self, other: Machine) -> Machine:
        """Both in one case; what stands alone (library, torch) is the left one's."""
        return replace(
            self,
            files=self.files | other.files,
            links=self.links | other.links,
            nodes=self.nodes | other.nodes,
            environ=self.environ | other.environ,
        )

    def told(self, **environ: str) -> Machine:
        return replace(self, environ=self.environ | environ)

    def build(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Write it below root, to be looked at by a plain user: tests may run as root, who may open anything."""
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path).stat().st_mode & mode == mode)
        for name, text in self.files.items():
            _place(root / name).write_text(text)
        for name, mode in self.nodes.items():
            _place(root / name).touch()
            (root / name).chmod(mode)
        for name, target in self.links.items():
            _place(root / name).unlink(missing_ok=True)  # built a second time, over itself
            (root / name).symlink_to(target)
        return root


def _place(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def pci(
    address: str, vendor: int, device: int, pci_class: int, driver: str = "", numa: int = 0, **more: str | int
) -> Machine:
    """One PCI device; `more` are further files of it."""
    folder = f"sys/bus/pci/devices/{address}"
    files = {
        f"{folder}/vendor": f"0x{vendor:04x}\n",
        f"{folder}/device": f"0x{device:04x}\n",
        f"{folder}/class": f"0x{pci_class:04x}00\n",
        f"{folder}/numa_node": f"{numa}\n",
    }
    files |= {f"{folder}/{name}": f"{value}\n" for name, value in more.items()}
    links = {f"{folder}/driver": f"../../../../bus/pci/drivers/{driver}"} if driver else {}
    return Machine(files, links)


def user(pid: int, name: str, *nodes: str) -> Machine:
    """A process with device files open."""
    links = {f"proc/{pid}/fd/{i + 3}": f"/{node}" for i, node in enumerate(nodes)}
    return Machine({f"proc/{pid}/comm": f"{name}\n"}, links)


def merged(parts: list[Machine]) -> Machine:
    whole = Machine()
    for part in parts:
        whole = whole + part
    return whole


# --- Processors ---------------------------------------------------------------------------------------------

SAPPHIRE_FLAGS = "avx2 avx512f avx512_vnni avx512_bf16 amx_bf16 amx_tile amx_int8"


def meminfo(total_gib: int, available_gib: int) -> str:
    return (
        f"MemTotal: {total_gib << 20} kB\nMemFree: 1 kB\nMemAvailable: {available_gib << 20} kB\nHugePages_Total: 0\n"
    )


def host(name: str, cpus: int, flags: str, total_gib: int, available_gib: int, numa_nodes: int = 1) -> Machine:
    cpuinfo = "\n".join(
        f"processor\t: {i}\nmodel name\t: {name}\nphysical id\t: 0\ncore id\t\t: {i}\nflags\t\t: {flags}\n"
        for i in range(cpus)
    )
    files = {
        "proc/cpuinfo": cpuinfo,
        "proc/meminfo": meminfo(total_gib, available_gib),
        "proc/self/status": f"Name:\tpython\nCpus_allowed_list:\t0-{cpus - 1}\n",
    }
    per_node = cpus // numa_nodes
    for node in range(numa_nodes):
        first = node * per_node
        files[f"sys/devices/system/node/node{node}/cpulist"] = f"{first}-{first + per_node - 1}\n"
    return Machine(files)


def arm_host(part: str, cpus: int, features: str, total_gib: int, model: str = "") -> Machine:
    cpuinfo = "\n".join(
        f"processor\t: {i}\nBogoMIPS\t: 50.00\nFeatures\t: {features}\nCPU implementer\t: 0x41\nCPU part\t: {part}\n"
        for i in range(cpus)
    )
    tail = f"\nRevision\t: d04170\nModel\t\t: {model}\n" if model else ""
    return Machine({"proc/cpuinfo": cpuinfo + tail, "proc/meminfo": meminfo(total_gib, total_gib - 1)})


XEON = host("Intel(R) Xeon(R) Platinum 8480+", 8, SAPPHIRE_FLAGS, 2048, 1990, numa_nodes=2)
EPYC = host("AMD EPYC 9654 96-Core Processor", 8, "avx2 avx512f avx512_vnni avx512_bf16", 1536, 1500, numa_nodes=2)
LAPTOP = host("Intel(R) Core(TM) Ultra 7 155H", 8, "avx2", 32, 20)
SMALL_HOST = host("AMD EPYC 7R13", 4, "avx2", 64, 60)

POD = SMALL_HOST + Machine(
    {
        "proc/self/status": "Cpus_allowed_list:\t0-3\n",
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/cpu.max": "200000 100000\n",
        "sys/fs/cgroup/memory.max": f"{8 * GIB}\n",
        "sys/fs/cgroup/memory.current": f"{3 * GIB}\n",
    }
)
RASPBERRY = arm_host("0xd0b", 4, "fp asimd", 8, "Raspberry Pi 5 Model B Rev 1.0")
GRAVITON = arm_host("0xd40", 8, "fp asimd sve i8mm bf16", 64)

# --- NVIDIA -------------------------------------------------------------------------------------------------


def nvidia(gpus: list[Gpu], device: int, base: Machine, **library: Any) -> Machine:
    cards = [
        pci(gpu.address, 0x10DE, device, 0x0302, "nvidia", numa=i * 2 // max(len(gpus), 2))
        for i, gpu in enumerate(gpus)
    ]
    nodes = {f"dev/nvidia{i}": 0o666 for i in range(len(gpus))} | {"dev/nvidiactl": 0o666}
    whole = base + merged([*cards, Machine(nodes=nodes)])
    return replace(whole, nvml=RecordedNvml(gpus, **library), torch=CUDA_TORCH)


def h100(index: int, **changes: Any) -> Gpu:
    gpu = Gpu("NVIDIA H100 80GB HBM3", f"GPU-{index}0000000-aaaa-bbbb-cccc-00000000000{index}", 79.6, 79.1)
    return replace(gpu, address=f"0000:{0x1B + 0x10 * index:02x}:00.0", mig_mode=0, **changes)


def a100(index: int, **changes: Any) -> Gpu:
    gpu = Gpu("NVIDIA A100-SXM4-40GB", f"GPU-a{index}000000-aaaa-bbbb-cccc-00000000000{index}", 39.4, 39.0)
    return replace(gpu, **{"address": f"0000:{7 + index:02x}:00.0", "capability": (8, 0), "mig_mode": 0, **changes})


def eight_h100() -> Machine:
    """GPU 0 serves another model, GPU 3 is exclusive to a process, GPU 5 has fallen off the bus."""
    gpus = [h100(i) for i in range(8)]
    gpus[0] = h100(0, free_gib=4.2, pids=(4711,))
    gpus[3] = h100(3, free_gib=78.0, pids=(5150,), compute_mode=3)
    gpus[5] = h100(5, code=15)
    machine = nvidia(gpus, 0x2330, XEON)
    return machine + user(4711, "vllm") + user(5150, "python3")


def mig_a100() -> Machine:
    split = [
        Unit("NVIDIA A100-SXM4-40GB MIG 3g.20gb", "MIG-11111111-1111-1111-1111-111111111111", 19.6, 19.5),
        None,
        Unit("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "MIG-22222222-2222-2222-2222-222222222222", 4.8, 4.7, pids=(99,)),
    ]
    return nvidia([a100(0, mig_mode=1, instances=split), a100(1, mig_mode=1)], 0x20B0, EPYC)


def rtx_laptop() -> Machine:
    """A discrete card beside the processor's own GPU."""
    rtx = Gpu("NVIDIA GeForce RTX 4060 Laptop GPU", "GPU-4060", 8.0, 7.6, capability=(8, 9))
    return nvidia([rtx], 0x28E0, LAPTOP) + integrated_gpu(0x7D55)


def old_driver() -> Machine:
    v100 = Gpu("Tesla V100-SXM2-16GB", "GPU-5100", 16.0, 15.8, capability=(7, 0))
    return nvidia([v100], 0x1DB1, XEON, driver="470.57.02", cuda=11040)


def updated_driver() -> Machine:
    """The packages are new, the kernel module is still the old one."""
    return nvidia([a100(0)], 0x20B0, EPYC, init_code=18)


def unprivileged_container() -> Machine:
    machine = nvidia([a100(0)], 0x20B0, EPYC, init_code=4)
    machine.nodes["dev/nvidiactl"] = 0o600
    return machine


def nouveau() -> Machine:
    return LAPTOP + pci("0000:01:00.0", 0x10DE, 0x28E0, 0x0300, "nouveau")


# --- AMD ----------------------------------------------------------------------------------------------------


def kfd_gpu(
    node: int, address: str, gfx_version: int, vram_gib: int, product: str, used_gib: int = 0, minor: int | None = None
) -> Machine:
    bus, slot = int(address[5:7], 16), int(address[8:10], 16)
    minor = 127 + node if minor is None else minor
    folder = f"sys/class/kfd/kfd/topology/nodes/{node}"
    properties = {
        "simd_count": 1216,
        "gfx_target_version": gfx_version,
        "location_id": bus << 8 | slot << 3,
        "domain": 0,
        "drm_render_minor": minor,
        "unique_id": 0x1000 + node,
    }
    files = {
        f"{folder}/gpu_id": f"{40000 + node}\n",
        f"{folder}/properties": "".join(f"{name} {value}\n" for name, value in properties.items()),
        f"{folder}/mem_banks/0/properties": f"heap_type 1\nsize_in_bytes {vram_gib * GIB}\nflags 0\n",
    }
    card = pci(
        address,
        0x1002,
        0x74A1,
        0x1200,
        "amdgpu",
        numa=node % 2,
        mem_info_vram_total=vram_gib * GIB,
        mem_info_vram_used=used_gib * GIB,
        product_name=product,
    )
    return Machine(files, nodes={f"dev/dri/renderD{minor}": 0o666}) + card


def amd(gpus: list[Machine], base: Machine) -> Machine:
    """Node 0 is the processor's, as in every topology."""
    cpu = "sys/class/kfd/kfd/topology/nodes/0"
    kfd = Machine(
        {f"{cpu}/gpu_id": "0\n", f"{cpu}/properties": "cpu_cores_count 96\nsimd_count 0\n"},
        nodes={"dev/kfd": 0o666},
    )
    driver = Machine({"sys/module/amdgpu/version": "6.12.12\n"})
    return replace(base + merged([kfd, driver, *gpus]), torch=ROCM_TORCH)


def eight_mi300x() -> Machine:
    """The user hides the first one; the second is nearly full."""
    gpus = [
        kfd_gpu(
            i + 1, f"0000:{0x05 + 0x20 * i:02x}:00.0", 90402, 192, "AMD Instinct MI300X OAM", used_gib=180 * (i == 1)
        )
        for i in range(7)
    ]
    gpus.append(kfd_gpu(8, "0000:e5:00.0", 90402, 192, "AMD Instinct MI300X OAM"))
    process = Machine({"sys/class/kfd/kfd/proc/812/vram_40002": f"{180 * GIB}\n"}) + user(812, "sglang")
    return (amd(gpus, EPYC) + process).told(ROCR_VISIBLE_DEVICES="1,2,3,4,5,6,7")


def mi250() -> Machine:
    """A card is two devices of 64 GiB."""
    halves = [kfd_gpu(i + 1, f"0000:{0x29 + 3 * i:02x}:00.0", 90010, 64, "AMD Instinct MI250") for i in range(2)]
    return amd(halves, EPYC)


def no_render_group() -> Machine:
    machine = amd([kfd_gpu(1, "0000:03:00.0", 110000, 24, "AMD Radeon RX 7900 XTX")], LAPTOP)
    machine.nodes["dev/kfd"] = 0o660
    return machine


def two_kinds() -> Machine:
    """An NVIDIA and an AMD card."""
    rtx = Gpu("NVIDIA GeForce RTX 4090", "GPU-4090", 24.0, 23.5, capability=(8, 9))
    mi210 = amd([kfd_gpu(1, "0000:c3:00.0", 90010, 64, "AMD Instinct MI210")], EPYC)
    return nvidia([rtx], 0x2684, mi210)


# --- Intel --------------------------------------------------------------------------------------------------


def render_node(address: str, minor: int) -> Machine:
    return Machine(
        {f"sys/bus/pci/devices/{address}/drm/renderD{minor}/dev": "226:0\n"},
        nodes={f"dev/dri/renderD{minor}": 0o666},
    )


def intel_card(address: str, device: int, driver: str, minor: int, bar_bytes: int, pci_class: int = 0x0380) -> Machine:
    bars = [(0, 0), (0, 0), (0x6000000000, 0x6000000000 + bar_bytes - 1)]
    resource = "\n".join(f"0x{first:016x} 0x{last:016x} 0x{0x14220C:016x}" for first, last in bars)
    return pci(address, 0x8086, device, pci_class, driver, resource=resource) + render_node(address, minor)


def integrated_gpu(device: int, driver: str = "i915") -> Machine:
    address = "0000:00:02.0"
    return pci(address, 0x8086, device, 0x0300, driver, numa=-1) + render_node(address, 160)


LEVEL_ZERO = Machine({"usr/lib/x86_64-linux-gnu/libze_intel_gpu.so.1": ""})


def max_1550() -> Machine:
    cards = [
        intel_card(f"0000:{bus:02x}:00.0", 0x0BD5, "i915", 128 + i, 128 * GIB) for i, bus in enumerate((0x29, 0x3A))
    ]
    return replace(XEON + merged([*cards, LEVEL_ZERO]), torch=XPU_TORCH)


def arc_desktop() -> Machine:
    card = intel_card("0000:03:00.0", 0xE20B, "xe", 128, 16 * GIB, 0x0300)
    return replace(LAPTOP + card + integrated_gpu(0x7D55, "xe") + LEVEL_ZERO, torch=XPU_TORCH)


def old_integrated() -> Machine:
    return replace(LAPTOP + integrated_gpu(0x3E92), torch=XPU_TORCH)


# --- Gaudi, Neuron, TPU -------------------------------------------------------------------------------------


def gaudi_card(index: int, generation: str, device: int, module: int, status: str = "Operational") -> Machine:
    address = f"0000:{0x19 + 0x10 * index:02x}:00.0"
    folder = f"sys/class/accel/accel{index}/device"
    values = {"device_type": generation, "status": status, "pci_addr": address, "module_id": module}
    files = {f"{folder}/{name}": f"{value}\n" for name, value in values.items()}
    card = pci(address, 0x1DA3, device, 0x1200, "habanalabs", numa=index // 4)
    return Machine(files, nodes={f"dev/accel/accel{index}": 0o666}) + card


HABANALABS = Machine({"sys/module/habanalabs/version": "1.21.0-abc\n"})


def eight_gaudi2() -> Machine:
    """Card 0 is somebody's, card 2 is being reset, card 6 has failed."""
    status = {2: "In reset after device release", 6: "Disabled"}
    modules = (3, 2, 1, 0, 7, 6, 5, 4)
    cards = [gaudi_card(i, "GAUDI2", 0x1020, modules[i], status.get(i, "Operational")) for i in range(8)]
    return XEON + merged([*cards, HABANALABS, user(1234, "python3", "dev/accel/accel0")])


def gaudi3() -> Machine:
    return XEON + gaudi_card(0, "GAUDI3", 0x1060, 0) + HABANALABS


def neuron_chips(count: int, device: int, cores: int, used_bytes: int = 0) -> Machine:
    parts = []
    for i in range(count):
        folder = f"sys/devices/virtual/neuron_device/neuron{i}"
        files = {f"{folder}/info/serial_number": f"{0xA0 + i:016x}\n"}
        for core in range(cores):
            files[f"{folder}/neuron_core{core}/stats/memory_usage/device_mem/present"] = f"{used_bytes * (i == 0)}\n"
        parts.append(Machine(files, nodes={f"dev/neuron{i}": 0o666}))
        parts.append(pci(f"0000:{0x10 + i:02x}:1e.0", 0x1D0F, device, 0x0880, "neuron", numa=i * 2 // max(count, 2)))
    return merged([*parts, Machine({"sys/module/neuron/version": "2.24.7.0\n"})])


def trn2() -> Machine:
    return XEON + neuron_chips(16, 0x7364, 8, used_bytes=GIB) + user(77, "python3", "dev/neuron0")


def inf2() -> Machine:
    return SMALL_HOST + neuron_chips(1, 0x7264, 2)


def tpu_chips(count: int, device: int, kind: str, base: Machine, **more: str | int) -> Machine:
    parts = [base]
    for i in range(count):
        address = f"0000:00:{4 + i:02x}.0"
        old = device in (0x0027, 0x005E)
        node = f"dev/accel{i}" if old else f"dev/vfio/{10 + i}"
        parts.append(pci(address, 0x1AE0, device, 0x1200, "" if old else "vfio-pci", **more))
        parts.append(
            Machine(links={f"sys/bus/pci/devices/{address}/iommu_group": f"../../../kernel/iommu_groups/{10 + i}"})
        )
        parts.append(Machine(nodes={node: 0o666}))
    return merged(parts).told(TPU_ACCELERATOR_TYPE=kind)


def v5e_8() -> Machine:
    return tpu_chips(8, 0x0063, "v5litepod-8", EPYC) + user(31, "python3", "dev/vfio/10", "dev/vfio/11")


def v6e_4() -> Machine:
    return tpu_chips(4, 0x006F, "v6e-16", EPYC)


def plain(machine: Machine) -> Callable[[], Machine]:
    return lambda: machine


MACHINES: Mapping[str, Callable[[], Machine]] = {
    "eight H100": eight_h100,
    "split A100": mig_a100,
    "laptop with an RTX": rtx_laptop,
    "old driver": old_driver,
    "driver just updated": updated_driver,
    "container without permission": unprivileged_container,
    "nouveau": nouveau,
    "eight MI300X": eight_mi300x,
    "MI250": mi250,
    "no render group": no_render_group,
    "two kinds of card": two_kinds,
    "Intel Max 1550": max_1550,
    "Arc desktop": arc_desktop,
    "old integrated GPU": old_integrated,
    "eight Gaudi 2": eight_gaudi2,
    "Gaudi 3": gaudi3,
    "trn2": trn2,
    "inf2": inf2,
    "v5e-8": v5e_8,
    "v6e-16": v6e_4,
    "pod with limits": plain(POD),
    "Raspberry Pi": plain(RASPBERRY),
    "Graviton": plain(GRAVITON),
}
