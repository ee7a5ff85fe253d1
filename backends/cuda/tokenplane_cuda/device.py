"""NVIDIA GPUs, as the driver's management library (NVML) and /sys describe them. Opens no CUDA context.

A device is a GPU or, where a GPU is split, one of its MIG instances. Indices count what CUDA_VISIBLE_DEVICES leaves,
in its order, else in NVML's. CUDA itself may order unlike cards otherwise and shows one MIG instance at most, so
whoever opens a device names it to CUDA by `Device.uuid`.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenplane_core.backend.hardware import pci_cards
from tokenplane_core.backend.probe import (
    ACCELERATOR_SCORE,
    TorchBuild,
    addresses,
    found,
    hidden,
    join_notes,
    meminfo_bytes,
    node_problem,
    torch_build,
    torch_problem,
    users_note,
    visible,
)
from tokenplane_core.backend.records import DetectReport, Device
from tokenplane_torch.device import gpu_offer

from .nvml import (
    DRIVER_NOT_LOADED,
    GPU_IS_LOST,
    LIBRARY,
    NO_PERMISSION,
    RESET_REQUIRED,
    Nvml,
    NvmlError,
    NvmlMemory,
    NvmlPci,
    NvmlProcess,
)

MIN_CAPABILITY = (7, 0)  # Triton compiles for nothing older

# The oldest driver of each CUDA major version: any minor version of torch's CUDA runs on it (CUDA compatibility guide).
DRIVER_FOR_CUDA = {11: "450", 12: "525", 13: "580"}

PROHIBITED, EXCLUSIVE_PROCESS = 2, 3  # nvmlComputeMode_t
MAX_PROCESSES = 64


def detect(
    root: Path = Path("/"),
    environ: Mapping[str, str] = os.environ,
    load_library: Callable[[], Any] = lambda: ctypes.CDLL(LIBRARY),
    torch: TorchBuild | None = None,
) -> DetectReport:
    """What is here. load_library raises OSError where there is none; torch: the installed one unless given."""
    cards = pci_cards(root, "cuda")
    here = f"the NVIDIA GPU at {addresses(cards)}" if cards else ""
    if not here and any((root / "dev").glob("nvidia[0-9]*")):
        here = "an NVIDIA GPU (/dev/nvidia*)"
    try:
        nvml = Nvml(load_library())
    except OSError:
        if not here:
            return DetectReport("absent", reason="no NVIDIA GPU")
        held = f" (its kernel driver is {cards[0].driver})" if cards and cards[0].driver else ""
        return DetectReport(
            "broken",
            reason=f"{here} is there{held}, but {LIBRARY} is not: install NVIDIA's driver; in a container, start it"
            " with the NVIDIA container toolkit (docker run --gpus all)",
        )
    try:
        nvml.call("nvmlInit_v2")
    except NvmlError as error:
        if error.code == DRIVER_NOT_LOADED and not here:
            return DetectReport("absent", reason=f"no NVIDIA GPU ({LIBRARY} is installed)")
        problem = node_problem(root, "dev/nvidiactl") if error.code == NO_PERMISSION else ""
        return DetectReport("broken", reason=f"{here or 'NVIDIA driver'}: {problem or error}")
    try:
        return _report(nvml, root, environ, torch or torch_build(), {c.address: c.numa_note for c in cards})
    except NvmlError as error:
        return DetectReport("broken", reason=f"{here or 'NVIDIA driver'}: {error}")
    finally:
        nvml.call("nvmlShutdown")


def _report(
    nvml: Nvml, root: Path, environ: Mapping[str, str], torch: TorchBuild | None, numa: Mapping[str, str]
) -> DetectReport:
    """numa: PCI address -> note."""
    driver = nvml.text("nvmlSystemGetDriverVersion")
    cards = [_card(nvml, root, index, driver, numa) for index in range(nvml.number("nvmlDeviceGetCount_v2"))]
    if not cards:
        return DetectReport("absent", reason=f"driver {driver} is loaded, but shows this process no GPU")
    wanted = environ.get("CUDA_VISIBLE_DEVICES")
    devices = [device for card in cards for device in card.devices]
    if wanted is not None:
        names = [card.uuid for card in cards] + [device.uuid for device in devices if device.uuid[:4] == "MIG-"]
        by_uuid = {device.uuid: [device] for device in devices if device.uuid}
        groups = [card.devices for card in cards] + [by_uuid[name] for name in names[len(cards) :]]
        devices = [device for i in visible(wanted, names, len(cards)) for device in groups[i]]
    if not devices:
        return hidden(f"CUDA_VISIBLE_DEVICES={wanted!r}", "NVIDIA GPU", len(cards))
    if problem := _software_problem(torch, driver, nvml.number("nvmlSystemGetCudaDriverVersion_v2")):
        return DetectReport("broken", reason=f"{len(devices)} x {devices[0].name}: {problem}")
    unlike = len({card.devices[0].name for card in cards}) > 1
    reason = ""
    if wanted and unlike and wanted[0].isdigit() and environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        reason = (
            f"CUDA_VISIBLE_DEVICES={wanted!r} was read in the order of nvidia-smi; set CUDA_DEVICE_ORDER=PCI_BUS_ID or"
            " name UUIDs, since CUDA counts unlike cards by speed otherwise"
        )
    return found(devices, reason)


def _software_problem(torch: TorchBuild | None, driver: str, cuda_driver: int) -> str:
    """cuda_driver: 12040 is CUDA 12.4."""
    if torch is None or torch.cuda is None:
        return torch_problem(torch, "CUDA")
    major = int(torch.cuda.split(".")[0])
    if cuda_driver // 1000 >= major:
        return ""
    newer = f", driver {DRIVER_FOR_CUDA[major]} or newer" if major in DRIVER_FOR_CUDA else ""
    return (
        f"driver {driver} is too old: it knows CUDA {cuda_driver // 1000}.{cuda_driver % 1000 // 10}, and torch"
        f" {torch.version} needs CUDA {major}.0{newer}"
    )


# --- One card -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Card:
    uuid: str
    devices: list[Device]  # the card itself, or its MIG instances


def _card(nvml: Nvml, root: Path, index: int, driver: str, numa: Mapping[str, str]) -> Card:
    unknown = Device("cuda", index, f"NVIDIA GPU {index}", "", 0, (), ACCELERATOR_SCORE, state="broken")
    try:
        handle = nvml.handle("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index))
        uuid, pci = nvml.text("nvmlDeviceGetUUID", handle), NvmlPci()
        nvml.call("nvmlDeviceGetPciInfo_v3", handle, ctypes.byref(pci))
        address = f"{pci.domain:04x}:{pci.bus:02x}:{pci.device:02x}.0"
        notes = join_notes(f"driver {driver}", numa.get(address, ""))
        return Card(uuid, _instances(nvml, root, handle, notes) or [_device(nvml, root, handle, handle, notes)])
    except NvmlError as error:
        problem = node_problem(root, f"dev/nvidia{index}") if error.code == NO_PERMISSION else ""
        return Card("", [replace(unknown, notes=problem or str(error))])


def _instances(nvml: Nvml, root: Path, gpu: ctypes.c_void_p, notes: str) -> list[Device]:
    """The MIG instances of a GPU, or none where it is not split."""
    found = []
    for i in range(nvml.number_or_zero("nvmlDeviceGetMaxMigDeviceCount", gpu)):
        try:
            instance = nvml.handle("nvmlDeviceGetMigDeviceHandleByIndex", gpu, ctypes.c_uint(i))
        except NvmlError:
            continue  # a place without an instance
        found.append(_device(nvml, root, gpu, instance, notes))
    return found


def _device(nvml: Nvml, root: Path, gpu: ctypes.c_void_p, handle: ctypes.c_void_p, notes: str) -> Device:
    """`handle` is the GPU or a MIG instance of it."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvml.call("nvmlDeviceGetCudaComputeCapability", gpu, ctypes.byref(major), ctypes.byref(minor))
    capability = (major.value, minor.value)
    total, free, shared = _memory(nvml, root, handle)
    pids = _pids(nvml, handle)
    is_split = handle is gpu and _mig_mode(nvml, gpu)
    mode = nvml.number_or_zero("nvmlDeviceGetComputeMode", gpu)
    broken = ""
    if is_split:
        broken = "MIG is on but has no instance: create one (nvidia-smi mig -cgi ... -C) or switch MIG off"
    elif capability < MIN_CAPABILITY:
        least = ".".join(map(str, MIN_CAPABILITY))
        broken = f"compute capability {major.value}.{minor.value} is below {least}, which the kernels need"
    elif mode == PROHIBITED:
        broken = "compute mode is Prohibited: sudo nvidia-smi -c DEFAULT"
    busy = bool(pids) and mode == EXCLUSIVE_PROCESS
    return Device(
        kind="cuda",
        index=0,
        name=nvml.text("nvmlDeviceGetName", handle),
        arch=f"sm_{major.value}{minor.value}",
        memory_total_bytes=total,
        dtypes=("bfloat16", "float16", "float32") if capability >= (8, 0) else ("float16", "float32"),
        score=ACCELERATOR_SCORE,
        memory_free_bytes=free,
        notes=join_notes(
            broken,
            "exclusive to one process" if mode == EXCLUSIVE_PROCESS else "",
            users_note(root, pids),
            shared,
            notes,
        ),
        offer=gpu_offer(total),
        uuid=nvml.text("nvmlDeviceGetUUID", handle),
        state="broken" if broken else "busy" if busy else "ok",
    )


