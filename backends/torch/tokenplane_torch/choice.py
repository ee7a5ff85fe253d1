"""Which attention kernels a device serves a model with: the first candidate that is there and computes right.

A library's version, its build and the card decide together whether it works, and no table of names knows that. So
every candidate that says it can is auditioned: random batches of every kind of layer the model has, on this very
device, against the torch twins. Why one was passed over is part of the description.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tokenplane_core.backend.errors import ConfigError, UnsupportedModel

from .attention import AttentionRule
from .device import ONLY, TorchDevice
from .failures import first_line
from .kernels import AttentionKernels, LayerNeed, TorchKernels
from .kv_cache import LayerCache, allocate
from .step import StepPlan, plan_step


class Unavailable(Exception):
    """These kernels cannot serve here; the message is one line that says why (not installed, head size, version)."""


@dataclass(frozen=True, slots=True)
class Candidate:
    name: str
    make: Callable[[Sequence[LayerNeed], TorchDevice], AttentionKernels]
    """Raises Unavailable."""


class Chosen:
    """The chosen kernels, with the reasons in their description."""

    def __init__(self, kernels: AttentionKernels, passed_over: Mapping[str, str]) -> None:
        self.write_kv, self.attend_prefill = kernels.write_kv, kernels.attend_prefill
        self.attend_decode = kernels.attend_decode
        self._kernels, self._passed_over = kernels, passed_over

    def describe(self) -> Mapping[str, str]:
        own = dict(self._kernels.describe())
        reasons = "; ".join(f"not {name}: {reason}" for name, reason in self._passed_over.items())
        if reasons:
            own["attention"] = f"{own.get('attention', 'unnamed')} ({reasons})"
        return own


def choose(candidates: Sequence[Candidate], needs: Sequence[LayerNeed], device: TorchDevice) -> AttentionKernels:
    """The first candidate that serves all layers, or the one that `ONLY` names.

    Raises:
        UnsupportedModel: none does; names every reason.
        ConfigError: `ONLY` names no candidate.
    """
    passed_over: dict[str, str] = {}
    for candidate in _allowed(candidates, os.environ.get(ONLY)):
        try:
            kernels = candidate.make(needs, device)
            for need in dict.fromkeys(needs):
                audition(kernels, need, device)
            return Chosen(kernels, passed_over)
        except Unavailable as reason:
            passed_over[candidate.name] = str(reason)
        except Exception as error:  # a library may fail in any way, and there is a next one
            passed_over[candidate.name] = f"failed on a trial batch: {type(error).__name__}: {first_line(error)}"
    reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over.items())
    raise UnsupportedModel(f"no attention kernels on this device serve its layers: {reasons}")


def _allowed(candidates: Sequence[Candidate], only: str | None) -> Sequence[Candidate]:
    if not only:
        return candidates
    named = [candidate for candidate in candidates if candidate.name == only]
    if not named:
        raise ConfigError(f"{ONLY} is {only!r}; known here are {', '.join(c.name for c in candidates)}")
    return named


# New tokens and cached tokens of each row. In units of a block where longer.
TRIALS = {
    "decode": ((1, 1, 1), (0.3, 1, 2.5)),
    "prefill": ((1.2, 0.4), (0, 0)),
    "chunks and decode rows": ((0.5, 1, 1.1), (1.5, 2.2, 0.9)),
}
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}


def audition(kernels: AttentionKernels, need: LayerNeed, device: TorchDevice) -> None:
    """Compare kernels with the torch twins on random batches of one kind of layer, ragged and (decode) padded.

    Raises:
        Unavailable: they differ; says where and by how much. Whatever the kernels raise passes through.
    """
    for name, (new, context) in TRIALS.items():
        trial = _Trial(need, device, new, context)
        wanted = trial.run(TorchKernels(), trial.plan)
        trial.require_same(f"{name}, ragged", trial.run(kernels, trial.plan), wanted)
        if name == "decode":
            trial.require_same(f"{name}, padded", trial.run(kernels, trial.padded()), wanted)


class _Trial:
    """One random step over one layer, whose cache holds NaN wherever nothing was written."""

    def __init__(self, need: LayerNeed, device: TorchDevice, new: Sequence[float], context: Sequence[float]) -> None:
        size, shape = device.block_tokens, need.shape
        generator = torch.Generator().manual_seed(0)
        self.need, self.device = need, device
        self.new = np.array([max(1, int(n * size)) if n != 1 else 1 for n in new], np.int32)
        self.context = np.array([int(c * size) for c in context], np.int32)
        lengths = self.context + self.new
        self.tables = np.zeros((len(lengths), -(-int(lengths.max()) // size)), np.int32)
        ids = iter(np.random.default_rng(0).permutation(np.arange(1, self.tables.size + 1)))
        for row, length in zip(self.tables, lengths, strict=True):
            row[: -(-length // size)] = [next(ids) for _ in range(-(-length // size))]

        def random(heads: int, dim: int, tokens: int) -> Tensor:
            values = torch.randn((tokens, heads, dim), generator=generator)
            return values.to(device.torch_device, shape.dtype)

        total = int(self.new.sum())
        self.query = random(need.heads, shape.key_dim, total)
        self.key, self.value = (
            random(shape.kv_heads, shape.key_dim, total),
            random(shape.kv_heads, shape.value_dim, total),
        )
        (self.cache,) = allocate([shape], self.tables.size + 1, size, device.torch_device)
        self.cache.key.fill_(torch.nan), self.cache.value.fill_(torch.nan)
        self._write_context(random)
        self.plan = plan_step(
            np.zeros(total, np.int32), self.new, self.context, self.tables, self.new > 0, size, device.upload
        )
        sinks = torch.linspace(-1, 1, need.heads, device=device.torch_device).to(shape.dtype) if need.sinks else None
        # A window of thousands of tokens would hide nothing here; one inside the trial shows whether it is kept.
        window = None if need.window is None else min(need.window, size)
        self.rule = AttentionRule(shape.key_dim**-0.5, window, need.softcap, sinks)

    def _write_context(self, random: Callable[[int, int, int], Tensor]) -> None:
        size, shape = self.device.block_tokens, self.need.shape
        at = [
            row[p // size] * size + p % size for row, c in zip(self.tables, self.context, strict=True) for p in range(c)
        ]
        if at:
            index = self.device.upload(np.array(at, np.int64))
            self.cache.key_tokens[index] = random(shape.kv_heads, shape.key_dim, len(at)).flatten(1)
            self.cache.value_tokens[index] = random(shape.kv_heads, shape.value_dim, len(at)).flatten(1)

    def padded(self) -> StepPlan:
        """The decode step as a graph would see it: wider tables, nothing known on the host."""
        assert self.plan.decode is not None
        tables = torch.nn.functional.pad(self.plan.decode.tables, (0, 3))
        rows = replace(self.plan.decode, tables=tables, most_keys=tables.shape[1] * self.device.block_tokens, host=None)
        return replace(self.plan, decode=rows)

    def run(self, kernels: AttentionKernels, plan: StepPlan) -> Tensor:
        cache = LayerCache(self.cache.key.clone(), self.cache.value.clone())
        kernels.write_kv(cache, self.key, self.value, plan.write_index)
        out = self.query.new_full((*self.query.shape[:2], self.need.shape.value_dim), torch.nan)  # all is theirs
        if plan.decode is not None:
            kernels.attend_decode(self.query, cache, plan.decode, self.rule, out)
        if plan.prefill is not None:
            kernels.attend_prefill(self.query, cache, plan.prefill, self.rule, out)
        return out

    def require_same(self, name: str, got: Tensor, wanted: Tensor) -> None:
        error = float((got.float() - wanted.float()).abs().max())
        limit = TOLERANCE.get(wanted.dtype, 4e-2)
        if not error <= limit:
            shape = self.need.shape
            raise Unavailable(
                f"wrong on a trial batch ({name}; {self.need.heads} heads over {shape.kv_heads} of {shape.key_dim},"
                f" {shape.dtype}): off by {error:.2g}, limit {limit:g}"
            )
