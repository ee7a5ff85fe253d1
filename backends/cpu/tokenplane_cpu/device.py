"""What this host is and what a process may use of it. Standard library only.

Everything is read from /proc and /sys below a root that tests replace by a recorded tree. Where such files are
missing (macOS, Windows), what Python itself knows stands in.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenplane_core.backend.probe import GIB, join_notes, meminfo_bytes, number_list, read_number, read_text
from tokenplane_core.backend.records import DetectReport, Device, Offer

from .native import is_built

SCORE = 1  # any accelerator scores higher
QUANTIZES = ("int8", "int4")  # by the native kernels
KV_DTYPES = ("int8",)  # the same
COMPUTED_IN = "bfloat16"  # by those

# Flag in /proc/cpuinfo -> what people call it, weakest first. x86 says "flags", Arm says "Features".
ISA = {
    "avx2": "avx2",
    "avx512f": "avx512",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "amx_int8": "amx_int8",
    "amx_bf16": "amx_bf16",
    "asimd": "neon",
    "sve": "sve",
    "i8mm": "i8mm",
    "bf16": "bf16",
}
NATIVE_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}

# Arm processors give no name in /proc/cpuinfo: "CPU implementer" and "CPU part" -> core (util-linux, lscpu-arm.c).
ARM_CORES = {
    ("0x41", "0xd08"): "Arm Cortex-A72",
    ("0x41", "0xd0b"): "Arm Cortex-A76",
    ("0x41", "0xd0c"): "Arm Neoverse-N1",
    ("0x41", "0xd40"): "Arm Neoverse-V1",
    ("0x41", "0xd49"): "Arm Neoverse-N2",
    ("0x41", "0xd4f"): "Arm Neoverse-V2",
    ("0xc0", "0xac3"): "Ampere-1",
}


@dataclass(frozen=True, slots=True)
class Host:
    name: str
    isa: tuple[str, ...]
    cores: int  # that computing threads should use: physical, allowed by affinity and by cgroup
    logical_cpus: int  # of the whole machine
    numa_note: str  # which memory nodes the allowed CPUs belong to; "" if there is only one


@dataclass(frozen=True, slots=True)
class Memory:
    machine_bytes: int
    total_bytes: int  # the machine's, or the tightest cgroup limit above this process
    free_bytes: int  # of that, what could still be taken without swapping


def detect(root: Path = Path("/")) -> DetectReport:
    """There is always a CPU."""
    host, memory = read_host(root), read_memory(root)
    native_bf16 = not NATIVE_BF16.isdisjoint(host.isa)
    device = Device(
        kind="cpu",
        index=0,
        name=host.name,
        arch="+".join(("aarch64" if "neon" in host.isa else platform.machine() or "unknown", *host.isa)),
        memory_total_bytes=memory.total_bytes,
        dtypes=("bfloat16", "float32", "float16") if native_bf16 else ("float32", "bfloat16", "float16"),
        score=SCORE,
        memory_free_bytes=memory.free_bytes,
        offer=Offer(
            headroom_bytes=headroom_bytes(memory.total_bytes),
            quantizes=QUANTIZES if is_built() else (),
            kv_dtypes=KV_DTYPES if is_built() else (),
        ),
        notes=join_notes(
            f"{host.cores} of {host.logical_cpus} CPUs used",
            f"bfloat16 {'native' if native_bf16 else 'emulated'}",
            host.numa_note,
            _limit_note(memory),
        ),
    )
    return DetectReport("found", (device,))


def _limit_note(memory: Memory) -> str:
    if memory.total_bytes >= memory.machine_bytes:
        return ""
    return f"memory limited by cgroup (machine: {memory.machine_bytes / GIB:.1f} GiB)"


def headroom_bytes(memory_total_bytes: int) -> int:
    """What the KV cache leaves free: 1/8 of the memory allowed, at least 256 MiB, for activations, gathered keys,
    logits, the allocator's slack and the rest of the machine.
    """
    return max(256 << 20, memory_total_bytes // 8)


# --- Cores --------------------------------------------------------------------------------------------------


def read_host(root: Path = Path("/")) -> Host:
    cpus = _cpuinfo(root)
    allowed = _allowed_cpus(root)
    if allowed is None:
        allowed = set(range(len(cpus) or os.cpu_count() or 1))
    cores = min(_physical_cores(cpus, allowed), _quota_cpus(root))
    first = cpus[0] if cpus else {}
    flags = set((first.get("flags") or first.get("Features") or "").split())
    return Host(
        name=_name(cpus) or platform.processor() or platform.machine() or "CPU",
        isa=tuple(name for flag, name in ISA.items() if flag in flags),
        cores=max(1, cores),
        logical_cpus=len(cpus) or os.cpu_count() or 1,
        numa_note=_numa_note(root, allowed),
    )


def _name(cpus: list[dict[str, str]]) -> str:
    """x86 names each CPU. Arm boards name the board, after the last CPU; Arm servers only number their cores."""
    for cpu in (*cpus[:1], *cpus[-1:]):
        core = ARM_CORES.get((cpu.get("CPU implementer", ""), cpu.get("CPU part", "")), "")
        board = cpu.get("Model", "")
        if name := cpu.get("model name") or (f"{board} ({core})" if board and core else board):
            return name
    return core if cpus else ""


def _numa_note(root: Path, allowed: set[int]) -> str:
    nodes = {
        int(folder.name[4:]): set(number_list(read_text(folder / "cpulist")))
        for folder in (root / "sys/devices/system/node").glob("node[0-9]*")
    }
    ours = sorted(node for node, cpus in nodes.items() if cpus & allowed)
    if len(nodes) < 2 or not ours:
        return ""
    if len(ours) == len(nodes):
        return f"{len(nodes)} NUMA nodes"
    return f"on NUMA node {', '.join(map(str, ours))} of {len(nodes)}"


def default_threads(root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> int:
    """Threads to compute with when nobody names a number: OMP_NUM_THREADS where it is set, else a thread per core."""
    wanted = environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(wanted) if wanted.isdigit() and int(wanted) > 0 else read_host(root).cores


def _cpuinfo(root: Path) -> list[dict[str, str]]:
    """One dict per logical CPU."""
    cpus: list[dict[str, str]] = []
    for line in read_text(root / "proc/cpuinfo").splitlines():
        name, _, value = (part.strip() for part in line.partition(":"))
        if name == "processor":
            cpus.append({})
        if cpus and name:
            cpus[-1][name] = value
    return cpus


def _allowed_cpus(root: Path) -> set[int] | None:
    """CPU numbers this process may run on, or None where nobody says."""
    for line in read_text(root / "proc/self/status").splitlines():
        if line.startswith("Cpus_allowed_list:"):
            return set(number_list(line.partition(":")[2]))
    return None


def _physical_cores(cpus: list[dict[str, str]], allowed: set[int]) -> int:
    """Two threads on one core slow each other down in matrix products: count each core once."""
    cores = {
        (cpu.get("physical id"), cpu.get("core id", f"cpu {cpu['processor']}"))
        for cpu in cpus
        if cpu["processor"].isdigit() and int(cpu["processor"]) in allowed
    }
    return len(cores) or len(allowed)


def _quota_cpus(root: Path) -> int:
    """Whole CPUs of the tightest cgroup quota; a fraction of a CPU is not worth a thread that gets throttled."""
    quotas = [1 << 16]
    for folder in _cgroup_folders(root, ""):
        quota, _, period = read_text(folder / "cpu.max").partition(" ")
        if quota.isdigit() and period.isdigit():
            quotas.append(int(quota) // int(period))
    for folder in _cgroup_folders(root, "cpu"):
        micros, period_us = read_number(folder / "cpu.cfs_quota_us"), read_number(folder / "cpu.cfs_period_us")
        if micros and period_us:
            quotas.append(micros // period_us)
    return max(1, min(quotas))


# --- Memory -------------------------------------------------------------------------------------------------


def read_memory(root: Path = Path("/")) -> Memory:
    """The machine's memory, narrowed by every cgroup that holds this process."""
    machine = meminfo_bytes(root)
    total = whole = machine.get("MemTotal") or _sysconf_bytes("SC_PHYS_PAGES")
    free = machine.get("MemAvailable") or _sysconf_bytes("SC_AVPHYS_PAGES") or total
    for limit, used in _cgroup_memory(root):
        total, free = min(total, limit), min(free, max(0, limit - used))
    return Memory(whole, total, free)


