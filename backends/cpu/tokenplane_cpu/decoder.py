"""Reads a loaded transformers module as a plain decoder: embedding, layers of norms, attention and gated MLP, head.

No architecture is known by name. The module runs once on a few tokens, watched; which of its linear layers and norms
were called, in which order and of which shapes, says what each is for, and a look at what a small part computes says
the rest (a norm's offset, an activation, a scaled embedding). Every parameter must belong to a part that was called
(attention sinks aside), and every part with parameters that was called must have found its place. What is read this way
may still be wrong in ways that shapes do not show: whoever uses it compares logits (tokenplane_torch.checks.compare),
and looks at positions far beyond those of such a comparison (positions.py).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, silu
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from tokenplane_torch.kernels import LayerNeed

from .linear import SOURCE_TYPES

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": lambda x: gelu(x, approximate="tanh"),
}


class NotPlain(Exception):
    """The module is no plain decoder; the message is one line that says what is unlike."""


@dataclass(frozen=True, slots=True)
class Norm:
    """x / sqrt(mean(x^2) + eps) * weight"""

    weight: Tensor  # f32 [n], an offset already added
    eps: float


@dataclass(frozen=True, slots=True)
class Layer:
    """x += residual_scale * attention_norm(out(attend(input_norm(x)))), then the same with the MLP."""

    need: LayerNeed
    scaling: float
    sinks: Tensor | None  # f32 [heads]
    rotary: tuple[Tensor, Tensor]  # cos and sin, f32 [positions, n]: dimension i < n turns with dimension i + n
    input_norm: Norm | None
    query_norm: Norm | None  # of each head, or of all heads together
    key_norm: Norm | None
    qkv: Sequence[nn.Linear]  # one, or three
    out: nn.Linear
    attention_norm: Norm | None
    mlp_norm: Norm | None
    gate_up: Sequence[nn.Linear]  # one, or two
    down: nn.Linear
    output_norm: Norm | None


@dataclass(frozen=True, slots=True)
class Decoder:
    embedding: Tensor  # [vocab, hidden]
    embedding_scale: float
    layers: Sequence[Layer]
    activation: str  # of ACTIVATIONS
    residual_scale: float
    norm: Norm
    head: nn.Linear
    logit_scale: float
    logit_softcap: float | None


class NoProducts(TorchFunctionMode):
    """Inside, linear layers give zeros at once: for who wants to know what is called, not what comes of it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_no_product if func is linear else func)(*args, **(kwargs or {}))


