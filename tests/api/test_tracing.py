"""Traces arrive at a collector: a real OTLP/HTTP receiver on loopback, real requests."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from helpers.live_server import live_server
from tokenplane_api.settings import Settings
from tokenplane_api.tracing import start_tracing, traces_url
from tokenplane_core.backend.errors import ConfigError

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
COMPLETIONS = "/v1/completions"


@dataclass
class Collector:
    url: str
    paths: list[str] = field(default_factory=list)
    spans: list[Any] = field(default_factory=list)
    resource: dict[str, str] = field(default_factory=dict)

    def named(self, name: str) -> Any:
        (found,) = [span for span in self.spans if span.name == name]
        return found


@pytest.fixture
def found() -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            for group in ExportTraceServiceRequest.FromString(body).resource_spans:
                found.resource |= {pair.key: pair.value.string_value for pair in group.resource.attributes}
                for scope in group.scope_spans:
                    found.spans += scope.spans
            found.paths.append(self.path)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    receiver = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found = Collector(f"http://127.0.0.1:{receiver.server_address[1]}")
    thread = threading.Thread(target=receiver.serve_forever)
    thread.start()
    try:
        yield found
    finally:
        receiver.shutdown()
        thread.join()
        receiver.server_close()


def attributes(span: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in span.attributes}


def test_a_request_becomes_spans_below_the_callers(model_folder: Path, found: Collector) -> None:
    with (
        live_server(model_folder, step_ms=5, otlp_endpoint=found.url, otlp_service_name="shop-assistant") as live,
        live.client() as client,
    ):
        answer = client.post(
            "/generate",
            json={"inputs": "The scheduler", "parameters": {"max_new_tokens": 5, "seed": 7, "do_sample": True}},
            headers={"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01", "x-request-id": "order-66"},
        )
        assert answer.status_code == 200
        client.get("/health")
        client.post(COMPLETIONS, json={"prompt": "a", "temperature": 9})
    # Closing the server has sent what was left.
    assert set(found.paths) == {"/v1/traces"}
    assert found.resource["service.name"] == "shop-assistant"
    server, generate = found.named("POST /generate"), found.named("generate")
    assert (server.trace_id.hex(), server.parent_span_id.hex()) == (TRACE_ID, PARENT_ID)
    assert generate.parent_span_id == server.span_id
    said = attributes(server)
    assert (said["http.response.status_code"], said["tokenplane.request_id"]) == (200, "order-66")
    said = attributes(generate)
    assert {"parameters", "validation_time", "queue_time", "inference_time", "time_per_token"} <= set(said)
    assert said["total_time"].endswith("ms") and said["seed"] == "Some(7)"
    assert (said["gen_ai.usage.output_tokens"], said["gen_ai.usage.input_tokens"]) == (5, 5)
    queue, prefill, decode = (found.named(name) for name in ("queue", "prefill", "decode"))
    assert all(span.parent_span_id == generate.span_id for span in (queue, prefill, decode))
    times = [server.start_time_unix_nano, queue.start_time_unix_nano, queue.end_time_unix_nano]
    times += [prefill.end_time_unix_nano, decode.end_time_unix_nano, server.end_time_unix_nano]
    assert times == sorted(times)
    assert prefill.start_time_unix_nano == queue.end_time_unix_nano
    assert decode.end_time_unix_nano - decode.start_time_unix_nano > 5e6  # four steps
    refused = found.named(f"POST {COMPLETIONS}")
    assert attributes(refused)["http.response.status_code"] == 400
    assert "temperature" in attributes(refused)["error.message"]
    assert len(found.spans) == 6  # probes are not traced


def test_a_collector_that_is_away_disturbs_nobody(model_folder: Path) -> None:
    with live_server(model_folder, otlp_endpoint="http://127.0.0.1:9") as live, live.client() as client:
        answer = client.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 3})
        assert answer.status_code == 200


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("http://collector:4318", "http://collector:4318/v1/traces"),
        ("http://collector:4318/", "http://collector:4318/v1/traces"),
        ("https://collector/otlp/v1/traces", "https://collector/otlp/v1/traces"),
    ],
)
def test_the_path_of_the_collector_is_added(given: str, used: str) -> None:
    assert traces_url(given) == used


@pytest.mark.parametrize("given", ["collector:4318", "", "grpc://collector:4317", "http://", "http://host:port"])
def test_an_endpoint_that_is_no_url_stops_the_start(given: str) -> None:
    with pytest.raises(ConfigError, match="--otlp-endpoint"):
        traces_url(given)


def test_without_the_packages_the_start_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    with pytest.raises(ConfigError, match=r"pip install 'tokenplane-api\[otlp\]'"):
        start_tracing(Settings(model_id="m", otlp_endpoint="http://collector:4318"))


def test_without_an_endpoint_nothing_is_even_imported() -> None:
    code = (
        "import sys; from tokenplane_api import app, tracing; from tokenplane_api.settings import Settings\n"
        "assert tracing.start_tracing(Settings(model_id='m')) is None\n"
        "assert not any(name.startswith(('opentelemetry.sdk', 'opentelemetry.exporter')) for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
