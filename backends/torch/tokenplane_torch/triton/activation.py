"""The gate of a gated MLP: act(gate) * up in one pass."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# (Triton compiles kernel bodies itself; their arguments have no Python types.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ACTIVATIONS = ("silu", "gelu_tanh")
TILE = 1024


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) * up for equal shapes [..., width] and types, where `activation` is one of ACTIVATIONS.

    Computed in float32 and rounded where torch would round. Rows may have any stride (halves of one projection).
    """
    width = gate.shape[-1]
    gates, ups = gate.reshape(-1, width), up.reshape(-1, width)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _gated[(len(gates), triton.cdiv(width, TILE))](
        gates,
        ups,
        out,
        gates.stride(0),
        ups.stride(0),
        WIDTH=width,
        SILU=activation == "silu",
        TILE=TILE,
    )
    return out


@triton.jit
def _gated(gate, up, out, gate_row, up_row, WIDTH: tl.constexpr, SILU: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = column < WIDTH
    x = tl.load(gate + row * gate_row + column, mask=mask, other=0.0).to(tl.float32)
    # Of the approximated gelu, 0.5 (1 + tanh(z)) is sigmoid(2 z).
    y = x * tl.sigmoid(x if SILU else 1.5957691216057308 * (x + 0.044715 * x * x * x))
    element = out.dtype.element_ty
    other = tl.load(up + row * up_row + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + column, (y.to(element).to(tl.float32) * other).to(element), mask=mask)
