"""Prometheus counters: TGI's `tgi_request_*` family under its own names and buckets, and ours from the engine's stats.

TGI's counters carry no `_total`, which the Prometheus client library always appends; `render` takes it off again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .settings import Limits

if TYPE_CHECKING:
    from tokenplane_core.client import EngineClient

    from .generation import Generation, GenerationSpec

DURATION_BUCKETS_S = tuple(0.0001 * 1.5**n for n in range(1, 36))
"""TGI's set for every name that ends in `duration`."""

CONTENT_TYPE = "text/plain; charset=utf-8"


def token_buckets(most: int) -> tuple[float, ...]:
    """A hundred equal steps up to `most` tokens."""
    return tuple(most * n / 100 for n in range(1, 101))


class Metrics:
    """The counters of one application. Token histograms appear once the limits are known."""

    def __init__(self, engine: EngineClient) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self._registry.register(EngineCollector(engine))
        self._count = Counter("tgi_request_count", "Generations asked for", registry=self._registry)
        self._success = Counter("tgi_request_success", "Generations finished", registry=self._registry)
        self._failure = Counter("tgi_request_failure", "Generations failed, by cause", ["err"], registry=self._registry)
        self._duration = self._seconds("tgi_request_duration", "From arrival to the last token")
        self._validation = self._seconds("tgi_request_validation_duration", "From arrival to the engine's queue")
        self._queue = self._seconds("tgi_request_queue_duration", "From the engine's queue to the first step")
        self._inference = self._seconds("tgi_request_inference_duration", "From the first step to the last token")
        self._per_token = self._seconds(
            "tgi_request_mean_time_per_token_duration", "Inference time per generated token"
        )
        self._first_token = self._seconds("tokenplane_first_token_duration", "From arrival to the first token")
        self._generated: Histogram | None = None
        self._input: Histogram | None = None
        self._max_new: Histogram | None = None

    def _seconds(self, name: str, text: str) -> Histogram:
        return Histogram(name, f"{text}, seconds", buckets=DURATION_BUCKETS_S, registry=self._registry)

    def set_limits(self, limits: Limits) -> None:
        if self._generated is not None:
            return
        inputs, totals = token_buckets(limits.max_input_tokens), token_buckets(limits.max_total_tokens)
        self._generated = Histogram(
            "tgi_request_generated_tokens", "Tokens generated", buckets=totals, registry=self._registry
        )
        self._input = Histogram("tgi_request_input_length", "Prompt tokens", buckets=inputs, registry=self._registry)
        self._max_new = Histogram(
            "tgi_request_max_new_tokens", "Tokens allowed", buckets=totals, registry=self._registry
        )

    def asked(self, num_generations: int) -> None:
        """So many generations were asked for, valid or not."""
        self._count.inc(num_generations)

    def received(self, spec: GenerationSpec) -> None:
        """A generation passed validation and goes to the engine."""
        if self._input is not None and self._max_new is not None:
            self._input.observe(len(spec.prompt_ids))
            self._max_new.observe(spec.max_new_tokens)

    def succeeded(self, generation: Generation) -> None:
        times = generation.times
        started_s = times.started_s or times.queued_s
        self._success.inc()
        self._duration.observe(times.ended_s - times.arrived_s)
        self._validation.observe(times.queued_s - times.arrived_s)
        self._queue.observe(started_s - times.queued_s)
        self._inference.observe(times.ended_s - started_s)
        self._per_token.observe((times.ended_s - started_s) / max(generation.num_tokens, 1))
        if times.first_token_s:
            self._first_token.observe(times.first_token_s - times.arrived_s)
        if self._generated is not None:
            self._generated.observe(generation.num_tokens)

    def failed(self, cause: str, num_generations: int) -> None:
        """cause: overloaded, validation, template, generation or dropped."""
        if num_generations:
            self._failure.labels(err=cause).inc(num_generations)

    def render(self) -> bytes:
        return re.sub(rb"\b(tgi_\w+)_total\b", rb"\1", generate_latest(self._registry))


class EngineCollector(Collector):
    """Reads the engine's latest heartbeat at every scrape."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats
        gauges: dict[str, tuple[str, float]] = {
            "tgi_queue_size": ("Requests waiting in the engine", stats.num_waiting),
            "tgi_batch_current_size": ("Requests running in the engine", stats.num_running),
            "tokenplane_requests_running": ("Requests running in the engine", stats.num_running),
            "tokenplane_requests_waiting": ("Requests waiting in the engine", stats.num_waiting),
            "tokenplane_requests_live": ("Requests submitted and not finished", self._engine.num_live),
            "tokenplane_kv_blocks_used": ("KV cache blocks held by live requests", stats.blocks_used),
            "tokenplane_kv_blocks": ("KV cache blocks in all", stats.blocks_total),
            "tokenplane_engine_ready": ("1 while the engine serves", int(self._engine.is_ready)),
        }
        counters: dict[str, tuple[str, float]] = {
            "tokenplane_requests_finished": ("Requests the engine finished", stats.requests_finished),
            "tokenplane_requests_preempted": ("Requests set back to make room", stats.requests_preempted),
            "tokenplane_prompt_tokens": ("Prompt tokens of admitted requests", stats.prompt_tokens),
            "tokenplane_prefix_cache_hit_tokens": ("Prompt tokens found in the prefix cache", stats.cached_tokens),
            "tokenplane_generated_tokens": ("Tokens generated", stats.generated_tokens),
            "tokenplane_prefill_steps": ("Steps that computed prompt tokens", stats.prefill_steps),
            "tokenplane_decode_steps": ("Steps that only decoded", stats.decode_steps),
            "tokenplane_step_tokens": ("Tokens computed", stats.step_tokens),
            "tokenplane_padded_tokens": ("Padding tokens computed for nothing", stats.padded_tokens),
            "tokenplane_device_busy_seconds": ("Seconds the device was busy", stats.device_s),
            "tokenplane_engine_restarts": ("Times the engine process was replaced", self._engine.num_restarts),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value)
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(name, text, value)
