"""OpenTelemetry traces over OTLP/HTTP, for operators that set an endpoint; off, this costs nothing.

Spans are made when a request is over, from the times that were noted anyway, so tokens pay nothing for them either.
One server span for the HTTP request, whose parent is the client's `traceparent`; below it a span for each generation,
with the attributes TGI has, and in that `queue`, `prefill` (up to the first token) and `decode`.
"""

from __future__ import annotations

from time import perf_counter_ns, time_ns
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import Scope

from tokenplane_core.backend.errors import ConfigError

from . import __version__
from .settings import Settings

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

    from .generation import Generation
    from .request_scope import RequestRecord

EXPORT_TIMEOUT_S = 3.0
"""Tries included; at the end, the server waits so long for a collector that is away."""

_OPERATIONS = {
    "/": "compat_generate",
    "/generate": "generate",
    "/generate_stream": "generate_stream",
    "/v1/chat/completions": "chat_completions",
    "/v1/completions": "completions",
    "/v1/responses": "responses",
    "/vertex": "vertex_compatibility",
    "/invocations": "sagemaker_compatibility",
}
"""TGI's span names; other routes that generate have `generate`."""


def start_tracing(settings: Settings) -> Tracing | None:
    """None without an endpoint.

    Raises:
        ConfigError: the endpoint is no URL, or the packages for it are not installed.
    """
    if settings.otlp_endpoint is None:
        return None
    endpoint = traces_url(settings.otlp_endpoint)
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(
            f"--otlp-endpoint needs a package that is missing ({error.name}): pip install 'tokenplane-api[otlp]'"
        ) from error
    resource = Resource.create({"service.name": settings.otlp_service_name, "service.version": __version__})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_TIMEOUT_S)))
    return Tracing(provider, settings.public_name)


def traces_url(endpoint: str) -> str:
    """The endpoint as the exporter wants it: `/v1/traces` is added to a URL without a path.

    Raises:
        ConfigError: no http(s) URL.
    """
    try:
        parts = urlsplit(endpoint)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        is_url = False
    if not is_url:
        raise ConfigError(
            f"--otlp-endpoint is {endpoint!r}; it must be the URL of an OTLP/HTTP collector, like http://localhost:4318"
        )
    return endpoint if parts.path.strip("/") else endpoint.rstrip("/") + "/v1/traces"


class Tracing:
    """Turns finished requests into spans; a background thread sends them."""

    def __init__(self, provider: TracerProvider, model: str) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("tokenplane", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._server_kind = trace.SpanKind.SERVER
        self._in_span = trace.set_span_in_context
        self._failed = trace.Status(trace.StatusCode.ERROR)
        self._model = model

    def export(self, scope: Scope, status: int, record: RequestRecord) -> None:
        """Queue the spans of a request that is over; dropped if the collector is too slow."""
        clock_ns = time_ns() - perf_counter_ns()  # from perf_counter to the time of day
        path = scope["path"]
        span = self._tracer.start_span(
            f"{scope['method']} {path}" if path in _OPERATIONS else scope["method"],
            context=self._propagator.extract(Headers(scope=scope)),
            kind=self._server_kind,
            attributes=_http_attributes(scope, status, record),
            start_time=_ns(record.arrived_s, clock_ns),
        )
        if record.error is not None and status >= 500:
            span.set_status(self._failed)
        parent = self._in_span(span)
        for generation in record.generations:
            self._export_generation(_OPERATIONS.get(path, "generate"), generation, parent, clock_ns)
        span.end(time_ns())

    def _export_generation(self, name: str, generation: Generation, parent: Any, clock_ns: int) -> None:
        times = generation.times
        end_s = times.ended_s or perf_counter_ns() / 1e9
        started_s, first_token_s = times.started_s or end_s, times.first_token_s or end_s
        span = self._tracer.start_span(
            name,
            context=parent,
            attributes=_generation_attributes(generation, self._model, started_s, end_s),
            start_time=_ns(times.arrived_s, clock_ns),
        )
        context = self._in_span(span)
        for phase, begin_s, until_s in (
            ("queue", times.queued_s, started_s),
            ("prefill", times.started_s, first_token_s),
            ("decode", times.first_token_s, end_s),
        ):
            if begin_s:
                child = self._tracer.start_span(phase, context=context, start_time=_ns(begin_s, clock_ns))
                child.end(_ns(until_s, clock_ns))
        span.end(_ns(end_s, clock_ns))

    def close(self) -> None:
        """Send what is queued; takes some seconds if nobody answers."""
        self._provider.shutdown()


def _http_attributes(scope: Scope, status: int, record: RequestRecord) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "http.request.method": scope["method"],
        "url.path": scope["path"],
        "http.response.status_code": status,
        "tokenplane.request_id": record.request_id,
    }
    if scope.get("client"):
        attributes["client.address"] = scope["client"][0]
    if record.error is not None:
        attributes["error.type"] = record.error.kind.tgi_type
        attributes["error.message"] = record.error.message
    return attributes


def _generation_attributes(generation: Generation, model: str, started_s: float, end_s: float) -> dict[str, Any]:
    """TGI's own, then those of OpenTelemetry's conventions for generative models."""
    spec, times = generation.spec, generation.times
    inference_s = end_s - started_s
    return {
        "parameters": f"max_new_tokens={spec.max_new_tokens} {spec.sampling}",
        "total_time": _text(end_s - times.arrived_s),
        "validation_time": _text(times.queued_s - times.arrived_s),
        "queue_time": _text(started_s - times.queued_s),
        "inference_time": _text(inference_s),
        "time_per_token": _text(inference_s / max(generation.num_tokens, 1)),
        "seed": f"Some({spec.sampling.seed})" if spec.sampling.temperature > 0 else "None",
        "gen_ai.request.model": model,
        "gen_ai.request.max_tokens": spec.max_new_tokens,
        "gen_ai.request.temperature": spec.sampling.temperature,
        "gen_ai.usage.input_tokens": len(spec.prompt_ids),
        "gen_ai.usage.output_tokens": generation.num_tokens,
        "gen_ai.response.finish_reasons": [generation.finish_reason or "none"],
        "tokenplane.cached_tokens": generation.num_cached_tokens,
    }


def _ns(reading_s: float, clock_ns: int) -> int:
    return int(reading_s * 1e9) + clock_ns


def _text(seconds: float) -> str:
    """As TGI writes a duration, for people: 12.3ms."""
    if seconds >= 1:
        return f"{seconds:.6g}s"
    return f"{seconds * 1e3:.6g}ms" if seconds >= 1e-3 else f"{seconds * 1e6:.6g}µs"
