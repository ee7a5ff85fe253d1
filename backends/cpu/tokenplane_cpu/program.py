"""A whole decoder as one native program: weights packed once, then one call for each step (native/program.h).

Knows tensors only while it packs; steps take and give numpy arrays. Knows no slots, no sampling and no records.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from ctypes import POINTER, Structure, byref, c_float, c_int32, c_void_p
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tokenplane_core.backend.records import F32, I32

from .attention import TYPES, AttentionStruct
from .decoder import Decoder, Layer, Norm
from .linear import SOURCE_TYPES, Activation, PackedLinear, Part, WeightStruct
from .native import isa, library
from .quantization import Form, forms

ACTIVATIONS = {"silu": Activation.SILU, "gelu": Activation.GELU, "gelu_tanh": Activation.GELU_TANH}


class NormStruct(Structure):
    """tp_norm."""

    _fields_ = (("weight", c_void_p), ("eps", c_float), ("size", c_int32))


class LayerStruct(Structure):
    """tp_layer."""

    _fields_ = (
        ("attention", AttentionStruct),
        *((name, WeightStruct) for name in ("qkv", "out", "gate_up", "down")),
        *((name, NormStruct) for name in ("input_norm", "attention_norm", "mlp_norm", "output_norm")),
        *((name, NormStruct) for name in ("query_norm", "key_norm")),
        *((name, c_void_p) for name in ("cosines", "sines")),
        *((name, c_int32) for name in ("rotary_pairs", "interleaved")),
    )


class DecoderStruct(Structure):
    """tp_decoder."""

    _fields_ = (
        ("layers", POINTER(LayerStruct)),
        ("head", WeightStruct),
        ("embedding", c_void_p),
        ("norm", NormStruct),
        *((name, c_float) for name in ("embedding_scale", "residual_scale", "logit_scale", "logit_softcap")),
        *((name, c_int32) for name in ("embedding_type", "activation", "num_layers", "hidden")),
        *((name, c_int32) for name in ("max_tokens", "max_keys")),
    )


class StepStruct(Structure):
    """tp_step."""

    _fields_ = (
        *((name, c_void_p) for name in ("token_ids", "slots", "context_lens", "num_new", "wanted", "tables", "logits")),
        *((name, c_int32) for name in ("table_stride", "tokens", "rows", "num_wanted", "num_logits")),
    )


class Program:
    """Takes the weights out of a decoder: when this returns, nothing of the module is needed any more."""

    def __init__(
        self,
        decoder: Decoder,
        dtype: str,
        max_tokens: int,
        threads: int,
        quantize: str | None = None,
        kv_dtype: str | None = None,
    ) -> None:
        form, head_form = forms(dtype, quantize)
        self.vocab_size = decoder.head.out_features
        self._keep: list[Tensor] = []  # what the structs point to
        # Else the head's packed weight is the embedding, too; a quantized one would not do.
        tied = decoder.embedding is decoder.head.weight and quantize is None
        with ThreadPoolExecutor(threads) as pool:

            def pack(linears: Sequence[nn.Linear], gated: bool = False, form: Form = form) -> Future[PackedLinear]:
                return pool.submit(_packed, form, linears, gated)

            head = pack([decoder.head], form=head_form)
            packed = [
                (pack(layer.qkv), pack([layer.out]), pack(layer.gate_up, True), pack([layer.down]))
                for layer in decoder.layers
            ]
            self._weights = [head.result(), *(weight.result() for layer in packed for weight in layer)]
        self._layers = (LayerStruct * len(decoder.layers))()
        for struct, layer, weights in zip(self._layers, decoder.layers, packed, strict=True):
            self._fill(struct, layer, getattr(torch, kv_dtype or dtype))
            for name, weight in zip(("qkv", "out", "gate_up", "down"), weights, strict=True):
                setattr(struct, name, weight.result().struct)
        embedding = None if tied else decoder.embedding.detach().clone().contiguous()
        self._keep += [] if embedding is None else [embedding]
        self._decoder = DecoderStruct(
            layers=self._layers,
            head=head.result().struct,
            embedding=None if embedding is None else embedding.data_ptr(),
            norm=self._norm(decoder.norm),
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
        self._lib = _library()
        self._handle = self._lib.tp_program_create(byref(self._decoder))
        self._what = f"one native call a step, {form} weights, {isa()}"
        self._stage(max_tokens)

    def _fill(self, struct: LayerStruct, layer: Layer, cache_dtype: torch.dtype) -> None:
        shape = layer.need.shape
        for name in ("input_norm", "attention_norm", "mlp_norm", "output_norm", "query_norm", "key_norm"):
            setattr(struct, name, self._norm(getattr(layer, name)))
        struct.cosines, struct.sines = map(self._address, layer.rotary)
        struct.rotary_pairs = layer.rotary[0].shape[1]
        struct.attention = AttentionStruct(
            sinks=None if layer.sinks is None else self._address(layer.sinks),
            scaling=layer.scaling,
            softcap=layer.need.softcap or 0.0,
            window=layer.need.window or 0,
            type=TYPES[cache_dtype],
            heads=layer.need.heads,
            kv_heads=shape.kv_heads,
            key_dim=shape.key_dim,
            value_dim=shape.value_dim,
        )

    def _norm(self, norm: Norm | None) -> NormStruct:
        return NormStruct() if norm is None else NormStruct(self._address(norm.weight), norm.eps, len(norm.weight))

    def _address(self, tensor: Tensor) -> int:
        self._keep.append(tensor.contiguous())
        return self._keep[-1].data_ptr()

    def _stage(self, max_tokens: int) -> None:
        """Arrays in fixed places, into which each step is copied: asking numpy for an address takes longer."""
        self._token_ids, self._wanted = np.zeros(max_tokens, np.int32), np.zeros(max_tokens, np.int32)
        self._slots, self._context_lens = np.zeros(max_tokens, np.int32), np.zeros(max_tokens, np.int32)
        self._num_new = np.zeros(max_tokens, np.int32)
        self._logits = np.empty((0, self.vocab_size), np.float32)
        self._step = StepStruct(
            token_ids=self._token_ids.ctypes.data,
            slots=self._slots.ctypes.data,
            context_lens=self._context_lens.ctypes.data,
            num_new=self._num_new.ctypes.data,
            wanted=self._wanted.ctypes.data,
        )
        self._step_address = byref(self._step)

    def describe(self) -> str:
        return self._what

    @property
    def weights_bytes(self) -> int:
        others = {tensor.data_ptr(): tensor.nbytes for tensor in self._keep}
        return sum(weight.nbytes for weight in self._weights) + sum(others.values())

    def workspace_bytes(self, draws: int) -> int:
        """Memory that the largest step and that many logits take while they are computed, bytes."""
        scratch: int = self._lib.tp_program_scratch_bytes(self._handle)
        return scratch + draws * self.vocab_size * 4

    def block_bytes(self) -> list[tuple[int, int]]:
        """Memory of one block of the cache: keys and values of each layer."""
        sizes = (self._lib.tp_key_block_bytes, self._lib.tp_value_block_bytes)
        return [(sizes[0](byref(layer.attention)), sizes[1](byref(layer.attention))) for layer in self._layers]

    def attach(self, caches: Sequence[tuple[int, int]], tables: I32) -> None:
        """Compute from now on over these caches (addresses of keys and values, for each layer) and i32 [slots, blocks]
        block tables, which the caller keeps and changes between steps.
        """
        for layer, (keys, values) in zip(self._layers, caches, strict=True):
            layer.attention.keys, layer.attention.values = keys, values
        self._tables = tables
        self._step.tables, self._step.table_stride = tables.ctypes.data, tables.shape[1]

    def step(
        self,
        token_ids: I32,
        slots: I32,
        context_lens: I32,
        num_new: I32 | int,
        wanted: NDArray[np.signedinteger[Any]],
        num_logits: int,
    ) -> F32:
        """Compute packed tokens i32 [t]; row i of them has num_new[i] tokens of the sequence in slots[i].

        wanted: indices of the tokens after which logits may be asked for.
        Returns f32 [num_logits, vocab] after the first of `wanted`, valid until the next call.
        """
        rows, tokens, step = len(slots), len(token_ids), self._step
        self._token_ids[:tokens] = token_ids
        self._slots[:rows] = slots
        self._context_lens[:rows] = context_lens
        self._num_new[:rows] = num_new
        self._wanted[: len(wanted)] = wanted
        step.tokens, step.rows, step.num_wanted, step.num_logits = tokens, rows, len(wanted), num_logits
        logits = self._logits_for(num_logits)
        self._lib.tp_program_step(self._handle, self._step_address)
        return logits

    def logits(self, first: int, count: int) -> F32:
        """f32 [count, vocab] after the tokens wanted[first] and on of the last step, valid until the next call."""
        logits = self._logits_for(count)
        self._lib.tp_program_logits(self._handle, first, count, self._step.logits)
        return logits

    def _logits_for(self, count: int) -> F32:
        if count > len(self._logits):
            self._logits = np.empty((count, self.vocab_size), np.float32)
            self._step.logits = self._logits.ctypes.data
        return self._logits[:count]

    def close(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            self._lib.tp_program_destroy(handle)

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self.close()


def _packed(form: Form, linears: Sequence[nn.Linear], gated: bool = False) -> PackedLinear:
    parts = [Part(linear.weight, linear.bias) for linear in linears]
    return PackedLinear(parts, form.type, group=form.group, gated=gated)


def _library() -> ctypes.CDLL:
    found = library()
    assert found is not None
    found.tp_program_create.restype = c_void_p
    found.tp_program_create.argtypes = [c_void_p]
    found.tp_program_destroy.argtypes = [c_void_p]
    found.tp_program_scratch_bytes.restype, found.tp_program_scratch_bytes.argtypes = ctypes.c_size_t, [c_void_p]
    found.tp_program_step.argtypes = [c_void_p, c_void_p]
    for size in (found.tp_key_block_bytes, found.tp_value_block_bytes):
        size.restype, size.argtypes = ctypes.c_size_t, [c_void_p]
    found.tp_program_logits.argtypes = [c_void_p, ctypes.c_int, ctypes.c_int, c_void_p]
    return found
