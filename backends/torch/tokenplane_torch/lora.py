"""LoRA adapters beside the linear layers of a loaded model, several in one step.

A layer's output gains `(x @ down.T) @ up` of the row's adapter, scaled beforehand. Rows without an adapter gain
nothing, and a step of such rows alone computes nothing: an adapted layer then looks at one attribute.

Two ways through a step. A ragged one knows on the host which tokens have which adapter and computes them group by
group (`Grouped`). One of a fixed shape computes every token with every adapter and leaves out what is not the token's
own (`Masked`): all sizes depend on the shape alone, and nothing is gathered.

Room for all adapters is taken when the model is loaded, so that captured steps may hold its addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel

from tokenplane_core.backend.errors import UnsupportedAdapter
from tokenplane_core.backend.records import I32, AdapterLimits, AdapterSpec

from .checks import ObservedStep
from .lora_files import LoraPart, read_parts
from .module import DecoderModule
from .step import Upload


class AdaptedStep(Protocol):
    """How the tokens of one step find their adapters."""

    def add(self, layer: LoraLayer, inputs: Tensor, out: Tensor) -> None:
        """Add what the adapters say to out [t, out], for inputs [t, in]."""
        ...


class LoraLayer:
    """Room for all adapters of one linear layer; an adapter that leaves it alone has rank 0 there."""

    def __init__(self, part: Module, limits: AdapterLimits, dtype: torch.dtype, device: torch.device) -> None:
        self.inputs, self.outputs = _sizes(part) or (0, 0)
        adapters, rank = limits.max_adapters, limits.max_rank
        # Not torch.zeros: its memory counts as taken only once it is written to.
        self.down = torch.empty((adapters, rank, self.inputs), dtype=dtype, device=device).zero_()
        self.up = torch.empty((adapters, rank, self.outputs), dtype=dtype, device=device).zero_()
        self.ranks = [0] * adapters

    @property
    def num_bytes(self) -> int:
        return self.down.nbytes + self.up.nbytes

    def put(self, index: int, part: LoraPart | None) -> None:
        """Replace the adapter of an index; None: it leaves this layer alone."""
        down, up = self.down[index - 1].zero_(), self.up[index - 1].zero_()
        rank = self.ranks[index - 1] = 0 if part is None else len(part.down)
        if part is not None:
            down[:rank].copy_(part.down)
            up[:rank].copy_(part.up)


@dataclass(frozen=True, slots=True)
class Grouped:
    """The tokens of each adapter index: where they lie, or an i64 list of them.

    least_rank: computed whatever the adapters have, for a trial.
    """

    groups: list[tuple[int, slice | Tensor]]
    least_rank: int = 0

    def add(self, layer: LoraLayer, inputs: Tensor, out: Tensor) -> None:
        for index, where in self.groups:
            rank = max(layer.ranks[index - 1], self.least_rank)
            if rank == 0:
                continue
            down, up = layer.down[index - 1, :rank], layer.up[index - 1, :rank]
            inner = inputs[where] @ down.T
            if isinstance(where, slice):
                out[where].addmm_(inner, up)
            else:
                out.index_add_(0, where, inner @ up)


@dataclass(frozen=True, slots=True)
class Masked:
    """others bool [t, adapters, 1]: True where the adapter is not the token's."""

    others: Tensor

    def add(self, layer: LoraLayer, inputs: Tensor, out: Tensor) -> None:
        inner = (inputs @ layer.down.flatten(0, 1).T).view(len(inputs), *layer.down.shape[:2])
        # Filled, not multiplied: what overflows under another adapter stays there.
        out.addmm_(inner.masked_fill(self.others, 0).flatten(1), layer.up.flatten(0, 1))


