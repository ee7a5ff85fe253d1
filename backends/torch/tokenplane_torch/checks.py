"""The load-time check: does this model compute through our attention what it computes by itself?

Nothing here knows an architecture by name. Three questions: may a sequence depend on its neighbours through position
scaling (`require_steady_positions`); does every layer call the attention function once, and under which mask
(`observe`); does a packed, paged, chunked run give the logits of the model's own attention (`compare`). The last two
are answered by running the loaded model on a few tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionMaskInterface, PreTrainedModel

from tokenplane_core.backend.errors import ConfigError, OutOfMemory, UnsupportedModel
from tokenplane_core.backend.records import I32, ModelSpec

from . import attention
from .attention import AttentionRule
from .device import TorchDevice
from .failures import first_line, is_out_of_memory
from .kernels import AttentionKernels, LayerNeed
from .kv_cache import LayerShape
from .loader import OUTSIDE_INTERFACE, refused
from .step import PagedStep, plan_step

OBSERVED = attention.NAME + "_observed"  # the same function, but with a mask prepared for it


Packed = Callable[[I32, I32, I32, I32], Tensor]
"""Computes a step over a cache of `TRIAL_BLOCKS` blocks: token ids i32 [t] packed, new tokens i32 [n], cached tokens
i32 [n], block tables i32 [n, blocks] -> logits [t, vocab] on the host, of all tokens."""


def survey(module: PreTrainedModel, model: ModelSpec) -> list[LayerNeed]:
    """What the attention of each layer needs.

    Raises:
        UnsupportedModel, OutOfMemory: as `check_model`.
    """
    with _refusing(model):
        require_steady_positions(module, model.max_model_tokens)
        return observe(module, model)


def check_model(
    module: PreTrainedModel, model: ModelSpec, device: TorchDevice
) -> tuple[list[LayerNeed], AttentionKernels]:
    """Check the loaded model; return what each layer's attention needs, and the device's kernels for it.

    Raises:
        UnsupportedModel: with the model type and the reason; the module is as it was.
        OutOfMemory: the weights fit, a few tokens more did not.
    """
    needs = survey(module, model)
    with _refusing(model):
        kernels = device.kernels(needs)
        compare(module, model, device.block_tokens, _paged(module, needs, device, kernels))
    return needs, kernels


@contextlib.contextmanager
def _refusing(model: ModelSpec) -> Iterator[None]:
    """Inside, whatever goes wrong becomes a refusal of the model."""
    try:
        with torch.no_grad():  # torch-xla multiplies no weight in inference mode
            yield
    except ConfigError:
        raise  # not about the model
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemory(f"{model.model_id}: no memory left to run it: {first_line(error)}") from error
        known = isinstance(error, UnsupportedModel)
        failure = f"it does not run on a packed batch without a mask ({type(error).__name__}: {first_line(error)})"
        reason = str(error) if known else failure
        raise refused(model, reason) from error


# --- Position scaling ---------------------------------------------------------------------------------------


def require_steady_positions(module: PreTrainedModel, max_model_tokens: int) -> None:
    """Refuse RoPE whose frequencies depend on the longest position of a batch (dynamic NTK, longrope).

    transformers switches them for the whole batch, so that one long sequence would change its neighbours. Up to
    the original length they never switch.
    """
    for part in module.modules():
        kinds = getattr(part, "rope_type", None)
        for layer_type, kind in (kinds if isinstance(kinds, dict) else {None: kinds}).items():
            if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope"):
                limit = _original_tokens(part, layer_type, kind)
                if max_model_tokens > limit:
                    raise UnsupportedModel(
                        f"its position scaling (RoPE type {kind!r}) changes once any sequence of a batch passes"
                        f" {limit} tokens, and sequences of {max_model_tokens} are allowed; set --max-total-tokens"
                        f" to {limit} or less"
                    )


def _original_tokens(rope: Any, layer_type: str | None, kind: str) -> int:
    """Where transformers' dynamic_rope_update (modeling_rope_utils.py) switches frequencies."""
    if kind != "longrope":
        return int(rope.original_max_seq_len)
    parameters = rope.config.rope_parameters
    return int((parameters if layer_type is None else parameters[layer_type])["original_max_position_embeddings"])


# --- Which layers attend, and to what -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PreparedMask:
    """What transformers hands a layer as its mask while it is observed: the rule itself, not a tensor."""

    sees: Callable[[Tensor, Tensor, Tensor, Tensor], Any]  # batch, head, query position, key position -> bool


