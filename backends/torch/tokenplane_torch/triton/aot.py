"""Compile every kernel ahead of time, without a card, for each kind of card that can be named to Triton's compilers.

The launches are the real ones: the kernels' own host code runs on tensors without memory, against a driver that
knows a target and its limits but has no device, and what would be launched is compiled and looked at instead.
`python -m tokenplane_torch.triton.aot` prints registers, spills and shared memory of each, and fails if one is beyond
its target's limits.

Intel's compiler is a Triton distribution of its own and cannot stand beside the other one, so it is not here.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction
from triton.runtime.driver import driver

from ..attention import AttentionRule
from ..kv_cache import LayerCache
from ..step import Rows
from .activation import gated
from .kernels import TritonKernels
from .norm import rms_norm
from .rotary import rotate
from .sampling import draw

META = torch.device("meta")
MOST_SPILLED_BYTES = 64  # of a thread: some 16 registers, beside a loop that moves kilobytes


@dataclass(frozen=True, slots=True)
class Target:
    name: str
    gpu: GPUTarget
    shared_bytes: int  # what one program may take
    registers: int  # what one thread may take
    processors: int  # only bounds how keys are split


TARGETS = (
    Target("sm_80", GPUTarget("cuda", 80, 32), 163 << 10, 255, 108),
    Target("sm_90", GPUTarget("cuda", 90, 32), 227 << 10, 255, 132),
    Target("sm_100", GPUTarget("cuda", 100, 32), 227 << 10, 255, 148),
    Target("gfx90a", GPUTarget("hip", "gfx90a", 64), 64 << 10, 512, 104),
    Target("gfx942", GPUTarget("hip", "gfx942", 64), 64 << 10, 512, 304),
    Target("gfx950", GPUTarget("hip", "gfx950", 64), 160 << 10, 512, 256),
)


@dataclass(frozen=True, slots=True)
class Compiled:
    kernel: str
    case: str
    target: Target
    registers: int  # of one thread, vector registers
    spilled_bytes: int  # of one thread, what did not fit into them
    shared_bytes: int  # of one program

    @property
    def fits(self) -> bool:
        registers, shared = self.registers <= self.target.registers, self.shared_bytes <= self.target.shared_bytes
        return registers and shared and self.spilled_bytes <= MOST_SPILLED_BYTES

    def __str__(self) -> str:
        numbers = f"{self.registers:5d} {self.spilled_bytes:7d} {self.shared_bytes:7d}"
        return f"{self.kernel:8s} {self.case:26s} {self.target.name:7s} {numbers}{'' if self.fits else ' too much'}"


HEADER = f"{'kernel':8s} {'case':26s} {'target':7s} {'regs':>5s} {'spilled':>7s} {'shared':>7s}"


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def attention_case(
    new: int,
    dim: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    kv_heads: int = 8,
    group: int = 4,
    rows: int = 4,
    most_keys: int = 8192,
    value_dim: int | None = None,
    sinks: bool = False,
    **rule: Any,
) -> Callable[[], None]:
    """One layer's attention: rows of at most `new` new tokens over a cache of 2**32 elements."""

    def launch() -> None:
        block_tokens, width = 32, value_dim or dim
        blocks = 2**32 // (block_tokens * kv_heads * dim)

        cache = LayerCache(
            empty(blocks, block_tokens, kv_heads, dim, dtype=dtype),
            empty(blocks, block_tokens, kv_heads, width, dtype=dtype),
        )
        per_row = empty(rows, dtype=torch.int32)
        tables = empty(rows, most_keys // block_tokens, dtype=torch.int32)
        heads, kernels = kv_heads * group, TritonKernels(META)
        asked = Rows(per_row, per_row, per_row, tables, block_tokens, most_tokens=new, most_keys=most_keys)
        kernels.attend_prefill(
            empty(rows * new, heads, dim, dtype=dtype),
            cache,
            asked,
            AttentionRule(scaling=0.1, sinks=empty(heads) if sinks else None, **rule),
            empty(rows * new, heads, width, dtype=dtype),
        )

    return launch


def write_case() -> None:
    cache = LayerCache(empty(2**16, 32, 8, 256), empty(2**16, 32, 8, 256))
    new = empty(64, 8, 256)
    TritonKernels(META).write_kv(cache, new, new, empty(64, dtype=torch.int64))


def norm_case(width: int, plus_one: bool) -> Callable[[], None]:
    def launch() -> None:
        x, weight = empty(64, width), empty(width)
        rms_norm(x, weight, 1e-6, plus_one)

    return launch


def rotary_case() -> None:
    query, key, table = empty(64, 64, 128), empty(64, 8, 128), empty(64, 96)
    rotate(query, key, table, table, query, key)


def draw_case() -> None:
    numbers = empty(64, dtype=torch.float32)
    draw(empty(64, 128256), numbers, empty(64, dtype=torch.int32), numbers, numbers, numbers)


CASES: dict[str, Callable[[], object]] = {
    "prefill 64": attention_case(512, 64),
    "prefill 128": attention_case(512, 128),
    "prefill 256": attention_case(512, 256),
    "prefill 192/128": attention_case(512, 192, value_dim=128, group=1),
    "prefill 128 window softcap": attention_case(512, 128, window=4096, softcap=50.0),
    "prefill 256 float32": attention_case(512, 256, dtype=torch.float32),
    "decode 64": attention_case(1, 64, group=8),
    "decode 64 sinks window": attention_case(1, 64, group=8, window=128, sinks=True),
    "decode 128": attention_case(1, 128, group=8),
    "decode 256": attention_case(1, 256, group=2),
    "decode 128 float32": attention_case(1, 128, dtype=torch.float32),
    "prefill 128 split": attention_case(64, 128, rows=1),
    "verify 5 128": attention_case(5, 128, group=8, rows=1),
    "write": write_case,
    "norm 4096": norm_case(4096, False),
    "norm 16384 gemma": norm_case(16384, True),
    "rotary 96 of 128": rotary_case,
    "silu": lambda: gated(empty(64, 14336), empty(64, 14336), "silu"),
    "gelu_tanh": lambda: gated(empty(64, 14336), empty(64, 14336), "gelu_tanh"),
    "draw 128256": draw_case,
}


class _Utils:
    def __init__(self, target: Target) -> None:
        self._facts = {"max_shared_mem": target.shared_bytes, "multiprocessor_count": target.processors}

    def get_device_properties(self, index: int) -> dict[str, int]:
        return self._facts


@contextmanager
def compiling_for(target: Target) -> Iterator[list[Any]]:
    """Within it, launching a kernel compiles it for the target and adds it to the list."""
    compiled: list[Any] = []
    index = TARGETS.index(target)  # as if the targets were the devices of one machine
    fake = SimpleNamespace(
        get_current_device=lambda: index,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: target.gpu,
        utils=_Utils(target),
    )
    run, active = JITFunction.run, driver._active

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled.append((self, run(self, *args, grid=grid, warmup=True, **kwargs)))

    driver.set_active(fake)
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver._active = active


def measure(case: str, target: Target) -> list[Compiled]:
    """Compile what a case launches."""
    with compiling_for(target) as launched:
        CASES[case]()
    return [
        Compiled(fn.fn.__name__.strip("_"), case, target, *_resources(kernel), kernel.metadata.shared)
        for fn, kernel in launched
    ]


def _resources(kernel: Any) -> tuple[int, int]:
    """Registers and spilled bytes of a thread."""
    if "cubin" not in kernel.asm:
        text = kernel.asm["amdgcn"]
        names = ("vgpr_count", "private_segment_fixed_size")
        vector, scratch = (int(re.findall(rf"\.{name}:\s+(\d+)", text)[-1]) for name in names)
        return vector, scratch
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        said = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    used = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    return used["REG"], used["STACK"] + used["LOCAL"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one line per kernel, case and target; 1 if one does not fit."""
    parser = argparse.ArgumentParser(description="Compile every kernel for every target.")
    parser.add_argument("--target", action="append", choices=[target.name for target in TARGETS])
    parser.add_argument("--case", action="append", choices=list(CASES))
    wanted = parser.parse_args(arguments)
    print(HEADER)
    all_fit = True
    for case in wanted.case or CASES:
        for target in TARGETS:
            if not wanted.target or target.name in wanted.target:
                for compiled in measure(case, target):
                    print(compiled, flush=True)
                    all_fit &= compiled.fits
    return 0 if all_fit else 1


if __name__ == "__main__":
    sys.exit(main())
