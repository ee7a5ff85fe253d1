"""The structs and numbers of the library's interface, native/tokenplane_cpu.h. Imports no torch."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from ctypes import Structure, c_float, c_int32, c_int64, c_void_p
from enum import IntEnum
from typing import Any

BLOCK_TOKENS = 32  # TP_KV_BLOCK_TOKENS
MOST_LOGPROBS = 1024  # TP_MOST_LOGPROBS


class WeightType(IntEnum):
    """How a packed weight is stored."""

    F32 = 0
    BF16 = 1
    INT8 = 2
    INT4 = 3


class Epilogue(IntEnum):
    """What becomes of a finished row: stored, added to what is there, or gated."""

    STORE = 0
    ADD = 1
    GATED = 2


class Activation(IntEnum):
    SILU = 0
    GELU = 1
    GELU_TANH = 2


def _fields(kind: Any, *names: str) -> Iterator[tuple[str, Any]]:
    return ((name, kind) for name in names)


class WeightStruct(Structure):
    """tp_linear_weight."""

    _fields_ = (
        *_fields(c_void_p, "values", "scales", "output_scales", "bias"),
        *_fields(c_int32, "type", "outputs", "inputs", "group", "gated"),
    )


class OutputStruct(Structure):
    """tp_linear_output."""

    _fields_ = (
        ("data", c_void_p),
        ("stride", c_int64),
        *_fields(c_int32, "epilogue", "activation"),
    )


class AttentionStruct(Structure):
    """tp_attention."""

    _fields_ = (
        *_fields(c_void_p, "keys", "values", "sinks"),
        *_fields(c_float, "scaling", "softcap"),
        *_fields(c_int32, "window", "type", "heads", "kv_heads", "key_dim", "value_dim"),
    )


class TokenRowsStruct(Structure):
    """tp_token_rows."""

    _fields_ = (("data", c_void_p), ("stride", c_int64), ("type", c_int32))


class RowsStruct(Structure):
    """tp_attention_rows."""

    _fields_ = (
        *_fields(c_void_p, "first_tokens", "num_tokens", "context_lens", "tables", "slots"),
        *_fields(c_int32, "table_stride", "rows"),
    )


class NormStruct(Structure):
    """tp_norm."""

    _fields_ = (("weight", c_void_p), ("eps", c_float), ("size", c_int32))


class LayerStruct(Structure):
    """tp_layer."""

    _fields_ = (
        ("attention", AttentionStruct),
        *_fields(WeightStruct, "qkv", "out", "gate_up", "down"),
        *_fields(NormStruct, "input_norm", "attention_norm", "mlp_norm", "output_norm", "query_norm", "key_norm"),
        *_fields(c_void_p, "cosines", "sines"),
        ("rotary_pairs", c_int32),
    )


class DecoderStruct(Structure):
    """tp_decoder."""

    _fields_ = (
        ("layers", ctypes.POINTER(LayerStruct)),
        ("head", WeightStruct),
        ("embedding", c_void_p),
        ("norm", NormStruct),
        *_fields(c_float, "embedding_scale", "residual_scale", "logit_scale", "logit_softcap"),
        *_fields(c_int32, "embedding_type", "activation", "num_layers", "hidden", "max_tokens", "max_keys"),
    )


class StepStruct(Structure):
    """tp_step."""

    _fields_ = (
        *_fields(c_void_p, "token_ids", "slots", "context_lens", "num_new", "wanted", "tables", "logits"),
        *_fields(c_int32, "table_stride", "tokens", "rows", "num_wanted", "num_logits"),
    )


class SamplingStruct(Structure):
    """tp_sampling."""

    _fields_ = (
        ("logits", c_void_p),
        ("stride", c_int64),
        *_fields(c_int32, "rows", "vocab"),
        *_fields(c_void_p, "masks", "mask_rows", "bias_starts", "bias_ids", "bias_values"),
        *_fields(c_void_p, "temperature", "top_k", "top_p", "typical_p", "min_p", "uniforms"),
        *_fields(c_void_p, "num_logprobs", "processed_logprobs"),
        *_fields(c_void_p, "repetition_penalty", "presence_penalty", "frequency_penalty"),
        *_fields(c_void_p, "history_rows", "history_ids", "history_lengths", "history_prompts"),
        ("history_stride", c_int64),
        *_fields(c_void_p, "token_ids", "logprobs", "top_ids", "top_logprobs"),
        ("width", c_int32),
    )