def _no_product(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """In place of torch.nn.functional.linear."""
    return input.new_zeros((*input.shape[:-1], len(weight)))


class Watched:
    """What happened while a module ran: which parts that hold parameters were called, and what went into each layer."""

    def __init__(self) -> None:
        self.parts: list[nn.Module] = []
        self.inputs: list[tuple[tuple[Any, ...], dict[str, Any]]] = []  # of each layer
        self.turns: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []  # calls of the rotary embedding
        self.token_ids = torch.empty(0, dtype=torch.int64)  # that were embedded


@contextmanager
def watched(module: PreTrainedModel) -> Iterator[Watched]:
    """Inside, note what the module does."""
    seen, decoder = Watched(), module.get_decoder()
    layers, rotary = getattr(decoder, "layers", ()), getattr(decoder, "rotary_emb", None)
    leaves = [m for m in module.modules() if not any(m.children()) and any(True for _ in m.parameters(recurse=False))]
    handles = [leaf.register_forward_pre_hook(lambda part, _: seen.parts.append(part)) for leaf in leaves]

    def embeds(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.token_ids = args[0].flatten()

    handles.append(module.get_input_embeddings().register_forward_pre_hook(embeds))
    for layer in layers:
        note = lambda _, args, named: seen.inputs.append((args, named))  # noqa: E731
        handles.append(layer.register_forward_pre_hook(note, with_kwargs=True))
    if isinstance(rotary, nn.Module):
        turn = lambda _, args, named, out: seen.turns.append((args, named, out))  # noqa: E731
        handles.append(rotary.register_forward_hook(turn, with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def read_decoder(module: PreTrainedModel, seen: Watched, needs: Sequence[LayerNeed], max_model_tokens: int) -> Decoder:
    """Read a module that was watched while it ran on a few tokens, with the needs of its layers' attention.

    Raises:
        NotPlain: it is something else.
    """
    config: Any = module.config
    decoder: Any = module.get_decoder()
    embedding, head = module.get_input_embeddings(), module.get_output_embeddings()
    layers = getattr(decoder, "layers", None)
    if (
        not isinstance(embedding, nn.Embedding)
        or embedding.weight.dtype not in SOURCE_TYPES
        or not isinstance(head, nn.Linear)
        or not isinstance(layers, nn.ModuleList)
    ):
        raise NotPlain("it is not made of an embedding, a list of layers and a linear output layer")
    _require_plain(head)
    if len(seen.inputs) != len(layers) or len(needs) != len(layers):
        raise NotPlain(f"{len(seen.inputs)} calls of its {len(layers)} layers")
    tables = _RotaryTables(decoder, seen, max_model_tokens)
    read = [
        _read_layer(layer, _called_in(layer, seen), need, tables.of(inputs[1].get("position_embeddings")))
        for layer, need, inputs in zip(layers, needs, seen.inputs, strict=True)
    ]
    inner = {part for layer in layers for part in layer.modules()}
    norms = [part for part in seen.parts if part not in inner and part is not embedding and part is not head]
    if len(norms) != 1:
        raise NotPlain(
            f"{len(norms)} parts outside its layers hold parameters besides embedding and head, not one norm"
        )
    _require_all_used(module, seen)
    return Decoder(
        embedding=embedding.weight,
        embedding_scale=_embedding_scale(embedding, seen),
        layers=read,
        activation=_activation(layers),
        residual_scale=float(getattr(config, "residual_multiplier", None) or 1.0),
        norm=_read_norm(norms[0]),
        head=head,
        logit_scale=1.0 / float(getattr(config, "logits_scaling", None) or 1.0),
        logit_softcap=getattr(config, "final_logit_softcapping", None),
    )


def _called_in(layer: nn.Module, seen: Watched) -> list[nn.Module]:
    inside = set(layer.modules())
    return [part for part in seen.parts if part in inside]


def _require_all_used(module: PreTrainedModel, seen: Watched) -> None:
    known = {id(parameter) for part in seen.parts for parameter in part.parameters(recurse=False)}
    for name, parameter in module.named_parameters():
        if id(parameter) not in known and not name.endswith("sinks"):
            raise NotPlain(f"nothing is known of its parameter {name}")


# --- A layer ------------------------------------------------------------------------------------------------


def _read_layer(layer: nn.Module, parts: list[nn.Module], need: LayerNeed, rotary: Any) -> Layer:
    children = layer.children()
    attention: Any = next((child for child in children if isinstance(getattr(child, "layer_idx", None), int)), None)
    if attention is None:
        raise NotPlain("its layers have no part for attention")
    own = set(attention.modules())
    inside = [i for i, part in enumerate(parts) if part in own]
    if not inside or inside != list(range(inside[0], inside[-1] + 1)):
        raise NotPlain("its layers do not compute attention first and then the rest")
    before, after = parts[: inside[0]], parts[inside[-1] + 1 :]
    linears, norms = _split(parts[inside[0] : inside[-1] + 1])
    *qkv, out = linears
    heads, shape = need.heads, need.shape
    rows = [heads * shape.key_dim, shape.kv_heads * shape.key_dim, shape.kv_heads * shape.value_dim]
    if shape.key_dim != shape.value_dim or [linear.out_features for linear in qkv] not in (rows, [sum(rows)]):
        raise NotPlain("its attention does not make queries, keys and values with one or three linear layers")
    query_norm, key_norm = _head_norms(norms, need)
    mlp, _ = _split(after)
    if len(mlp) not in (2, 3) or sum(linear.out_features for linear in mlp[:-1]) != 2 * mlp[-1].in_features:
        raise NotPlain("its layers do not end with a gated MLP")
    at = after.index(mlp[0])
    between, last = after[:at], after[at + len(mlp) :]
    if after[at : at + len(mlp)] != mlp or len(before) > 1 or len(between) + len(last) > 3 or len(last) > 1:
        raise NotPlain("its layers have norms in other places than before and behind attention and MLP")
    attention_norm, mlp_norm = _between(before, between)
    return Layer(
        need=need,
        scaling=shape.key_dim**-0.5 if need.scaling is None else float(need.scaling),
        sinks=attention.sinks.float() if need.sinks else None,
        rotary=rotary,
        input_norm=_optional_norm(before),
        query_norm=query_norm,
        key_norm=key_norm,
        qkv=qkv,
        out=out,
        attention_norm=attention_norm,
        mlp_norm=mlp_norm,
        gate_up=mlp[:-1],
        down=mlp[-1],
        output_norm=_optional_norm(last),
    )


def _split(parts: list[nn.Module]) -> tuple[list[nn.Linear], list[nn.Module]]:
    """Linear layers, and the rest."""
    linears = [p for p in parts if isinstance(p, nn.Linear)]
    for part in linears:
        _require_plain(part)
    return linears, [p for p in parts if not isinstance(p, nn.Linear)]


def _require_plain(part: nn.Linear) -> None:
    """Subclasses and quantized weights compute something besides input @ weight.T + bias."""
    weights = [parameter for parameter in (part.weight, part.bias) if parameter is not None]
    if type(part) is not nn.Linear or "forward" in vars(part):
        raise NotPlain(f"{type(part).__name__} is a linear layer of its own kind")
    for weight in weights:
        if type(weight) is not nn.Parameter or weight.dtype not in SOURCE_TYPES:
            raise NotPlain(f"its linear layers hold {type(weight).__name__} of {weight.dtype}")


def _head_norms(norms: list[nn.Module], need: LayerNeed) -> tuple[Norm | None, Norm | None]:
    """Of queries and keys, in this order."""
    if not norms:
        return None, None
    if len(norms) != 2:
        raise NotPlain(f"its attention has {len(norms)} norms")
    query, key = map(_read_norm, norms)
    dim = need.shape.key_dim
    if (len(query.weight), len(key.weight)) not in ((dim, dim), (need.heads * dim, need.shape.kv_heads * dim)):
        raise NotPlain(f"its attention has norms of {len(query.weight)} and {len(key.weight)}")
    return query, key


def _between(before: list[nn.Module], between: list[nn.Module]) -> tuple[Norm | None, Norm | None]:
    """The norms of what attention gives and of what the MLP takes.

    A single one belongs to the MLP where attention has one before it, and else to attention.
    """
    if len(between) == 2:
        return _read_norm(between[0]), _read_norm(between[1])
    return (None, _optional_norm(between)) if before else (_optional_norm(between), None)


def _optional_norm(parts: list[nn.Module]) -> Norm | None:
    return _read_norm(parts[0]) if parts else None


def _read_norm(part: nn.Module) -> Norm:
    """What a norm computes, found by trying it in float32 on numbers of ordinary size and on tiny ones."""
    weight = getattr(part, "weight", None)
    eps = getattr(part, "variance_epsilon", getattr(part, "eps", None))
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(eps, float):
        raise NotPlain(f"{type(part).__name__} is neither a linear layer nor an RMS norm")
    plain, x = copy.deepcopy(part).float(), torch.linspace(-1.7, 2.1, len(weight))
    for offset in (0.0, 1.0):
        norm = Norm(weight.float() + offset, eps)
        if all(torch.allclose(plain(y), _normed(y, norm), rtol=1e-4, atol=1e-5) for y in (x, x * eps**0.5)):
            return norm
    raise NotPlain(f"{type(part).__name__} is no RMS norm")


def _normed(x: Tensor, norm: Norm) -> Tensor:
    return x * torch.rsqrt(x.square().mean() + norm.eps) * norm.weight


# --- Around the layers --------------------------------------------------------------------------------------


class _RotaryTables:
    """Cosines and sines of all positions, one pair for each kind of rotary embedding that the layers were given."""

    def __init__(self, decoder: Any, seen: Watched, max_model_tokens: int) -> None:
        self._decoder, self._seen, self._length = decoder, seen, max_model_tokens
        self._made: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, embeddings: Any) -> tuple[Tensor, Tensor]:
        for call, (args, named, out) in enumerate(self._seen.turns):
            if isinstance(embeddings, tuple) and out is embeddings:
                if call not in self._made:
                    self._made[call] = self._table(args, named)
                return self._made[call]
        raise NotPlain("its layers are not given a rotary embedding")

    def _table(self, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The module's own, asked in float32 and about all positions."""
        positions = torch.arange(self._length)[None]

        def instead(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.float()[:1, :1] if value.is_floating_point() else positions

        cos, sin = self._decoder.rotary_emb(*map(instead, args), **{k: instead(v) for k, v in named.items()})
        half = cos.shape[-1] // 2
        if not torch.equal(cos[..., :half], cos[..., half:]):
            raise NotPlain("its rotary embedding turns other pairs than i and i + half")
        return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()


def _embedding_scale(embedding: nn.Embedding, seen: Watched) -> float:
    """By how much the first layer's input is larger than the embedding of the tokens that the module ran on."""
    args, named = seen.inputs[0]
    hidden = (args[0] if args else named["hidden_states"])[0].float()
    plain = embedding.weight[seen.token_ids].float()
    scale = float((hidden * plain).sum() / plain.square().sum())
    if not torch.allclose(hidden, plain * scale, rtol=2e-2, atol=1e-6):
        raise NotPlain("what enters its first layer is not the embedding times a number")
    return scale


def _activation(layers: nn.ModuleList) -> str:
    """The one function that all layers apply, besides what their parameters do."""
    parts = [part for layer in layers for part in layer.modules() if not any(part.children())]
    plain = [part for part in parts if not any(True for _ in part.parameters())]
    functions = [part for part in plain if not isinstance(part, nn.Dropout)]
    x = torch.linspace(-6, 6, 101)
    for name, known in ACTIVATIONS.items():
        if functions and all(torch.allclose(function(x), known(x), atol=1e-5) for function in functions):
            return name
    raise NotPlain(f"the activation of its MLP is not one of {', '.join(ACTIVATIONS)}")
