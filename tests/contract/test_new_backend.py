"""`tokenplane new-backend NAME` writes a package that passes the kit as it is, and refuses names that cannot work."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.packages import judged, run_pytest, search_path
from tokenplane_api.new_backend import MAX_NAME_LENGTH, new_backend
from tokenplane_core.backend.errors import ConfigError
from tokenplane_core.backend.records import CONTRACT_VERSION
from tokenplane_core.kit.report import LEVELS, verdict

ROOT = Path(__file__).parents[2]
LONGEST = "a_rather_long_name_x"
CLAIMS = ("kv.kind", "shapes.", "async_depth", "sampling.", "limits.", "prompt_logprobs", "adapters", "max_drafts")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_backend("my_card", tmp_path_factory.mktemp("new"))


def test_the_package_passes_the_kit_at_its_simplest_level(package: Path, tmp_path: Path) -> None:
    report, printed = judged(package, "my_card", tmp_path)
    assert report.level == "basic" == next(iter(LEVELS))
    assert "level basic" in printed
    skipped = [law for law in report.laws if law.outcome == "skipped"]
    assert skipped, "the simplest package cannot do everything"
    assert not [law for law in skipped if not law.reason.startswith(CLAIMS)], "a skip names the missing capability"
    assert (report.backend, report.distribution, report.contract) == ("my_card", "tokenplane-my_card", CONTRACT_VERSION)
    assert report.device is not None and report.device.kind == "my_card"
    assert report.declared["kv"] == "slot" and report.declared["async_depth"] == 0
    said = "\n".join(verdict("acme", report.laws))
    assert said in (ROOT / "docs" / "write-a-backend.md").read_text(), "the tutorial shows another verdict"


def test_the_package_passes_its_own_tests(package: Path, tmp_path: Path) -> None:
    done = run_pytest(search_path(package, tmp_path / "site"), tmp_path, "-W", "error", str(package / "tests"))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["x", "my_card", LONGEST])
def test_the_package_passes_the_linter_whatever_its_name(name: str, tmp_path: Path) -> None:
    folder = new_backend(name, tmp_path)
    ruff = [sys.executable, "-m", "ruff", "check", "--no-cache", "--config", str(ROOT / "pyproject.toml"), str(folder)]
    done = subprocess.run(ruff, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_nothing_of_the_templates_own_name_is_left(package: Path) -> None:
    files = [file for file in package.rglob("*") if file.is_file()]
    assert len(files) > 8
    assert not [file for file in files if re.search("acme", str(file.relative_to(package)) + file.read_text(), re.I)]


def test_the_longest_name_of_the_tests_is_the_longest_allowed() -> None:
    assert len(LONGEST) == MAX_NAME_LENGTH


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("Acme", "small letters"),
        ("my-card", "small letters"),
        ("1st", "a letter first"),
        ("", "small letters"),
        ("../acme", "small letters"),
        (LONGEST + "y", f"at most {MAX_NAME_LENGTH}"),
        ("cuda", "distribution of Tokenplane itself"),
        ("core", "distribution of Tokenplane itself"),
    ],
)
def test_a_name_that_cannot_work_is_refused(name: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=why):
        new_backend(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_name_of_an_installed_backend_is_refused(package: Path, tmp_path: Path) -> None:
    code = "import pathlib, tokenplane_api.new_backend as n; n.new_backend('my_card', pathlib.Path('.'))"
    path = search_path(package, tmp_path / "site")
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": path}, cwd=tmp_path, capture_output=True, text=True
    )
    assert "ConfigError: a backend called 'my_card' is installed already" in done.stderr


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "acme-backend").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        new_backend("acme", tmp_path)
    assert not list((tmp_path / "acme-backend").iterdir())


def test_the_command_says_what_to_do_next(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tokenplane_api.cli", "new-backend", "acme", "--path", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pytest --tokenplane-backend acme" in done.stdout
    again = subprocess.run(command, capture_output=True, text=True)
    assert (again.returncode, again.stderr.count("\n")) == (1, 1) and "exists already" in again.stderr
