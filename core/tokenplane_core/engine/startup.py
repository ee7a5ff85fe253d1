"""From an EngineConfig to a loaded backend with a KV cache: estimate, load, size the cache, allocate, warm up."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace

from ..backend.errors import ConfigError, OutOfMemory, UnsupportedModel
from ..backend.plugins import Backend, open_backend
from ..backend.records import SAMPLING_FEATURES, Capabilities, Device, KVLayout, LoadOptions
from ..config import EngineConfig
from ..memory import SIMULATED, MemoryPlan, MemoryRow, format_table, measured_rows, share_of
from ..messages import EngineInfo
from ..weight_files import Weights, read_weights
from .shapes import ShapeTable

log = logging.getLogger("tokenplane.engine")


@dataclass(frozen=True)
class Started:
    backend: Backend
    capabilities: Capabilities
    layout: KVLayout
    info: EngineInfo


def start_backend(config: EngineConfig, own_process: bool = False) -> Started:
    """Load the model and allocate its cache. own_process: see LoadOptions.

    Raises:
        BackendError, ConfigError: with the sentence the user should read. The process is to end.
    """
    start_s = time.monotonic()
    plan = plan_memory(config, share_of(config.device, config.memory_fraction)) if config.device else None
    if plan is not None:
        for line in format_table(plan.rows()):
            log.info("%s", line)
        plan.refuse_the_impossible()
    backend = open_backend(config.backend)
    options = replace(_load_options(config), own_process=own_process)
    capabilities = within_share(backend.load(config.model, options), config.memory_fraction)
    if config.max_adapters and capabilities.adapters is None:
        backend.close()
        raise ConfigError(
            f"{config.backend} serves no LoRA adapters; leave --lora-adapters and --max-loras out, or merge one adapter"
            " into the weights (peft's merge_and_unload) and serve those"
        )
    if config.max_drafts and not capabilities.max_drafts:
        backend.close()
        raise ConfigError(
            f"--speculate is {config.max_drafts}, but backend {config.backend} verifies no drafts; leave --speculate"
            " out"
        )
    layout = size_cache(capabilities, config)
    backend.kv_alloc(layout)
    backend.warmup()
    plan = plan or plan_memory(config, share_of(capabilities.device, config.memory_fraction))
    memory = measured_rows(plan, capabilities, layout) if plan else []
    info = _info(config, capabilities, layout, memory, time.monotonic() - start_s)
    return Started(backend, capabilities, layout, info)


def plan_memory(config: EngineConfig, device: Device) -> MemoryPlan | None:
    """The estimate for this model on this device; None if the size of the weights cannot be known.

    Then the plugin decides: it may read files that the core does not.
    """
    weights = Weights(0, 0, "")
    if device.kind != SIMULATED:
        try:
            weights = read_weights(config.model)
        except (ConfigError, UnsupportedModel) as error:
            log.info("No estimate of the memory: %s", error)
            return None
    required_tokens = config.kv_cache_tokens or config.required_tokens or 1
    return MemoryPlan(config.model, weights, device, _load_options(config), required_tokens, config.kv_cache_tokens)


def _load_options(config: EngineConfig) -> LoadOptions:
    return LoadOptions(
        device_index=config.device_index,
        num_threads=config.num_threads,
        max_step_tokens=config.max_step_tokens,
        max_sequences=config.max_sequences,
        graph_rows=config.graph_rows,
        max_adapters=config.max_adapters,
        max_adapter_rank=config.max_adapter_rank,
        max_drafts=config.max_drafts,
    )


def within_share(capabilities: Capabilities, fraction: float) -> Capabilities:
    """The same, with no more room for the cache than weights and reserves leave of that share of the memory."""
    if fraction == 1:
        return capabilities
    taken = capabilities.weights_bytes + sum(capabilities.reserved_bytes.values())
    left = max(0, int(capabilities.device.memory_total_bytes * fraction) - taken)
    kv = replace(capabilities.kv, budget_bytes=min(capabilities.kv.budget_bytes, left))
    return replace(capabilities, kv=kv)


def size_cache(capabilities: Capabilities, config: EngineConfig) -> KVLayout:
    """How many blocks and slots to ask for: what all slots could ever need, or as much as the memory holds.

    Raises:
        ConfigError: kv_cache_tokens does not fit; names the numbers.
        OutOfMemory: not even one sequence's worth fits.
    """
    kv, limits = capabilities.kv, capabilities.limits
    for flag, value in (
        ("--max-batch-size", config.max_sequences),
        ("--max-batch-prefill-tokens", config.max_step_tokens),
        ("--max-batch-total-tokens", config.kv_cache_tokens),
    ):
        if value is not None and value < 1:
            raise ConfigError(f"{flag} is {value}; at least 1 is needed")
    num_slots = min(limits.max_sequences, config.max_sequences or limits.max_sequences)
    affordable = kv.budget_bytes // kv.block_bytes - 1  # one block, or line, is for padding
    per_sequence = -(-limits.max_model_tokens // kv.block_tokens)
    wanted = num_slots * per_sequence
    if config.kv_cache_tokens is not None:
        wanted = -(-config.kv_cache_tokens // kv.block_tokens)
        if wanted > affordable:
            raise ConfigError(
                f"--max-batch-total-tokens is {config.kv_cache_tokens}, which takes {wanted * kv.block_bytes:,} bytes;"
                f" {kv.budget_bytes:,} bytes are free for the KV cache:"
                f" lower it to {max(affordable, 0) * kv.block_tokens}"
            )
    wanted = min(wanted, affordable)
    if wanted < 1:
        raise OutOfMemory(
            f"no room for a KV cache: one block of {kv.block_tokens} tokens takes {kv.block_bytes:,} bytes,"
            f" {kv.budget_bytes:,} bytes are free; lower --max-total-tokens or use a smaller model or dtype"
        )
    if kv.kind == "slot":
        num_slots = wanted = min(num_slots, wanted)
    return KVLayout(
        num_blocks=wanted + 1,
        block_tokens=kv.block_tokens,
        num_slots=num_slots,
        max_blocks_per_sequence=per_sequence,
    )


def _info(
    config: EngineConfig, caps: Capabilities, layout: KVLayout, memory: list[MemoryRow], load_s: float
) -> EngineInfo:
    limits, sampling = caps.limits, caps.sampling
    shapes = ShapeTable(caps.shapes, limits)
    unlimited = sampling.returns_logits  # the host samples what the device cannot
    return EngineInfo(
        model_id=config.model.model_id,
        backend=caps.backend,
        backend_version=caps.version,
        device=caps.device.name,
        device_kind=caps.device.kind,
        device_notes=caps.device.notes,
        dtype=caps.dtype,
        vocab_size=config.model.vocab_size,
        max_model_tokens=limits.max_model_tokens,
        max_sequences=layout.num_slots,
        max_step_tokens=limits.max_step_tokens,
        kv_kind=caps.kv.kind,
        num_blocks=layout.num_blocks - 1,
        block_tokens=layout.block_tokens,
        block_bytes=caps.kv.block_bytes,
        weights_bytes=caps.weights_bytes,
        prefix_cache=config.prefix_cache and caps.kv.kind == "paged",
        async_depth=caps.async_depth,
        mixed=caps.mixed,
        shape_mode=caps.shapes.mode,
        sampling_features=sorted(SAMPLING_FEATURES if unlimited else sampling.features),
        max_top_logprobs=-1
        if sampling.returns_logits or sampling.max_top_logprobs is None
        else sampling.max_top_logprobs,
        kernels=dict(caps.kernels),
        load_s=load_s,
        max_request_tokens=min(limits.max_model_tokens, (layout.num_blocks - 1) * layout.block_tokens),
        max_prompt_tokens=shapes.longest_prompt(limits.chunk_tokens > 0, limits.max_model_tokens),
        memory=memory,
        prompt_logprobs=caps.prompt_logprobs,
        prompt_top_logprobs=caps.prompt_top_logprobs,
        max_adapters=caps.adapters.max_adapters if caps.adapters else 0,
        max_adapter_rank=caps.adapters.max_rank if caps.adapters else 0,
        max_drafts=caps.max_drafts,
    )
