"""examples/acme-backend, the package that vendors copy from, keeps every law there is and passes its own tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.packages import judged, run_pytest, search_path
from tokenplane_core.backend.records import CONTRACT_VERSION
from tokenplane_core.kit.laws import LAWS
from tokenplane_core.kit.report import Report

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "acme-backend"
TEMPLATE = ROOT / "core" / "tokenplane_core" / "kit" / "template"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return judged(EXAMPLE, "acme", tmp_path_factory.mktemp("example"))[0]


def test_it_keeps_every_law_but_those_of_claims_that_it_does_not_make(report: Report) -> None:
    unclaimed = ("prompt_logprobs_", "prompt_top_", "adapters_", "speculation_")
    expected = {law: "skipped" if law.startswith(unclaimed) else "passed" for law in LAWS}
    assert {law.law: law.outcome for law in report.laws} == expected
    assert report.level == "fast"


def test_it_is_written_for_the_contract_of_today(report: Report) -> None:
    assert report.contract == CONTRACT_VERSION


def test_it_passes_its_own_tests(tmp_path: Path) -> None:
    path = search_path(EXAMPLE, tmp_path / "site")
    done = run_pytest(path, tmp_path, "-W", "error", str(EXAMPLE / "tests"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_is_the_template_grown_up() -> None:
    """The same files, so that whoever knows one finds their way in the other; what did not have to change did not."""
    files = {file.relative_to(TEMPLATE) for file in TEMPLATE.rglob("*") if file.is_file() and file.suffix != ".pyc"}
    assert files, "the template is gone"
    missing = sorted(str(file) for file in files if not (EXAMPLE / file).is_file())
    assert not missing
    loader = Path("tokenplane_acme/loader.py")
    assert (EXAMPLE / loader).read_text() == (TEMPLATE / loader).read_text()
