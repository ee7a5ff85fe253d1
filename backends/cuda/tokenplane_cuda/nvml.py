"""NVIDIA's management library (NVML) by ctypes: the few structures and calls that detection needs.

Functions, structures and return codes as in nvml.h. Knows no rule of its own; `device.py` has those.
"""

from __future__ import annotations

import ctypes
from typing import Any

LIBRARY = "libnvidia-ml.so.1"

NO_PERMISSION, DRIVER_NOT_LOADED, GPU_IS_LOST, RESET_REQUIRED, VERSION_MISMATCH = 4, 9, 15, 16, 18
FUNCTION_NOT_FOUND = 13

ADVICE = {
    NO_PERMISSION: "no permission to use the driver's device files (/dev/nvidia*)",
    DRIVER_NOT_LOADED: "the kernel module nvidia is not loaded: sudo modprobe nvidia; after a kernel or driver update,"
    " reboot",
    GPU_IS_LOST: "the GPU is lost (it has fallen off the bus): reboot, and see dmesg for Xid errors",
    RESET_REQUIRED: "the GPU needs a reset: sudo nvidia-smi --gpu-reset, or reboot",
    VERSION_MISMATCH: "the loaded kernel module and the driver library have different versions, as after an update:"
    " reboot",
    999: "the driver answers with an unknown error; in a container that has lost its devices (a known effect of"
    " systemctl daemon-reload on the host), restart the container",
}


class NvmlMemory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class NvmlProcess(ctypes.Structure):
    _fields_ = (
        ("pid", ctypes.c_uint),
        ("usedGpuMemory", ctypes.c_ulonglong),
        ("gpuInstanceId", ctypes.c_uint),
        ("computeInstanceId", ctypes.c_uint),
    )


class NvmlPci(ctypes.Structure):
    _fields_ = (
        ("busIdLegacy", ctypes.c_char * 16),
        ("domain", ctypes.c_uint),
        ("bus", ctypes.c_uint),
        ("device", ctypes.c_uint),
        ("pciDeviceId", ctypes.c_uint),
        ("pciSubSystemId", ctypes.c_uint),
        ("busId", ctypes.c_char * 32),
    )


class NvmlError(Exception):
    def __init__(self, code: int) -> None:
        super().__init__(ADVICE.get(code, f"the driver library answers with error {code}"))
        self.code = code


class Nvml:
    """The library's C functions as calls that raise NvmlError."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def call(self, name: str, *args: Any) -> None:
        try:
            function = getattr(self._library, name)
        except AttributeError:
            raise NvmlError(FUNCTION_NOT_FOUND) from None
        if code := int(function(*args)):
            raise NvmlError(code)

    def text(self, name: str, *args: Any) -> str:
        buffer = ctypes.create_string_buffer(96)
        self.call(name, *args, buffer, ctypes.c_uint(96))
        return buffer.value.decode(errors="replace")

    def number(self, name: str, *args: Any) -> int:
        value = ctypes.c_uint()
        self.call(name, *args, ctypes.byref(value))
        return value.value

    def handle(self, name: str, *args: Any) -> ctypes.c_void_p:
        handle = ctypes.c_void_p()
        self.call(name, *args, ctypes.byref(handle))
        return handle

    def number_or_zero(self, name: str, *args: Any) -> int:
        """Zero where the card or the driver does not know the question."""
        try:
            return self.number(name, *args)
        except NvmlError as error:
            if error.code in (GPU_IS_LOST, RESET_REQUIRED):
                raise
            return 0