@dataclass(frozen=True, slots=True)
class Seen:
    layer: int
    need: LayerNeed
    mask: object


class ObservedStep:
    """Notes what each layer asks for, and computes nothing."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule, mask: object
    ) -> Tensor:
        if key.dtype != value.dtype or key.dtype != query.dtype:
            raise UnsupportedModel(f"layer {layer} mixes {query.dtype}, {key.dtype} and {value.dtype} in its attention")
        shape = LayerShape(key.shape[1], key.shape[2], value.shape[2], key.dtype)
        need = LayerNeed(query.shape[1], shape, rule.window, rule.softcap, rule.sinks is not None, rule.scaling)
        self.seen.append(Seen(layer, need, mask))
        return query.new_zeros((*query.shape[:2], value.shape[2]))


def observe(module: PreTrainedModel, model: ModelSpec) -> list[LayerNeed]:
    """Run a few tokens at the last positions a sequence may have, and look at every attention call.

    Raises:
        UnsupportedModel: a layer calls the attention function not exactly once (so it keeps state elsewhere), or
            attends to other keys than the kernels will.
    """
    attention.register(OBSERVED)
    AttentionMaskInterface.register(OBSERVED, lambda **arguments: PreparedMask(arguments["mask_function"]))
    step = ObservedStep()
    tokens = min(4, model.max_model_tokens)
    positions = torch.arange(model.max_model_tokens - tokens, model.max_model_tokens, device=module.device)
    with _attention_of(module, OBSERVED):
        _forward(module, positions % model.vocab_size, positions, step)
    calls = [seen.layer for seen in step.seen]
    _require_every_layer(calls, model.num_layers)
    for seen in step.seen:
        _require_known_mask(seen, model.max_model_tokens)
    return [seen.need for seen in step.seen]


def _require_every_layer(calls: list[int], num_layers: int) -> None:
    if not calls:
        raise UnsupportedModel(OUTSIDE_INTERFACE)
    absent = sorted(set(range(num_layers)) - set(calls))
    if absent:
        raise UnsupportedModel(
            f"layers {_short(absent)} of {num_layers} do not attend through transformers' attention interface: they"
            " keep a state of their own (recurrent or hybrid models), which the paged cache does not hold"
        )
    if calls != list(range(num_layers)):
        raise UnsupportedModel(f"its {num_layers} layers attend in the order {_short(calls)}, not once each")


def _require_known_mask(seen: Seen, max_model_tokens: int) -> None:
    """Compare the mask the model asked for with ours, over a grid of positions up to the longest sequence.

    A trial run is too short to show the difference: windows and chunks are thousands of tokens long.
    """
    if seen.mask is None:
        return
    if not isinstance(seen.mask, PreparedMask):
        raise UnsupportedModel(f"layer {seen.layer} makes an attention mask of its own")
    window = seen.need.window or max_model_tokens
    edges = np.array([0, 1, 2, window - 1, window, window + 1, max_model_tokens - 2, max_model_tokens - 1])
    grid = np.unique(np.concatenate((edges, np.linspace(0, max_model_tokens - 1, 64).astype(np.int64))))
    query = grid[(grid >= 0) & (grid < max_model_tokens)]
    around = query[:, None] - np.array([-1, 0, 1, window - 1, window, window + 1])
    key = np.unique(np.concatenate((query, around[(around >= 0) & (around < max_model_tokens)])))
    q, k = (torch.from_numpy(a.reshape(-1)) for a in np.meshgrid(query, key, indexing="ij"))
    zero = torch.zeros((), dtype=torch.int64)
    try:
        asked = torch.as_tensor(seen.mask.sees(zero, zero, q, k)).expand(len(q))
    except IndexError:
        raise UnsupportedModel(f"the attention mask of layer {seen.layer} depends on the batch") from None
    ours = (k <= q) & (q - k < window)
    if not torch.equal(asked, ours):
        at = int((asked != ours).nonzero()[0])
        raise UnsupportedModel(
            f"layer {seen.layer} is masked in a way that is neither causal nor a sliding window of {seen.need.window}"
            f" tokens (position {int(q[at])} and position {int(k[at])})"
        )


# --- Does it compute the same -------------------------------------------------------------------------------

TRIAL_BLOCKS = 6
BLOCKS = ((5, 2), (1, 4))  # block tables of sequence A and B: scattered


ROUNDING = 0.5
"""How far most tokens may be off in lower precision where single tokens may differ wholly: a router near a tie picks
another expert."""


def compare(
    module: PreTrainedModel, model: ModelSpec, block_tokens: int, packed: Packed, rounding: float = ROUNDING
) -> None:
    """Run two sequences packed through the paged cache, and side by side through the model's own eager attention.

    Raises:
        UnsupportedModel: the logits differ by more than rounding.
    """
    # Tokens of A and B in each packed step: chunks, a decode row, mixed. A goes on into its second block.
    whole_block = max(1, min(block_tokens, model.max_model_tokens - 3))
    chunks = np.array(((whole_block, 2), (1, 3), (2, 1)), np.int32)
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, model.vocab_size, length).astype(np.int32) for length in chunks.sum(axis=0)]
    computed: list[list[Tensor]] = [[], []]
    context = np.zeros(2, np.int32)
    for chunk in chunks:
        token_ids = np.concatenate([s[c : c + n] for s, c, n in zip(sequences, context, chunk, strict=True)])
        logits = packed(token_ids, chunk, context, np.array(BLOCKS, np.int32))
        for sequence, part in enumerate(torch.split(logits, chunk.tolist())):
            computed[sequence].append(part)
        context = context + chunk
    # Zeros behind the end of the shorter one change nothing before it.
    ids = np.zeros((2, max(map(len, sequences))), np.int64)
    for row, token_ids in zip(ids, sequences, strict=True):
        row[: len(token_ids)] = token_ids
    with _attention_of(module, "eager"):
        alone = module(input_ids=torch.from_numpy(ids).to(module.device), use_cache=False).logits.cpu()
    for logits, parts, token_ids in zip(alone, computed, sequences, strict=True):
        _require_same(torch.cat(parts), logits[: len(token_ids)], rounding)


def _paged(module: PreTrainedModel, needs: list[LayerNeed], device: TorchDevice, kernels: AttentionKernels) -> Packed:
    """The module itself, its attention going through the device's kernels over a cache of its own."""
    layers = device.allocate([need.shape for need in needs], TRIAL_BLOCKS)

    def packed(token_ids: I32, new: I32, context: I32, tables: I32) -> Tensor:
        wanted = np.ones(len(new), np.bool_)
        plan = plan_step(token_ids, new, context, tables, wanted, device.block_tokens, device.upload)
        return _forward(module, plan.token_ids.long(), plan.positions, PagedStep(plan, layers, kernels)).cpu()

    return packed


