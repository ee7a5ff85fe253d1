"""`scripts/gpu_check` on the one device that every machine has."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_check"


def gpu_check(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, timeout=300)


def test_a_section_reports_its_facts_and_what_they_hold_for(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    done = gpu_check("--backend", "cpu", "--sections", "ceilings", "--rounds", "1", "--out", str(out))
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(out.read_text())
    assert report["status"] == "found" and report["device"] and report["libraries"]["torch"]
    assert report["command"].startswith("scripts/gpu_check --backend cpu --sections ceilings")
    section = report["sections"]["ceilings"]
    assert section["status"] == "ok" and section["facts"]["copy_gb_s"] > 0
    for requests in ("one request", "all requests"):
        facts = section["facts"][requests]
        # A small model in a cache beats the memory, and native products those of torch that the fractions are of.
        assert facts["decode_fraction_of_bandwidth"] > 0 and facts["prefill_fraction_of_compute"] > 0


def test_a_section_that_does_not_end_is_a_failure_of_that_section_alone() -> None:
    done = gpu_check("--backend", "cpu", "--sections", "kit,kernels", "--limit-s", "0.2")
    assert done.returncode == 1
    sections = json.loads(done.stdout)["sections"]
    assert {section["reason"] for section in sections.values()} == {"not done after 0.2 s (--limit-s)"}
    assert list(sections) == ["kit", "kernels"]


def test_what_is_not_there_is_named() -> None:
    unknown = gpu_check("--backend", "cpu", "--sections", "kit,speeed")
    assert unknown.returncode == 2 and "there is no 'speeed'; there are kit, kernels, models" in unknown.stderr
    missing = gpu_check("--backend", "no-such-card")
    assert missing.returncode == 1 and "no-such-card" in missing.stderr and "Traceback" not in missing.stderr
