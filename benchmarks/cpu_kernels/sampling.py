"""The native sampler beside the torch sampler, and what a mask costs it.

    python benchmarks/cpu_kernels/sampling.py [--threads 2] [--rounds 7] [--rows 32] [--vocab 128256]

Each line: best time for all rows, ours and torch's taken in turn, and their ratio. The logits are normal numbers times
3: flatter than a model's, so that filters keep tens of thousands of ids. `mask` allows one id in eight of every row.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from tokenplane_core.backend.records import SamplingBatch, TokenMask
from tokenplane_core.kit.sampling_laws import replace_seed
from tokenplane_core.messages import SamplingParams
from tokenplane_cpu.native import use_threads
from tokenplane_cpu.sampler import HostSampler
from tokenplane_torch.sampler import TorchSampler
from tokenplane_torch.testing import PlainDevice
from tokenplane_torch.testing.driver import sampling_batch

CASES = {
    "greedy": SamplingParams(),
    "greedy, 5 logprobs": SamplingParams(num_logprobs=5),
    "temperature": SamplingParams(temperature=0.8),
    "top_k 40": SamplingParams(temperature=0.8, top_k=40),
    "top_p 0.9": SamplingParams(temperature=0.8, top_p=0.9),
    "top_k, top_p, min_p": SamplingParams(temperature=0.8, top_k=50, top_p=0.9, min_p=0.01),
    "typical_p 0.9": SamplingParams(temperature=0.8, typical_p=0.9),
}


def taken_s(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def masked(batch: SamplingBatch, vocab: int) -> SamplingBatch:
    rng = np.random.default_rng(1)
    words = rng.integers(0, 2**32, (len(batch), -(-vocab // 32)), np.uint32)
    for _ in range(2):
        words &= rng.integers(0, 2**32, words.shape, np.uint32)
    mask = TokenMask(np.arange(len(batch), dtype=np.int32), lambda: words)
    return replace(batch, mask=mask, features=batch.features | {"mask"})


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=128256)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    use_threads(options.threads)
    logits = np.random.default_rng(0).normal(0, 3, (options.rows, options.vocab)).astype(np.float32)
    tensor, rows = torch.from_numpy(logits), np.arange(options.rows)
    ours, theirs = HostSampler(), TorchSampler(PlainDevice())
    for name, params in CASES.items():
        plain = sampling_batch([replace_seed(params, i) for i in range(options.rows)], range(options.rows))
        for kind, batch in (("", plain), (", mask", masked(plain, options.vocab))):
            times = [
                (
                    taken_s(lambda: ours.draw(logits, batch, None)),  # noqa: B023 (called at once)
                    taken_s(lambda: theirs.draw(tensor, rows, batch, None)),  # noqa: B023
                )
                for _ in range(options.rounds)
            ]
            own_s, torch_s = min(t[0] for t in times), min(t[1] for t in times)
            print(
                f"{name + kind:28} ours {own_s * 1e3:7.2f} ms   torch {torch_s * 1e3:7.1f} ms   torch/ours"
                f" {torch_s / own_s:5.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
