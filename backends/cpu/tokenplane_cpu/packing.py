"""Packs the weights of a decoder as the native library reads them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn

from .attention import TYPES
from .decoder import Decoder, Layer, Norm
from .linear import SOURCE_TYPES, PackedLinear, Part
from .memory import address, zeroed_memory
from .packed import PackedDecoder, Piece
from .quantization import Form, forms
from .structs import Activation, AttentionStruct, DecoderStruct, LayerStruct, NormStruct

ACTIVATIONS = {"silu": Activation.SILU, "gelu": Activation.GELU, "gelu_tanh": Activation.GELU_TANH}


def pack(
    decoder: Decoder,
    dtype: str,
    max_tokens: int,
    threads: int,
    quantize: str | None = None,
    kv_dtype: str | None = None,
) -> PackedDecoder:
    """Take the weights out of a decoder: when this returns, nothing of the module is needed any more.

    Args:
        dtype: that it computes in; its weights, too, unless quantize says otherwise.
        max_tokens: of the largest step.
        kv_dtype: of the cache; None: dtype.
    """
    form, head_form = forms(dtype, quantize)
    # Else the head's packed weight is the embedding, too; a quantized one would not do.
    tied = decoder.embedding is decoder.head.weight and quantize is None
    with ThreadPoolExecutor(threads) as pool:

        def packed(linears: Sequence[nn.Linear], gated: bool = False, form: Form = form) -> Future[PackedLinear]:
            return pool.submit(_packed, form, linears, gated)

        head = packed([decoder.head], form=head_form)
        weights = [
            (packed(layer.qkv), packed([layer.out]), packed(layer.gate_up, True), packed([layer.down]))
            for layer in decoder.layers
        ]
        pieces = [weight.result().piece for weight in (head, *(weight for layer in weights for weight in layer))]
    embedding = None if tied else _copied(decoder.embedding)
    small = _Tensors()
    layers = (LayerStruct * len(decoder.layers))()
    for struct, layer, of_layer in zip(layers, decoder.layers, weights, strict=True):
        _fill(struct, layer, getattr(torch, kv_dtype or dtype), small)
        for name, weight in zip(("qkv", "out", "gate_up", "down"), of_layer, strict=True):
            setattr(struct, name, weight.result().struct)
    struct = DecoderStruct(
        head=head.result().struct,
        embedding=None if embedding is None else embedding.address,
        norm=small.norm(decoder.norm),
        embedding_scale=decoder.embedding_scale,
        residual_scale=decoder.residual_scale,
        logit_scale=decoder.logit_scale,
        logit_softcap=decoder.logit_softcap or 0.0,
        embedding_type=SOURCE_TYPES[decoder.embedding.dtype],
        activation=ACTIVATIONS[decoder.activation],
        num_layers=len(decoder.layers),
        hidden=decoder.embedding.shape[1],
        max_tokens=max_tokens,
        max_keys=len(decoder.layers[0].rotary[0]),
    )
    if embedding is not None:
        pieces.append(embedding)
    return PackedDecoder(struct, layers, str(form), [*pieces, *small.pieces()])


def _copied(tensor: Tensor) -> Piece:
    memory = zeroed_memory(tensor.nbytes)
    torch.frombuffer(memory, dtype=tensor.dtype).copy_(tensor.detach().flatten())
    return Piece(address(memory), tensor.nbytes, memory)


class _Tensors:
    """Tensors that structs point to, each once."""

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}

    def address(self, tensor: Tensor) -> int:
        tensor = tensor.contiguous()
        kept = self._kept.get(tensor.data_ptr())
        if kept is None or kept.nbytes < tensor.nbytes:
            self._kept[tensor.data_ptr()] = tensor
        return tensor.data_ptr()

    def norm(self, norm: Norm | None) -> NormStruct:
        return NormStruct() if norm is None else NormStruct(self.address(norm.weight), norm.eps, len(norm.weight))

    def pieces(self) -> list[Piece]:
        return [Piece(address, tensor.nbytes, tensor) for address, tensor in self._kept.items()]


def _fill(struct: LayerStruct, layer: Layer, cache_dtype: torch.dtype, small: _Tensors) -> None:
    """All but the weights."""
    shape = layer.need.shape
    for name in ("input_norm", "attention_norm", "mlp_norm", "output_norm", "query_norm", "key_norm"):
        setattr(struct, name, small.norm(getattr(layer, name)))
    struct.cosines, struct.sines = map(small.address, layer.rotary)
    struct.rotary_pairs = layer.rotary[0].shape[1]
    struct.attention = AttentionStruct(
        sinks=None if layer.sinks is None else small.address(layer.sinks),
        scaling=layer.scaling,
        softcap=layer.need.softcap or 0.0,
        window=layer.need.window or 0,
        type=TYPES[cache_dtype],
        heads=layer.need.heads,
        kv_heads=shape.kv_heads,
        key_dim=shape.key_dim,
        value_dim=shape.value_dim,
    )


def _packed(form: Form, linears: Sequence[nn.Linear], gated: bool) -> PackedLinear:
    parts = [Part(linear.weight, linear.bias) for linear in linears]
    return PackedLinear(parts, form.type, group=form.group, gated=gated)