def _require_same(packed: Tensor, alone: Tensor, rounding: float) -> None:
    """Compare logits [t, vocab] by token, in units of how much they differ from token to token.

    In float32 every token must agree. In lower precision rounding grows with depth, and only what three quarters of the
    tokens exceed counts.
    """
    strict = packed.dtype == torch.float32 and alone.dtype == torch.float32
    packed, alone = packed.float(), alone.float()
    spread = (alone - alone.mean(0)).norm(dim=1).mean()
    errors = (packed - alone).norm(dim=1) / spread
    error, limit = (errors.max(), 1e-3) if strict else (errors.quantile(0.75), rounding)
    if not error <= limit:
        raise UnsupportedModel(
            f"a packed and paged trial run gives other logits than the model's own attention (relative error"
            f" {float(error):.2g}, limit {limit:g}); something besides its attention looks across tokens"
        )


# --- Running the model --------------------------------------------------------------------------------------


def _forward(module: PreTrainedModel, token_ids: Tensor, positions: Tensor, step: attention.Step) -> Tensor:
    """All logits [t, vocab] of packed tokens."""
    out = module(input_ids=token_ids[None], position_ids=positions[None], use_cache=False, tokenplane_step=step)
    logits: Tensor = out.logits[0]
    return logits


class _attention_of:
    """Run the model with another attention implementation, then with ours again."""

    def __init__(self, module: PreTrainedModel, name: str) -> None:
        self.module, self.name = module, name

    def __enter__(self) -> None:
        self.module.set_attn_implementation(self.name)

    def __exit__(self, *_: object) -> None:
        self.module.set_attn_implementation(attention.NAME)


def _short(calls: list[int]) -> str:
    shown = ", ".join(map(str, calls[:8]))
    return shown + ", ..." if len(calls) > 8 else shown
