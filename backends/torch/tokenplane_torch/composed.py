"""Kernels put together from pieces, and the candidates that every GPU plugin ends its list with.

A library often has only one part of what a model needs. The rest then comes from Triton, or from torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from .attention import AttentionRule
from .choice import Candidate, Unavailable
from .device import TorchDevice
from .failures import first_line
from .fixed_kernels import FixedKernels
from .kernels import AttentionKernels, LayerNeed, TorchKernels
from .kv_cache import LayerCache
from .probing import library
from .step import Rows

Write = Callable[[LayerCache, Tensor, Tensor, Tensor], None]
Attend = Callable[[Tensor, LayerCache, Rows, AttentionRule, Tensor], None]


@dataclass(frozen=True, slots=True)
class Composed:
    """`AttentionKernels` whose pieces may belong to different libraries."""

    write_kv: Write
    attend_prefill: Attend
    attend_decode: Attend
    description: Mapping[str, str]

    def describe(self) -> Mapping[str, str]:
        return self.description


def with_writer(attention: str, prefill: Attend, decode: Attend, device: TorchDevice) -> Composed:
    """A library's attention (described by `attention`), and the best kernel there is to write the cache."""
    try:
        writer = triton_kernels(device)
    except Unavailable:
        writer = TorchKernels()
    description = {"attention": attention, "write_kv": writer.describe()["write_kv"]}
    return Composed(writer.write_kv, prefill, decode, description)


def triton_kernels(device: TorchDevice) -> AttentionKernels:
    """
    Raises:
        Unavailable: Triton is not installed, or drives no card of this machine.
    """
    library("triton")
    from .triton.kernels import TritonKernels

    try:
        return TritonKernels(device.torch_device)
    except RuntimeError as error:
        raise Unavailable(f"triton does not drive this device: {first_line(error)}") from error


class PlainKernels:
    """The torch twins, each for the steps it can serve: right on any device, and slow."""

    def __init__(self) -> None:
        self._ragged, self._fixed = TorchKernels(), FixedKernels()
        self.write_kv = self._ragged.write_kv

    def describe(self) -> Mapping[str, str]:
        what = "torch: gather, and whole tables in captured steps; right, but slow"
        return {**self._ragged.describe(), "attention": what}

    def attend_prefill(self, query: Tensor, cache: LayerCache, rows: Rows, rule: AttentionRule, out: Tensor) -> None:
        (self._ragged if rows.host else self._fixed).attend_prefill(query, cache, rows, rule, out)

    def attend_decode(self, query: Tensor, cache: LayerCache, rows: Rows, rule: AttentionRule, out: Tensor) -> None:
        (self._ragged if rows.host else self._fixed).attend_decode(query, cache, rows, rule, out)


def _triton(needs: Sequence[LayerNeed], device: TorchDevice) -> AttentionKernels:
    return triton_kernels(device)


def _plain(needs: Sequence[LayerNeed], device: TorchDevice) -> AttentionKernels:
    return PlainKernels()


LAST_CANDIDATES = (Candidate("triton", _triton), Candidate("torch", _plain))
"""What stands behind the vendor's libraries."""
