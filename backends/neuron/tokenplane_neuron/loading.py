"""From a model folder to a model on the Neuron cores: which cores, shapes and artefact, and what is refused."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from tokenplane_core.backend.artefacts import artefact, cache_folder
from tokenplane_core.backend.errors import BackendError, BackendUnavailable, OutOfMemory, UnsupportedModel
from tokenplane_core.backend.records import DetectReport, Device, LoadOptions, ModelSpec

from . import __version__
from .calls import Graphs, context_buckets
from .vendor import CompiledModel, Vendor, compile_graphs, open_exported, open_graphs

log = logging.getLogger("tokenplane.neuron")

DEFAULT_SEQUENCES, MOST_SEQUENCES = 8, 128
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
NO_ROOM = ("Allocation Failure", "NRT_RESOURCE", "RESOURCE_EXHAUSTED")  # in the runtime's messages (nrt status 4)


@dataclass(frozen=True, slots=True)
class Loaded:
    compiled: CompiledModel
    graphs: Graphs
    cores: int
    dtype: str
    line_bytes: int  # of one cache line over all layers and cores


def load_model(vendor: Vendor, model: ModelSpec, options: LoadOptions, device: Device, visible: DetectReport) -> Loaded:
    """Find the graphs or compile them, and load them with the weights; raises as the `load` hook does."""
    cores, memory_bytes = _claim_cores(vendor, device, visible)
    with _clear_errors(model):
        if (Path(model.path) / "neuron_config.json").exists():
            compiled, graphs = open_exported(vendor, model)
        else:
            _require_safetensors(model)
            wish = options.max_sequences
            rows = DEFAULT_SEQUENCES if wish is None else max(1, min(wish, MOST_SEQUENCES))
            graphs = Graphs(rows, model.max_model_tokens, context_buckets(model.max_model_tokens))
            _require_room(model, graphs, cores, memory_bytes)
            compiled = open_graphs(vendor, model, _compiled_folder(vendor, model, graphs, cores))
    config = compiled.neuron_config
    dtype = str(config.torch_dtype).removeprefix("torch.")
    return Loaded(
        compiled, graphs, config.tp_degree, dtype, _line_bytes(model, graphs.line_tokens, config.tp_degree, dtype)
    )


def _claim_cores(vendor: Vendor, device: Device, visible: DetectReport) -> tuple[int, int]:
    """How many cores this process computes on, and the memory of their chips.

    What NEURON_RT_VISIBLE_CORES or NEURON_RT_NUM_CORES name, on all visible chips; else the chosen chip's, which the
    runtime is told by the same variable before it starts.
    """
    memory_bytes = sum(chip.memory_total_bytes for chip in visible.devices)
    if not {"NEURON_RT_VISIBLE_CORES", "NEURON_RT_NUM_CORES"} & os.environ.keys():
        per_chip = vendor.cores_per_device()
        first = device.index * per_chip
        os.environ["NEURON_RT_VISIBLE_CORES"] = f"{first}-{first + per_chip - 1}"
        memory_bytes = device.memory_total_bytes
    cores = vendor.available_cores()
    if cores < 1:
        raise BackendUnavailable("neuron: no core is left to this process; see NEURON_RT_VISIBLE_CORES")
    return cores, memory_bytes


def _compiled_folder(vendor: Vendor, model: ModelSpec, graphs: Graphs, cores: int) -> Path:
    """The folder with this model's graphs, compiled now if they are not there.

    They depend on all the facts below, and not on the weights, which are loaded beside them.
    """
    model_type = (model.config.get("text_config") or model.config).get("model_type", "")
    model_class = vendor.model_class(model_type, task="text-generation", mode="inference")
    config = json.dumps(model.config, sort_keys=True).encode()
    facts = {
        "model_type": model_type,
        "config_sha256": hashlib.sha256(config).hexdigest(),
        "dtype": model.dtype,
        "rows": graphs.rows,
        "line_tokens": graphs.line_tokens,
        "context_tokens": list(graphs.context_tokens),
        "cores": cores,
        "target": vendor.target(),
        "tokenplane-neuron": __version__,
        **vendor.versions,
    }

    def build(folder: Path) -> None:
        log.info("Compiling %s for %d cores: %s. This takes many minutes, once.", model.model_id, cores, graphs)
        start_s = monotonic()
        compile_graphs(vendor, model_class, model, graphs, cores, folder)
        log.info("Compiled in %.0f s", monotonic() - start_s)

    folder = artefact(cache_folder("neuron"), model_type or "model", facts, build)
    log.info("Compiled graphs are in %s", folder)
    return folder


def _require_safetensors(model: ModelSpec) -> None:
    """Refuse before compiling what could not be loaded afterwards."""
    if not any(Path(model.path).glob("*.safetensors")):
        raise UnsupportedModel(
            f"{model.model_id}: {model.path} holds no *.safetensors file; convert its weights to safetensors first"
        )


def _require_room(model: ModelSpec, graphs: Graphs, cores: int, memory_bytes: int) -> None:
    """Refuse a cache that cannot fit before spending minutes on compiling for it."""
    cache_bytes = graphs.rows * _line_bytes(model, graphs.line_tokens, cores, model.dtype)
    if cache_bytes > memory_bytes:
        raise OutOfMemory(
            f"{model.model_id}: {graphs.rows} sequences of {graphs.line_tokens} tokens need {cache_bytes / 2**30:.1f}"
            f" GiB of KV cache, and {memory_bytes / 2**30:.1f} GiB of Neuron memory are there; lower"
            " --max-total-tokens or --max-batch-size, or let NEURON_RT_VISIBLE_CORES name cores of more chips"
        )


def _line_bytes(model: ModelSpec, line_tokens: int, cores: int, dtype: str) -> int:
    """Every core has at least one KV head of its own, if need be a copy (backend/modules/attention/gqa.py)."""
    heads = max(model.num_kv_heads, cores)
    return 2 * model.num_layers * heads * model.head_dim * line_tokens * ITEM_BYTES[dtype]


@contextmanager
def _clear_errors(model: ModelSpec) -> Iterator[None]:
    """The vendor's exceptions as the contract's. An unsupported model type is a ValueError that lists the others."""
    try:
        yield
    except BackendError:
        raise
    except Exception as error:
        text = str(error).strip() or type(error).__name__
        why = f"{model.model_id}: optimum-neuron cannot compile or load it: {text.splitlines()[0]}"
        if any(sign in text for sign in NO_ROOM):
            raise OutOfMemory(
                f"{why} (no room on the Neuron cores); lower --max-total-tokens or --max-batch-size, or let"
                " NEURON_RT_VISIBLE_CORES name cores of more chips"
            ) from error
        raise UnsupportedModel(why) from error
