"""Write docs/metrics.md from the metrics that the server registers.

python scripts/metrics_page.py            write the page
python scripts/metrics_page.py --check    say whether it is what it should be
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any, cast

from pages import table, write_or_check
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from tokenplane_api import errors
from tokenplane_api.metrics import Metrics
from tokenplane_api.settings import Limits
from tokenplane_core.durations import BOUNDS_S, Durations
from tokenplane_core.messages import Stats

HEAD = """# Metrics

<!-- Written by scripts/metrics_page.py from what api/tokenplane_api/metrics.py registers; change that instead. -->

`GET /metrics` on the server's own port, in Prometheus' text format, without an API key. What the engine tells is a
second old at most. Durations are in seconds. What differs from TGI's metrics of the same name is said in
[Migrating from TGI](migrating-from-tgi.md#metrics-traces-and-logs).

"""

EXAMPLE = Limits(max_input_tokens=4000, max_total_tokens=4096)
"""Histograms of tokens have a hundred equal steps up to one of these."""

BUCKETS = f"""## Buckets

* durations: {len(BOUNDS_S)} from {BOUNDS_S[0]:.5f} s to {BOUNDS_S[-1]:.1f} s, each 1.5 times the one before, as in TGI.
* tokens: 100 equal steps up to `--max-input-tokens` or `--max-total-tokens`; the tables show them for
  {EXAMPLE.max_input_tokens} and {EXAMPLE.max_total_tokens}.
* sizes of batches: 1, 2, 3 and so on; drafts that were right: 0, 1, 2 and so on up to `--speculate`, here 4.
"""


def page() -> str:
    families = list(text_string_to_metric_families(_metrics().render().decode()))
    lines = [
        "## TGI's\n",
        *_table(family for family in families if family.name.startswith("tgi_")),
        "## Ours\n",
        *_table(family for family in families if family.name.startswith("tokenplane_")),
        BUCKETS,
    ]
    return HEAD + "\n".join(lines)


def _metrics() -> Metrics:
    """As of a server that has seen every kind of step and of failure."""
    steps = {method: Durations() for method in ("prefill", "decode")}
    info = SimpleNamespace(num_blocks=1, block_tokens=1, max_drafts=4)
    engine = SimpleNamespace(
        stats=Stats(inference=steps, forward=steps, commit=steps, publish=steps),
        num_live=0,
        is_ready=True,
        has_info=True,
        info=info,
        num_restarts=0,
        inter_token=Durations(),
    )
    metrics = Metrics(cast(Any, engine))
    metrics.set_limits(EXAMPLE)
    for cause in {kind.metric for kind in vars(errors).values() if isinstance(kind, errors.ErrorKind)}:
        metrics.failed(cause, 1)
    return metrics


def _table(families: Iterable[Metric]) -> Iterator[str]:
    rows = (
        (f"`{_shown_name(family)}`", family.type, _labels(family), _buckets(family), family.documentation)
        for family in sorted(families, key=lambda family: family.name)
    )
    return table(("Metric", "Type", "Labels", "Buckets", "Meaning"), rows)


def _shown_name(family: Metric) -> str:
    """Of ours, Prometheus' counters end in _total."""
    return f"{family.name}_total" if family.type == "counter" and family.name.startswith("tokenplane_") else family.name


def _labels(family: Metric) -> str:
    values: dict[str, set[str]] = {}
    for sample in family.samples:
        for label, value in sample.labels.items():
            if label != "le":
                values.setdefault(label, set()).add(value)
    return "; ".join(f"`{label}`: {', '.join(sorted(found))}" for label, found in values.items())


def _buckets(family: Metric) -> str:
    bounds = sorted({float(sample.labels["le"]) for sample in family.samples if "le" in sample.labels})[:-1]
    if not bounds:
        return ""
    if bounds == list(BOUNDS_S):
        return "durations"
    return f"{len(bounds)} up to {bounds[-1]:g}"


if __name__ == "__main__":
    write_or_check("metrics.md", page())
