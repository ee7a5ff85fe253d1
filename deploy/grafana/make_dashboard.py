#!/usr/bin/env python3
"""Writes the Grafana dashboard beside this file from the list of panels below.

python deploy/grafana/make_dashboard.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("tokenplane.json")

SOURCE = {"type": "prometheus", "uid": "${source}"}
WIDTH, HEIGHT = 8, 7  # three panels in a row of 24 columns

Query = tuple[str, str]  # PromQL, legend
Panel = tuple[str, str, list[Query]]  # title, unit, queries


def rate(name: str, by: str = "") -> str:
    grouped = f" by ({by})" if by else ""
    return f"sum{grouped} (rate({name}{{{{SELECT}}}}[$__rate_interval]))"


def total(name: str) -> str:
    return f"sum({name}{{{{SELECT}}}})"


def quantiles(name: str, labels: str = "") -> list[Query]:
    """Median, 90th and 99th of a histogram."""
    more = f", {labels}" if labels else ""
    return [
        (
            f"histogram_quantile({q}, sum by (le) (rate({name}_bucket{{{{SELECT{more}}}}}[$__rate_interval])))",
            f"p{q * 100:g}",
        )
        for q in (0.5, 0.9, 0.99)
    ]


ROWS: dict[str, list[Panel]] = {
    "What clients see": [
        ("Time to first token", "s", quantiles("tokenplane_first_token_duration")),
        ("Between tokens", "s", quantiles("tokenplane_inter_token_duration")),
        ("Whole request", "s", quantiles("tgi_request_duration")),
        ("In the queue", "s", quantiles("tgi_request_queue_duration")),
        (
            "Requests",
            "reqps",
            [
                (rate("tgi_request_count"), "asked"),
                (rate("tgi_request_success"), "finished"),
                (rate("tgi_request_failure", "err"), "failed: {{err}}"),
            ],
        ),
        (
            "Tokens",
            "short",
            [
                (rate("tokenplane_generated_tokens_total"), "generated per second"),
                (rate("tokenplane_prompt_tokens_total"), "prompt per second"),
            ],
        ),
        ("Prompt length", "short", quantiles("tgi_request_input_length")),
        ("Answer length", "short", quantiles("tgi_request_generated_tokens")),
        ("Time per token, mean of a request", "s", quantiles("tgi_request_mean_time_per_token_duration")),
    ],
    "Engine": [
        (
            "Requests in the engine",
            "short",
            [(total("tokenplane_requests_running"), "running"), (total("tokenplane_requests_waiting"), "waiting")],
        ),
        ("KV cache in use", "percentunit", [("avg(tokenplane_kv_utilization{{SELECT}})", "used")]),
        (
            "Prompt tokens found in the prefix cache",
            "percentunit",
            [
                (
                    f"{rate('tokenplane_prefix_cache_hit_tokens_total')} / {rate('tokenplane_prompt_tokens_total')}",
                    "hit rate",
                )
            ],
        ),
        ("Prefill steps", "s", quantiles("tgi_batch_inference_duration", 'method="prefill"')),
        ("Decode steps", "s", quantiles("tgi_batch_inference_duration", 'method="decode"')),
        ("Decode steps on the device", "s", quantiles("tgi_batch_forward_duration", 'method="decode"')),
        ("Host work on a step's output", "s", quantiles("tgi_batch_decode_duration", 'method="decode"')),
        (
            "Steps",
            "ops",
            [
                (rate("tgi_batch_inference_count", "method"), "{{method}}"),
                (rate("tgi_batch_concat", "reason"), "joined by new requests"),
            ],
        ),
        ("Requests taken from the queue at once", "short", quantiles("tgi_batch_next_size")),
        (
            "Guessed tokens (--speculate)",
            "percentunit",
            [
                (
                    f"{rate('tokenplane_draft_tokens_accepted_total')} / {rate('tokenplane_draft_tokens_total')}",
                    "of them right",
                ),
                (
                    f"{rate('tokenplane_draft_tokens_accepted_total')} / {rate('tokenplane_generated_tokens_total')}",
                    "of all tokens guessed",
                ),
            ],
        ),
    ],
    "Trouble": [
        ("Preemptions", "ops", [(rate("tokenplane_requests_preempted_total"), "per second")]),
        (
            "Padding",
            "percentunit",
            [
                (
                    f"{rate('tokenplane_padded_tokens_total')} / ({rate('tokenplane_step_tokens_total')}"
                    f" + {rate('tokenplane_padded_tokens_total')})",
                    "computed for nothing",
                )
            ],
        ),
        (
            "Engine",
            "short",
            [
                (total("tokenplane_engine_ready"), "ready"),
                ("sum(increase(tokenplane_engine_restarts_total{{SELECT}}[$__range]))", "restarts"),
                ("sum(increase(tokenplane_compiled_shapes_total{{SELECT}}[$__range]))", "late compilations"),
            ],
        ),
    ],
}


def variables() -> list[dict[str, Any]]:
    return [
        {"name": "source", "type": "datasource", "query": "prometheus", "label": "Data source"},
        {
            "name": "instance",
            "type": "query",
            "label": "Server",
            "datasource": SOURCE,
            "query": {"query": "label_values(tokenplane_engine_ready, instance)", "refId": "instance"},
            "includeAll": True,
            "multi": True,
            "refresh": 2,
        },
    ]


def panel(number: int, row: int, column: int, content: Panel) -> dict[str, Any]:
    title, unit, queries = content
    return {
        "id": number,
        "type": "timeseries",
        "title": title,
        "datasource": SOURCE,
        "gridPos": {"x": column * WIDTH, "y": row, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": SOURCE, "expr": promql(query), "legendFormat": legend}
            for i, (query, legend) in enumerate(queries)
        ],
    }


def promql(query: str) -> str:
    """Fill in which servers are looked at."""
    return query.replace("{{SELECT", '{instance=~"$instance"').replace("}}", "}")


def dashboard() -> dict[str, Any]:
    panels: list[dict[str, Any]] = []
    y = 0
    for title, contents in ROWS.items():
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": title,
                "gridPos": {"x": 0, "y": y, "w": 24, "h": 1},
                "collapsed": False,
                "panels": [],
            }
        )
        y += 1
        for i, content in enumerate(contents):
            panels.append(panel(len(panels) + 1, y + i // 3 * HEIGHT, i % 3, content))
        y += -(-len(contents) // 3) * HEIGHT
    return {
        "uid": "tokenplane",
        "title": "Tokenplane",
        "tags": ["tokenplane"],
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": variables()},
        "panels": panels,
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps(dashboard(), indent=1) + "\n")
    print(f"{FILE.name}: {len(dashboard()['panels'])} panels")
