"""How the weights of a model are stored once they are packed, by dtype and by what ModelSpec.quantize asks for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .decoder import Decoder
from .structs import WeightType


@dataclass(frozen=True, slots=True)
class Form:
    type: WeightType
    group: int = 0  # inputs that share a scale; 0: all

    def __str__(self) -> str:
        return self.type.name.lower() + (f" (groups of {self.group})" if self.group else "")


INT8 = Form(WeightType.INT8)
INT4 = Form(WeightType.INT4, 32)


def forms(dtype: str, quantize: str | None) -> tuple[Form, Form]:
    """Of the layers' weights, and of the output layer's: a step of 1/16 there would move every logit."""
    if quantize is not None:
        return {"int8": INT8, "int4": INT4}[quantize], INT8
    plain = Form(WeightType.F32 if dtype == "float32" else WeightType.BF16)
    return plain, plain


def stored(weight: Tensor, form: Form) -> Tensor:
    """Weights [outputs, inputs] as they are after packing, f32: the twin of native/linear_pack.cpp."""
    if form.type is WeightType.F32:
        return weight.float()
    if form.type is WeightType.BF16:
        return weight.bfloat16().float()
    groups = torch.split(weight.float(), form.group or weight.shape[1], dim=1)
    return torch.cat([_quantized(group, form) for group in groups], dim=1)


def _quantized(group: Tensor, form: Form) -> Tensor:
    largest = group.gather(1, group.abs().argmax(dim=1, keepdim=True))
    scale = largest.abs() / 127 if form.type is WeightType.INT8 else largest / -8
    if form.group:
        scale = scale.bfloat16().float()
    values = (group / torch.where(scale == 0, 1, scale)).round()
    return (values.clamp(-127, 127) if form.type is WeightType.INT8 else values.clamp(-8, 7)) * scale


@contextmanager
def computing_as_stored(decoder: Decoder, form: Form, head: Form) -> Iterator[None]:
    """Inside, the module's linear layers compute with their weights as they are after packing, one at a time: so that
    a program with quantized weights can be compared with it.
    """
    layers = [part for layer in decoder.layers for part in (*layer.qkv, layer.out, *layer.gate_up, layer.down)]
    changed = [*((part, form) for part in layers), (decoder.head, head)]
    try:
        for part, its_form in changed:
            part.forward = partial(_forward, part, its_form)  # type: ignore[method-assign]
        yield
    finally:
        for part, _ in changed:
            part.__dict__.pop("forward", None)


def _forward(part: nn.Linear, form: Form, rows: Tensor) -> Tensor:
    return linear(rows, stored(part.weight, form).to(rows.dtype), part.bias)
