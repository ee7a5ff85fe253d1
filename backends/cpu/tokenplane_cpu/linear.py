"""Packed weights of linear layers, and the native linear layer over them; native/linear.h has the laws.

Knows tensors and the library, not models: whoever builds a step decides what is packed together and how.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .memory import address, zeroed_memory
from .native import built_library
from .packed import Piece
from .structs import Activation, Epilogue, OutputStruct, WeightStruct, WeightType

SOURCE_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 4}
GROUPS = (0, 32, 64, 128, 256)  # inputs that may share a scale


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
        lib = built_library()
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
        lib = built_library()
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
    def piece(self) -> Piece:
        """Where `struct` points into."""
        return Piece(address(self._memory), self.nbytes, self._memory)

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
        lib = built_library()
        workspace = torch.empty(lib.tp_linear_workspace_bytes(ctypes.byref(self.struct), count) + 64, dtype=torch.uint8)
        where = OutputStruct(out.data_ptr(), out.stride(0), epilogue, activation)
        aligned = (workspace.data_ptr() + 63) // 64 * 64
        lib.tp_linear(ctypes.byref(self.struct), rows.data_ptr(), rows.stride(0), count, ctypes.byref(where), aligned)
        return out
