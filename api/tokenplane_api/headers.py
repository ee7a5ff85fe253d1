"""TGI's response headers: what an answer cost, in time and tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tokenplane_core.messages import EngineInfo

from .generation import Generation


def compute_type(info: EngineInfo, override: str | None) -> str:
    """`1-<device>` in header-safe lower case, unless the operator says otherwise (COMPUTE_TYPE)."""
    return override or "1-" + (re.sub(r"[^a-z0-9]+", "-", info.device.lower()).strip("-") or info.device_kind)


def stream_headers(kind: str, num_chars: int) -> dict[str, str]:
    return {"x-compute-type": kind, "x-compute-characters": str(num_chars)}


def answer_headers(
    kind: str, num_chars: int, generations: Sequence[Generation], num_prompt_tokens: int
) -> dict[str, str]:
    """Sums over the generations of one answer; times in whole milliseconds but for x-compute-time."""
    total_s = validation_s = queue_s = inference_s = 0.0
    num_tokens = 0
    for generation in generations:
        times = generation.times
        started_s = times.started_s or times.queued_s
        total_s += times.ended_s - times.arrived_s
        validation_s += times.queued_s - times.arrived_s
        queue_s += started_s - times.queued_s
        inference_s += times.ended_s - started_s
        num_tokens += generation.num_tokens
    return {
        "x-compute-type": kind,
        "x-compute-time": f"{total_s:.6f}",
        "x-compute-characters": str(num_chars),
        "x-total-time": _ms(total_s),
        "x-validation-time": _ms(validation_s),
        "x-queue-time": _ms(queue_s),
        "x-inference-time": _ms(inference_s),
        "x-time-per-token": _ms(inference_s / max(num_tokens, 1)),
        "x-prompt-tokens": str(num_prompt_tokens),
        "x-generated-tokens": str(num_tokens),
    }


def _ms(seconds: float) -> str:
    return str(round(seconds * 1000))
