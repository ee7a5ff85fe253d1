"""What was measured, as tables, JSON and a plot."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path

from .ceiling import Ceiling
from .load import Case, Measured
from .servers import Server

HEAD = "| model | case | server | tok/s | x best peer | TTFT ms | x best peer | ms/token | of ceiling | foreign CPU |"


@dataclass(frozen=True)
class Sample:
    """One round of one case with one server. `ceiling_share`: least time of a token alone, divided by what it took."""

    model: str
    case: Case
    server: Server
    measured: Measured
    ceiling_share: float
    foreign_share: float


@dataclass
class Results:
    """`ceilings`: measured anew before each round that needs it. What is read in a second depends on the neighbours."""

    ceilings: list[Ceiling]
    samples: list[Sample] = field(default_factory=list)
    ready_s: dict[tuple[str, str], float] = field(default_factory=dict)  # by model and server
    resident_bytes: dict[tuple[str, str], int] = field(default_factory=dict)


def medians(results: Results) -> list[Sample]:
    """One sample for each case and server: the median of each number over the rounds."""
    groups: dict[tuple[str, Case, Server], list[Sample]] = {}
    for sample in results.samples:
        groups.setdefault((sample.model, sample.case, sample.server), []).append(sample)
    return [
        Sample(
            *key,
            Measured(
                statistics.median(s.measured.tokens_per_s for s in group),
                statistics.median(s.measured.first_token_ms for s in group),
                statistics.median(s.measured.token_ms for s in group),
            ),
            statistics.median(s.ceiling_share for s in group),
            statistics.median(s.foreign_share for s in group),
        )
        for key, group in groups.items()
    ]


def peers_of(row: Sample, rows: list[Sample]) -> list[Sample]:
    """The peers that ran the same case with weights of the same width."""
    return [
        other
        for other in rows
        if other.server.is_peer
        and (other.model, other.case, other.server.weights) == (row.model, row.case, row.server.weights)
    ]


def table_lines(results: Results) -> Iterator[str]:
    yield HEAD
    yield "| --- " * HEAD.count(" | ") + "| --- |"
    rows = medians(results)
    for row in rows:
        rate = first = ""
        peers = [] if row.server.is_peer else [peer.measured for peer in peers_of(row, rows)]
        own = row.measured
        if peers:
            rate = f"{own.tokens_per_s / max(peer.tokens_per_s for peer in peers):.2f}"
            first = f"{min(peer.first_token_ms for peer in peers) / own.first_token_ms:.2f}"
        share = f"{row.ceiling_share:.0%}" if row.case.concurrency == 1 else ""
        yield (
            f"| {row.model} | {row.case.name} c={row.case.concurrency} | {row.server.name} | {own.tokens_per_s:,.1f} "
            f"| {rate} | {own.first_token_ms:,.0f} | {first} | {own.token_ms:.2f} | {share} | {row.foreign_share:.0%} |"
        )


def tables(results: Results) -> str:
    """Two tables in Markdown: speed, then start and memory; between them the machine's ceilings."""
    limit = Ceiling(*map(statistics.median, zip(*map(astuple, results.ceilings), strict=True)))
    start = [
        f"| {model} | {name} | {ready_s:.1f} | {results.resident_bytes.get((model, name), 0) / 1e6:,.0f} |"
        for (model, name), ready_s in results.ready_s.items()
    ]
    return "\n".join(
        [
            *table_lines(results),
            "",
            f"Ceilings: {limit.read_bytes_per_s / 1e9:.1f} GB/s read, "
            f"{limit.bf16_flop_per_s / 1e9:,.0f} GFLOP/s bfloat16, {limit.float32_flop_per_s / 1e9:,.0f} float32.",
            "",
            "| model | server | start to ready, s | resident, MB |",
            "| --- | --- | --- | --- |",
            *start,
            "",
        ]
    )


def line(sample: Sample) -> str:
    """One sample, for the eye, while the rest still runs."""
    measured = sample.measured
    return (
        f"{sample.model} {sample.case.name} c={sample.case.concurrency} {sample.server.name}: "
        f"{measured.tokens_per_s:,.1f} tok/s, first {measured.first_token_ms:,.0f} ms, then {measured.token_ms:.2f} ms "
        f"a token, others used {sample.foreign_share:.0%}"
    )


def write_json(results: Results, path: Path) -> None:
    """All samples, not only medians."""
    samples = [
        {
            "model": s.model,
            "case": asdict(s.case),
            "server": s.server.name,
            "weights": s.server.weights,
            **asdict(s.measured),
            "ceiling_share": s.ceiling_share,
            "foreign_share": s.foreign_share,
        }
        for s in results.samples
    ]
    servers = [
        {
            "model": model,
            "server": name,
            "ready_s": ready_s,
            "resident_bytes": results.resident_bytes.get((model, name)),
        }
        for (model, name), ready_s in results.ready_s.items()
    ]
    document = {
        "taken": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": platform.processor() or platform.machine(),
        "ceilings": [asdict(limit) for limit in results.ceilings],
        "samples": samples,
        "servers": servers,
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def plot(results: Results, path: Path) -> None:
    """Output tokens/s of every case, one panel for each, each server a bar; a dot for each round."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = medians(results)
    panels = list(dict.fromkeys((row.model, row.case) for row in rows))
    names = list(dict.fromkeys(row.server.name for row in rows))
    colours = {name: f"C{i}" for i, name in enumerate(names)}
    columns = min(5, max(1, len(panels)))
    lines = -(-len(panels) // columns) or 1
    figure, grid = pyplot.subplots(lines, columns, figsize=(3.2 * columns, 2.6 * lines), squeeze=False, layout="tight")
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (model, case) in zip(grid.flat, panels, strict=False):
        for row in (row for row in rows if (row.model, row.case) == (model, case)):
            name = row.server.name
            axes.barh(name, row.measured.tokens_per_s, color=colours[name], alpha=0.6)
            dots = [
                s.measured.tokens_per_s
                for s in results.samples
                if (s.model, s.case, s.server) == (model, case, row.server)
            ]
            axes.plot(dots, [name] * len(dots), "k.", markersize=3)
        axes.invert_yaxis()
        axes.set_title(f"{model}, {case.name}, c={case.concurrency}", fontsize=9)
        axes.tick_params(labelsize=7)
        axes.set_xlabel("output tokens/s", fontsize=7)
    figure.savefig(path, dpi=120)
