"""What the server says about itself once it serves: device, kernels, memory, and each limit with how it came about."""

from __future__ import annotations

from collections.abc import Iterator

from tokenplane_core.memory import format_table
from tokenplane_core.messages import EngineInfo

from .adapters import LEAST_RANK
from .flags import BY_NAME
from .settings import Limits, ServeOptions, Settings


def banner(info: EngineInfo, options: ServeOptions, settings: Settings, limits: Limits) -> list[str]:
    """The lines, without the last one, which has the address."""
    notes = f"; {info.device_notes}" if info.device_notes else ""
    cache_mib = info.num_blocks * info.block_bytes / 2**20
    return [
        f"Device: {info.device} ({info.backend} {info.backend_version}), {info.dtype}{notes}",
        *_kernels(info, options),
        f"Weights: {info.weights_bytes / 2**20:.1f} MiB, loaded in {info.load_s:.1f} s",
        f"KV cache: {_cache_tokens(info)} tokens, {cache_mib:.1f} MiB, {info.num_blocks} blocks of {info.block_tokens}",
        *format_table(info.memory),
        *_limits_table(info, options, settings, limits),
        *_lines_of_tgi(info, options),
    ]


def _kernels(info: EngineInfo, options: ServeOptions) -> list[str]:
    kernels = dict(info.kernels) or {"all": "the backend names none"}
    if options.graph_rows is not None:
        kernels.setdefault("graphs", "none; this backend, or --cuda-graphs, captures no decode step")
    width = max(map(len, kernels))
    return ["Kernels:", *(f"  {piece.ljust(width)}  {choice}" for piece, choice in kernels.items())]


def _cache_tokens(info: EngineInfo) -> int:
    return info.num_blocks * info.block_tokens


def _limits_table(info: EngineInfo, options: ServeOptions, settings: Settings, limits: Limits) -> list[str]:
    rows = [("LIMIT", "VALUE", "WHY"), *_limits(info, options, settings, limits)]
    name_width = max(len(name) for name, _, _ in rows)
    value_width = max(len(value) for _, value, _ in rows)
    return [f"{name.ljust(name_width)}  {value.rjust(value_width)}  {why}" for name, value, why in rows]


def _limits(
    info: EngineInfo, options: ServeOptions, settings: Settings, limits: Limits
) -> Iterator[tuple[str, str, str]]:
    total, longest = limits.max_total_tokens, limits.max_input_tokens
    given = "as given"
    yield "--max-total-tokens", str(total), given if settings.max_total_tokens else _why_total(info, total)
    why = f"all but one of {total}" if longest == total - 1 else "the longest prompt the device takes"
    yield "--max-input-tokens", str(longest), given if settings.max_input_tokens else why
    yield (
        "--max-batch-prefill-tokens",
        str(info.max_step_tokens),
        _why_offered(options.max_step_tokens, info.max_step_tokens),
    )
    yield "--max-batch-size", str(info.max_sequences), _why_offered(options.max_sequences, info.max_sequences)
    yield "--max-batch-total-tokens", str(_cache_tokens(info)), _why_cache(info, options)
    if info.max_adapters:
        named = f"{len(options.lora_adapters)} named at the start"
        yield "--max-loras", str(info.max_adapters), given if options.max_loras else named
        why = given if options.max_lora_rank else f"the largest of them, {LEAST_RANK} at least"
        yield "--max-lora-rank", str(info.max_adapter_rank), why
    if info.max_drafts:
        yield "--speculate", str(info.max_drafts), _why_offered(options.max_drafts, info.max_drafts)
    most = settings.max_concurrent_requests
    yield (
        "--max-concurrent-requests",
        str(most),
        given if most != BY_NAME["max-concurrent-requests"].default else "default",
    )


def _why_total(info: EngineInfo, total: int) -> str:
    if total < info.max_model_tokens:
        return f"all that the KV cache holds; the model allows {info.max_model_tokens}"
    return "as long as the model was trained for"


def _why_offered(wish: int | None, value: int) -> str:
    if wish is None:
        return "the backend's choice"
    return "as given" if wish == value else f"{wish} was given; it is what the device does"


def _why_cache(info: EngineInfo, options: ServeOptions) -> str:
    if options.kv_cache_tokens is not None:
        return f"{options.kv_cache_tokens} was given, in blocks of {info.block_tokens}"
    full = info.max_sequences * -(-info.max_model_tokens // info.block_tokens)
    if info.num_blocks >= full:
        return f"{info.max_sequences} sequences of {info.max_model_tokens}"
    share = "" if options.memory_fraction == 1 else f" of the share of {options.memory_fraction}"
    return f"all the memory that is left{share}"


def _lines_of_tgi(info: EngineInfo, options: ServeOptions) -> Iterator[str]:
    """What scripts look for in TGI's log, word by word. `Connected` comes when requests are answered, as in TGI."""
    attention = info.kernels.get("attention", "the backend's kernels").split(" (")[0]
    yield f"Using attention {attention} - Prefix caching {str(info.prefix_cache).lower()}"
    if options.max_step_tokens is None:
        yield f"Default `max_batch_prefill_tokens` to {info.max_step_tokens}"
    yield f"Setting max batch total tokens to {_cache_tokens(info)}"
    yield "Connected"
