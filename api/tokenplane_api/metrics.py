"""Prometheus metrics: TGI's under its own names, labels and buckets, and ours from the engine's stats.

What is counted for each request is observed here when it is over; what happens for each token or step is counted in
`Durations` by whoever does it, and read when somebody scrapes. TGI's counters carry no `_total`, which the Prometheus
client library always appends; `render` takes it off again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from tokenplane_core.durations import BOUNDS_S, Durations
from tokenplane_core.messages import Stats

from .settings import Limits

if TYPE_CHECKING:
    from tokenplane_core.client import EngineClient

    from .generation import Generation, GenerationSpec

CONTENT_TYPE = "text/plain; charset=utf-8"

MAX_BATCH_SIZE_BUCKET = 1024
"""TGI counts sizes of admitted batches in buckets of 1, 2, 3 ... up to this."""


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
        return Histogram(name, f"{text}, seconds", buckets=BOUNDS_S, registry=self._registry)

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
        """cause: overloaded, validation, template, generation, timeout or dropped."""
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
        for name, (text, value) in self._gauges(stats).items():
            yield GaugeMetricFamily(name, text, value)
        for name, (text, value) in self._counters(stats).items():
            yield CounterMetricFamily(name, text, value)
        yield _durations(
            "tokenplane_inter_token_duration",
            "Between tokens of one request, as they reach the API",
            {"": self._engine.inter_token},
        )
        yield from _batch_metrics(stats)
        yield _skipped_tokens(stats.accepted, self._engine.info.max_drafts if self._engine.has_info else 0)

    def _gauges(self, stats: Stats) -> dict[str, tuple[str, float]]:
        gauges: dict[str, tuple[str, float]] = {
            "tgi_queue_size": ("Requests waiting in the engine", stats.num_waiting),
            "tgi_batch_current_size": ("Requests running in the engine", stats.num_running),
            "tgi_batch_current_max_tokens": ("Tokens the running requests may grow to", stats.max_batch_tokens),
            "tokenplane_requests_running": ("Requests running in the engine", stats.num_running),
            "tokenplane_requests_waiting": ("Requests waiting in the engine", stats.num_waiting),
            "tokenplane_requests_live": ("Requests submitted and not finished", self._engine.num_live),
            "tokenplane_kv_blocks_used": ("KV cache blocks held by live requests", stats.blocks_used),
            "tokenplane_kv_blocks": ("KV cache blocks in all", stats.blocks_total),
            "tokenplane_kv_utilization": (
                "Part of the KV cache held by live requests, 0 to 1",
                stats.blocks_used / max(stats.blocks_total, 1),
            ),
            "tokenplane_adapters_loaded": ("LoRA adapters the engine holds", stats.adapters_loaded),
            "tokenplane_engine_ready": ("1 while the engine serves", int(self._engine.is_ready)),
        }
        if self._engine.has_info:
            info = self._engine.info
            gauges["tgi_batch_max_total_tokens"] = ("Tokens the KV cache holds", info.num_blocks * info.block_tokens)
            gauges["tokenplane_kv_block_tokens"] = ("Tokens in a KV cache block", info.block_tokens)
        return gauges

    def _counters(self, stats: Stats) -> dict[str, tuple[str, float]]:
        return {
            "tokenplane_requests_finished": ("Requests the engine finished", stats.requests_finished),
            "tokenplane_requests_preempted": ("Requests set back to make room", stats.requests_preempted),
            "tokenplane_prompt_tokens": ("Prompt tokens of admitted requests", stats.prompt_tokens),
            "tokenplane_prefix_cache_hit_tokens": ("Prompt tokens found in the prefix cache", stats.cached_tokens),
            "tokenplane_generated_tokens": ("Tokens generated", stats.generated_tokens),
            "tokenplane_prefill_steps": ("Steps that computed prompt tokens", stats.prefill_steps),
            "tokenplane_decode_steps": ("Steps that only decoded", stats.decode_steps),
            "tokenplane_step_tokens": ("Tokens computed", stats.step_tokens),
            "tokenplane_padded_tokens": ("Padding tokens computed for nothing", stats.padded_tokens),
            "tokenplane_compiled_shapes": ("Shapes compiled after the warm-up", stats.compiled_shapes),
            "tokenplane_device_busy_seconds": ("Seconds the device was busy", stats.device_s),
            "tokenplane_draft_tokens": ("Tokens guessed, for a step to verify", stats.draft_tokens),
            "tokenplane_draft_tokens_accepted": ("Guessed tokens that were right", stats.draft_tokens_accepted),
            "tokenplane_engine_restarts": ("Times the engine process was replaced", self._engine.num_restarts),
        }


def _batch_metrics(stats: Stats) -> Iterator[Metric]:
    """TGI's metrics of steps, with its label `method`: prefill or decode."""
    counts = {"prefill": stats.prefill_steps, "decode": stats.decode_steps}
    # A step that fails ends the engine process, so all steps that came back are successes.
    for name, text in (("count", "Steps"), ("success", "Steps that came back")):
        family = CounterMetricFamily(f"tgi_batch_inference_{name}", text, labels=["method"])
        for method, count in counts.items():
            family.add_metric([method], count)
        yield family
    joined = CounterMetricFamily(
        "tgi_batch_concat", "Steps in which new requests joined running ones", labels=["reason"]
    )
    joined.add_metric(["chunking"], stats.steps_joined)
    yield joined
    for name, text, durations in (
        ("inference", "From the launch of a step until its output is read back", stats.inference),
        ("forward", "A step on the device, as the backend reports it", stats.forward),
        ("decode", "Host work on a step's output", stats.commit),
        ("filter", "Telling clients a step's news", stats.publish),
    ):
        yield _durations(f"tgi_batch_{name}_duration", text, durations)
    sizes = [stats.admitted.get(size, 0) for size in range(1, MAX_BATCH_SIZE_BUCKET + 1)]
    beyond = sum(count for size, count in stats.admitted.items() if size > MAX_BATCH_SIZE_BUCKET)
    yield HistogramMetricFamily(
        "tgi_batch_next_size",
        "Requests taken from the queue at once",
        buckets=_buckets(range(1, MAX_BATCH_SIZE_BUCKET + 1), [*sizes, beyond]),
        sum_value=sum(size * count for size, count in stats.admitted.items()),
    )


def _skipped_tokens(accepted: Mapping[int, int], most: int) -> Metric:
    """TGI's name for it: steps that a sequence was spared."""
    return HistogramMetricFamily(
        "tgi_request_skipped_tokens",
        "Guessed tokens that were right, for each step of a sequence",
        buckets=_buckets(range(most + 1), [*(accepted.get(count, 0) for count in range(most + 1)), 0]),
        sum_value=sum(count * times for count, times in accepted.items()),
    )


def _durations(name: str, text: str, by_method: Mapping[str, Durations]) -> HistogramMetricFamily:
    """A histogram for each method; "" is one without the label."""
    labels = [] if "" in by_method else ["method"]
    family = HistogramMetricFamily(name, f"{text}, seconds", labels=labels)
    for method, durations in by_method.items():
        family.add_metric([method] if method else [], _buckets(BOUNDS_S, durations.counts), durations.sum_s)
    return family


def _buckets(bounds: range | tuple[float, ...], counts: list[int]) -> list[tuple[str, float]]:
    """(upper bound, how many up to it), the last without a bound."""
    names = [*(repr(float(bound)) for bound in bounds), "+Inf"]
    return list(zip(names, map(float, accumulate(counts)), strict=True))
