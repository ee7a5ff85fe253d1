"""What the operator decided about engine and API, and the limits that follow from it once the engine is known."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenplane_core.backend.errors import ConfigError
from tokenplane_core.messages import EngineInfo

from .adapters import AdapterSource

NAMES_OF_ANY_MODEL = ("tgi", "dummy")
"""What clients of TGI call whatever is served; "dummy" is what Hugging Face's InferenceClient sends for no name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Defaults are TGI's. None: computed from what the engine turns out to be."""

    model_id: str
    model_sha: str | None = None  # commit of a model from the hub
    served_model_name: str | None = None
    max_concurrent_requests: int = 128
    max_best_of: int = 2
    max_stop_sequences: int = 4
    max_top_n_tokens: int = 5
    max_client_batch_size: int = 4
    max_input_tokens: int | None = None
    max_total_tokens: int | None = None
    payload_limit_bytes: int = 2_000_000
    validation_workers: int = 2
    disable_grammar_support: bool = False
    api_key: str | None = None
    api_key_file: Path | None = None
    max_requests_per_key: int | None = None  # sequences running or waiting
    request_timeout_s: float | None = None  # from arrival to the end of the answer
    queue_timeout_s: float | None = None
    header_timeout_s: float = 10.0  # for a client to send them
    body_timeout_s: float = 60.0
    max_header_bytes: int = 32_768
    slow_reader_timeout_s: float = 30.0  # without taking anything of a stream
    otlp_endpoint: str | None = None  # where traces go
    otlp_service_name: str = "text-generation-inference.router"
    cors_allow_origins: tuple[str, ...] = ("*",)
    compute_type: str | None = None  # the x-compute-type header
    vertex_predict_route: str | None = None  # also takes what /vertex takes; Vertex AI's AIP_PREDICT_ROUTE
    vertex_health_route: str | None = None  # also answers as /health; AIP_HEALTH_ROUTE
    tool_call_parser: str = "auto"  # how the model writes calls: a name of text/tool_calls.py
    reasoning_parser: str = "auto"  # how it marks its thoughts: a name of text/reasoning.py, or "none"
    allow_runtime_lora: bool = False  # clients may have adapters loaded from folders of this machine

    @property
    def public_name(self) -> str:
        """What the model is called in responses and in /v1/models."""
        return self.served_model_name or self.model_id

    @property
    def accepted_names(self) -> frozenset[str]:
        """What a client may call the model."""
        last_part = self.model_id.rstrip("/").rpartition("/")[2]
        return frozenset({*NAMES_OF_ANY_MODEL, self.public_name, self.model_id, last_part})


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """What the operator decided about model, engine and port; Settings is the API's part. None: decided later."""

    model_id: str
    revision: str | None = None
    dtype: str | None = None
    quantize: str | None = None  # how the checkpoint is stored, or is quantized while it loads
    kv_cache_dtype: str | None = None
    trust_remote_code: bool = False
    tokenizer_config_path: Path | None = None
    hub_cache: Path | None = None
    backend: str | None = None
    device_index: int | None = None  # None: the best that is ok
    memory_fraction: float = 1.0  # of the device's memory, at most this much is taken
    graph_rows: tuple[int, ...] | None = None  # batch sizes whose decode step is captured
    num_threads: int | None = None
    max_step_tokens: int | None = None
    max_sequences: int | None = None
    kv_cache_tokens: int | None = None
    prefix_cache: bool = True
    max_drafts: int = 0  # guessed tokens that a step verifies for a sequence
    lora_adapters: tuple[AdapterSource, ...] = ()
    max_loras: int | None = None  # adapters held at once
    max_lora_rank: int | None = None
    ready_timeout_s: int = 600
    hostname: str = "0.0.0.0"
    port: int = 3000
    grace_s: int = 90
    json_output: bool = False  # log lines as JSON


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a request may be, in tokens; input plus output is the total."""

    max_input_tokens: int
    max_total_tokens: int


def limits_for(settings: Settings, info: EngineInfo) -> Limits:
    """Combine what the operator asked for with what the engine can do.

    Raises:
        ConfigError: they contradict each other; names flag, value and limit.
    """
    most = min(info.max_model_tokens, info.max_request_tokens)
    total = settings.max_total_tokens or most
    if total > most:
        why = "the KV cache holds" if most == info.max_request_tokens else "the model allows"
        raise ConfigError(
            f"--max-total-tokens is {total}, but {why} {most} tokens for one request; lower it to {most} or less"
        )
    longest = min(total - 1, info.max_prompt_tokens)
    given = settings.max_input_tokens or longest
    if given >= total:
        raise ConfigError(
            f"--max-input-tokens is {given}, but --max-total-tokens is {total}; it must be less, to leave room"
        )
    if given > longest:
        raise ConfigError(
            f"--max-input-tokens is {given}, but the device takes prompts of at most {longest} tokens; lower it"
        )
    return Limits(given, total)
