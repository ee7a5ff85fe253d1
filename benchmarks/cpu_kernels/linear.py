"""Native linear layers beside oneDNN's (torch, weights packed) and beside this machine's ceilings.

    python benchmarks/cpu_kernels/linear.py [--threads 2] [--rounds 30] [--rows 1 8 32 256 1024] [--types BF16 INT8]

Each line: the best time of the rounds, ours and oneDNN's taken in turn; oneDNN's over ours; and what fraction of ours
is the time that the ceiling allows: reading the weight once from memory, or multiplying at bf16's peak, whichever
is longer. Weights come from copies that together exceed the caches, as a model's do. oneDNN gets bf16 weights in every
line. Its sums may change with the number of rows; ours do not.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import torch
from ceilings import Ceilings, measure
from torch import Tensor

from tokenplane_cpu.linear import PackedLinear, Part
from tokenplane_cpu.native import use_threads
from tokenplane_cpu.structs import WeightType

SHAPES = {  # name: (inputs, outputs)
    "smol qkv": (576, 960),
    "smol down": (1536, 576),
    "smol gate-up": (576, 3072),
    "qwen05 gate-up": (896, 9728),
    "qwen05 down": (4864, 896),
    "qwen05 head": (896, 151936),
    "llama1b gate-up": (2048, 16384),
    "llama1b down": (8192, 2048),
}
BEYOND_CACHES_BYTES = 128 << 20
GROUPS = {WeightType.INT4: 32}
HEADER = ("shape", "type", "rows", "us", "GB/s", "GFLOP/s", "ceiling", "oneDNN us", "ratio")

Layer = Callable[[Tensor], Tensor]


def onednn(weight: Tensor) -> Layer:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
    return lambda rows: torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "")


def in_turn(layers: Sequence[tuple[Layer, Layer]], rows: Tensor, rounds: int) -> tuple[float, float]:
    """Seconds of the best call of each of the two; every round takes the next copy."""
    best = [float("inf"), float("inf")]
    for i in range(rounds):
        for which, layer in enumerate(layers[i % len(layers)]):
            start_s = time.perf_counter()
            layer(rows)
            best[which] = min(best[which], time.perf_counter() - start_s)
    return best[0], best[1]


def compare(name: str, kind: WeightType, counts: Sequence[int], most_rounds: int, ceilings: Ceilings) -> None:
    inputs, outputs = SHAPES[name]
    weight = torch.randn(outputs, inputs).bfloat16() / inputs**0.5
    copies = max(1, BEYOND_CACHES_BYTES // weight.nbytes)
    ours = [PackedLinear([Part(weight)], kind, group=GROUPS.get(kind, 0)) for _ in range(copies)]
    layers = [(our, onednn(weight)) for our in ours]
    for count in counts:
        flops = 2 * count * weight.numel()
        rounds = max(3, most_rounds if flops < 1 << 30 else most_rounds // 10)
        own_s, other_s = in_turn(layers, torch.randn(count, inputs).bfloat16(), rounds)
        least_s = max(ours[0].nbytes / ceilings.read_bytes_s, flops / ceilings.bf16_flops)
        print(
            f"{name:>16} {kind.name:>5} {count:>5} {own_s * 1e6:>9.1f} {ours[0].nbytes / own_s / 1e9:>6.1f}"
            f" {flops / own_s / 1e9:>8.1f} {least_s / own_s:>8.2f} {other_s * 1e6:>10.1f} {other_s / own_s:>6.2f}",
            flush=True,
        )


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 256, 1024])
    parser.add_argument("--types", nargs="+", default=["BF16", "INT8", "INT4"], choices=["BF16", "INT8", "INT4"])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    use_threads(options.threads)
    found = measure(options.threads)
    gb_s, gflops = found.read_bytes_s / 1e9, found.bf16_flops / 1e9
    print(f"{options.threads} threads; ceilings {gb_s:.1f} GB/s, {gflops:.0f} GFLOP/s bf16")
    print("{:>16} {:>5} {:>5} {:>9} {:>6} {:>8} {:>8} {:>10} {:>6}".format(*HEADER))
    for name in options.shapes:
        for kind in options.types:
            compare(name, WeightType[kind], options.rows, options.rounds, found)


if __name__ == "__main__":
    main()