def _cgroup_memory(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, used) in bytes of each cgroup with a limit. File cache the kernel would drop first is not used."""
    for controller, limit_file, used_file in (
        ("", "memory.max", "memory.current"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        for folder in _cgroup_folders(root, controller):
            limit, used = read_number(folder / limit_file), read_number(folder / used_file)
            if limit is not None:
                yield limit, max(0, (used or 0) - _inactive_file(folder))


def _inactive_file(folder: Path) -> int:
    """Version 1 counts the groups below under a name of its own, and its usage figure includes them."""
    stat = dict(line.split(" ", 1) for line in read_text(folder / "memory.stat").splitlines() if " " in line)
    return int(stat.get("total_inactive_file") or stat.get("inactive_file") or 0)


# --- Files --------------------------------------------------------------------------------------------------


def _cgroup_folders(root: Path, controller: str) -> Iterator[Path]:
    """The cgroup folder of this process and all above it; controller "" means version 2.

    In a container the path of /proc/self/cgroup may lie outside what is mounted: folders that are not there are
    passed over, the mount point itself always counts.
    """
    base = root / "sys/fs/cgroup"
    for controllers, path in re.findall(r"^\d+:([^:]*):/(.*)$", read_text(root / "proc/self/cgroup"), re.MULTILINE):
        if controller in controllers.split(","):
            mount = base / controllers if controller else base
            if controller and not mount.is_dir():
                mount = base / controller
            inner = Path(path)
            yield from (mount / part for part in (inner, *inner.parents) if ".." not in part.parts)


def _sysconf_bytes(pages: str) -> int:
    try:
        return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0
