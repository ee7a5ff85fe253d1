"""Native attention beside torch's scaled_dot_product_attention and beside this machine's ceilings.

    python benchmarks/cpu_kernels/attention.py [--threads 2] [--rounds 15] [--cache bfloat16]

Decode: rows of one token, each behind a context of its own; the fraction is that of reading every key and value once
from memory. Prefill: one prompt; the fraction is that of bf16's peak, counting what causality leaves. torch reads keys
and values that lie densely in memory, gathered beforehand at no cost, so it does less than a server's attention must.
Each line: best time of the rounds, ours and torch's taken in turn; torch's time over ours; the fraction of the ceiling.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from ceilings import Ceilings, measure
from torch.nn.functional import scaled_dot_product_attention

from tokenplane_cpu.attention import NativeKernels
from tokenplane_cpu.native import use_threads
from tokenplane_cpu.structs import BLOCK_TOKENS
from tokenplane_torch.attention import AttentionRule
from tokenplane_torch.kv_cache import LayerCache, LayerShape
from tokenplane_torch.step import PagedStep, plan_step

MODELS = {"smol": (9, 3, 64), "qwen05": (14, 2, 64), "llama8b": (32, 8, 128)}  # heads, KV heads, head size
DECODE = [(1, 256), (1, 4096), (8, 512), (32, 512), (32, 2048)]  # rows, context
PREFILL = [128, 1024, 4096]
LAYERS_BYTES = 128 << 20  # caches of as many layers as exceed the processor's


def best_s(rounds: int, ours: Callable[[], object], theirs: Callable[[], object]) -> tuple[float, float]:
    times = [(taken_s(ours), taken_s(theirs)) for _ in range(rounds)]
    return min(t[0] for t in times), min(t[1] for t in times)


def taken_s(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def step_of(rows: int, new: int, context: int, layers: list[LayerCache], kernels: NativeKernels) -> PagedStep:
    blocks = -(-(new + context) // BLOCK_TOKENS)
    tables = np.random.default_rng(0).permutation(rows * blocks).astype(np.int32).reshape(rows, blocks)
    ones = np.ones(rows, np.int32)
    plan = plan_step(
        np.zeros(rows * new, np.int32), ones * new, ones * context, tables, ones > 0, BLOCK_TOKENS, torch.from_numpy
    )
    return PagedStep(plan, layers, kernels)


def compare(
    name: str, rows: int, new: int, context: int, kernels: NativeKernels, rounds: int, ceilings: Ceilings
) -> None:
    heads, kv_heads, dim = MODELS[name]
    shape = LayerShape(kv_heads, dim, dim, torch.bfloat16)
    length = new + context
    blocks = rows * -(-length // BLOCK_TOKENS)
    copies = max(1, LAYERS_BYTES // (kernels.block_bytes([shape]) * blocks)) if context else 1
    layers = kernels.allocate([shape] * copies, blocks)
    for layer in layers:
        for tensor in layer.tensors():
            tensor.fill_(0)
    step = step_of(rows, new, context, layers, kernels)
    query, key, value = (torch.randn(rows * new, h, dim).bfloat16() for h in (heads, kv_heads, kv_heads))
    rule = AttentionRule(dim**-0.5)
    dense = [torch.zeros(2, rows, kv_heads, length, dim, dtype=torch.bfloat16) for _ in range(copies)]
    queries = query.view(rows, new, heads, dim).transpose(1, 2)

    def ours() -> None:
        for i in range(copies):
            step.attend(i, query, key, value, rule, None)

    def theirs() -> None:
        for keys, values in dense:
            scaled_dot_product_attention(queries, keys, values, is_causal=new > 1, enable_gqa=True)

    own_s, torch_s = (t / copies for t in best_s(rounds, ours, theirs))
    read_s = kernels.block_bytes([shape]) * blocks / ceilings.read_bytes_s
    compute_s = 4 * rows * heads * dim * (new * context + new * (new + 1) / 2) / ceilings.bf16_flops
    kind = f"decode {rows} x {context}" if new == 1 else f"prefill {new}"
    print(
        f"{name:8} {kind:18} ours {own_s * 1e6:9.0f} us   torch {torch_s * 1e6:9.0f} us   torch/ours"
        f" {torch_s / own_s:5.2f}   of ceiling {max(read_s, compute_s) / own_s:4.0%}",
        flush=True,
    )


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cache", choices=["bfloat16", "int8"], default="bfloat16")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    use_threads(options.threads)
    ceilings = measure(options.threads)
    kernels = NativeKernels(getattr(torch, options.cache))
    for name in MODELS:
        for rows, context in DECODE:
            compare(name, rows, 1, context, kernels, options.rounds, ceilings)
        for length in PREFILL:
            compare(name, 1, length, 0, kernels, options.rounds, ceilings)


if __name__ == "__main__":
    main()
