"""NVIDIA's management library as recorded on a machine: answers through ctypes as the real one does."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

GIB = 1 << 30
SUCCESS, NOT_SUPPORTED, NOT_FOUND = 0, 3, 6


@dataclass
class Unit:
    """A GPU, or a MIG instance."""

    name: str
    uuid: str
    total_gib: float | None  # None: it shares the host's memory and does not say
    free_gib: float = 0.0
    pids: tuple[int, ...] = ()


@dataclass
class Gpu(Unit):
    address: str = "0000:01:00.0"
    capability: tuple[int, int] = (9, 0)
    compute_mode: int = 0
    mig_mode: int | None = None  # None: a card without MIG
    instances: list[Unit | None] = field(default_factory=list)  # None: a place without an instance
    code: int = SUCCESS  # what asking for its handle answers
    memory_code: int = SUCCESS


@dataclass
class RecordedNvml:
    gpus: list[Gpu] = field(default_factory=list)
    driver: str = "580.95.05"
    cuda: int = 13000
    init_code: int = SUCCESS
    is_open: bool = False

    def __call__(self) -> RecordedNvml:
        """Stands for loading the library."""
        return self

    def nvmlInit_v2(self) -> int:
        self.is_open = self.init_code == SUCCESS
        return self.init_code

    def nvmlShutdown(self) -> int:
        self.is_open = False
        return SUCCESS

    def nvmlSystemGetDriverVersion(self, buffer: Any, size: Any) -> int:
        return self._text(buffer, size, self.driver)

    def nvmlSystemGetCudaDriverVersion_v2(self, version: Any) -> int:
        version._obj.value = self.cuda
        return SUCCESS

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = len(self.gpus)
        return SUCCESS

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, handle: Any) -> int:
        handle._obj.value = (index.value + 1) << 8
        return self.gpus[index.value].code

    def nvmlDeviceGetPciInfo_v3(self, handle: Any, pci: Any) -> int:
        domain, bus, rest = self._gpu(handle).address.split(":")
        pci._obj.domain, pci._obj.bus, pci._obj.device = int(domain, 16), int(bus, 16), int(rest[:2], 16)
        return SUCCESS

    def nvmlDeviceGetUUID(self, handle: Any, buffer: Any, size: Any) -> int:
        return self._text(buffer, size, self._unit(handle).uuid)

    def nvmlDeviceGetName(self, handle: Any, buffer: Any, size: Any) -> int:
        return self._text(buffer, size, self._unit(handle).name)

    def nvmlDeviceGetCudaComputeCapability(self, handle: Any, major: Any, minor: Any) -> int:
        major._obj.value, minor._obj.value = self._gpu(handle).capability
        return SUCCESS

    def nvmlDeviceGetMemoryInfo(self, handle: Any, memory: Any) -> int:
        unit = self._unit(handle)
        if unit.total_gib is None:
            return NOT_SUPPORTED
        total, free = int(unit.total_gib * GIB), int(unit.free_gib * GIB)
        memory._obj.total, memory._obj.free, memory._obj.used = total, free, total - free
        return self._gpu(handle).memory_code

    def nvmlDeviceGetComputeMode(self, handle: Any, mode: Any) -> int:
        mode._obj.value = self._gpu(handle).compute_mode
        return SUCCESS

    def nvmlDeviceGetMigMode(self, handle: Any, current: Any, pending: Any) -> int:
        mode = self._gpu(handle).mig_mode
        current._obj.value = pending._obj.value = mode or 0
        return NOT_SUPPORTED if mode is None else SUCCESS

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: Any, count: Any) -> int:
        count._obj.value = len(self._gpu(handle).instances)
        return NOT_SUPPORTED if self._gpu(handle).mig_mode is None else SUCCESS

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: Any, index: Any, instance: Any) -> int:
        instance._obj.value = handle.value + index.value + 1
        return SUCCESS if self._gpu(handle).instances[index.value] else NOT_FOUND

    def nvmlDeviceGetComputeRunningProcesses_v3(self, handle: Any, count: Any, processes: Any) -> int:
        pids = self._unit(handle).pids
        for i, pid in enumerate(pids):
            processes[i].pid = pid
        count._obj.value = len(pids)
        return SUCCESS

    def _gpu(self, handle: ctypes.c_void_p) -> Gpu:
        assert self.is_open and handle.value
        return self.gpus[(handle.value >> 8) - 1]

    def _unit(self, handle: ctypes.c_void_p) -> Unit:
        gpu, place = self._gpu(handle), (handle.value or 0) & 0xFF
        unit = gpu.instances[place - 1] if place else gpu
        assert unit is not None
        return unit

    @staticmethod
    def _text(buffer: Any, size: Any, text: str) -> int:
        assert size.value == len(buffer) > len(text)
        buffer.value = text.encode()
        return SUCCESS


def no_library() -> Any:
    raise OSError("libnvidia-ml.so.1: cannot open shared object file: No such file or directory")
