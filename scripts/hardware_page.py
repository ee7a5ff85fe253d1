"""Write docs/hardware.md from the kit's reports (docs/reports) and dated runs on hardware (docs/hardware-runs).

    python scripts/hardware_page.py            write the page
    python scripts/hardware_page.py --check    say whether it is what it should be

A report is what `pytest --tokenplane-backend NAME --tokenplane-report docs/reports/NAME.json` writes. A run is a file
with the fields of `Run`, written by whoever ran something on a card, and never changed afterwards.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path

import msgspec
from pages import table, write_or_check

from tokenplane_core.backend.records import SAMPLING_FEATURES
from tokenplane_core.kit.report import LEVELS, Report, read_report

ROOT = Path(__file__).resolve().parents[1]
NOT_YET = "not yet run on hardware"


class Run(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Something that was run on a card, on a day."""

    date: str  # ISO
    backend: str
    card: str  # as its vendor calls it, and how many
    driver: str  # with version; "none" for a CPU
    command: str  # as it was typed, without paths of the machine
    results: dict[str, str]  # what -> how much, with unit
    notes: str = ""


def page(root: Path = ROOT) -> str:
    """The page that the files below `root` make."""
    reports = [read_report(file) for file in sorted((root / "docs" / "reports").glob("*.json"))]
    files = sorted((root / "docs" / "hardware-runs").glob("*.json"))
    runs = [msgspec.json.decode(file.read_bytes(), type=Run) for file in files]
    own = dict(own_backends(root))
    for run in runs:
        if run.backend not in own:
            raise SystemExit(f"docs/hardware-runs: {run.backend!r} is no backend of this project: {', '.join(own)}")
    lines = [
        "# Hardware",
        "",
        "<!-- Written by scripts/hardware_page.py; change docs/reports or docs/hardware-runs instead. -->",
        "",
        "What has been run on which hardware, and which laws of the conformance kit each backend keeps.",
        "",
        *_where_it_has_run(own, runs),
        *_runs(runs),
        *_conformance(reports),
    ]
    return "\n".join(lines).rstrip() + "\n"


def own_backends(root: Path) -> Iterator[tuple[str, str]]:
    """(backend, description) of each package in backends/ that names one."""
    for file in sorted((root / "backends").glob("*/pyproject.toml")):
        project = tomllib.loads(file.read_text())["project"]
        for name in project.get("entry-points", {}).get("tokenplane.backends", {}):
            yield name, project["description"]


def _where_it_has_run(own: dict[str, str], runs: list[Run]) -> Iterator[str]:
    yield from ("## Where it has run", "")
    rows = []
    for name, description in own.items():
        last = max((run for run in runs if run.backend == name), key=lambda run: run.date, default=None)
        rows.append((f"`{name}`", description, f"{last.card}, {last.date}" if last else NOT_YET))
    yield from table(("backend", "what it is", "last run"), rows)


def _runs(runs: list[Run]) -> Iterator[str]:
    for run in sorted(runs, key=lambda run: (run.backend, run.date)):
        yield from (f"### {run.backend}: {run.card}, {run.date}", "")
        yield from (f"Driver: {run.driver}. Command: `{run.command}`", "")
        yield from table(("measured", "result"), run.results.items())
        if run.notes:
            yield from (run.notes, "")


def _conformance(reports: list[Report]) -> Iterator[str]:
    yield from (
        "## Conformance",
        "",
        "`pytest --tokenplane-backend NAME`, one report for each backend. Levels, each with all before it and no law",
        "broken: **basic** serves the right text; **paged** has its KV cache in blocks, with shared prefixes and",
        "preemption; **fast** samples on the device and runs one step ahead. A simulated device shows that the core",
        "can keep to such a card's limits, and nothing about the card; `acme` is the imaginary card of",
        "`examples/acme-backend`.",
        "",
    )
    assert list(LEVELS) == ["basic", "paged", "fast"], "the sentence above names the levels"
    yield from table(
        ("backend", "version", "contract", "level", "laws kept", "device", "model", "date"),
        [
            (
                f"`{r.backend}`",
                f"{r.distribution} {r.version}",
                r.contract,
                r.level,
                f"{sum(law.outcome == 'passed' for law in r.laws)} of {len(r.laws)}",
                r.device.name if r.device else "none found",
                r.model + (f", {r.declared['dtype']}" if r.declared else ""),
                r.date,
            )
            for r in reports
        ],
    )
    yield from ("What they declare:", "")
    yield from table(
        ("backend", "KV cache", "shapes", "mixed steps", "steps ahead", "samples itself"),
        [
            (
                f"`{r.backend}`",
                r.declared["kv"],
                f"{r.declared['shapes']}, {r.declared['num_buckets']} buckets",
                "yes" if r.declared["mixed"] else "no",
                str(r.declared["async_depth"]),
                _features(r.declared["sampling_features"]),
            )
            for r in reports
            if r.declared
        ],
    )
    excused = [(r.backend, law) for r in reports for law in r.laws if law.outcome != "passed"]
    if excused:
        yield from ("Laws that did not apply, or failed:", "")
        yield from table(
            ("backend", "law", "outcome", "why"),
            [(f"`{name}`", f"`{law.law}`", law.outcome, law.reason) for name, law in excused],
        )


def _features(names: list[str]) -> str:
    missing = sorted(SAMPLING_FEATURES - set(names))
    if len(missing) < len(names):
        return f"everything but {', '.join(missing)}" if missing else "everything"
    return ", ".join(names) or "greedy only; the core does the rest"


if __name__ == "__main__":
    write_or_check("hardware.md", page())
