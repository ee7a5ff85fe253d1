"""docs/hardware.md is what its sources make, and its sources are fit to be published."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tokenplane_core.kit.report import read_report

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "hardware_page.py"
PAGE = ROOT / "docs" / "hardware.md"
REPORTS = sorted((ROOT / "docs" / "reports").glob("*.json"))
RUNS = sorted((ROOT / "docs" / "hardware-runs").glob("*.json"))
ACCELERATORS = ("cuda", "rocm", "xpu", "tpu", "gaudi", "neuron")


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=60)


def test_an_unknown_option_is_refused() -> None:
    assert "there is --check" in run_script("--chek").stderr


@pytest.mark.parametrize("backend", ACCELERATORS)
def test_a_card_that_nothing_was_run_on_is_said_to_be_untried(backend: str) -> None:
    (row,) = re.findall(rf"^\| `{backend}` \|.*\| ([^|]+) \|$", PAGE.read_text().split("## Conformance")[0], re.M)
    was_run = any(json.loads(run.read_text())["backend"] == backend for run in RUNS)
    assert (row == "not yet run on hardware") is not was_run


@pytest.mark.parametrize("file", REPORTS, ids=lambda file: file.stem)
def test_a_stored_report_names_its_backend_and_has_no_law_broken(file: Path) -> None:
    report = read_report(file)
    assert report.backend == file.stem
    assert not [law.law for law in report.laws if law.outcome == "failed"]


@pytest.mark.parametrize("file", [*REPORTS, *RUNS, PAGE], ids=lambda file: file.name)
def test_nothing_published_names_a_folder_of_the_machine_it_was_made_on(file: Path) -> None:
    assert not re.findall(r"(?<![\w.])/(?:tmp|home|root|Users|work|opt|mnt)\b\S*", file.read_text())


@pytest.mark.parametrize("file", RUNS, ids=lambda file: file.name)
def test_a_run_is_filed_under_its_day_and_backend(file: Path) -> None:
    run = json.loads(file.read_text())
    assert file.name.startswith(f"{run['date']}-{run['backend']}-")