def _memory(nvml: Nvml, root: Path, handle: ctypes.c_void_p) -> tuple[int, int, str]:
    """Total and free bytes, and a note. GPUs that share the host's memory (GB10) do not answer."""
    memory = NvmlMemory()
    try:
        nvml.call("nvmlDeviceGetMemoryInfo", handle, ctypes.byref(memory))
    except NvmlError as error:
        if error.code in (GPU_IS_LOST, RESET_REQUIRED):
            raise
        host = meminfo_bytes(root)
        return host.get("MemTotal", 0), host.get("MemAvailable", 0), "shares the host's memory"
    return memory.total, memory.free, ""


def _pids(nvml: Nvml, handle: ctypes.c_void_p) -> list[int]:
    """Processes that compute on it, as far as this PID namespace shows them; the first ones if there are very many."""
    count, processes = ctypes.c_uint(MAX_PROCESSES), (NvmlProcess * MAX_PROCESSES)()
    try:
        nvml.call("nvmlDeviceGetComputeRunningProcesses_v3", handle, ctypes.byref(count), processes)
    except NvmlError:
        return []
    return [process.pid for process in processes[: count.value]]


def _mig_mode(nvml: Nvml, gpu: ctypes.c_void_p) -> bool:
    current, pending = ctypes.c_uint(), ctypes.c_uint()
    try:
        nvml.call("nvmlDeviceGetMigMode", gpu, ctypes.byref(current), ctypes.byref(pending))
    except NvmlError:
        return False  # a card without MIG
    return bool(current.value)
