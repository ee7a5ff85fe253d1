"""What this machine can do: how fast it reads memory, and its largest matrix product.

Measured before each round that is held against it, on the same processors; the best of several tries, since others can
only slow it.

    python -m benchmarks.peers.ceiling
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

READ_BYTES = 1 << 30  # far beyond any cache


@dataclass(frozen=True)
class Ceiling:
    read_bytes_per_s: float
    bf16_flop_per_s: float
    float32_flop_per_s: float


def best_s(run: Callable[[], object], tries: int = 7) -> float:
    run()
    times = []
    for _ in range(tries):
        start_s = time.perf_counter()
        run()
        times.append(time.perf_counter() - start_s)
    return min(times)


def ceiling() -> Ceiling:
    """Reads by summing 1 GiB on every processor; products of 2048 x 2048 matrices."""
    import torch

    data = torch.ones(READ_BYTES // 4)
    read_bytes_per_s = READ_BYTES / best_s(data.sum)
    del data
    rates = {}
    for dtype in (torch.bfloat16, torch.float32):
        matrix = torch.randn(2048, 2048).to(dtype)
        rates[dtype] = 2 * 2048**3 / best_s(partial(torch.matmul, matrix, matrix), 5)
    return Ceiling(read_bytes_per_s, rates[torch.bfloat16], rates[torch.float32])


if __name__ == "__main__":
    print({name: f"{value:.3g}" for name, value in asdict(ceiling()).items()})
