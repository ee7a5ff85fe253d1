"""What the operator decided about the API, and the limits that follow from it once the engine is known."""

from __future__ import annotations

from dataclasses import dataclass

from tokenplane_core.backend.errors import ConfigError
from tokenplane_core.messages import EngineInfo

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
    api_key: str | None = None
    cors_allow_origins: tuple[str, ...] = ("*",)
    compute_type: str | None = None  # the x-compute-type header

    @property
    def public_name(self) -> str:
        """What the model is called in responses and in /v1/models."""
        return self.served_model_name or self.model_id

    @property
    def accepted_names(self) -> frozenset[str]:
        """What a client may call the model."""
        last_part = self.model_id.rstrip("/").rpartition("/")[2]
        return frozenset({*NAMES_OF_ANY_MODEL, self.public_name, self.model_id, last_part})


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