class LoraLayers:
    """The adapted layers of one model. `now` says how the step that is computed finds its adapters; None: none has."""

    def __init__(self, module: PreTrainedModel, limits: AdapterLimits) -> None:
        self.limits = limits
        self.now: AdaptedStep | None = None
        self._numbers = torch.arange(1, limits.max_adapters + 1, device=module.device)
        found = adaptable_layers(module)
        self._layers = {name: LoraLayer(part, limits, module.dtype, module.device) for name, part in found.items()}
        for name, part in found.items():
            part.forward = self._adapted(part.forward, self._layers[name])

    def _adapted(self, compute: Callable[..., Tensor], layer: LoraLayer) -> Callable[..., Tensor]:
        def forward(inputs: Tensor, *arguments: Any, **options: Any) -> Tensor:
            out = compute(inputs, *arguments, **options)
            if self.now is not None:
                self.now.add(layer, inputs.reshape(-1, layer.inputs), out.view(-1, layer.outputs))
            return out

        return forward

    @property
    def num_bytes(self) -> int:
        return sum(layer.num_bytes for layer in self._layers.values())

    def describe(self) -> str:
        return f"torch; {len(self._layers)} linear layers, {self.limits.max_adapters} of rank {self.limits.max_rank}"

    @torch.inference_mode()
    def load(self, index: int, adapter: AdapterSpec) -> None:
        """Put an adapter's weights under an index.

        Raises:
            UnsupportedAdapter: it does not fit the model; nothing has changed.
        """
        parts = read_parts(adapter)
        self._require_fit(parts)
        for name, layer in self._layers.items():
            layer.put(index, parts.get(name))

    @torch.inference_mode()
    def drop(self, index: int) -> None:
        for layer in self._layers.values():
            layer.put(index, None)

    def _require_fit(self, parts: Mapping[str, LoraPart]) -> None:
        for name, part in parts.items():
            layer = self._layers.get(name)
            if layer is None:
                raise UnsupportedAdapter(
                    f"it changes {name}, which is no linear layer of this model that adapters reach"
                )
            if part.shape != (layer.outputs, layer.inputs):
                raise UnsupportedAdapter(
                    f"it was made for another model: its {name} is {part.shape[1]} to {part.shape[0]},"
                    f" the model's {layer.inputs} to {layer.outputs}"
                )
            if len(part.down) > self.limits.max_rank:
                raise UnsupportedAdapter(f"its {name} has rank {len(part.down)}, the limit is {self.limits.max_rank}")
            # In the model's number format, too. What is not finite would reach the rows of others.
            if not all(tensor.to(layer.down.dtype).isfinite().all() for tensor in (part.down, part.up)):
                raise UnsupportedAdapter(f"its weights of {name} are not all finite numbers as {layer.down.dtype}")

    # --- Steps ----------------------------------------------------------------------------------------------

    def grouped(self, adapters: I32, upload: Upload, least_rank: int = 0) -> Grouped | None:
        """For a packed step: adapters i32 [t], the index of each token; None if none has one."""
        groups: list[tuple[int, slice | Tensor]] = []
        for index in np.unique(adapters[adapters > 0]).tolist():
            where = np.flatnonzero(adapters == index)
            first, end = int(where[0]), int(where[-1]) + 1
            groups.append((index, slice(first, end) if end - first == len(where) else upload(where)))
        return Grouped(groups, least_rank) if groups else None

    def fullest(self, new: I32, upload: Upload) -> Grouped | None:
        """For a trial: each row, of new[i] tokens, has an adapter of the largest rank, another than its neighbours'."""
        each = np.arange(len(new), dtype=np.int32) % self.limits.max_adapters + 1
        return self.grouped(np.repeat(each, new), upload, self.limits.max_rank)

    def masked(self, adapters: Tensor) -> Masked:
        """For a step of a fixed shape: adapters [t] of any integer type."""
        return Masked((adapters[:, None] != self._numbers)[:, :, None])


def adaptable_layers(module: PreTrainedModel) -> dict[str, Module]:
    """By name, the linear layers that see each token of a step once and in order, in the model's number format, but for
    the output layer. An expert of a mixture, for one, sees its own choice of tokens.
    """
    named = {name: part for name, part in module.named_modules() if _sizes(part) is not None}
    lengths: dict[str, list[int]] = {name: [] for name in named}

    def note(name: str) -> Callable[..., None]:
        def hook(part: Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
            is_plain = inputs[0].dtype == out.dtype == module.dtype
            lengths[name].append(inputs[0].shape[:-1].numel() if is_plain else 0)

        return hook

    tokens = torch.arange(3, device=module.device)
    hooks = [part.register_forward_hook(note(name)) for name, part in named.items()]
    try:
        with torch.no_grad():
            DecoderModule(module).logits(tokens, tokens, tokens, ObservedStep())
    finally:
        for hook in hooks:
            hook.remove()
    head = module.get_output_embeddings()
    return {name: part for name, part in named.items() if lengths[name] == [len(tokens)] and part is not head}


def _sizes(part: Module) -> tuple[int, int] | None:
    """Width of what goes in and of what comes out of a linear layer, quantized ones among them; None: it is none."""
    for names in (("in_features", "out_features"), ("nx", "nf")):  # the latter in GPT-2
        sizes = tuple(getattr(part, name, None) for name in names)
        if all(isinstance(size, int) for size in sizes):
            return sizes  # type: ignore[return-value]
    return None
