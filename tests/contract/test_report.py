"""The kit's verdict: what a run writes, which level it comes to, and that nothing of the machine is in it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from helpers.packages import run_pytest
from tokenplane_core.kit.laws import LAWS
from tokenplane_core.kit.report import LEVELS, LawResult, level_of, read_report, verdict, without_paths

ALL = [law for laws in LEVELS.values() for law in laws]

PLUGIN = """
from tokenplane_core.backend.hookspecs import hookimpl
from tokenplane_core.backend.records import DetectReport
from tokenplane_core.kit.simulated import SimulatedCuda

class Plugin(SimulatedCuda):
    @hookimpl
    def {hook}:
        {body}
"""


def run_kit_on(folder: Path, hook: str, body: str, *arguments: str) -> tuple[subprocess.CompletedProcess[str], Path]:
    """The kit on a plugin with one hook replaced; what pytest said, and the report's file."""
    (folder / "plugin_under_test.py").write_text(PLUGIN.format(hook=hook, body=body))
    info = folder / "tokenplane_faulty-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tokenplane-faulty\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[tokenplane.backends]\nfaulty = plugin_under_test:Plugin\n")
    file = folder / "report.json"
    options = ("--tokenplane-backend", "faulty", "--tokenplane-report", str(file), "--tb=no")
    return run_pytest(str(folder), folder, *options, *arguments), file


def results(**outcomes: str) -> list[LawResult]:
    """Every law of every level passed, but for those named."""
    return [LawResult(law, outcomes.get(law, "passed"), 0.1, "because") for law in ALL]  # type: ignore[arg-type]


def test_levels_name_laws_that_exist_each_once() -> None:
    assert set(ALL) <= LAWS.keys() and len(ALL) == len(set(ALL))


def test_a_level_needs_every_law_of_its_own_and_of_those_below() -> None:
    assert level_of(results()) == "fast"
    assert level_of(results(async_depth_changes_nothing="skipped")) == "paged"
    assert level_of(results(prefix_hit_equals_recompute="skipped")) == "basic"
    assert level_of(results(filters_bite="skipped")) == "none"
    assert level_of(results()[1:]) == "none", "a law that was not run has not been kept"
    assert level_of([]) == "none"


def test_a_broken_law_leaves_no_level_wherever_it_belongs() -> None:
    assert level_of(results(declared_features_act="failed")) == "none"
    assert level_of([*results(), LawResult("a_law_of_no_level", "failed", 0.1)]) == "none"


def test_the_verdict_names_what_the_next_level_takes() -> None:
    first, *rest = verdict("acme", results(prefix_hit_equals_recompute="skipped"))
    assert first == f"acme: {len(ALL) - 1} passed, 1 skipped; level basic"
    assert rest == ["  for level paged: prefix_hit_equals_recompute (because)"]
    assert verdict("acme", results(filters_bite="failed"))[1:] == ["  broken: filters_bite"]
    assert len(verdict("acme", results())) == 1


def test_paths_are_cut_to_their_last_part() -> None:
    assert without_paths("cannot open /opt/acme/lib/kernel.bin: 3/4 of a/b") == "cannot open kernel.bin: 3/4 of a/b"


def test_a_backend_that_breaks_laws_gets_a_report_that_says_so(tmp_path: Path) -> None:
    fault = "raise RuntimeError('cannot open /opt/acme/lib/kernel.bin')"
    done, file = run_kit_on(tmp_path, "decode(self, batch, sampling)", fault)
    assert done.returncode == 1
    report = read_report(file)
    assert (report.level, report.distribution, report.version) == ("none", "tokenplane-faulty", "1.2")
    failed = {law.law: law.reason for law in report.laws if law.outcome == "failed"}
    assert failed["batch_equals_singles"] == "RuntimeError: cannot open kernel.bin"
    assert "level none" in done.stdout and "broken: batch_equals_singles" in done.stdout
    assert {law.law for law in report.laws} == set(LAWS)
    assert report.declared["kv"] == "paged" and report.libraries == {}
    assert not re.search(r"/tmp|/home|/root|/opt|" + re.escape(str(tmp_path)), file.read_text())


def test_a_card_is_not_named_in_a_report_that_is_to_be_published(tmp_path: Path) -> None:
    body = "return DetectReport('found', (__import__('dataclasses').replace(self._device(), uuid='GPU-1234'),))"
    _, file = run_kit_on(tmp_path, "detect(self)", body, "-k", "detect_is_quick")
    device = read_report(file).device
    assert device is not None and device.kind == "simulated"
    assert "GPU-1234" not in file.read_text()


def test_a_backend_that_is_absent_fails_every_law_for_its_own_reason(tmp_path: Path) -> None:
    _, file = run_kit_on(tmp_path, "detect(self)", "return DetectReport('absent', reason='no card on the bus')")
    report = read_report(file)
    assert report.level == "none" and report.device is None and report.declared == {}
    assert {law.outcome for law in report.laws} == {"failed"}
    assert all("faulty is absent: no card on the bus" in law.reason for law in report.laws)


@pytest.mark.parametrize("backends", [(), ("simulated-cuda", "simulated-tpu")])
def test_a_report_is_about_one_backend(backends: tuple[str, ...], tmp_path: Path) -> None:
    named = [argument for backend in backends for argument in ("--tokenplane-backend", backend)]
    done = run_pytest("", tmp_path, *named, "--tokenplane-report", "report.json")
    assert done.returncode == 4 and "--tokenplane-report holds one backend" in done.stderr
    assert not (tmp_path / "report.json").exists()
