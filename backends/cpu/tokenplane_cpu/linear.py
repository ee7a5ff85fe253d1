"""Packed weights of linear layers, and the native linear layer over them; native/linear.h has the laws.

Knows tensors and the library, not models: whoever builds a step decides what is packed together and how.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch

from .native import library


class WeightType(IntEnum):
    """How a packed weight is stored; as in native/tokenplane_cpu.h."""

    F32 = 0
    BF16 = 1
    INT8 = 2
    INT4 = 3


class Epilogue(IntEnum):
    """What becomes of a finished row: stored, added to what is there, or gated."""

    STORE = 0
    ADD = 1
    GATED = 2


class Activation(IntEnum):
    SILU = 0
    GELU = 1
    GELU_TANH = 2


SOURCE_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 4}
GROUPS = (0, 32, 64, 128, 256)  # inputs that may share a scale


class WeightStruct(ctypes.Structure):
    """tp_linear_weight."""

    _fields_ = [
        ("values", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("output_scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("outputs", ctypes.c_int32),
        ("inputs", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("gated", ctypes.c_int32),
    ]


class OutputStruct(ctypes.Structure):
    """tp_linear_output."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("epilogue", ctypes.c_int32),
        ("activation", ctypes.c_int32),
    ]


@dataclass(frozen=True, slots=True)
class Part:
    """One matrix of a packed weight: weight [outputs, inputs] and bias [outputs], of float32, bfloat16 or float16."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None


class PackedLinear:
    """A weight as the native kernels read it, in memory of its own that lives as long as this object.

    Args:
        parts: matrices with the same inputs, whose outputs follow each other. Two if gated: the gate's and the up
            projection's; or one that holds both in this order.
        group: inputs that share a scale: 32, 64, 128 or 256; 0: a scale for each output. Quantized types only.
    """

    def __init__(self, parts: Sequence[Part], type: WeightType, *, group: int = 0, gated: bool = False) -> None:
        self.type, self.gated = type, gated
        self.outputs = sum(part.weight.shape[0] for part in parts)
        self.inputs = parts[0].weight.shape[1]
        if group not in GROUPS:
            raise ValueError(f"group is {group}, not one of {GROUPS}")
        if any(part.weight.shape[1] != self.inputs for part in parts):
            raise ValueError(f"parts have {[part.weight.shape[1] for part in parts]} inputs")
        lib = _library()
        shape = (int(type), self.outputs, self.inputs, group, int(gated))
        self.nbytes: int = lib.tp_linear_packed_bytes(*shape)
        self._memory = zeroed_memory(self.nbytes)
        self.struct = WeightStruct()
        lib.tp_linear_prepare(ctypes.byref(self.struct), address(self._memory), *shape)
        first = 0
        for part in parts:
            self._pack(part, first)
            first += part.weight.shape[0]

    def _pack(self, part: Part, first: int) -> None:
        lib = _library()
        weight = part.weight.detach().contiguous()
        bias = None if part.bias is None else part.bias.detach().to(weight.dtype).contiguous()
        lib.tp_linear_pack(
            ctypes.byref(self.struct),
            first,
            weight.shape[0],
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            SOURCE_TYPES[weight.dtype],
        )

    @property
    def input_dtype(self) -> torch.dtype:
        return torch.float32 if self.type is WeightType.F32 else torch.bfloat16

    def __call__(
        self,
        rows: torch.Tensor,
        out: torch.Tensor | None = None,
        epilogue: Epilogue = Epilogue.STORE,
        activation: Activation = Activation.SILU,
    ) -> torch.Tensor:
        """rows [n, inputs] of `input_dtype` -> out, which is made where it is not given.

        out: float32 [n, outputs]; gated: `input_dtype` [n, outputs / 2].
        """
        count = rows.shape[0]
        if epilogue is Epilogue.GATED:
            shape, dtype = (count, self.outputs // 2), self.input_dtype
        else:
            shape, dtype = (count, self.outputs), torch.float32
        if out is None:
            out = (torch.zeros if epilogue is Epilogue.ADD else torch.empty)(shape, dtype=dtype)
        if rows.dtype != self.input_dtype or rows.shape[1] != self.inputs or rows.stride(1) != 1:
            raise ValueError(f"rows are {rows.dtype} {tuple(rows.shape)}, not {self.input_dtype} [n, {self.inputs}]")
        if out.dtype != dtype or out.shape != shape or out.stride(1) != 1:
            raise ValueError(f"out is {out.dtype} {tuple(out.shape)}, not {dtype} {shape}")
        lib = _library()
        workspace = torch.empty(lib.tp_linear_workspace_bytes(ctypes.byref(self.struct), count) + 64, dtype=torch.uint8)
        where = OutputStruct(out.data_ptr(), out.stride(0), epilogue, activation)
        aligned = (workspace.data_ptr() + 63) // 64 * 64
        lib.tp_linear(ctypes.byref(self.struct), rows.data_ptr(), rows.stride(0), count, ctypes.byref(where), aligned)
        return out


@functools.cache
def _library() -> ctypes.CDLL:
    found = library()
    if found is None:
        raise RuntimeError("tokenplane-cpu was built without its native kernels")
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    found.tp_linear_packed_bytes.restype = ctypes.c_size_t
    found.tp_linear_packed_bytes.argtypes = [integer] * 5
    found.tp_linear_prepare.argtypes = [pointer, pointer, *[integer] * 5]
    found.tp_linear_pack.argtypes = [pointer, integer, integer, pointer, pointer, integer]
    found.tp_linear_workspace_bytes.restype = ctypes.c_size_t
    found.tp_linear_workspace_bytes.argtypes = [pointer, integer]
    found.tp_linear.argtypes = [pointer, pointer, ctypes.c_int64, integer, pointer, pointer]
    return found


def zeroed_memory(size_bytes: int) -> mmap.mmap:
    """Zeroed memory, on huge pages where the system has some: a step goes through gigabytes once."""
    memory = mmap.mmap(-1, max(1, size_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def address(memory: mmap.mmap) -> int:
    """Where it lies; the mapping must outlive every use."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
