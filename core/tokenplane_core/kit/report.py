"""The kit's verdict on a backend: which laws it kept, which level that makes; as JSON, and as lines for a terminal.

Levels, each with all that comes before it, and none with a law broken:

    basic   right text in every batch, order and neighbourhood, every draw by the published law: it can be served
    paged   KV cache in blocks: prompts in chunks, shared prefixes, preemption
    fast    samples on the device, and takes the next step before the last one is read back
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import msgspec

from .. import __version__
from ..backend.plugins import PluginAnswer
from ..backend.records import CONTRACT_VERSION, Capabilities, Device

FORMAT = 1
"""Number of this file format; it grows when a reader of old reports would misread new ones."""

LEVELS: dict[str, tuple[str, ...]] = {
    # Laws that must hold, and not merely be skipped.
    "basic": (
        "detect_is_quick_and_clear",
        "import_is_clean",
        "capabilities_are_honest",
        "batch_equals_singles",
        "decode_equals_prefill",
        "slot_reuse_leaks_nothing",
        "neighbours_do_not_disturb",
        "seed_means_the_same_everywhere",
        "filters_bite",
        "close_twice_is_fine",
    ),
    "paged": ("chunked_prefill_equals_whole", "prefix_hit_equals_recompute", "preempted_equals_uninterrupted"),
    "fast": ("declared_features_act", "async_depth_changes_nothing"),
}


class LawResult(msgspec.Struct, frozen=True, omit_defaults=True):
    law: str
    outcome: Literal["passed", "failed", "skipped"]
    duration_s: float
    reason: str = ""  # why it failed, or which capability was not declared


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What `pytest --tokenplane-backend NAME --tokenplane-report FILE` writes. Holds no paths of the machine."""

    format: int = FORMAT
    date: str  # ISO, UTC
    backend: str
    distribution: str
    version: str
    contract: str  # that the plugin was written for
    core_version: str
    core_contract: str
    python: str
    platform: str
    device: Device | None  # as detected, but nameless (no uuid); None if it was not
    libraries: dict[str, str]  # what the distribution requires -> version installed
    model: str
    declared: dict[str, Any]  # the facts of Capabilities that laws are about; empty if load() never returned
    level: str  # a key of LEVELS, or "none"
    duration_s: float
    laws: list[LawResult]


def make_report(answer: PluginAnswer, model: str, declared: Mapping[str, Any], laws: Iterable[LawResult]) -> Report:
    """The report on one backend, for laws that have just run."""
    laws = list(laws)
    return Report(
        date=datetime.now(UTC).date().isoformat(),
        backend=answer.name,
        distribution=answer.distribution,
        version=answer.version,
        contract=answer.contract,
        core_version=__version__,
        core_contract=CONTRACT_VERSION,
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        device=replace(answer.report.devices[0], uuid="") if answer.report.devices else None,
        libraries=dict(sorted(_libraries(answer.distribution))),
        model=model,
        declared=dict(declared),
        level=level_of(laws),
        duration_s=round(sum(law.duration_s for law in laws), 1),
        laws=laws,
    )


def write_report(report: Report, file: Path) -> None:
    file.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")


def read_report(file: Path) -> Report:
    """Raises msgspec.ValidationError if the file is not a report of this format."""
    report = msgspec.json.decode(file.read_bytes(), type=Report)
    if report.format != FORMAT:
        raise msgspec.ValidationError(f"{file.name} has report format {report.format}, this kit reads {FORMAT}")
    return report


def level_of(laws: Iterable[LawResult]) -> str:
    """The highest level whose laws, and those of all levels below, have passed; "none" if any law failed."""
    outcomes = {law.law: law.outcome for law in laws}
    reached = "none"
    if "failed" in outcomes.values():
        return reached
    for level, needed in LEVELS.items():
        if any(outcomes.get(law) != "passed" for law in needed):
            break
        reached = level
    return reached


def verdict(name: str, laws: Iterable[LawResult]) -> list[str]:
    """What a person should read after a run: the counts, the level, and what the next level takes."""
    results = {law.law: law for law in laws}
    counts = {o: sum(r.outcome == o for r in results.values()) for o in ("passed", "failed", "skipped")}
    level = level_of(results.values())
    said = ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)
    lines = [f"{name}: {said}; level {level}"]
    if counts["failed"]:
        return [*lines, *(f"  broken: {r.law}" for r in results.values() if r.outcome == "failed")]
    higher = list(LEVELS)[list(LEVELS).index(level) + 1 :] if level != "none" else list(LEVELS)
    for law in LEVELS[higher[0]] if higher else ():
        result = results.get(law)
        if result is None or result.outcome != "passed":
            lines.append(f"  for level {higher[0]}: {law} ({result.reason if result else 'has not run'})")
    return lines


def declared_facts(caps: Capabilities) -> dict[str, Any]:
    """What a backend declared, apart from names and sizes: the claims that laws are about."""
    return {
        "dtype": caps.dtype,
        "kv": caps.kv.kind,
        "shapes": caps.shapes.mode,
        "num_buckets": len(caps.shapes.buckets),
        "mixed": caps.mixed,
        "async_depth": caps.async_depth,
        "sampling_features": sorted(caps.sampling.features),
        "returns_logits": caps.sampling.returns_logits,
        "prompt_logprobs": caps.prompt_logprobs,
        "prompt_top_logprobs": caps.prompt_top_logprobs,
        "kernels": dict(caps.kernels),
    }


def without_paths(text: str) -> str:
    """The text with absolute paths cut to their last part: a report is to be published."""
    return re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+", "", text)


def _libraries(distribution: str) -> Iterator[tuple[str, str]]:
    """What a distribution requires, and through other Tokenplane distributions, with the versions installed."""
    try:
        requirements = importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return
    for requirement in requirements:
        name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        if "extra ==" in requirement:
            continue
        if name.startswith("tokenplane-"):
            yield from _libraries(name)
            continue
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # required on other platforms only
