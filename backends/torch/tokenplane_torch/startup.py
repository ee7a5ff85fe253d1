"""What `load` does once a device is open: load, check, measure."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from tokenplane_core.backend.errors import OutOfMemory
from tokenplane_core.backend.records import (
    PAD_BLOCK,
    AdapterLimits,
    Bucket,
    KVLayout,
    KVSpec,
    Limits,
    LoadOptions,
    ModelSpec,
    SamplingBatch,
    ShapePolicy,
)
from tokenplane_core.memory import workspace_bytes

from .device import TorchDevice
from .failures import as_out_of_memory, first_line, is_out_of_memory
from .loader import load_model
from .lora import LoraLayers
from .runner import ModelRunner, Runner, checked_runner
from .sampler import neutral_batch
from .slots import SlotState


@dataclass(frozen=True, slots=True)
class Loaded:
    """A loaded model and the facts about it that go into its Capabilities."""

    runner: Runner
    limits: Limits
    kv: KVSpec
    shapes: ShapePolicy
    weights_bytes: int
    reserved_bytes: Mapping[str, int]
    kernels: Mapping[str, str]
    adapters: LoraLayers | None


def load_runner(model: ModelSpec, device: TorchDevice, options: LoadOptions) -> Loaded:
    """Load and check the model, and measure what its steps need besides weights and cache.

    Raises:
        UnsupportedModel, OutOfMemory: nothing stays loaded.
    """
    sequences = _wish(options.max_sequences, device.default_sequences, device.most_sequences)
    step_tokens = _wish(options.max_step_tokens, device.default_step_tokens, device.most_step_tokens)
    policy = device.shapes(sequences, step_tokens, model.max_model_tokens)
    if policy.mode == "hard":  # no more than the largest buckets hold
        sequences = min(sequences, max(b.rows for b in policy.buckets if b.phase == "decode"))
        step_tokens = max(b.tokens for b in policy.buckets)
    if policy.mode == "soft" and options.graph_rows is not None:
        rows = [rows for rows in options.graph_rows if rows <= sequences]
        policy = replace(policy, buckets=tuple(Bucket("decode", n, n) for n in rows)) if rows else ShapePolicy()
    module = load_model(model, device)
    adapters: LoraLayers | None = None
    if options.max_adapters and device.serves_adapters:
        # Adapters reach the modules of transformers: a device's own way to run the model would pass them by.
        runner: Runner = (checked := checked_runner(module, model, device, policy, step_tokens))
        limits = AdapterLimits(options.max_adapters, options.max_adapter_rank)
        with as_out_of_memory(f"no memory left for {limits.max_adapters} adapters of rank {limits.max_rank}"):
            adapters = checked.module.adapters = LoraLayers(module, limits)
    else:
        runner = device.runner(module, model, policy, step_tokens)
    del module
    kernels = dict(runner.describe())
    draws = sequences + options.max_drafts
    graph_bytes, workspace = 0, runner.workspace_bytes(draws)
    gc.collect()  # what loading left behind would count as taken
    if isinstance(runner, ModelRunner):
        if policy.mode == "soft":
            kernels["graphs"], graph_bytes = _try_capture(runner)
            policy = runner.policy
        workspace = _measured_workspace(runner, step_tokens, sequences, draws)
    if workspace is None:
        workspace = workspace_bytes(model, step_tokens, draws)
    reserved = {
        "slots": SlotState.size_bytes(sequences, model.max_model_tokens, device.block_tokens),
        "workspace": workspace,
        "graphs": graph_bytes,
        "headroom": device.headroom_bytes(),
    }
    held = adapters.num_bytes if adapters is not None else 0  # taken already, so not of what is free
    return Loaded(
        runner=runner,
        limits=Limits(
            max_sequences=sequences,
            max_step_tokens=step_tokens,
            max_model_tokens=model.max_model_tokens,
            max_prefill_rows=min(sequences, device.max_prefill_rows or sequences),
            max_table_entries=device.max_table_entries,
        ),
        kv=KVSpec(
            kind="paged",
            block_tokens=device.block_tokens,
            block_bytes=runner.block_bytes(),
            budget_bytes=max(0, device.free_bytes() - sum(reserved.values())),
        ),
        shapes=policy,
        weights_bytes=runner.weights_bytes(),
        reserved_bytes={piece: size for piece, size in {**reserved, "adapters": held}.items() if size},
        adapters=adapters,
        kernels=kernels,
    )


GRAPH_BYTES = 16 << 20
"""What one more captured graph takes besides the memory that all share; an estimate, on the generous side."""


def _try_capture(runner: ModelRunner) -> tuple[str, int]:
    """Capture the largest bucket over a cache of one block: a line for the kernels' list, and the bytes all will take.

    A model may do what cannot be captured (read a value on the host, say). It then runs without buckets, and that is
    known before anything is served.
    """
    device, buckets = runner.device, runner.policy.buckets
    largest = max(buckets, key=lambda bucket: bucket.rows)
    try:
        blocks = -(-runner.max_model_tokens // device.block_tokens)
        runner.allocate(KVLayout(PAD_BLOCK + 1, device.block_tokens, largest.rows, blocks))
        device.peak_bytes()  # what torch keeps from loading would hide, and slots be counted twice
        before = device.taken_bytes()
        for adapted in runner.variants:
            runner.warm(largest, adapted)
        after = device.taken_bytes()
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemory(f"no memory left to capture a decode step: {first_line(error)}") from error
        runner.policy = ShapePolicy()
        return f"none, this model cannot be captured: {first_line(error)}", 0
    finally:
        runner.drop_cache()
    taken = GRAPH_BYTES * (len(buckets) - 1) * len(runner.variants) + max(0, (after or 0) - (before or 0))
    return f"decode, {len(buckets)} batch sizes up to {largest.rows}", taken


def _measured_workspace(runner: ModelRunner, step_tokens: int, sequences: int, draws: int) -> int | None:
    """Memory that the largest step, or the most draws, take while they run; None where nobody counts.

    Its rows all write into the padding block: what is computed means nothing, how much memory it takes does.

    Raises:
        OutOfMemory: there is not so much.
    """
    if runner.device.peak_bytes() is None:
        return None
    what = f"no memory left for a step of {step_tokens} tokens of {sequences} sequences"
    with as_out_of_memory(what, "; lower --max-batch-prefill-tokens or --max-batch-size"):
        return _peak_bytes(runner, step_tokens, sequences, draws)


@torch.inference_mode()
def _peak_bytes(runner: ModelRunner, step_tokens: int, sequences: int, draws: int) -> int:
    device, longest = runner.device, runner.max_model_tokens
    layers = device.allocate(runner.layer_shapes, PAD_BLOCK + 1)
    for layer in layers:
        layer.key.zero_(), layer.value.zero_()
    tokens = min(step_tokens, sequences * longest)
    rows = [longest] * (tokens // longest) + [tokens % longest] * (tokens % longest > 0)
    device.peak_bytes()
    logits = runner.try_step(layers, rows, context=0)
    step_bytes = device.peak_bytes() or 0
    # All ids equally likely: then filters look at every one of them, and take most memory.
    flat = logits.new_zeros((draws, logits.shape[1]))
    runner.sampler.draw(flat, np.arange(draws), _demanding(draws), None)
    return max(step_bytes, device.peak_bytes() or 0)


def _demanding(rows: int) -> SamplingBatch:
    """Parameters that take a sampler's memory: draws filtered in every way but the fused kernel's, with logprobs."""
    return replace(
        neutral_batch(rows),
        features=frozenset({"temperature", "top_p", "typical_p", "logprobs"}),
        temperature=np.ones(rows, np.float32),
        top_p=np.full(rows, 0.9, np.float32),
        typical_p=np.full(rows, 0.9, np.float32),
        num_logprobs=np.full(rows, 5, np.int32),
    )


def _wish(wish: int | None, default: int, most: int) -> int:
    """What a plugin offers for a user's wish: at least 1, at most what the device is good for."""
    return default if wish is None else max(1, min(wish, most))
