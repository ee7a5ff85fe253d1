"""Every metric that a dashboard of ours or of TGI's asks for is there, and says what TGI's says."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import httpx
import pytest
import yaml

from helpers.live_server import LiveServer, live_server, wait_until

DEPLOY = Path(__file__).parents[2] / "deploy"

TGI_DASHBOARD = {
    "tgi_request_count": (),
    "tgi_request_success": (),
    "tgi_request_failure": ("err",),
    "tgi_request_duration_bucket": ("le",),
    "tgi_request_queue_duration_bucket": ("le",),
    "tgi_request_validation_duration_bucket": ("le",),
    "tgi_request_inference_duration_bucket": ("le",),
    "tgi_request_mean_time_per_token_duration_bucket": ("le",),
    "tgi_request_generated_tokens_bucket": ("le",),
    "tgi_request_generated_tokens_sum": (),
    "tgi_request_generated_tokens_count": (),
    "tgi_request_input_length_bucket": ("le",),
    "tgi_request_max_new_tokens_bucket": ("le",),
    "tgi_request_skipped_tokens_bucket": ("le",),
    "tgi_queue_size": (),
    "tgi_batch_current_size": (),
    "tgi_batch_current_max_tokens": (),
    "tgi_batch_max_total_tokens": (),
    "tgi_batch_next_size_bucket": ("le",),
    "tgi_batch_concat": ("reason",),
    "tgi_batch_inference_count": ("method",),
    "tgi_batch_inference_success": ("method",),
    "tgi_batch_inference_duration_bucket": ("le", "method"),
    "tgi_batch_forward_duration_bucket": ("le", "method"),
    "tgi_batch_decode_duration_bucket": ("le", "method"),
    "tgi_batch_filter_duration_bucket": ("le", "method"),
}
"""With their labels. What is left out on purpose stands in the page about migrating: tgi_batch_concat_duration (nothing
is ever merged), tgi_batch_inference_failure (a step that fails ends the engine process: tokenplane_engine_restarts),
tgi_batch_total_tokens (TGI never sets it)."""

GATEWAY_GAUGES = ("tokenplane_requests_waiting", "tokenplane_requests_running", "tokenplane_kv_utilization")
"""What the Gateway API inference extension routes by."""


def series(text: str) -> dict[str, list[dict[str, str]]]:
    """Names of all samples, with the labels of each."""
    found: dict[str, list[dict[str, str]]] = {}
    for name, labels in re.findall(r"^(\w+)(?:\{(.*)\})? \S+$", text, re.MULTILINE):
        found.setdefault(name, []).append(dict(re.findall(r'(\w+)="([^"]*)"', labels)))
    return found


def value(text: str, sample: str) -> float:
    (line,) = [line for line in text.splitlines() if line.startswith(f"{sample} ")]
    return float(line.rpartition(" ")[2])


@pytest.fixture(scope="module")
def busy(model_folder: Path) -> Iterator[LiveServer]:
    """A server that has seen some traffic, failures among it."""
    with live_server(model_folder, step_ms=2) as live, live.client() as client:
        for inputs in ("The scheduler decides who runs next.", "What is the capital of France? " * 4):
            for _ in range(2):
                body = {"inputs": inputs, "parameters": {"max_new_tokens": 20}}
                assert client.post("/generate", json=body).status_code == 200
        client.post("/generate", json={"inputs": "a", "parameters": {"temperature": 0}})
        live.wait_idle()
        wait_until(lambda: live.service.engine.stats.requests_finished == 4, 5, "the engine's next heartbeat")
        yield live


@pytest.fixture(scope="module")
def text(busy: LiveServer) -> str:
    with busy.client() as client:
        return client.get("/metrics").text


@pytest.mark.parametrize("name", TGI_DASHBOARD)
def test_what_tgis_dashboard_asks_for_is_there_with_its_labels(text: str, name: str) -> None:
    labels = series(text)[name]
    assert all(tuple(sorted(found)) == TGI_DASHBOARD[name] for found in labels)
    if "method" in TGI_DASHBOARD[name]:
        assert {found["method"] for found in labels} == {"prefill", "decode"}


def test_buckets_of_steps_are_tgis(text: str) -> None:
    bounds = [found["le"] for found in series(text)["tgi_batch_forward_duration_bucket"] if found["method"] == "decode"]
    assert len(bounds) == 36 and bounds[-1] == "+Inf"
    assert [float(bound) for bound in bounds[:-1]] == pytest.approx([0.0001 * 1.5**n for n in range(1, 36)])
    sizes = [found["le"] for found in series(text)["tgi_batch_next_size_bucket"]]
    assert sizes == [*(f"{size}.0" for size in range(1, 1025)), "+Inf"]


def test_histograms_never_fall_and_end_at_their_count(text: str) -> None:
    counts: dict[str, list[float]] = {}
    for name, labels, count in re.findall(r"^(\w+)_bucket\{(.*)\} (\S+)$", text, re.MULTILINE):
        rest = re.sub(r',?le="[^"]*",?', "", labels)
        counts.setdefault(f"{name}_count" + (f"{{{rest}}}" if rest else ""), []).append(float(count))
    assert len(counts) > 12
    for name, found in counts.items():
        assert found == sorted(found), name
        assert found[-1] == value(text, name)


def test_steps_and_tokens_add_up(text: str) -> None:
    """Four requests, one after another: a prefill step each, then a decode step for each further token."""
    assert value(text, 'tgi_batch_inference_count{method="prefill"}') == 4
    assert value(text, 'tgi_batch_inference_count{method="decode"}') == 4 * 19
    assert value(text, 'tgi_batch_inference_duration_count{method="decode"}') == 4 * 19
    assert value(text, 'tgi_batch_inference_duration_sum{method="decode"}') > 4 * 19 * 0.001
    assert value(text, "tgi_batch_next_size_count") == value(text, "tgi_batch_next_size_sum") == 4
    assert value(text, "tokenplane_inter_token_duration_count") == 4 * 19
    assert value(text, "tokenplane_first_token_duration_count") == 4
    assert value(text, "tokenplane_prefix_cache_hit_tokens_total") > 0
    assert value(text, "tokenplane_generated_tokens_total") == 80


def test_what_a_gateway_routes_by_follows_the_load(model_folder: Path) -> None:
    with live_server(model_folder, step_ms=20, engine={"max_sequences": 1}) as live, live.client() as client:
        body = {"prompt": "Go on.", "max_tokens": 1000, "n": 3, "stream": True, "ignore_eos": True}
        with client.stream("POST", "/v1/completions", json=body) as running:
            events = running.iter_bytes()
            next(events)
            wait_until(lambda: live.service.engine.stats.num_waiting == 2, 5, "two to wait")
            text = httpx.get(f"{live.url}/metrics").text
            waiting, active, used = (value(text, name) for name in GATEWAY_GAUGES)
            assert (waiting, active) == (2, 1)
            assert 0 < used < 1
            assert value(text, "tgi_batch_current_max_tokens") > 1000
        live.wait_idle()
        text = client.get("/metrics").text
        assert [value(text, name) for name in GATEWAY_GAUGES] == [0, 0, 0]


# --- deploy/ ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_dashboard", DEPLOY / "grafana" / "make_dashboard.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_dashboard_is_what_its_script_writes(maker: ModuleType) -> None:
    assert json.loads((DEPLOY / "grafana" / "tokenplane.json").read_text()) == maker.dashboard()


def test_every_query_of_the_dashboard_names_metrics_that_exist(maker: ModuleType, text: str) -> None:
    names = set(series(text))
    panels = [panel for panel in maker.dashboard()["panels"] if panel["type"] != "row"]
    assert len(panels) > 15
    for panel in panels:
        for target in panel["targets"]:
            asked = set(re.findall(r"\b(?:tgi|tokenplane)_\w+", target["expr"]))
            assert asked and asked <= names, (panel["title"], asked - names)
            assert target["expr"].count("(") == target["expr"].count(")") and "{{" not in target["expr"]
            for method in re.findall(r'method="(\w+)"', target["expr"]):
                assert method in ("prefill", "decode")


def test_what_compose_mounts_and_scrapes_exists() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yml").read_text())
    for service in compose["services"].values():
        for mount in service.get("volumes", []):
            source = mount.partition(":")[0]
            assert (DEPLOY / source).exists() if source.startswith(".") else source in compose["volumes"]
    assert (DEPLOY.parent / compose["services"]["tokenplane"]["build"]["dockerfile"]).exists()
    scrape = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"][0]["static_configs"][0]
    assert scrape["targets"] == ["tokenplane:80"]
    assert "PORT=80" in (DEPLOY / "Dockerfile").read_text()
    assert scrape["labels"]["container"]  # TGI's dashboard selects by it
