"""RMSNorm as transformers' models compute it, in one kernel."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# (Triton compiles kernel bodies itself; their arguments have no Python types.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_WIDTH = 1 << 15  # one program holds a whole row in registers
TILE = 4096  # elements; narrow rows (heads) share a program


def rms_norm(x: Tensor, weight: Tensor, eps: float, plus_one: bool = False) -> Tensor:
    """Normalise the last dimension of x by its root mean square, in float32, and weigh it with `weight` [width].

    plus_one: False as Llama does (rounded to x's type, then times weight), True as Gemma does (times 1 + weight in
    float32, then rounded).

    Raises:
        ValueError: the width is above `MOST_WIDTH`.
    """
    width = x.shape[-1]
    if width > MOST_WIDTH:
        raise ValueError(f"rows of {width} elements are too wide for the norm kernel: the limit is {MOST_WIDTH}")
    rows_in = x.reshape(-1, width)
    dtype = x.dtype if plus_one else torch.promote_types(x.dtype, weight.dtype)
    out = torch.empty(rows_in.shape, dtype=dtype, device=x.device)
    tile = triton.next_power_of_2(width)
    rows = max(1, TILE // tile)
    _norm[(triton.cdiv(len(rows_in), rows),)](
        rows_in,
        weight,
        out,
        len(rows_in),
        rows_in.stride(0),
        eps,
        WIDTH=width,
        TILE=tile,
        ROWS=rows,
        PLUS_ONE=plus_one,
        num_warps=min(max(tile * rows // 512, 4), 16),
    )
    return out.view(x.shape)


@triton.jit(do_not_specialize=["rows"])
def _norm(
    x,
    weight,
    out,
    rows,
    x_row,  # stride in elements; inner stride 1
    eps,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    PLUS_ONE: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, TILE)[None, :]
    mask = (row < rows) & (column < WIDTH)
    exact = tl.load(x + row * x_row + column, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(exact * exact, 1) / WIDTH + eps)[:, None]
    weights = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    normed = exact * scale
    if PLUS_ONE:
        weights += 1.0
    else:
        normed = normed.to(x.dtype.element_ty).to(tl.float32)
    tl.store(out + row * WIDTH + column, (normed * weights).to(out.dtype.element_ty), mask=mask)
