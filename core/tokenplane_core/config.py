"""Everything the engine process is told at start, in one frozen record that travels as msgpack."""

from __future__ import annotations

import msgspec

from .backend.records import Device, ModelSpec


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """None means: let the backend's capabilities and the memory decide."""

    model: ModelSpec
    backend: str  # entry-point name, already chosen
    device_index: int = 0  # already chosen
    device: Device | None = None  # as detect found it; None: no estimate before loading
    memory_fraction: float = 1.0  # of the device's memory; the server takes at most so much
    graph_rows: tuple[int, ...] | None = None  # LoadOptions.graph_rows
    num_threads: int | None = None
    max_step_tokens: int | None = None
    max_sequences: int | None = None
    kv_cache_tokens: int | None = None
    required_tokens: int | None = None  # one sequence of this length must fit; None: any that does will do
    prefix_cache: bool = True
    adapters: dict[str, str] = {}  # LoRA adapters to begin with: name -> folder; the client loads them
    max_adapters: int = 0  # LoadOptions.max_adapters
    max_adapter_rank: int = 0
    max_drafts: int = 0  # LoadOptions.max_drafts; 0: no speculation
    ageing_s: float = 10.0  # waiting this long is worth one priority level
    ready_timeout_s: float = 600.0  # from process start to the first Ready
    hang_timeout_s: float = 300.0  # silence after which a running engine counts as hung
    json_log: bool = False  # the engine's log lines as JSON
