"""Where a device's memory goes: estimated from config.json and file headers before loading, measured after.

An estimate has two uses. Shown, it says what to expect. As a reason to refuse, only what no backend can do without
counts (`MemoryPlan.least_bytes`): it must never turn away what would in truth run. Knows no framework, no file and no
plugin; where the core cannot know a device's habits it says so in the row.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from .backend.errors import ConfigError, OutOfMemory
from .backend.records import Capabilities, Device, KVLayout, LoadOptions, ModelSpec
from .weight_files import DTYPE_BYTES, Weights

USEFUL_TOKENS = 64  # a shorter --max-total-tokens is no advice

SIMULATED = "simulated"
"""Device kind of the devices that only exist for tests."""

QUANTIZED_BYTES = {"int8": 1.0, "int4": 0.5 + 2 / 32}
"""Of one weight, with its share of scales: int4 in groups of 32. Backends may differ a little."""

ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")

# Per layer and captured decode graph. vLLM logs 0.21 GiB for 35 graphs of Llama 3.2 1B, which has 16 layers.
GRAPH_LAYER_BYTES = 384 << 10


KV_SCALE_BYTES = 4
"""Of a quantized KV cache, for the key and for the value of each token and head."""


class MemoryRow(msgspec.Struct, frozen=True):
    """One line of the table. None: not known, or not yet. `KV per token` says a rate; the other rows add up."""

    piece: str
    estimated_bytes: int | None
    measured_bytes: int | None
    why: str


# --- What a model needs -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class KVToken:
    """What one token takes in the cache, over all layers."""

    num_bytes: int
    least_bytes: int  # by the most thrifty way to cache that is known
    why: str


def kv_token(model: ModelSpec, shards: int = 1) -> KVToken:
    """Keys and values of one token, `shards` > 1: on each of that many devices.

    A sliding window saves nothing: blocks belong to all layers at once, so every layer keeps every token. Heads that
    do not divide by the devices are kept on several of them.
    """
    config, itemsize = _text(model), 1 if model.kv_dtype else DTYPE_BYTES[model.dtype]
    scale_bytes = KV_SCALE_BYTES if model.kv_dtype else 0
    layers = [_kv_shape(config, model, layer) for layer in range(model.num_layers) if _attends(config, layer)]
    shapes = sorted({(heads, *dims) for heads, *dims in layers})
    num_bytes = sum(-(-heads // shards) * (itemsize * (key + value) + 2 * scale_bytes) for heads, key, value in layers)
    least_bytes, notes = num_bytes, []
    if latent := config.get("kv_lora_rank"):
        least_bytes = min(num_bytes, itemsize * len(layers) * (latent + config.get("qk_rope_head_dim", 0)))
        notes.append(f"MLA as full heads; a backend that keeps latents needs {format_bytes(least_bytes)}")
    if shared := config.get("num_kv_shared_layers"):
        least_bytes = least_bytes * (len(layers) - shared) // len(layers)
        notes.append(f"{shared} layers may share theirs")
    if other := model.num_layers - len(layers):
        notes.append(f"{other} layers keep a state of another kind, known after loading")
    if config.get("sliding_window"):
        notes.append("windows save nothing")
    heads = " or ".join(f"{h} KV heads of {k if k == v else f'{k} + {v}'}" for h, k, v in shapes)
    why = "; ".join([f"{len(layers)} layers, {heads or 'no KV heads'}, {model.kv_dtype or model.dtype}", *notes])
    return KVToken(num_bytes, least_bytes, why)


def _kv_shape(config: Mapping[str, Any], model: ModelSpec, layer: int) -> tuple[int, int, int]:
    """KV heads, key and value size of a layer; both may differ from layer to layer."""
    if "kv_lora_rank" in config:  # DeepSeek's MLA, as its heads see it
        key = config.get("qk_nope_head_dim", 0) + config.get("qk_rope_head_dim", 0)
        return model.num_heads, key or model.head_dim, config.get("v_head_dim") or model.head_dim
    heads, dim = model.num_kv_heads, model.head_dim
    for name in ("num_key_value_heads", "num_key_value_heads_per_layer", "num_kv_heads"):
        given = config.get(name)
        if isinstance(given, list) and len(given) == model.num_layers:
            heads = given[layer]
    if "global_head_dim" in config and _layer_type(config, layer) == "full_attention":  # Gemma 4
        dim = config["global_head_dim"]
        heads = (config.get("attention_k_eq_v") and config.get("num_global_key_value_heads")) or heads
    return heads, dim, dim


def workspace_bytes(model: ModelSpec, step_tokens: int, rows: int, shards: int = 1) -> int:
    """Activations of a step at their peak: tokens x width + sampled rows x vocabulary.

    A token holds its residual twice (one normalised, in float32 on the way), and either the queries, keys, values and
    output of attention or the three inner activations of a gated feed-forward layer, times its experts in a mixture.
    A sampled row holds its logits as computed and twice in float32: as they are, and as a distribution.
    """
    config, itemsize = _text(model), DTYPE_BYTES[model.dtype]
    hidden = _number(config, "hidden_size", "n_embd", "d_model") or model.num_heads * model.head_dim
    experts = _number(config, "num_experts_per_tok", "num_experts_per_token", "moe_topk") or 0
    dense = _number(config, "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size") or 4 * hidden
    expert = _number(config, "moe_intermediate_size") or dense
    inner = max(3 * max(dense, experts * expert), 2 * (model.num_heads + model.num_kv_heads) * model.head_dim)
    token_bytes = hidden * (2 * itemsize + 4) + -(-inner // shards) * itemsize
    return step_tokens * token_bytes + rows * model.vocab_size * (itemsize + 8)


def loaded_bytes(model: ModelSpec, weights: Weights) -> int:
    """The weights once they are loaded: of a quantized model all but the embedding, which is looked up, not multiplied.

    An output layer that shares its weights with the embedding is quantized beside it, and to no less than int8.
    """
    if model.quantize is None:
        return weights.bytes_as(model.dtype)
    config = _text(model)
    hidden = _number(config, "hidden_size", "n_embd", "d_model") or model.num_heads * model.head_dim
    embedding = min(model.vocab_size * hidden, weights.num_floats)
    tied = bool(config.get("tie_word_embeddings"))
    head = embedding if tied or 2 * embedding <= weights.num_floats else 0
    layers = weights.num_floats - embedding - (0 if tied else head)
    kept = embedding * DTYPE_BYTES[model.dtype] + weights.other_bytes
    return kept + head + int(layers * QUANTIZED_BYTES[model.quantize])


def adapter_bytes(model: ModelSpec, rank: int) -> int:
    """Room for one LoRA adapter of that rank beside every linear layer of a dense block: as wide as what goes into the
    layer and what comes out of it.
    """
    config = _text(model)
    hidden = _number(config, "hidden_size", "n_embd", "d_model") or model.num_heads * model.head_dim
    inner = _number(config, "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size") or 4 * hidden
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    attention = 2 * (hidden + queries) + 2 * (hidden + keys)
    return model.num_layers * (attention + 3 * (hidden + inner)) * rank * DTYPE_BYTES[model.dtype]


def shard_problem(model: ModelSpec, shards: int) -> str | None:
    """Why the attention of this model cannot be split over so many devices, if it cannot."""
    if model.num_heads % shards:
        return f"its {model.num_heads} attention heads do not divide by {shards}"
    if model.num_kv_heads % shards and shards % model.num_kv_heads:
        return f"its {model.num_kv_heads} KV heads neither divide by {shards} nor the other way round"
    return None


# --- The plan -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """A model on a device. `dataclasses.replace` answers what-ifs.

    required_tokens: the sequence, or cache, without which there is no point in starting. shards: over how many
    devices the model is split; every number is then that of one device.
    """

    model: ModelSpec
    weights: Weights
    device: Device
    options: LoadOptions
    required_tokens: int
    cache_tokens_wish: int | None = None
    shards: int = 1

    @property
    def free_bytes(self) -> int:
        """What the device has for us; 0 if it does not say."""
        free = self.device.memory_free_bytes
        return self.device.memory_total_bytes if free is None else free

    @property
    def step_tokens(self) -> int:
        most = self.options.max_step_tokens or self.device.offer.max_step_tokens
        return min(most, self.sequences * self.model.max_model_tokens)

    @property
    def sequences(self) -> int:
        return self.options.max_sequences or self.device.offer.max_sequences

    @property
    def kv(self) -> KVToken:
        if self.device.kind == SIMULATED:
            return KVToken(4, 4, "a simulated device caches token ids")
        return kv_token(self.model, self.shards)

    @property
    def weights_bytes(self) -> int:
        if self.device.kind == SIMULATED:
            return 0
        return -(-loaded_bytes(self.model, self.weights) // self.shards)

    @property
    def fixed_bytes(self) -> int:
        """Everything but the cache."""
        return sum(row.estimated_bytes or 0 for row in self._fixed_rows())

    @property
    def cache_capacity_tokens(self) -> int:
        """KV tokens that fit beside the rest."""
        return max(0, self.free_bytes - self.fixed_bytes) // max(1, self.kv.num_bytes)

    @property
    def cache_tokens(self) -> int:
        """KV tokens that will be asked for: those of all slots, as far as they fit, and never less than required."""
        wanted = self.cache_tokens_wish or self.sequences * self.model.max_model_tokens
        affordable = min(wanted, self.cache_capacity_tokens) if self.free_bytes else wanted
        return max(affordable, self.required_tokens)

    @property
    def fits(self) -> bool:
        return self.cache_capacity_tokens >= self.required_tokens

    @property
    def least_bytes(self) -> int:
        """What no backend can do without: the weights, and the required tokens in the cache."""
        return self.weights_bytes + self.required_tokens * self.kv.least_bytes

    def refuse_the_impossible(self) -> None:
        """Raises OutOfMemory, with the numbers and what to change, if not even `least_bytes` are free."""
        if self.free_bytes and self.least_bytes > self.free_bytes:
            cache = format_bytes(self.required_tokens * self.kv.least_bytes)
            raise OutOfMemory(
                f"{self.model.model_id} does not fit: its weights take {format_bytes(self.weights_bytes)} as"
                f" {self.model.dtype} and a KV cache of {self.required_tokens} tokens {cache}, together"
                f" {format_bytes(self.least_bytes)} (estimated, without activations); {self.device.name} has"
                f" {format_bytes(self.free_bytes)} free. Try {self.way_out()}"
            )

    def way_out(self) -> str:
        """What to change, each with a value computed to fit."""
        ways = [self._shorter()]
        small_steps = replace(self.options, max_step_tokens=256, max_sequences=8)
        if not any(ways) and self.step_tokens > 256:
            small = replace(self, options=small_steps)
            ways.append(small._shorter("--max-batch-prefill-tokens 256 --max-batch-size 8 "))
        if self.model.dtype == "float32" and (half := next((d for d in self.device.dtypes if d != "float32"), None)):
            halved = replace(self, model=replace(self.model, dtype=half))
            ways.append(f"--dtype {half}" if halved.fits else halved._shorter(f"--dtype {half} "))
        found = [way for way in ways if way]
        needed = format_bytes(self.fixed_bytes + self.required_tokens * self.kv.num_bytes)
        return " or ".join([*found, f"a smaller or quantized model, or a device with {needed} free"])

    @property
    def longest_tokens(self) -> int:
        """The longest sequence, or cache, up to the required one that fits; 0 if it is too short to be of use."""
        tokens = min(self.cache_capacity_tokens, self.required_tokens)
        tokens -= tokens % 256 if 256 < tokens < self.required_tokens else 0
        return tokens if tokens >= min(USEFUL_TOKENS, self.required_tokens) else 0

    def _shorter(self, flags: str = "") -> str:
        """The flags with the most tokens that then fit; "" if that is nothing worth having."""
        flag = "--max-total-tokens" if self.cache_tokens_wish is None else "--max-batch-total-tokens"
        return f"{flags}{flag} {self.longest_tokens}" if self.longest_tokens else ""

    def rows(self) -> list[MemoryRow]:
        """The table before loading."""
        kv, cache_tokens = self.kv, self.cache_tokens
        cache_bytes = cache_tokens * kv.num_bytes
        length = self.model.max_model_tokens
        share = f"{cache_tokens:,} tokens: {cache_tokens / length:,.1f} sequences of {length:,}"
        slack = self.free_bytes - self.fixed_bytes - cache_bytes
        return [
            *self._fixed_rows(),
            MemoryRow("KV per token", kv.num_bytes, None, kv.why),
            MemoryRow("KV cache", cache_bytes, None, share),
            MemoryRow("slack", slack if self.free_bytes else None, None, f"of {format_bytes(self.free_bytes)} free"),
        ]

    def _fixed_rows(self) -> Iterator[MemoryRow]:
        model, offer = self.model, self.device.offer
        if self.device.kind == SIMULATED:
            yield MemoryRow("weights", 0, None, "a simulated device keeps none")
            return
        split = f", split over {self.shards}" if self.shards > 1 else ""
        stored = f"{model.quantize}, quantized from {model.dtype}" if model.quantize else model.dtype
        yield MemoryRow("weights", self.weights_bytes, None, f"{stored}{split}, from {self.weights.source}")
        rows = self.sequences + self.options.max_drafts
        workspace = workspace_bytes(model, self.step_tokens, rows, self.shards)
        why = f"activations of {self.step_tokens:,} tokens, logits of {rows} rows x {model.vocab_size:,}"
        yield MemoryRow("workspace", workspace, None, why)
        yield _graphs_row(model, offer.decode_graphs, self.sequences)
        if self.options.max_adapters:
            count, rank = self.options.max_adapters, self.options.max_adapter_rank
            size = count * adapter_bytes(model, rank)
            yield MemoryRow("adapters", size, None, f"{count} of rank {rank}, beside every linear layer")
        why = "kept free: the driver's context, libraries, the allocator's slack"
        yield MemoryRow("headroom", offer.headroom_bytes, None, why)


def _graphs_row(model: ModelSpec, most: int | None, sequences: int) -> MemoryRow:
    if most is None:
        return MemoryRow("graphs", None, None, "compiled programs: known after warm-up")
    if most == 0:
        return MemoryRow("graphs", 0, None, "nothing is captured on this device")
    count = min(most, sequences)
    why = f"{count} decode graphs of {model.num_layers} layers"
    return MemoryRow("graphs", count * model.num_layers * GRAPH_LAYER_BYTES, None, why)


def share_of(device: Device, fraction: float) -> Device:
    """The device as a server sees it that may take this share of its memory.

    Raises:
        ConfigError: it does not say how much memory it has.
    """
    if fraction == 1:
        return device
    if not device.memory_total_bytes:
        raise ConfigError(
            f"--cuda-memory-fraction is {fraction}, but {device.name} does not say how much memory it has;"
            " bound the KV cache with --max-batch-total-tokens"
        )
    share = int(device.memory_total_bytes * fraction)
    free = device.memory_free_bytes
    return replace(device, memory_free_bytes=share if free is None else min(free, share))


def measured_rows(plan: MemoryPlan, capabilities: Capabilities, layout: KVLayout) -> list[MemoryRow]:
    """The table after loading: the plan's rows with what was measured, and the pieces only the plugin knows."""
    kv, reserved = capabilities.kv, dict(capabilities.reserved_bytes)
    cache_bytes = layout.num_blocks * kv.block_bytes
    tokens = (layout.num_blocks - 1) * layout.block_tokens
    measured: dict[str, int] = {
        **reserved,
        "weights": capabilities.weights_bytes,
        "KV per token": -(-kv.block_bytes // kv.block_tokens),
        "KV cache": cache_bytes,
        "slack": kv.budget_bytes - cache_bytes,
    }
    rows = plan.rows()
    known = {row.piece for row in rows}
    extra = [MemoryRow(piece, None, size, "set aside by the backend") for piece, size in reserved.items()]
    rows[-3:-3] = [row for row in extra if row.piece not in known]
    shares = {"KV cache": f"{tokens:,} tokens in {layout.num_blocks - 1} blocks of {layout.block_tokens}"}
    return [
        msgspec.structs.replace(row, measured_bytes=measured.get(row.piece), why=shares.get(row.piece, row.why))
        for row in rows
    ]


# --- For people ---------------------------------------------------------------------------------------------


def format_table(rows: Iterable[MemoryRow], width: int = 100) -> list[str]:
    """The rows as lines of at most `width` columns; the measured column only where something was measured."""
    rows = list(rows)
    is_measured = any(row.measured_bytes is not None for row in rows)
    cells = [["MEMORY", "ESTIMATED", "MEASURED", "WHY"]]
    for row in rows:
        sizes = ("-" if size is None else format_bytes(size) for size in (row.estimated_bytes, row.measured_bytes))
        cells.append([row.piece, *sizes, row.why])
    if not is_measured:
        cells = [[piece, estimated, why] for piece, estimated, _, why in cells]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]) - 1)]
    indent = sum(widths) + 2 * len(widths)
    lines = []
    for piece, *columns, why in cells:
        aligned = [piece.ljust(widths[0]), *(c.rjust(w) for c, w in zip(columns, widths[1:], strict=True))]
        first, *more = textwrap.wrap(why, width - indent, break_on_hyphens=False) or [""]
        lines += ["  ".join([*aligned, first]).rstrip(), *(" " * indent + part for part in more)]
    return lines


def format_bytes(num_bytes: int) -> str:
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if abs(num_bytes) >= scale:
            return f"{num_bytes / scale:.2f} {unit}"
    return f"{num_bytes} B"


def _text(model: ModelSpec) -> Mapping[str, Any]:
    config: Mapping[str, Any] = model.config.get("text_config") or model.config
    return config


def _number(config: Mapping[str, Any], *names: str) -> int | None:
    found = (config.get(name) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), None)


def _layer_type(config: Mapping[str, Any], layer: int) -> str | None:
    types = config.get("layer_types")
    return types[layer] if isinstance(types, list) and layer < len(types) else None


def _attends(config: Mapping[str, Any], layer: int) -> bool:
    return _layer_type(config, layer) in (None, *ATTENTION)
